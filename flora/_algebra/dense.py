"""ΔW and W + ΔW as dense arrays: to merge, to measure, to ship."""

from typing import Any

import jax
from jax import lax

from flora._tree.arrays import compute_dtype
from flora._tree.errors import Unfactorable
from flora._tree.layout import Layout
from flora._tree.quantized import dequantized
from flora._tree.weight import LoraWeight, Product, product_of, scale_of


def delta(weight: LoraWeight) -> jax.Array:
    """W_eff - W in W's shape, in float32 or wider: scale A B for plain LoRA."""
    product = product_of(weight)
    change = _low_rank(weight, product)
    if product.columns is None:
        return change
    base = dequantized(weight.base).astype(change.dtype)
    return (base + change) * _spread(weight, product, change.dtype) - base


def materialize(weight: LoraWeight) -> jax.Array:
    """(W + scale A B) ⊙ columns, in float32 or wider, rounded once to W's dtype."""
    product = product_of(weight)
    change, base = _low_rank(weight, product), dequantized(weight.base)
    whole = base.astype(change.dtype) + change
    if product.columns is not None:
        whole = whole * _spread(weight, product, change.dtype)
    return whole.astype(base.dtype)


def _low_rank(weight: LoraWeight, product: Product) -> jax.Array:
    """Scale A B in W's shape, in float32 or wider."""
    if product.between is not None:
        raise Unfactorable(
            f"{weight.variant!r} puts a function between A and B: no sum with W is that"
        )
    layout, shape = weight.layout, weight.base.shape
    stack, in_, out = layout.matrix(shape)
    a, b = product.a, product.b
    dtype = compute_dtype(a.dtype, b.dtype, weight.base.dtype)
    a = a.astype(dtype).reshape(stack, in_, -1)
    b = b.astype(dtype).reshape(stack, -1, out)
    dims = (((2,), (1,)), ((0,), (0,)))
    ab = lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)
    return scale_of(weight) * in_place(ab, layout, shape)


def _spread(weight: LoraWeight, product: Product, dtype: Any) -> jax.Array:
    """A factor for each output, as an array that W's shape broadcasts with."""
    layout, shape = weight.layout, weight.base.shape
    ones = tuple(1 if i in layout.in_ else n for i, n in enumerate(shape))
    return in_place(product.columns.astype(dtype), layout, ones)


def in_place(x: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """An array in the order `[*stack, *in, *out]` with its axes where W has them."""
    order = layout.order
    x = x.reshape([shape[i] for i in order])
    return x.transpose([order.index(i) for i in range(len(shape))])
