"""PRNG keys: typed, one at a time, consumed once, and apart for each path."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.arrays import is_array
from flora._tree.errors import LoraTypeError


def require_key(key: Any, verb: str) -> None:
    """Raises unless key is one typed PRNG key."""
    dtype = getattr(key, "dtype", None) if is_array(key) else None
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        given = (
            type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)} array"
        )
        raise LoraTypeError(
            f"{verb}: key is a {given}; expected a typed PRNG key. Write "
            "jax.random.key(0), or jax.random.wrap_key_data(key) around "
            "one made by PRNGKey."
        )
    if key.shape != ():
        raise LoraTypeError(
            f"{verb}: key has shape {key.shape}; expected one key. Write "
            "key[0], or jax.vmap over the keys."
        )


def consumed(key: Any) -> Any:
    """A key derived from `key`, which JAX's key-reuse checker then counts as used."""
    return key if isinstance(key, jax.ShapeDtypeStruct) else jax.random.split(key, 1)[0]


def path_salt(path: str) -> int:
    """What to fold into a key for one leaf; the same in every tree."""
    return zlib.crc32(path.encode())
