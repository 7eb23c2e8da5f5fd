"""Nodes in the hands of `flax.serialization` and `jax.export`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax import export

import flora
import flora.quantize
from flora._files.nodes import _static_of_weight
from flora._files.records import static_of_json
from tests.support import contract
from tests.support.contract import array

X = array(2, 8, dtype=jnp.float32)


def fn(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def adapted(qtype=None, **config):
    params = {"w": array(8, 8, dtype=jnp.float32), "b": jnp.ones(8),
              "v": array(8, 4, seed=1, dtype=jnp.float32)}  # fmt: skip
    if qtype:
        params = flora.quantize.quantize(params, qtype, target="w", block=4)
    settings = {"target": ["w", "v"], "train": "b"} | config
    return contract.randomized(contract.adapt(fn, params, X, **settings))


TREES = {
    "adapted": adapted,
    "DoRA": lambda: adapted(variant=flora.variants.DoRA()),
    "base": lambda: flora.split(adapted("int8"))[0],
    "adapter": lambda: flora.split(adapted())[1],
    "optimizer": lambda: flora.optimizer(optax.adamw(0.1), adapted()).init(adapted()),
    "state": lambda: TrainState.create(
        apply_fn=None, params=adapted("nf4"),
        tx=flora.optimizer(optax.adam(0.1), adapted("nf4"))),
} | {q: lambda q=q: adapted(q) for q in flora.quantize.QTYPES}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_flax_writes_a_tree_and_restores_it(name):
    tree = TREES[name]()
    target = jax.tree.map(jnp.zeros_like, tree)
    again = serialization.from_bytes(target, serialization.to_bytes(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.array_equal(x, y)


def test_the_state_is_a_dict_of_arrays_without_the_keys_of_a_step():
    tree = flora.with_dropout(adapted(dropout=0.5), jax.random.key(0))
    state = serialization.to_state_dict(tree)
    assert set(state["w"]) == {"base", "a", "b", "scale"}
    assert state["w"]["a"] is tree["w"].a
    assert state["b"] == {"value": tree["b"].value}
    assert serialization.from_state_dict(tree, state)["w"].key is tree["w"].key
    raw = serialization.msgpack_restore(serialization.to_bytes(adapted("int8")))
    assert set(raw["w"]["base"]) == {"qvalue", "scale"}


REFUSED = {
    "scale": (adapted, lambda: adapted(alpha=3.0), "'[wv]' was written with scale 1.5"),
    "rank": (
        adapted,
        lambda: adapted(rank=1, alpha=3.0),
        r"'[wv]': a has shape \(8, 1\)",
    ),
    "plain": (adapted, lambda: flora.merge(adapted()), "'[bwv]' holds a ndarray"),
    "base": (lambda: flora.split(adapted())[1], adapted, "'[wv]' holds .*'base'"),
    "variant": (TREES["DoRA"], adapted, "'[wv]' holds .*extra"),
    "quantized": (TREES["int8"], adapted, "'w/base' holds a ndarray"),
    "trained": (adapted, lambda: adapted(train=()), "'b' holds a ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flax_restores_into_the_same_kind_of_tree_only(name):
    target, tree, match = REFUSED[name]
    written = serialization.to_bytes(tree())
    with pytest.raises(flora.LoraError, match=f"{match}.* Restore into"):
        serialization.from_bytes(target(), written)


@pytest.mark.parametrize("name", ["adapted", "DoRA", "int8", "nf4", "adapter"])
def test_an_exported_function_takes_adapted_trees(name):
    tree = TREES[name]()
    base = flora.split(adapted())[0] if name == "adapter" else None

    def run(tree, x):
        whole = tree if base is None else flora.join(base, tree)
        return flora.lora(fn)(whole, x), tree

    shape = jax.ShapeDtypeStruct(
        export.symbolic_shape("tokens, 8", constraints=["tokens >= 1"]), jnp.float32
    )
    written = export.export(jax.jit(run))(tree, shape).serialize()
    y, back = export.deserialize(written).call(tree, X)
    contract.close(y, run(tree, X)[0], 1e-6)
    assert jax.tree.structure(back) == jax.tree.structure(tree)


def test_a_training_step_is_exported_with_its_gradients():
    tree = adapted()

    def step(tree, x):
        loss, grads = flora.value_and_grad(lambda t: flora.lora(fn)(t, x).sum())(tree)
        return loss, grads

    written = export.export(jax.jit(step))(tree, X).serialize()
    contract.close(export.deserialize(written).call(tree, X), step(tree, X), 1e-6)


def test_what_is_not_flora_s_is_not_exported():
    @dataclasses.dataclass(frozen=True)
    class Own:
        frozen = ()

    w = flora.LoraWeight(1, 2, 3, variant=Own())
    with pytest.raises(flora.LoraError, match=r"export: .*Own\(\) cannot be written"):
        _static_of_weight(jax.tree.structure(w).node_data()[1])
    quantized = flora.quantize.Quantized(X, lambda x: x)
    exported = export.export(jax.jit(lambda w: w.dense()))(quantized)
    with pytest.raises(flora.LoraError, match=r"dequantized by .* flora.merge"):
        exported.serialize()


BAD = [
    b"", b"[]", b"{", b"[" * 100_000, b'{"layout": {"class": "os:system"}}',
    b'{"rank": {"class": "flora.hf:save", "fields": {}}}', b"\xff", b'{"layout": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:20]))
def test_what_is_read_back_makes_nothing_else(text):
    with pytest.raises(flora.LoraError):
        static_of_json(text)


def test_what_is_static_comes_back():
    w = flora.LoraWeight(1, 2, 3, layout=flora.Layout((0,), (1, 3), (2,)), rank=4,
                         alpha=1 / 3, dropout=0.1, form="concat",
                         variant=flora.variants.VeRA(seed=3))  # fmt: skip
    written = _static_of_weight(jax.tree.structure(w).node_data()[1])
    assert json.loads(written)["rank"] == 4
    assert flora.LoraWeight(1, 2, 3, **static_of_json(written)) == w
