"""‖W + scale A B‖ over the in axes, output by output, without A B.

    ‖W + s A B‖² = ‖W‖² + 2 s ⟨W, A B⟩ + s² ‖A B‖²

costs one product of W with A.  Where the three terms nearly cancel, float32 holds none
of the sum's digits.  That is noticed, and the weight's norms are computed anew from the
elements of W + s A B, a slab of rows at a time:

    s A B = A₁ B₁ + (A₁ B₂ + A₂ s B)

with A₁ and B₁ of so few bits that A₁ B₁ is exact, and W + A₁ B₁ is where it cancels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._algebra.choice import target
from flora._tree.arrays import compute_dtype
from flora._tree.blocks import covered
from flora._tree.placement import mesh_of, spec_of, specs
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
      Ozaki et al. 2012 (exact products of parts). doi:10.1007/s11075-011-9478-1
    """
    base, layout = weight.base, weight.layout
    spec = spec_of(base)
    if spec is None or not mesh_of(base).explicit_axes:
        return _norms(weight)
    found = tuple(specs(layout, spec, len(base.shape)).b)
    n = len(layout.stack)
    place = NamedSharding(mesh_of(base), Spec(*found[:n], *found[n + 1 :]))
    run: Any = jax.sharding.auto_axes(_norms, out_sharding=place)
    return run(weight)


compiled_norms = jax.jit(column_norms)


def zero_problems(path: str, weight: LoraWeight, norms: Any) -> list[str]:
    """Why DoRA cannot train all outputs of a leaf, as far as its norms have values."""
    if weight.blocks and not isinstance(norms, jax.ShapeDtypeStruct):
        stack, _, out = weight.layout.sizes(weight.base.shape)
        norms = jnp.where(covered(weight.blocks, stack, out), norms, 1)
    if isinstance(norms, Tracer) or not isinstance(norms, jax.Array):
        return []
    if not (count := int(jax.device_get(_zeros(norms)))):
        return []
    return [
        f"'{path}' has columns of zeros, for {count} of its {norms.size} outputs: DoRA "
        "divides by their norm, and they would never train. Exclude it, or adapt it "
        "without variant=DoRA()."
    ]


@jax.jit
def _zeros(norms: jax.Array) -> jax.Array:
    return jnp.sum(norms == 0)


def _norms(weight: LoraWeight) -> jax.Array:
    square, terms = _by_products(weight)
    square = jnp.maximum(square, 0)
    if square.dtype != jnp.float32:
        return jnp.sqrt(square)
    fixed, known, terms = lax.stop_gradient((weight, square, terms))

    # A loop of at most one step: under vmap a branch would always be taken.
    def anew(state: Any) -> Any:
        return ~state[0], _by_slabs(fixed)

    todo = jnp.any(known < _CANCELS * terms)
    _, exact = lax.while_loop(lambda state: state[0], anew, (todo, known))
    return jnp.sqrt(square + (exact - known))


def _by_products(weight: LoraWeight) -> tuple[jax.Array, jax.Array]:
    """‖W + s A B‖² `[*stack, *out]`, and how large the terms are that it sums."""
    layout = weight.layout
    dtype = compute_dtype(weight.a.dtype, weight.b.dtype, weight.base.dtype)
    w = dequantized(weight.base).astype(dtype)
    a, b = weight.a.astype(dtype), weight.b.astype(dtype)
    rank, twin, axes = w.ndim, w.ndim + 1, [*range(w.ndim)]
    stack, in_, out = ([*group] for group in (layout.stack, layout.in_, layout.out))
    cross = _sums(w, axes, a, [*stack, *in_, rank], [*stack, rank, *out])
    cross = _sums(cross, [*stack, rank, *out], b, [*stack, rank, *out], [*stack, *out])
    gram = _sums(a, [*stack, *in_, rank], a, [*stack, *in_, twin], [*stack, rank, twin])
    half = _sums(
        gram, [*stack, rank, twin], b, [*stack, twin, *out], [*stack, rank, *out]
    )
    square = _sums(half, [*stack, rank, *out], b, [*stack, rank, *out], [*stack, *out])
    whole = _sums(w, axes, w, axes, [*stack, *out])
    sizes = jnp.diagonal(gram, axis1=-2, axis2=-1)
    apart = _sums(sizes, [*stack, rank], b * b, [*stack, rank, *out], [*stack, *out])
    s = _scale(weight, len(out)).astype(dtype)
    return whole + 2 * s * cross + s * s * square, whole + s * s * apart


