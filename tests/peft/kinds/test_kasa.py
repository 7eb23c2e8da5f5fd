"""KaSA: a truncated base, and a diagonal between A and B."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from flora._peft.kinds.kasa import KaSA
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, D, F, X, fn, params, up_adapters, values

E = {f"{PREFIX}layers.{i}.up.lora_diag": values(2, seed=60 + i) for i in range(2)}


def saved(folder, held=None, **config):
    config = {"kasa_config": {"beta": 1e-3, "gamma": 1e-2}} | config
    return files.write(folder, held or up_adapters() | E, **config)


def wanted():
    tree, held = params(), up_adapters()
    for i in range(2):
        own = tree["layers"][str(i)]["up"]
        u, s, v = np.linalg.svd(np.asarray(own["kernel"], np.float64), False)
        a = held[f"{PREFIX}layers.{i}.up.lora_A.weight"]
        b = held[f"{PREFIX}layers.{i}.up.lora_B.weight"]
        e = E[f"{PREFIX}layers.{i}.up.lora_diag"]
        kept = (u[:, : D - 2] * s[: D - 2]) @ v[: D - 2]
        own["kernel"] = jnp.asarray(kept + 3.0 * ((b * e) @ a).T, jnp.float32)
    return tree


def test_products_and_merged_weights(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    np.testing.assert_allclose(flora.lora(fn)(loaded, X), fn(wanted(), X), rtol=2e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        flora.merge(loaded),
        wanted(),
    )


@pytest.mark.parametrize("base", [None, "plain"])
def test_what_was_loaded_is_written_again(tmp_path, base):
    """With `base=` too: PEFT truncates it anew."""
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    flora.peft.save(tmp_path / "b", loaded, base=params() if base else None)
    config, held = files.read(tmp_path / "b")
    assert config["kasa_config"] == {"beta": 1e-3, "gamma": 1e-2}
    assert {*held} == {*up_adapters(), *E}
    for key, x in (up_adapters() | E).items():
        np.testing.assert_array_equal(held[key], x)


def test_what_does_not_fit(tmp_path):
    with pytest.raises(flora.LoraError, match="lora_diag' is missing"):
        flora.peft.load(saved(tmp_path / "a", up_adapters()), params())
    with pytest.raises(flora.LoraError, match="lora_diag' is there"):
        flora.peft.load(saved(tmp_path / "b", kasa_config=None), params())
    short = up_adapters() | {k: v[:1] for k, v in E.items()}
    with pytest.raises(flora.LoraError, match=r"has shape \(1,\); expected \(2,\)"):
        flora.peft.load(saved(tmp_path / "c", short), params())
    held = up_adapters(4) | {k: values(4) for k in E}
    with pytest.raises(flora.LoraError, match="takes 4 singular values"):
        flora.peft.load(saved(tmp_path / "d", held, r=4), params())
    abstract = jax.eval_shape(params)
    with pytest.raises(flora.LoraError, match="and KaSA\\) changed the base"):
        flora.peft.load(saved(tmp_path / "e"), abstract)
    assert D < F


def test_what_cannot_be_done_with_it(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    with pytest.raises(flora.LoraError, match="truncated"):
        flora.peft.save(tmp_path / "b", loaded, serving=True)
    node = loaded["layers"]["1"]["up"]["kernel"]
    loaded["layers"]["1"]["up"]["kernel"] = dataclasses.replace(node, variant=KaSA())
    with pytest.raises(flora.LoraError, match="of other beta and gamma"):
        flora.peft.save(tmp_path / "b", loaded)
    config = flora.LoraConfig(rank=2, target="up/kernel", variant=KaSA())
    with pytest.raises(flora.LoraError, match="Start it in PEFT"):
        flora.init(jax.random.key(0), config, fn, params(), X)
