"""What must hold of an adapted tree before a verb works on it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.checks import require_adapted, weight_problems
from tests.verbs.test_init import X, fn, init

GOOD = flora.LoraWeight(
    jnp.ones((3, 7, 5)), jnp.ones((3, 7, 2)), jnp.ones((3, 2, 5)),
    layout=flora.Layout((0,), (1,), (2,)), rank=2,
)  # fmt: skip


def changed(**fields):
    return dataclasses.replace(GOOD, **fields)


def test_what_fits_has_no_problem():
    shapes = jax.eval_shape(lambda: GOOD)
    numpy = jax.tree.map(np.asarray, GOOD)
    with_extra = changed(extra={"m": jnp.ones((3, 5))}, key=jax.random.key(0))
    other = changed(a=jnp.ones((3, 7, 2), jnp.bfloat16))
    traced = []
    jax.eval_shape(lambda w: traced.extend(weight_problems("w", w)), GOOD)
    assert traced == []
    for leaf in (GOOD, shapes, numpy, with_extra, other, changed(extra={})):
        assert weight_problems("w", leaf) == []


def test_only_weights_are_looked_at():
    for leaf in (jnp.ones(3), None, "label", flora.Trained(None), {"a": 1}):
        assert weight_problems("w", leaf) == []


WRONG = {
    "no base": (
        {"base": None}, "'a/w' is an adapter without its base. Write flora.join"),
    "no arrays": ({"a": None}, "'a/w' is a LoraWeight that holds no arrays. Pass the"),
    "numbers": ({"base": 1}, "holds no arrays"),
    "labels": ({"b": "b"}, "holds no arrays"),
    "an axis less": (
        {"base": jnp.ones((7, 5))},
        "'a/w' has shape (7, 5), but its layout is for 3 axes (stack=0 in=1 out=2)"),
    "an axis twice": (
        {"layout": flora.Layout((0,), (1,), (1,))}, "but its layout is for 3 axes"),
    "extra": ({"extra": [1]}, "'a/w' has extra=[1]; expected a dict of arrays by name"),
    "wider": (
        {"base": jnp.ones((3, 7, 6))},
        "'a/w' has base (3, 7, 6), a (3, 7, 2) and b (3, 2, 5); layout stack=0 in=1 "
        "out=2 and rank 2 ask for a (3, 7, 2) and b (3, 2, 6)."),
    "A of another rank": ({"a": jnp.ones((3, 7, 1))}, "ask for a (3, 7, 2)"),
    "another rank": ({"rank": 3}, "and rank 3 ask for a (3, 7, 3) and b (3, 3, 5)"),
    "another stack": ({"b": jnp.ones((4, 2, 5))}, "b (4, 2, 5); layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_problem_with_path_and_shapes(name):
    fields, message = WRONG[name]
    (problem,) = weight_problems("a/w", changed(**fields))
    assert message in problem


def test_a_tree_must_hold_something_adapted():
    tree = {"w": GOOD, "v": jnp.ones(3), "none": None}
    assert [path for path, _ in require_adapted(tree, "verb")] == ["v", "w"]
    assert require_adapted(flora.Trained(1), "verb") == [("", flora.Trained(1))]
    for plain, count in (({"v": jnp.ones(3), "u": 2}, 2), ({}, 0), (None, 0)):
        with pytest.raises(
            flora.LoraError, match=f"verb: none of the tree's {count} leaves is adapted"
        ):
            require_adapted(plain, "verb")


def test_trees_of_another_shape_than_at_init():
    adapted = init()
    up = adapted["mlp"]["up"]
    wider = up["kernel"].__class__(**(vars(up["kernel"]) | {"base": jnp.ones((7, 12))}))
    tree = adapted | {"mlp": adapted["mlp"] | {"up": up | {"kernel": wider}}}
    with pytest.raises(
        flora.LoraError, match=re.escape("base (7, 12), a (7, 2) and b (2, 11)")
    ):
        flora.lora(fn)(tree, X)
    deeper = up["kernel"].__class__(
        **(vars(up["kernel"]) | {"base": jnp.ones((1, 7, 11))})
    )
    tree = adapted | {"mlp": adapted["mlp"] | {"up": up | {"kernel": deeper}}}
    with pytest.raises(flora.LoraError, match="layout is for 2 axes"):
        flora.lora(fn)(tree, X)
