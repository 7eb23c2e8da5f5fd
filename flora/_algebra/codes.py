"""Weights in fewer bits inside the interpreter: W = C ⊙ s, codes with a scale apart.

Where s does not vary along what a product sums over, the product is of C, and its
result or its other operand is scaled: the cast of C rides on the product's own read,
and no array of W's shape is written.

    y = (x C) ⊙ s,   dx = (dy ⊙ s) Cᵀ
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import Factored, Named, Sizes
from flora._tree.quantized import (
    Levels,
    Quantized,
    dequantized,
    is_quantized,
    of_levels,
)


def is_codes(x: Any) -> bool:
    """Whether x is a weight that is stored as codes with a scale apart."""
    return isinstance(x, Factored) and x.base_scale is not None


def with_scale(w: Any) -> Any:
    """The weight, its scale again where its codes are."""
    if not is_codes(w):
        return w
    sizes = tuple(x.size for x in w.pieces)
    values = _Scaled(w.base.values, w.base_scale.aligned(w.names), sizes)
    base = Quantized(values, _of_scaled)
    return dataclasses.replace(w, base=base, base_scale=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scaled:
    """W = C ⊙ s.

    Attributes:
      levels: C.
      scale: s, with an axis for each of `sizes`.
      sizes: of the pieces of W's axes.
    """

    levels: Levels
    scale: Any
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.levels.shape)
    dtype = property(lambda self: self.levels.dtype)


def _of_scaled(values: _Scaled) -> jax.Array:
    """W in the dtype of its scale, rounded to its own."""
    levels, scale = values.levels, values.scale
    c = of_levels(dataclasses.replace(levels, dtype=scale.dtype))
    w = lax.reshape(c, values.sizes) * scale
    return lax.reshape(w, values.shape).astype(values.dtype)


def with_dtype(w: Factored, dtype: Any) -> Factored:
    """A quantized weight, cast."""
    dtype, base = jnp.dtype(dtype), w.base
    if is_codes(w):
        levels = dataclasses.replace(base.values, dtype=dtype)
        return dataclasses.replace(w, base=Quantized(levels, of_levels))
    cast = Quantized(_Cast(base.values, dtype), _OfCast(base.dequantize))
    return dataclasses.replace(w, base=cast)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Cast:
    values: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.values.shape)


@dataclasses.dataclass(frozen=True)
class _OfCast:
    dequantize: Callable[[Any], Any]

    def __call__(self, values: _Cast) -> jax.Array:
        return self.dequantize(values.values).astype(values.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight in fewer bits or scaled, with named axes, in the place of a `Named`.

    Attributes:
      base: W; or C, where there is a scale.
      names: of its pieces.
      sizes: of its pieces.
      scale: s, or `None`.
      in_blocks: whether no product can be of codes, so that each dequantizes them.
    """

    base: Any
    scale: Named | None
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    in_blocks: bool = dataclasses.field(metadata={"static": True})

    def split(self, pieces: Mapping[str, Sizes]) -> "Stored":
        """With axes in the place of some, as `Named.split` has them."""
        sizes = [
            part
            for n, size in zip(self.names, self.sizes, strict=True)
            for part in pieces.get(n, ((n, size),))
        ]
        names, lengths = zip(*sizes, strict=True)
        scale = None if self.scale is None else self.scale.split(pieces)
        return dataclasses.replace(self, scale=scale, names=names, sizes=lengths)

    def opened(self) -> Named:
        """W or C as an array.

        Scales of blocks are multiplied in W's own shape: in that of its pieces, such as
        heads, TPUs would lay out every step anew.
        """
        w = dequantized(self.base)
        if self.in_blocks and w.shape != self.sizes:
            w = lax.optimization_barrier(w)
        return Named(lax.reshape(w, self.sizes), self.names)

    def after(self, u: Any) -> tuple["Stored", Any]:
        """The weight, not opened before u is there, and u.

        What waits is the smallest array, such as scales: the codes, which may be a
        slice of a stack, are read where they lie.
        """
        leaves, treedef = jax.tree.flatten(self.base)
        least = min(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[least], u = lax.optimization_barrier((leaves[least], u))
        return dataclasses.replace(self, base=treedef.unflatten(leaves)), u

    def dense(self) -> Named:
        """W as an array."""
        w = self.opened()
        return w if self.scale is None else scaled(w, self.scale)


def stored(w: Factored, *ends: tuple[str, ...]) -> Any:
    """The base as an operand: a `Named`, or `Stored` where it is quantized.

    Args:
      w: the weight.
      *ends: the names of x and of the result; one of them must have all of the scale's,
        or the scale is no longer apart.
    """
    sizes = tuple(x.size for x in w.pieces)
    if not is_quantized(w.base):
        return Named(lax.reshape(w.base, sizes), w.names)
    by = w.base_scale
    if by is not None and not any({*by.names} <= {*names} for names in ends):
        w = with_scale(w)
    return Stored(w.base, w.base_scale, w.names, sizes, w.base_scale is None)


def with_scaled_outputs(base: Any, by: Named) -> Stored | None:
    """The base of `stored` with its outputs scaled; `None` if its inputs are."""
    if isinstance(base, Named):
        return Stored(base.array, by, base.names, base.array.shape, False)
    if base.scale is None:
        return dataclasses.replace(base, scale=by)
    if not {*base.scale.names} <= {*by.names}:
        return None
    return dataclasses.replace(base, scale=by.times(base.scale))


def scaled(u: Named, scale: Named, apply: Callable = lax.mul) -> Named:
    """U ⊙ s in float32 or wider, rounded to u's dtype."""
    wide = jnp.result_type(u.dtype, scale.dtype, jnp.float32)
    return u.astype(wide).times(scale, apply).astype(u.dtype)
