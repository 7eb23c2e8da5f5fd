"""Layers that PEFT repeats, each time with factors of their own."""

import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import D, F, X, linear, params

SPANS = [[0, 2], [1, 2]]  # layers 0, 1, 1


def repeated():
    tree = params()
    tree["layers"]["2"] = tree["layers"]["1"]
    return tree


def fn(p, x):
    for i in "012":
        q = p["layers"][i]
        h = jnp.tanh(x @ q["up"]["kernel"] + q["up"]["bias"])
        x = x + h @ q["down"]["kernel"] + q["down"]["bias"]
    return x


def tensors():
    found = {}
    for i in range(3):
        found |= linear(f"layers.{i}.up", D, F, seed=10 * i)
    return found


def saved(folder, **config):
    return files.write(folder, tensors(), **{"layer_replication": SPANS} | config)


def test_each_copy_has_its_own_factors(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), repeated())
    tree = repeated()
    for i in range(3):
        layer = tree["layers"][str(i)]
        change = files.delta(tensors(), f"layers.{i}.up", 3.0)
        up = {**layer["up"], "kernel": layer["up"]["kernel"] + change}
        tree["layers"][str(i)] = {**layer, "up": up}
    np.testing.assert_allclose(flora.lora(fn)(loaded, X), fn(tree, X), rtol=1e-4)
    flora.peft.save(tmp_path / "b", loaded)  # as it came
    config, held = files.read(tmp_path / "b")
    assert config["layer_replication"] == SPANS
    assert {*held} == {*tensors()}
    flora.peft.save(tmp_path / "d", loaded, layer_replication=())
    assert files.read(tmp_path / "d")[0]["layer_replication"] is None
    flora.peft.save(tmp_path / "c", flora.split(loaded)[1], layer_replication=SPANS)
    assert files.read(tmp_path / "c")[0] == config


def test_layers_in_one_leaf(tmp_path):
    layers = repeated()["layers"]
    stack = {
        "up": {
            name: jnp.stack([layers[i]["up"][name] for i in "012"])
            for name in ("kernel", "bias")
        }
    }
    names = {"up": "layers.{i}.up"}
    flora.peft.load(saved(tmp_path / "a"), stack, names=names)
    stack["up"]["kernel"] = stack["up"]["kernel"].at[2].add(1)
    with pytest.raises(flora.LoraError, match="their values differ"):
        flora.peft.load(tmp_path / "a", stack, names=names)


def test_trees_that_are_other_layers(tmp_path):
    with pytest.raises(flora.LoraError, match=r"no layer 2.*are \[0, 1, 1\] of"):
        flora.peft.load(saved(tmp_path / "a"), params())
    tree = repeated()
    tree["layers"]["2"] = tree["layers"]["0"]
    with pytest.raises(flora.LoraError, match="are layer 1 of the base"):
        flora.peft.load(tmp_path / "a", tree)
    tree = repeated()
    tree["layers"]["3"] = tree["layers"]["0"]
    with pytest.raises(flora.LoraError, match="one more"):
        flora.peft.load(tmp_path / "a", tree)
    with pytest.raises(flora.LoraError, match="layer_replication is"):
        flora.peft.load(saved(tmp_path / "b", layer_replication=[[2, 1]]), repeated())


def test_saves_that_do_not_fit(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), repeated())
    for spans, text in (
        ([[0, 2]], "one more"),
        ([0, 2], "Write ranges"),
        ([[0, 1], [0, 2]], "their values differ"),
    ):
        with pytest.raises(flora.LoraError, match=text):
            flora.peft.save(tmp_path / "b", loaded, layer_replication=spans)
    with pytest.raises(flora.LoraError, match="do not serve"):
        flora.peft.save(tmp_path / "b", loaded, layer_replication=SPANS, serving=True)
