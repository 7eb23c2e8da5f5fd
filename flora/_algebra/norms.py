"""‖W + scale A B‖ over the in axes, output by output, without A B.

    ‖W + s A B‖² = ‖W‖² + 2 s ⟨W, A B⟩ + s² ‖A B‖²

costs one product of W with A.  Where the three terms nearly cancel, float32 holds none
of the sum's digits.  Such columns are noticed, and the columns of their weight are
computed anew from W + s A B itself, a slab of rows at a time, with sums and products of
two float32 numbers each: what cancels there is exact.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flora._algebra.choice import target
from flora._algebra.dense import in_place
from flora._tree.arrays import compute_dtype
from flora._tree.quantized import dequantized
from flora._tree.weight import LoraWeight

# A sum that is smaller than this part of its terms is computed anew.
_CANCELS = 1 / 8
_SLAB = 2**20  # elements of a slab, on each device


def column_norms(weight: LoraWeight) -> jax.Array:
    """‖W + scale A B‖ over the in axes, `[*stack, *out]`, without A B.

    In float32 within 1e-4 of the norm of every column that is at least a thousandth of
    W's; usually within 1e-6.

    Args:
      weight: its variant and `extra` are not read.

    Returns:
      The norms in float32 or wider, differentiable in A and B.

    References: Liu et al. 2024 (DoRA). https://arxiv.org/abs/2402.09353
    """
    square, terms = _by_products(weight)
    if square.dtype != jnp.float32:
        return jnp.sqrt(jnp.maximum(square, 0))
    held = lax.stop_gradient((weight, jnp.maximum(square, 0)))
    todo = jnp.any(held[1] < lax.stop_gradient(terms) * _CANCELS)

    # A loop of at most one step: under vmap a branch would always be taken.
    def anew(state: Any) -> Any:
        return ~state[0], _by_slabs(held[0])

    _, exact = lax.while_loop(lambda state: state[0], anew, (todo, held[1]))
    return jnp.sqrt(square + (exact - lax.stop_gradient(square)))


def _by_products(weight: LoraWeight) -> tuple[jax.Array, jax.Array]:
    """‖W + s A B‖² `[*stack, *out]`, and how large the terms are that it sums."""
    layout = weight.layout
    dtype = compute_dtype(weight.a.dtype, weight.b.dtype, weight.base.dtype)
    w = dequantized(weight.base).astype(dtype)
    a, b = weight.a.astype(dtype), weight.b.astype(dtype)
    rank, twin, axes = w.ndim, w.ndim + 1, [*range(w.ndim)]
    stack, in_, out = ([*group] for group in (layout.stack, layout.in_, layout.out))

    def sums(*operands: Any) -> jax.Array:
        return jnp.einsum(*operands, precision=lax.Precision.HIGHEST)

    cross = sums(w, axes, a, [*stack, *in_, rank], [*stack, rank, *out])
    cross = sums(cross, [*stack, rank, *out], b, [*stack, rank, *out], [*stack, *out])
    gram = sums(a, [*stack, *in_, rank], a, [*stack, *in_, twin], [*stack, rank, twin])
    half = sums(
        gram, [*stack, rank, twin], b, [*stack, twin, *out], [*stack, rank, *out]
    )
    square = sums(half, [*stack, rank, *out], b, [*stack, rank, *out], [*stack, *out])
    whole = sums(w, axes, w, axes, [*stack, *out])
    sizes = jnp.diagonal(gram, axis1=-2, axis2=-1)
    apart = sums(sizes, [*stack, rank], b * b, [*stack, rank, *out], [*stack, *out])
    s = _scale(weight, len(out)).astype(dtype)
    return whole + 2 * s * cross + s * s * square, whole + s * s * apart


def _scale(weight: LoraWeight, ones: int) -> np.ndarray:
    """The scale in float64, with axes of length 1 behind those of a stack."""
    scale = np.asarray(weight.scale, np.float64)
    return scale.reshape(*scale.shape, *(1,) * ones)


def _by_slabs(weight: LoraWeight) -> jax.Array:
    """‖W + s A B‖² `[*stack, *out]` in float32, from slabs along the longest in axis.

    Each slab has rows of every device that W may be sharded over along that axis.
    """
    layout, shape = weight.layout, weight.base.shape
    w, stack = dequantized(weight.base), len(layout.stack)
    at = max(layout.in_, key=lambda i: shape[i])
    devices = target().devices
    shares = math.gcd(shape[at], devices)
    length = shape[at] // shares
    count = max(2, math.ceil(math.prod(shape) / (_SLAB * devices)))
    rows = math.ceil(length / min(count, length))

    def spread(x: Any, gone: Sequence[int]) -> Any:
        """`[rank, ...]` with W's axes, those that are gone of length 1."""
        ones = tuple(1 if i in gone else n for i, n in enumerate(shape))
        return jax.vmap(lambda x: in_place(x, layout, ones))(x)

    def slab(x: Any, axis: int, first: Any) -> Any:
        split = x.reshape(*x.shape[:axis], shares, length, *x.shape[axis + 1 :])
        cut = lax.dynamic_slice_in_dim(split, first, rows, axis + 1)
        return cut.reshape(*x.shape[:axis], shares * rows, *x.shape[axis + 1 :])

    def add(i: Any, total: Any) -> Any:
        first = jnp.minimum(i * rows, length - rows)
        x = _changed(slab(w, at, first), slab(a, at + 1, first), bs)
        is_new = jnp.tile(first + jnp.arange(rows) >= i * rows, shares)
        is_new = lax.expand_dims(is_new, [j for j in range(w.ndim) if j != at])
        return total + jnp.sum(jnp.where(is_new, x * x, 0), layout.in_)

    a = spread(jnp.moveaxis(weight.a.astype(jnp.float32), -1, 0), layout.out)
    b = jnp.moveaxis(weight.b.astype(jnp.float32), stack, 0)
    bs = [spread(x, layout.in_) for x in _scaled(b, _scale(weight, len(layout.out)))]
    zeros = 0 * bs[0][0].sum(layout.in_)
    total = lax.fori_loop(0, math.ceil(length / rows), add, zeros)
    kept = sorted((*layout.stack, *layout.out))
    return total.transpose([kept.index(i) for i in (*layout.stack, *layout.out)])


