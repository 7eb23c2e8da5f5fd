"""`lora_bias`: scale c beside a bias of the base, or where it has none."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import (
    PREFIX,
    D,
    F,
    X,
    delta,
    fn,
    params,
    up_adapters,
    values,
)

BIASES = {f"layers.{i}.up": values(F, seed=40 + i) / 9 for i in range(2)}


def tensors():
    added = {f"{PREFIX}{m}.lora_B.bias": c for m, c in BIASES.items()}
    return up_adapters() | added


def saved(folder):
    return files.write(folder, tensors(), lora_bias=True)


def wanted():
    """The base with scale B A and scale c in it."""
    tree = params()
    for i, c in enumerate(BIASES.values()):
        up = tree["layers"][str(i)]["up"]
        up["kernel"] = up["kernel"] + delta(tensors(), f"layers.{i}.up", 3.0)
        up["bias"] = up["bias"] + 3.0 * c
    return tree


def without_biases(p, x):
    """The function, of a tree whose `up` has no bias."""
    for i, c in enumerate(BIASES.values()):
        up = p["layers"][str(i)]["up"]
        p = {**p, "layers": {**p["layers"], str(i): {**p["layers"][str(i)]}}}
        p["layers"][str(i)]["up"] = {"bias": jnp.zeros_like(c), **up}
    return fn(p, x)


def bare():
    tree = params()
    for i in "01":
        del tree["layers"][i]["up"]["bias"]
    return tree


def test_it_is_a_change_of_the_bias_that_merges(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    merged = flora.merge(loaded)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5), merged, wanted())
    np.testing.assert_allclose(flora.lora(fn)(loaded, X), fn(wanted(), X), rtol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
def test_what_was_loaded_is_written_again(tmp_path, with_bias):
    loaded = flora.peft.load(saved(tmp_path / "a"), params() if with_bias else bare())
    flora.peft.save(tmp_path / "b", loaded)
    config, held = files.read(tmp_path / "b")
    assert config["lora_bias"] is True
    assert {*held} == {*tensors()}
    for key, x in tensors().items():
        np.testing.assert_array_equal(held[key], x)


def test_a_module_without_a_bias_adds_it_and_refuses_to_merge(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), bare())
    tree = wanted()
    for i in "01":
        up = tree["layers"][i]["up"]
        up["bias"] = up["bias"] - params()["layers"][i]["up"]["bias"]
    got = flora.lora(without_biases)(loaded, X)
    np.testing.assert_allclose(got, fn(tree, X), rtol=1e-4)
    with pytest.raises(flora.LoraError, match="layers/0/up/kernel"):
        flora.merge(loaded)


@pytest.mark.parametrize("with_bias", [True, False])
def test_it_trains_by_its_own_gradient(tmp_path, with_bias):
    """dL/dc is scale dL/dbias, and the bias of the base stays as it is."""
    base, run = (params(), fn) if with_bias else (bare(), without_biases)
    loaded = flora.peft.load(saved(tmp_path / "a"), base)
    _, grads = flora.value_and_grad(lambda t: (flora.lora(run)(t, X) ** 2).sum())(
        loaded
    )
    flora.peft.save(tmp_path / "grads", grads)
    tree = wanted()
    if not with_bias:
        for i in "01":
            up = tree["layers"][i]["up"]
            up["bias"] = up["bias"] - params()["layers"][i]["up"]["bias"]
    whole = jax.grad(lambda t: (fn(t, X) ** 2).sum())(tree)
    for i in range(2):
        got = files.read(tmp_path / "grads")[1][f"{PREFIX}layers.{i}.up.lora_B.bias"]
        want = 3.0 * whole["layers"][str(i)]["up"]["bias"]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    tx = flora.optimizer(optax.adamw(0.1, weight_decay=0.5), loaded)
    updates, _ = tx.update(grads, tx.init(loaded), loaded)
    after = optax.apply_updates(loaded, updates)
    for old, new in zip(*map(jax.tree.leaves, (loaded, after)), strict=True):
        assert old.shape == new.shape
    left, _ = flora.split(after)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(left),
        jax.tree.leaves(flora.split(loaded)[0]),
    )


def test_one_that_does_not_fit_is_named(tmp_path):
    for n, shape in enumerate([(F + 1,), (F, 1), (1,)]):
        held = tensors() | {f"{PREFIX}layers.1.up.lora_B.bias": values(*shape)}
        folder = files.write(tmp_path / f"a{n}", held, lora_bias=True)
        match = re.escape(f".1.up.lora_B.bias' has shape {shape}; expected ({F},)")
        with pytest.raises(flora.LoraError, match=match):
            flora.peft.load(folder, params())
    folder = files.write(tmp_path / "b", tensors(), lora_bias=True, use_dora=True)
    with pytest.raises(flora.LoraError, match="lora_bias and use_dora"):
        flora.peft.load(folder, params())


def test_servers_refuse_it(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    with pytest.raises(flora.LoraError, match=r"'layers\.0\.up' has a lora_bias"):
        flora.peft.save(tmp_path / "b", loaded, serving=True)


def test_a_bias_without_its_module_has_no_place(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    up = loaded["layers"]["1"]["up"]
    up["kernel"] = up["kernel"].base
    with pytest.raises(flora.LoraError, match=r"bias of 'layers\.1\.up' is changed"):
        flora.peft.save(tmp_path / "b", loaded)


def test_modules_without_one_get_zeros(tmp_path):
    """PEFT has a bias of all modules or of none."""
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    up = loaded["layers"]["1"]["up"]
    up["bias"] = up["bias"].base
    flora.peft.save(tmp_path / "b", loaded)
    held = files.read(tmp_path / "b")[1]
    np.testing.assert_array_equal(held[f"{PREFIX}layers.1.up.lora_B.bias"], np.zeros(F))
    assert D != F
