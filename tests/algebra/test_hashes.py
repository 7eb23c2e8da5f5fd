"""Hashes: every bit of what goes in changes half of what comes out."""

import jax.numpy as jnp
import numpy as np
import pytest

from flora._algebra.hashes import hashed, stirred


def flips(fn, bit, n=4096):
    """How often each bit of the result changes with one of the argument."""
    x = jnp.arange(n, dtype=jnp.uint32) * jnp.uint32(2654435761)
    changed = np.asarray(fn(x) ^ fn(x ^ jnp.uint32(1 << bit)))
    return (changed[:, None] >> np.arange(32)) & 1


@pytest.mark.parametrize("bit", [0, 1, 7, 15, 16, 30, 31])
def test_a_bit_changes_half_of_all_bits(bit):
    # Of 4096 tosses of a fair coin the standard error is 0.008.
    assert np.abs(flips(hashed, bit).mean(0) - 0.5).max() < 0.04


def test_hashes_are_a_permutation():
    x = jnp.arange(1 << 16, dtype=jnp.uint32)
    assert np.unique(np.asarray(hashed(x))).size == 1 << 16


def test_the_high_bits_change_with_either_source():
    """Where both are hashes themselves, as those of rows and columns are."""
    words = hashed(jnp.arange(4096, dtype=jnp.uint32))
    others = hashed(words + jnp.uint32(1))
    for delta in np.asarray(hashed(jnp.arange(1, 33, dtype=jnp.uint32))):
        first = stirred(words, others) ^ stirred(words ^ delta, others)
        second = stirred(words, others) ^ stirred(words, others ^ delta)
        for changed in (first, second):
            high = (np.asarray(changed)[:, None] >> np.arange(24, 32)) & 1
            assert np.abs(high.mean(0) - 0.5).max() < 0.05