def _sums(*operands: Any) -> jax.Array:
    """An einsum, with axes given as lists of numbers."""
    return jnp.einsum(*operands, precision=lax.Precision.HIGHEST)


def _scale(weight: LoraWeight, ones: int) -> np.ndarray:
    """The scale in float64, with axes of length 1 behind those of a stack."""
    scale = np.asarray(weight.scale, np.float64)
    return scale.reshape(*scale.shape, *(1,) * ones)


def _by_slabs(weight: LoraWeight) -> jax.Array:
    """‖W + s A B‖² `[*stack, *out]` in float32, from slabs along the longest in axis.

    Each slab has rows of every device that W may be sharded over along that axis.
    """
    layout, shape = weight.layout, weight.base.shape
    stack, in_, out = ([*group] for group in (layout.stack, layout.in_, layout.out))
    axes, rank = [*range(len(shape))], len(shape)
    w, (first, rest) = dequantized(weight.base), _divided(weight)
    of_a, of_b = [*stack, *in_, rank], [*stack, rank, *out]
    at = max(in_, key=lambda i: shape[i])
    devices = target().devices
    shares = math.gcd(shape[at], devices)
    shares = 1 if shares == shape[at] else shares
    length = shape[at] // shares
    count = max(2, math.ceil(math.prod(shape) / (_SLAB * devices)))
    rows = math.ceil(length / min(count, length))

    def slab(x: Any, axis: int, start: Any) -> Any:
        split = x.reshape(*x.shape[:axis], shares, length, *x.shape[axis + 1 :])
        cut = lax.dynamic_slice_in_dim(split, start, rows, axis + 1)
        return cut.reshape(*x.shape[:axis], shares * rows, *x.shape[axis + 1 :])

    def add(i: Any, total: Any) -> Any:
        start = jnp.minimum(i * rows, length - rows)
        x = slab(w, at, start).astype(jnp.float32)
        for a, b in (first, rest):
            x = x + _sums(slab(a, of_a.index(at), start), of_a, b, of_b, axes)
        is_new = jnp.tile(start + jnp.arange(rows) >= i * rows, shares)
        x = x * lax.expand_dims(is_new, [j for j in axes if j != at])
        return total + _sums(x, axes, x, axes, [*stack, *out])

    zeros = 0 * first[1].sum(len(stack))
    return lax.fori_loop(0, math.ceil(length / rows), add, zeros)


def _divided(weight: LoraWeight) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """`(A₁, B₁)` and `(A', B')` with s A B = A₁ B₁ + A' B', the former exact.

    All sums of an output in A₁ B₁ are multiples of one power of two, below 2²⁴ times
    it, so that float32 holds them.  A' B' is some thousand times smaller.
    """
    layout, scale = weight.layout, _scale(weight, 1 + len(weight.layout.out))
    n, high = len(layout.stack), _rounded_scale(scale)
    a, b = weight.a.astype(jnp.float32), weight.b.astype(jnp.float32)
    b1 = lax.reduce_precision(b, exponent_bits=8, mantissa_bits=11)
    s1, s2 = (jnp.asarray(s, jnp.float32) for s in (high, scale - high))
    product, left = s1 * b1, s1 * (b - b1) + s2 * b  # 12 bits times 12 are exact
    largest = jnp.max(jnp.abs(a), range(n, a.ndim - 1))  # [*stack, rank]
    unit = _power_of_two(largest) * 2**-11
    unit = jnp.where(unit == 0, 1, unit)

    def spread(x: Any) -> Any:
        return lax.expand_dims(x, range(n + 1, b.ndim))

    sums = jnp.sum(spread(largest) * jnp.abs(product), n, keepdims=True)
    a1 = _to_multiples(a, lax.expand_dims(unit, range(n, a.ndim - 1)))
    b1 = _to_multiples(product, _power_of_two(sums) * 2**-22 / spread(unit))
    more = [a1, a - a1], [(product - b1) + left, product + left]
    return (a1, b1), (jnp.concatenate(more[0], -1), jnp.concatenate(more[1], n))


def _rounded_scale(scale: np.ndarray) -> np.ndarray:
    """To 12 bits."""
    part, exponent = np.frexp(scale)
    return np.ldexp(np.round(np.ldexp(part, 12)), exponent - 12)


def _power_of_two(x: Any) -> Any:
    """The largest that is not above x; 0 for 0."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _to_multiples(x: Any, unit: Any) -> Any:
    """x rounded to a multiple of a power of two, of which it is at most 2²² times."""
    shift = unit * (1.5 * 2**23)
    return (x + shift) - shift
