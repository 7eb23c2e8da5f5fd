"""Hashes of 32 bits: noise that needs no memory, as it is made where it is read."""

from typing import Any

import jax.numpy as jnp


def hashed(bits: Any) -> Any:
    """A hash of 32 bits in which each bit of the input changes half of the output's.

    References: Wellons 2018, "Prospecting for hash functions".
      https://nullprogram.com/blog/2018/07/31/
    """
    bits = stirred(bits ^ (bits >> 16))
    return bits ^ (bits >> 16)


def stirred(bits: Any, others: Any = None) -> Any:
    """The hash's two products, others' bits mixed in between.

    Both are hashes already, and of the result the high bits are used.
    """
    bits = bits * jnp.uint32(0x7FEB352D)
    bits = bits if others is None else bits ^ others
    return (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
