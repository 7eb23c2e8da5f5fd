"""PRNG keys: one at a time, typed or not, consumed once, and apart for each path."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.arrays import is_array
from flora._tree.errors import LoraTypeError


def require_key(key: Any, verb: str) -> None:
    """Raises unless key is one PRNG key, of `jax.random.key` or `PRNGKey`."""
    if not is_array(key) or not (_is_typed(key) or _is_legacy(key)):
        given = (
            f"{key.dtype}{list(key.shape)} array"
            if is_array(key)
            else type(key).__name__
        )
        raise LoraTypeError(
            f"{verb}: key is a {given}; expected a PRNG key. Write jax.random.key(0), "
            "or jax.random.wrap_key_data(key, impl=...) around the data of one."
        )
    shape = key.shape if _is_typed(key) else key.shape[:-1]
    if shape != ():
        raise LoraTypeError(
            f"{verb}: key has shape {key.shape}; expected one key. Write "
            "key[0], or jax.vmap over the keys."
        )


def _is_typed(key: Any) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _is_legacy(key: Any) -> bool:
    """Whether it is what `jax.random.PRNGKey` makes, or several of these."""
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return key.dtype == data.dtype and key.shape[-1:] == data.shape


def consumed(key: Any) -> Any:
    """A typed key derived from `key`, which JAX's key-reuse checker counts as used."""
    if not _is_typed(key):
        if isinstance(key, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.wrap_key_data, key)
        key = jax.random.wrap_key_data(jnp.asarray(key))
    return key if isinstance(key, jax.ShapeDtypeStruct) else jax.random.split(key, 1)[0]


def path_salt(path: str) -> int:
    """What to fold into a key for one leaf; the same in every tree."""
    return zlib.crc32(path.encode())