def _changed(w: Any, a: Any, bs: Any) -> Any:
    """W + s A B, rounded once: the terms are exact and summed with what is rounded off.

    Args:
      w: `[...]`.
      a: `[rank, ...]`, of length 1 along the axes that A does not have.
      bs: s B likewise, as `_scaled` divides it.
    """

    def add(k: Any, state: Any) -> Any:
        total, left = state
        column, (first, second, third) = a[k], [b[k] for b in bs]
        high, low = _halves(column)
        term = high * first  # 12 bits each: exact
        rest = (high * second + low * first) + (low * second + column * third)
        new = total + term
        back = new - total
        lost = (total - (new - back)) + (term - back)  # Knuth's two-sum
        return new, left + (lost + rest)

    w = w.astype(jnp.float32)
    total, left = lax.fori_loop(0, a.shape[0], add, (w, 0 * w))
    return total + left


def _scaled(b: Any, scale: np.ndarray) -> tuple[Any, Any, Any]:
    """S B as three numbers an element: two of 12 bits, and what is left."""
    s = jnp.asarray(scale, jnp.float32)
    rest = jnp.asarray(scale - np.asarray(scale, np.float32), jnp.float32)
    (s_high, s_low), (b_high, b_low), sb = _halves(s), _halves(b), s * b
    lost = (s_high * b_high - sb) + (s_high * b_low + s_low * b_high) + s_low * b_low
    return *_halves(sb), lost + rest * b


def _halves(x: Any) -> tuple[Any, Any]:
    """x as the sum of two numbers of 12 bits, so that their products are exact."""
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)
    return high, x - high
