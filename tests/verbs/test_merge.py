import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.weight import Product
from tests.support import contract
from tests.verbs.test_init import init, params


def test_merge_and_rank_and_alpha_patterns():
    alphas = {re.compile(".*down.*"): 10}
    adapted = init(rank=2, alpha=4, rank_pattern={"up/kernel": 3}, alpha_pattern=alphas)
    adapted = contract.randomized(adapted)
    up, down = (adapted["mlp"][n]["kernel"] for n in ("up", "down"))
    assert (up.rank, up.alpha, down.rank, down.alpha) == (3, 4.0, 2, 10.0)
    merged = flora.merge(adapted)
    for w, name in ((up, "up"), (down, "down")):
        a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
        want = np.asarray(w.base, np.float64) + w.alpha / w.rank * a @ b
        np.testing.assert_allclose(merged["mlp"][name]["kernel"], want, rtol=1e-5)
    assert merged["mlp"]["up"]["bias"] is adapted["mlp"]["up"]["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(params())


def test_everything_else_stays_as_it_was():
    adapted = init(train="scale") | {"none": None, "name": "abc"}
    merged = flora.merge(adapted)
    assert merged["scale"] is adapted["scale"].value
    assert (merged["none"], merged["name"]) == (None, "abc")
    assert merged["mlp"]["up"]["bias"] is adapted["mlp"]["up"]["bias"]
    assert isinstance(merged["mlp"]["up"]["kernel"], jax.Array)
    # At B = 0 the sum is W, bit for bit.
    chex.assert_trees_all_equal(merged["mlp"], params()["mlp"])


def test_dtype_and_keys_do_not_matter_to_the_sum():
    w = flora.LoraWeight(
        jnp.ones((4, 3), jnp.bfloat16), jnp.ones((4, 2)), jnp.ones((2, 3)), rank=2,
        key=jax.random.key(0), dropout=0.5,
    )  # fmt: skip
    (got,) = jax.tree.leaves(flora.merge(w))
    assert got.dtype == jnp.bfloat16
    assert (got == 2).all()
    jitted = jax.jit(flora.merge)(dataclasses.replace(w, key=None))
    assert jnp.array_equal(jitted, got)


def test_shapes_merge_to_the_shape_of_the_base():
    shapes = jax.eval_shape(lambda: init(train="scale"))
    merged = flora.merge(shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params())
    assert merged["mlp"]["up"]["kernel"] is shapes["mlp"]["up"]["kernel"].base


def test_what_cannot_be_merged_is_named():
    with pytest.raises(flora.LoraError, match=r"merge: none of the tree's 4 leaves"):
        flora.merge(params())
    _, adapter = flora.split(init())
    with pytest.raises(
        flora.LoraError, match=r"2 problems:\n.*'mlp/down/kernel' is an"
    ):
        flora.merge(adapter)

    @dataclasses.dataclass(frozen=True)
    class Squashed:
        frozen = ()

        def product(self, w):
            return Product(w.a, w.b, between=jnp.tanh)

    w = dataclasses.replace(init()["mlp"]["up"]["kernel"], variant=Squashed())
    with pytest.raises(
        flora.LoraError, match=r"merge: 'up': .*between A and B.*Ship the adapter"
    ):
        flora.merge({"up": w})
