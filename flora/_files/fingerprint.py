"""A content hash of each leaf of a base, computed where the leaf lies."""

import collections
import functools
import hashlib
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flora._tree.arrays import bits_of, is_array
from flora._tree.errors import fail
from flora._tree.keys import path_salt
from flora._tree.paths import named_leaves, path_of
from flora._tree.quantized import is_quantized


def fingerprint(base: Any, *, signed_zeros: bool = False) -> dict[str, str]:
    """`{path: 'float32[4,3] 0123456789abcdef'}`, of every bit of every leaf.

    h_k = Σᵢ mix(wordᵢ xor mix(indexᵢ + salt_k)) mod 2³² for k = 0, 1: the order of
    summation does not matter, so the hash is the same whatever the sharding, and no
    leaf is gathered.  One NaN differs from another; -0.0 counts as 0.0, to which an
    addition of 0.0 turns it.  It tells accidents apart (64 bits), not forgeries.

    Args:
      base: a tree of arrays (any dtype, typed PRNG keys too) and plain Python values;
        other objects count by their type alone.
      signed_zeros: whether -0.0 differs from 0.0, as in files of flora's first
        versions; where there is no -0.0, both are the same.

    Returns:
      One line of text for each leaf, which depends on path, dtype, shape and content.

    Raises:
      LoraError: a leaf holds no values (`ShapeDtypeStruct`, tracer, donated array), or
        two leaves have one path.
    """
    named = list(_arrays(base))
    fail(p for path, leaf in named for p in no_values(path, leaf))
    fail(same_names([path for path, _ in named]))
    # All sums are under way before the first is waited for.
    sums = [(path, leaf, _sums(path, leaf, signed_zeros)) for path, leaf in named]
    return {
        path: f"{describe(leaf)} {int(one):08x}{int(two):08x}"
        for path, leaf, (one, two) in sums
    }


def _arrays(base: Any) -> Iterator[tuple[str, Any]]:
    """The leaves by name; of a weight in fewer bits each array that is stored."""
    for path, leaf in named_leaves(base)[0]:
        if not is_quantized(leaf):
            yield path, leaf
            continue
        parts, _ = jax.tree_util.tree_flatten_with_path(leaf.values)
        for keys, x in parts:
            yield f"{path}/{path_of(keys)}", x


def describe(x: Any) -> str:
    """'float32[4,3]', or the type's name where x is no array."""
    if not is_array(x):
        return type(x).__qualname__
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def no_values(path: str, x: Any) -> list[str]:
    """What keeps a leaf from being read."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return [
            f"'{path}' is a ShapeDtypeStruct, {describe(x)}; expected an array with "
            "values. Load the weights first."
        ]
    if isinstance(x, Tracer):
        return [f"'{path}' is a tracer, {describe(x)}. Call this outside of jax.jit."]
    if isinstance(x, jax.Array) and x.is_deleted():
        return [
            f"'{path}', {describe(x)}, was donated to a jitted function and is gone. "
            "Pass the arrays that the function returned."
        ]
    return []


def same_names(paths: list[str]) -> list[str]:
    """Two leaves of one name, which could not be told apart."""
    twice = sorted(p for p, n in collections.Counter(paths).items() if n > 1)
    return [f"Two leaves are named '{p}'. Rename one of them." for p in twice]


def _sums(path: str, x: Any, signed_zeros: bool) -> tuple[Any, Any]:
    salt = path_salt(path)
    if not is_array(x):
        x = 0.0 if isinstance(x, float) and x == 0 and not signed_zeros else x
        text = repr(x) if isinstance(x, _PLAIN) else ""
        digest = hashlib.sha256(f"{salt} {text}".encode()).digest()
        return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])
    zero = None if signed_zeros else _negative_zero(x.dtype)
    if not isinstance(x, jax.Array):
        x = _numpy_words(x)
    elif jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return _hash(x, np.uint32(salt), np.uint32(zlib.crc32(b"two", salt)), zero)


def _negative_zero(dtype: Any) -> tuple[int, ...] | None:
    """The words of -0.0, lowest first; `None` for types that have none."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    real = jnp.finfo(dtype).dtype
    if real.itemsize > 8:
        return None
    bits = np.array(-0.0).astype(real).view(f"u{real.itemsize}")
    # Some float8 have one zero alone, and their NaN where others have -0.0.
    if bits != 1 << (bits_of(real) - 1):
        return None
    return (int(bits),) if real.itemsize <= 4 else (0, 1 << 31)


_PLAIN = (int, float, complex, str, bytes, bool, type(None))


def _numpy_words(x: Any) -> np.ndarray:
    """The words of a NumPy array as uint32 `[..., k]`: JAX may not have its dtype."""
    x = np.asarray(x)
    if x.dtype == jax.dtypes.float0 or x.dtype.hasobject:
        x = np.frombuffer(repr(x.tolist()).encode(), np.uint8)
    size = x.dtype.itemsize
    if size in (1, 2):
        return _bits(x).view(f"u{size}").astype(np.uint32)[..., None]
    if size % 4:
        return np.ascontiguousarray(x).view(np.uint8).astype(np.uint32)[..., None]
    return np.ascontiguousarray(x)[..., None].view(np.uint32)


def _bits(x: np.ndarray) -> np.ndarray:
    """Of types narrower than a byte, the bits alone, as JAX widens them."""
    x = np.ascontiguousarray(x)
    narrow = 8 * x.dtype.itemsize > bits_of(x.dtype)
    return x.view(np.uint8) & np.uint8(2 ** bits_of(x.dtype) - 1) if narrow else x


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32, `[..., k]`."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        parts = jnp.stack([lax.real(x), lax.imag(x)], -1)
        words = lax.bitcast_convert_type(parts, jnp.uint32)
        return words if words.ndim == parts.ndim else words.reshape(*x.shape, 4)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)[..., None]
    width = bits_of(x.dtype)
    if width >= 32:
        words = lax.bitcast_convert_type(x, jnp.uint32)
        return words if width > 32 else words[..., None]
    return lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)[..., None]


@functools.partial(jax.jit, static_argnums=3)
def _hash(
    x: jax.Array, one: jax.Array, two: jax.Array, zero: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Both sums; for one the axes count in order, for two in reverse."""
    x = jax.device_put(x, jax.memory.Space.Device)  # from the host's memory, if there
    words = x if x.dtype == jnp.uint32 and x.ndim else _words(x)
    if zero is not None:  # a number is one word or two, a complex one two numbers
        count = words.shape[-1] // len(zero)
        numbers = words.reshape(*words.shape[:-1], count, len(zero))
        is_zero = (numbers == np.array(zero, np.uint32)).all(-1, keepdims=True)
        words = jnp.where(is_zero, 0, numbers).astype(jnp.uint32).reshape(words.shape)
    axes = range(words.ndim)

    def sum_of(salt: jax.Array, order: Any) -> jax.Array:
        index = salt
        for n, axis in enumerate(order):
            stride = math.prod(words.shape[i] for i in order[n + 1 :]) % 2**32
            place = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            index = index + place * np.uint32(stride)
        return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)

    return sum_of(one, axes), sum_of(two, axes[::-1])


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer, a bijection of 32 bits in which each bit moves all."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
