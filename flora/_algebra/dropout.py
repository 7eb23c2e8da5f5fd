"""Dropout with masks that are made anew wherever they are read.

A mask that is kept costs memory, one of `jax.random` a hundred operations an element.
Here an element takes seven: the hashes of its row and of its column, which are made
once, are mixed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.hashes import hashed, stirred

Seed = Any  # uint32[2], of one mask


def seed(key: Any) -> Seed:
    """The seed of a key's mask."""
    return jax.random.bits(key, (2,), "uint32")


def masked(x: Any, seed: Seed, rate: float, width: int) -> Any:
    """X, each element set to 0 with probability `rate`.  Linear, and its own transpose.

    Args:
      x: any shape; the mask does not depend on how the axes are divided.
      seed: of the mask.
      rate: from 0 to below 1.
      width: how many consecutive elements are a row.
    """
    at = x.ndim
    while at and math.prod(x.shape[at:]) != width:
        at -= 1
    first = hashed(_counted(x.shape[:at]) + seed[0])
    # Fenced, or XLA makes them anew for each element.
    rows = lax.optimization_barrier((first, hashed(first ^ seed[1])))
    first, second = (lax.expand_dims(row, range(at, x.ndim)) for row in rows)
    columns = lax.optimization_barrier(hashed(_counted(x.shape[at:])))
    bits = stirred(first ^ columns, second)
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), x, 0)


def _counted(shape: tuple[int, ...]) -> Any:
    """Indices in row order."""
    count = lax.broadcasted_iota(jnp.uint32, (math.prod(shape),), 0)
    return lax.reshape(count, shape)
