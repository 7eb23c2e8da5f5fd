"""Inputs of the wrong kind, everywhere: one clear error, never Python's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora

X = jnp.ones((2, 4))
PARAMS = {"a": {"kernel": jnp.ones((4, 3))}, "bias": jnp.ones(3)}


def fn(p, x):
    return x @ p["a"]["kernel"] + p["bias"]


KEY, CONFIG = jax.random.key(0), flora.LoraConfig(rank=2)
TREE = flora.init(KEY, CONFIG, fn, PARAMS, X)
BASE, ADAPTER = flora.split(TREE)
NODE = TREE["a"]["kernel"]
TX = optax.sgd(1.0)

ODD = {
    "None": None, "0": 0, "-1": -1, "1.5": 1.5, "nan": float("nan"), "huge": 10**30,
    "1j": 1j, "True": True, "''": "", "'abc'": "abc", "bytes": b"x", "[]": [], "{}": {},
    "()": (), "set": {1}, "object": object(), "module": np, "lambda": lambda *_: None,
    "numpy": np.zeros(3), "jax": jnp.ones(2), "key": KEY, "keys": jax.random.split(KEY),
    "struct": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "node of None": flora.LoraWeight(None, None, None),
    "node of ints": flora.LoraWeight(1, 2, 3),
    "node with other factors": dataclasses.replace(NODE, a=jnp.ones((2, 2))),
    "node with other layout": dataclasses.replace(
        NODE, layout=flora.Layout((0,), (1,), (2,))),
    "node of rank x": dataclasses.replace(NODE, rank="x"),
    "Trained(None)": flora.Trained(None), "Trained(1)": flora.Trained(1),
    "config": CONFIG, "adapted": TREE, "base": BASE,
    "adapter": ADAPTER, "plain": PARAMS, "tree of str": {"kernel": "abc"},
    "tree of None": {"kernel": None},
    "tree of objects": {"kernel": object()}, "tree of ints": {1: 2},
}  # fmt: skip


def adapted_with(**settings):
    config = flora.LoraConfig(**{"rank": 2, "target": "kernel"} | settings)
    return flora.init(KEY, config, fn, PARAMS, X)


def loss(tree):
    return flora.lora(fn)(tree, X).sum()


SLOTS = {
    "init key": lambda v: flora.init(v, CONFIG, fn, PARAMS, X),
    "init config": lambda v: flora.init(KEY, v, fn, PARAMS, X),
    "init fn": lambda v: flora.init(KEY, CONFIG, v, PARAMS, X),
    "init tree": lambda v: flora.init(KEY, CONFIG, fn, v, X),
    "lora": flora.lora,
    "lora fallback": lambda v: flora.lora(fn, fallback=v),
    "split": flora.split,
    "join base": lambda v: flora.join(v, ADAPTER),
    "join adapter": lambda v: flora.join(BASE, v),
    "merge": flora.merge,
    "mask": flora.mask,
    "optimizer": lambda v: flora.optimizer(v, TREE),
    "optimizer tree": lambda v: flora.optimizer(TX, v),
    "value_and_grad": flora.value_and_grad,
    "value_and_grad tree": flora.value_and_grad(lambda t: jnp.float32(0.0)),
    "value_and_grad loss": lambda v: flora.value_and_grad(lambda t: v)(TREE),
    "value_and_grad aux":
        lambda v: flora.value_and_grad(lambda t: v, has_aux=True)(TREE),
    "summary": lambda v: str(flora.summary(v)),
    "coverage fn": lambda v: flora.coverage(v, PARAMS, X),
    "coverage path": lambda v: flora.coverage(fn, PARAMS, X)[v],
    "coverage role": lambda v: flora.coverage(fn, PARAMS, X).select(v),
    "coverage without":
        lambda v: flora.coverage(fn, PARAMS, X).select("linear", without=v),
    "coverage status": lambda v: flora.coverage(fn, PARAMS, X).with_status(v),
    "with_dropout tree": lambda v: flora.with_dropout(v, KEY),
    "with_dropout key": lambda v: flora.with_dropout(TREE, v),
    "variance": lambda v: adapted_with(init=flora.initializers.gaussian(v)),
    "what init draws": lambda v: adapted_with(init=lambda *_: v),
    "layout of a leaf": lambda v: adapted_with(layouts={"kernel": v}),
} | {
    f"config {field.name}": lambda v, name=field.name: adapted_with(**{name: v})
    for field in dataclasses.fields(flora.LoraConfig)
} | {
    f"layout {field.name}": lambda v, name=field.name: flora.Layout(**{name: v})
    for field in dataclasses.fields(flora.Layout)
}  # fmt: skip


# Old versions of NumPy warn of a `.dtype` that is none before they refuse it.
@pytest.mark.filterwarnings("ignore:in the future the `.dtype`:DeprecationWarning")
@pytest.mark.parametrize("slot", SLOTS)
def test_wrong_kinds_give_one_clear_error(slot):
    refused = 0
    for name, value in ODD.items():
        try:
            SLOTS[slot](value)
        except flora.LoraError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{slot} = {name}") from error
    assert refused >= (0 if slot in ("summary", "value_and_grad loss") else 5)


def test_coverage_of_a_tree_without_arrays():
    for value in (None, 0, "", [], {}, object(), {"kernel": None}):
        with pytest.raises(flora.LoraError, match="has no floating arrays"):
            flora.coverage(lambda p, x: x, value, X)


def test_a_pattern_that_fails_is_named():
    with pytest.raises(flora.LoraError, match=r"pattern .* failed on 'a/kernel': Key"):
        adapted_with(target=lambda path, leaf: {}[path])


def test_a_loss_that_is_no_scalar_says_what_it_was():
    with pytest.raises(
        flora.LoraError, match=r"fn returned float32\[2,3\]; expected a"
    ):
        flora.value_and_grad(lambda t: flora.lora(fn)(t, X))(TREE)
    with pytest.raises(flora.LoraError, match=r"expected \(loss, aux\) with a scalar"):
        flora.value_and_grad(loss, has_aux=True)(TREE)
