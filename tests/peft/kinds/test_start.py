"""Starts that take a part of W out of the base: files that mean the same, or none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
import flora.peft
import flora.quantize
import flora.starts
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, D, F, X, fn, linear, params, up_adapters

CONFIG = flora.LoraConfig(rank=2, alpha=6, target="up/kernel")


def adapted():
    return flora.init(jax.random.key(0), CONFIG, fn, params(), X)


def gradients(tree):
    return flora.starts.base_gradients(lambda p, x: (fn(p, x) ** 2).sum(), tree, X)


STARTS = {
    "flora.starts.pissa": flora.starts.pissa,
    "flora.starts.olora": flora.starts.olora,
    "flora.starts.lora_ga": lambda t: flora.starts.lora_ga(t, gradients(t)),
}


def trained(tree):
    """With other factors than it started from."""
    return jax.tree.map(
        lambda w: (
            dataclasses.replace(w, a=w.a + 0.1, b=1.5 * w.b)
            if isinstance(w, flora.LoraWeight)
            else w
        ),
        tree,
        is_leaf=lambda x: isinstance(x, flora.LoraWeight),
    )


def out(tree):
    return np.asarray(flora.lora(fn)(tree, X), np.float64)


def close(got, want, tolerance=1e-5):
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", STARTS)
def test_a_changed_base_is_no_plain_file(tmp_path, name):
    start = STARTS[name](adapted())
    tree = trained(start)
    with pytest.raises(flora.LoraError, match=f"was started by {name}") as caught:
        flora.peft.save(tmp_path / "x", tree)
    for part in ("2 problems", "'layers/1/up/kernel'", "base=", "flora.starts.to_plai"):
        assert part in str(caught.value)
    assert not (tmp_path / "x").exists()
    with pytest.raises(flora.LoraError, match=f"was started by {name}"):
        flora.peft.save(tmp_path / "x", flora.split(tree)[1])
    want = out(tree)
    flora.peft.save(tmp_path / "base", tree, base=params())
    close(out(flora.peft.load(tmp_path / "base", params())), want)
    flora.peft.save(tmp_path / "plain", flora.starts.to_plain(tree, start, params()))
    close(out(flora.peft.load(tmp_path / "plain", params())), want)
    flora.peft.save(tmp_path / "own", tree, base=flora.split(tree)[0])
    close(out(flora.peft.load(tmp_path / "own", flora.split(tree)[0])), want)


def test_a_quantized_base_is_named_too(tmp_path):
    tree = flora.init(
        jax.random.key(0), flora.LoraConfig(rank=2),
        lambda p, x: x @ p["up"]["kernel"], {"up": {"kernel": jnp.ones((64, 64))}},
        jnp.ones((2, 64)),
    )  # fmt: skip
    tree = flora.quantize.loftq(tree, "int8")
    with pytest.raises(flora.LoraError, match=r"was started by flora\.quantize\.loftq"):
        flora.peft.save(tmp_path / "x", tree)
    flora.peft.save(tmp_path / "x", tree, base=flora.split(tree)[0])


def test_the_start_is_kept_by_training_and_by_files(tmp_path):
    tree = flora.starts.pissa(adapted())
    grads = jax.jit(
        jax.grad(lambda t: (flora.lora(fn)(t, X) ** 2).sum(), allow_int=True)
    )
    stepped = jax.tree.map(lambda w, g: w - 0.01 * g, tree, grads(tree))
    flora.save(tmp_path / "a.flora", stepped)
    base = flora.split(stepped)[0]
    for kept in (stepped, flora.load(tmp_path / "a.flora", base)):
        with pytest.raises(flora.LoraError, match=r"was started by flora\.starts"):
            flora.peft.save(tmp_path / "x", kept)


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_peft_started_is_written_as_it_came(tmp_path, how, stacked):
    """With ranks and scales of their own in one leaf."""
    held = linear("layers.0.up", D, F, 3) | linear("layers.1.up", D, F, 2, seed=20)
    config = {"init_lora_weights": how, "rank_pattern": {"layers.0.up": 3}}
    folder = files.write(tmp_path / "x", held, **config)
    base = params()
    if stacked:
        base["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *base["layers"].values())
    loaded = flora.peft.load(folder, base)
    names = {"layers/up": "layers.{i}.up"} if stacked else None
    flora.peft.save(tmp_path / "y", loaded, names=names)
    config, tensors = files.read(tmp_path / "y")
    assert config["init_lora_weights"] == how
    assert {k: x.tolist() for k, x in tensors.items()} == {
        k: x.tolist() for k, x in held.items()
    }
    again = flora.peft.load(tmp_path / "y", base)
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
    flora.peft.save(tmp_path / "plain", loaded, base=base, names=names)
    assert files.read(tmp_path / "plain")[0]["init_lora_weights"] is True
    plain = flora.merge(flora.peft.load(tmp_path / "plain", base))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        plain,
        flora.merge(loaded),
    )
    with pytest.raises(flora.LoraError, match=rf"by PEFT's {how} of rank 2 and scale"):
        flora.peft.save(tmp_path / "z", loaded, serving=True, names=names)


def test_what_peft_started_and_something_changed_is_refused(tmp_path):
    folder = files.write(tmp_path / "x", up_adapters(), init_lora_weights="pissa")
    loaded = flora.peft.load(folder, params())
    adapter = flora.split(loaded)[1]
    mixed = flora.multi.combine([adapter, adapter], [0.5, 0.5]).adapter
    other = dict(loaded, layers=dict(loaded["layers"]))
    other["layers"]["1"] = flora.peft.load(
        files.write(tmp_path / "y", up_adapters()), params()
    )["layers"]["1"]
    for tree in (mixed, flora.starts.pissa(loaded), other):
        with pytest.raises(flora.LoraError, match="was started by"):
            flora.peft.save(tmp_path / "z", tree)


def test_embeddings_start_as_plain_lora(tmp_path):
    held = linear("layers.0.up", D, F) | {
        f"{PREFIX}table.lora_embedding_A": files.values(2, 9),
        f"{PREFIX}table.lora_embedding_B": files.values(D, 2),
    }
    config = {"target_modules": ["layers.0.up", "table"], "init_lora_weights": "olora"}
    folder = files.write(tmp_path / "x", held, task_type="FEATURE_EXTRACTION", **config)
    base = params() | {"table": {"embedding": jnp.asarray(files.values(9, D))}}
    loaded = flora.peft.load(folder, base)
    assert loaded["table"]["embedding"].start == ""
    flora.peft.save(tmp_path / "y", loaded, tied={})
    assert files.read(tmp_path / "y")[0]["init_lora_weights"] == "olora"
