"""Rank × rank matrices that stand for large ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._algebra.gram import columns, rows, whole
from tests.support.contract import array, close


@pytest.mark.parametrize(
    ("stack", "axes"),
    [((), (5,)), ((3,), (5,)), ((2, 3), (4, 2)), ((), ()), ((0,), (5,))],
)
def test_products_over_all_axes_but_stack_and_rank(x64, stack, axes):
    n = len(stack)
    x, y = (array(*stack, *axes, 2, seed=i) for i in (1, 2))
    size = math.prod(axes)
    flat = [np.asarray(v).reshape(*stack, size, 2) for v in (x, y)]
    close(columns(x, y, n), jnp.einsum("...ir,...is->...rs", *flat))
    x, y = (array(*stack, 2, *axes, seed=i) for i in (1, 2))
    flat = [np.asarray(v).reshape(*stack, 2, size) for v in (x, y)]
    close(rows(x, y, n), jnp.einsum("...ro,...so->...rs", *flat))


def test_the_norm_of_a_product_without_the_product(x64):
    a, b = array(3, 7, 2), array(3, 2, 4, 5, seed=1)
    found = jnp.einsum("srt,srt->s", columns(a, a, 1), rows(b, b, 1))
    dense = np.einsum("sir,sroj->sioj", a, b)
    close(found, jnp.asarray((dense**2).sum((1, 2, 3))))
    jaxpr = jax.make_jaxpr(lambda a, b: (columns(a, a, 1), rows(b, b, 1)))(a, b)
    assert all(v.aval.size <= 3 * 2 * 2 for e in jaxpr.eqns for v in e.outvars)


def test_factors_of_two_ranks():
    x, y = jnp.ones((7, 2)), jnp.ones((7, 3))
    assert columns(x, y, 0).shape == (2, 3)
    assert rows(x.T, y.T, 0).shape == (2, 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_stack_stays_divided(kind):
    mesh = jax.make_mesh((2, 4), ("s", "i"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        x = jnp.arange(2 * 8 * 3.0).reshape(2, 8, 3)
        place = NamedSharding(mesh, Spec("s", "i", None))
        divided = jax.device_put(x, place)
        got = jax.jit(lambda x: columns(x, x, 1))(divided)
        np.testing.assert_allclose(got, np.einsum("sir,sit->srt", x, x))
        if kind is AxisType.Explicit:
            assert jax.typeof(whole(divided, 1)).sharding.spec == Spec("s", None, None)
            assert jax.typeof(got).sharding.spec[0] == "s"
        else:
            assert whole(divided, 1) is divided
