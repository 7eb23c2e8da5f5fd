"""Weights as stacks of matrices, and what decomposes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.matrices import compiled, folded, matrices, nearest, stacked, svd
from tests.support.contract import array

EXPERTS = flora.Layout((2,), (3, 0), (1,))
SHAPE = (5, 7, 3, 2)


def weight(rank=2, dtype=jnp.float64, **settings):
    a, b = EXPERTS.factor_shapes(SHAPE, rank)
    return flora.LoraWeight(
        array(*SHAPE), array(*a, seed=1).astype(dtype), array(*b, seed=2).astype(dtype),
        layout=EXPERTS, rank=rank, **settings,
    )  # fmt: skip


def test_axes_go_where_the_layout_says(x64):
    x = np.asarray(array(*SHAPE))
    got = matrices(jnp.asarray(x), EXPERTS)
    want = np.einsum("ioej->ejio", x).reshape(3, 10, 7)
    np.testing.assert_array_equal(got, want)
    (vector,) = matrices(jnp.arange(6.0).reshape(2, 3), flora.Layout((), (1,), (0,)))
    np.testing.assert_array_equal(vector, np.arange(6).reshape(2, 3).T)
    assert matrices(jnp.zeros((0, 3)), flora.Layout()).shape == (1, 0, 3)


def test_factors_are_stacked_and_folded_back(x64):
    w = weight(dtype=jnp.float32)
    a, b = stacked(w)
    assert (a.shape, b.shape) == ((3, 10, 2), (3, 2, 7))
    np.testing.assert_array_equal(a, np.asarray(w.a).reshape(3, 10, 2))
    back = folded(w, a.astype(jnp.float64), b)
    for got, want in zip(back, (w.a, w.b), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    # Of another rank than w has.
    longer = folded(w, jnp.ones((3, 10, 4)), jnp.ones((3, 4, 7)))
    assert [x.shape for x in longer] == [(3, 2, 5, 4), (3, 4, 7)]


TRIPLETS = jax.jit(svd, static_argnames=("count", "passes", "oversample"))


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 12), (4, 4)])
def test_singular_triplets_of_low_rank_matrices(x64, shape, keyed):
    *stack, n, m = shape
    x = array(*stack, n, 3, seed=1) @ array(*stack, 3, m, seed=2)
    u, s, v = TRIPLETS(x, 3, jax.random.key(0) if keyed else None)
    want = np.linalg.svd(np.asarray(x), compute_uv=False)[..., :3]
    np.testing.assert_allclose(s, want, rtol=1e-10)
    np.testing.assert_allclose(u * s[..., None, :] @ v, x, atol=1e-10)
    eye = np.broadcast_to(np.eye(3), (*stack, 3, 3))
    np.testing.assert_allclose(u.mT @ u, eye, atol=1e-12)


def test_passes_sharpen_a_sketch_of_what_falls_slowly(x64):
    u, v = (np.linalg.qr(np.asarray(array(30, 30, seed=i)))[0] for i in (1, 2))
    s = 1 / np.sqrt(1 + np.arange(30))
    # A complex matrix takes its adjoint, not its transpose.
    x = jnp.asarray((u * np.exp(1j * np.arange(30))[:, None]) * s @ v.T)
    key = jax.random.key(0)
    np.testing.assert_allclose(TRIPLETS(x, 4, key)[1], s[:4], rtol=2e-3)
    rough = TRIPLETS(x, 4, key, passes=0, oversample=0)[1]
    assert np.abs(rough - s[:4]).max() > 0.05


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_nearest_factors_give_the_best_change_of_that_rank(x64, stabilized):
    w = weight(alpha=5.0, rank_stabilized=stabilized)
    a, b = jax.jit(nearest)(w, w.base)
    x = np.asarray(matrices(w.base, w.layout))
    u, s, v = np.linalg.svd(x, full_matrices=False)
    best = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
    np.testing.assert_allclose(w.scale * a @ b, best, atol=1e-12)
    # Both carry the same share of the singular values.
    np.testing.assert_allclose(
        jnp.linalg.norm(a, axis=1), jnp.linalg.norm(b, axis=2), rtol=1e-12
    )
    assert math.isclose(w.scale, 5 / (math.sqrt(2) if stabilized else 2))


def test_a_function_is_compiled_once_for_one_place():
    def double(x):
        return 2 * x

    assert compiled(double, None) is compiled(double, None)
    assert (compiled(double, None)(jnp.ones(2)) == 2).all()
