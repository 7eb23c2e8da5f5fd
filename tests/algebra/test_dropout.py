"""Masks of dropout: as independent as coins, and the same however they are made."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flora._algebra.dropout import masked, seed

ROWS, WIDTH = 2048, 1024
AUTO = (AxisType.Auto, AxisType.Auto)


def mask(rate, key=0, shape=(ROWS, WIDTH), width=WIDTH):
    own = seed(jax.random.key(key))
    return np.asarray(masked(jnp.ones(shape), own, rate, width))


def standard(rate, key):
    """Of mean 0 and variance 1, if elements are 1 with the odds that they should."""
    return (mask(rate, key) - (1 - rate)) / np.sqrt(rate * (1 - rate))


def deviation(x):
    """Of a mean of independent values of variance 1, in standard errors."""
    return abs(x.sum()) / np.sqrt(x.size)


@pytest.mark.parametrize("key", [0, 1])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_elements_are_independent(rate, key):
    x, other = standard(rate, key), standard(rate, key + 7)
    assert deviation(x) < 4
    assert deviation(x * other) < 4
    for step in (1, 2, 8, 128, 1000):
        assert deviation(x[step:] * x[:-step]) < 4
        assert deviation(x[:, step:] * x[:, :-step]) < 4
    # Rows and columns are hashed apart: four corners of any rectangle, then.
    draw = np.random.default_rng(0)
    for i, j in draw.integers(1, ROWS, (50, 2)) % [[ROWS, WIDTH]]:
        pair = x * np.roll(x, i, 0)
        assert deviation(pair * np.roll(pair, j or 1, 1)) < 5
    for along in (x, x.T):
        total = along.sum(1) ** 2 / along.shape[1]  # of mean 1 and variance 2
        assert deviation((total - 1) / np.sqrt(2)) < 5
        two = along[:256] @ along[:256].T / np.sqrt(along.shape[1])
        pairs = two[np.triu_indices(256, 1)]
        assert abs((pairs**2).mean() - 1) < 0.05


def test_a_mask_does_not_depend_on_how_axes_are_divided():
    whole = mask(0.4, shape=(24, 60), width=60)
    for shape in ((24, 60), (4, 6, 60), (24, 5, 12), (2, 12, 3, 20), (24, 1, 60)):
        parts = mask(0.4, shape=shape, width=60)
        np.testing.assert_array_equal(parts.reshape(24, 60), whole)
    assert not np.array_equal(mask(0.4, 1, (24, 60), 60), whole)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 4), (3, 0), (1, 1), (2, 3, 1)])
def test_odd_shapes(shape):
    x = masked(jnp.ones(shape), seed(jax.random.key(0)), 0.5, math.prod(shape[-1:]))
    assert x.shape == shape


def test_rates_near_the_ends():
    assert mask(0.0).all()
    assert mask(1e-9).all()
    assert 0 < mask(1 - 1e-5).mean() < 1e-4


def test_what_is_dropped_is_zero_whatever_it_was():
    x = jnp.full((64, 64), jnp.nan)
    kept = masked(x, seed(jax.random.key(0)), 0.5, 64)
    assert 0.4 < float((kept == 0).mean()) < 0.6


def test_lengths_may_be_symbols():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8"), jnp.float32)
    own = seed(jax.random.key(0))
    there = export.export(jax.jit(lambda x: masked(x, own, 0.5, 8)))(x)
    here = masked(jnp.ones((5, 8)), own, 0.5, 8)
    np.testing.assert_array_equal(there.call(jnp.ones((5, 8))), here)


def test_shards_of_a_mask_are_made_where_they_are():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=AUTO)
    own, x = seed(jax.random.key(0)), jnp.ones((8, 4, 64))

    def fn(x):
        return masked(x, own, 0.5, 64)

    placed = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    program = jax.jit(fn, out_shardings=placed).lower(jax.device_put(x, placed))
    compiled = program.compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    np.testing.assert_array_equal(compiled(jax.device_put(x, placed)), fn(x))
