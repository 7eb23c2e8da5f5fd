"""`Quantized`: a frozen weight stored in fewer bits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.arrays import shown
from flora._tree.errors import LoraTypeError


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A frozen weight in fewer bits, dequantized where it is used.

    Attributes:
      values: a pytree with the weight's `shape` and `dtype`; each of its arrays has the
        weight's axes, one element each or one a block.
      dequantize: makes the dense weight of `values`.
    """

    values: Any
    dequantize: Callable[[Any], Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sharding(self) -> Any:
        """That of its largest array, which has the weight's axes."""
        return max(jax.tree.leaves(self.values), key=lambda part: part.size).sharding

    def dense(self) -> jax.Array:
        """The weight as an array, `[...]`."""
        return self.dequantize(self.values)

    def __repr__(self) -> str:
        parts = jax.tree.leaves(self.values)
        if not parts or not all(hasattr(x, "dtype") for x in parts):
            return f"Quantized({self.values!r})"
        return f"Quantized({shown(self)} as {'+'.join(str(x.dtype) for x in parts)})"

    def __jax_array__(self) -> Any:
        raise LoraTypeError(
            f"{self!r} was used as an array. Run the function through flora.lora(fn)."
        )


jax.tree_util.register_dataclass(
    Quantized, data_fields=["values"], meta_fields=["dequantize"]
)


def dequantized(base: Any) -> Any:
    """A weight as an array, dequantized if it is `Quantized`."""
    return base.dense() if is_quantized(base) else base


def abstract(base: Any) -> Any:
    """A quantized weight's shape and dtype as a struct; all else as it is."""
    if not is_quantized(base):
        return base
    return jax.ShapeDtypeStruct(base.shape, base.dtype)


def is_quantized(x: Any) -> bool:
    """Whether x is a weight stored in fewer bits."""
    return isinstance(x, Quantized)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """W ≈ scale · level(code), with one scale a block or an output.

    Attributes:
      qvalue: the codes, `[...]`.
      scale: of each block, one element a block along the axis of blocks; of each
        output, of length 1 along the axes that it sums over.
      qtype: one of `flora.quantize.QTYPES`.
    """

    qvalue: Any
    scale: Any
    qtype: str = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.qvalue.shape)
    dtype = property(lambda self: self.scale.dtype)


def of_codes(values: Codes) -> jax.Array:
    """The weight that the codes stand for."""
    levels = of_levels(Levels(values.qvalue, values.qtype, values.scale.dtype))
    blocks: list[int] = []
    for size, count in zip(levels.shape, values.scale.shape, strict=True):
        blocks += [count, size // max(count, 1)]
    scale = values.scale.reshape([n for c in values.scale.shape for n in (c, 1)])
    return (levels.reshape(blocks) * scale).reshape(levels.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """The levels of codes, without their scale.

    Attributes:
      qvalue: the codes, `[...]`.
      qtype: as of `Codes`.
      dtype: of the weight.
    """

    qvalue: Any
    qtype: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.qvalue.shape)


def of_levels(values: Levels) -> jax.Array:
    """The levels that the codes stand for."""
    codes, dtype = values.qvalue, values.dtype
    # A table that every element looks up is slow on TPU; choosing by bits fuses.
    nf4 = values.qtype == "nf4"
    return _looked_up(codes, LEVELS).astype(dtype) if nf4 else codes.astype(dtype)


def apart(base: Any) -> tuple[Any, Any]:
    """`(C, s)` with W = C ⊙ s where scales are one for each index of some axes.

    s has length 1 along the others; it is `None` where W has no such scales.
    """
    if not is_quantized(base) or base.dequantize is not of_codes:
        return base, None
    codes = base.values
    sizes = zip(codes.qvalue.shape, codes.scale.shape, strict=True)
    if any(count not in (1, size) for size, count in sizes):
        return base, None
    levels = Levels(codes.qvalue, codes.qtype, codes.scale.dtype)
    return Quantized(levels, of_levels), codes.scale


# The levels of NF4, by the code that qwix stores: Dettmers et al. 2023, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _looked_up(codes: jax.Array, levels: Sequence[float]) -> jax.Array:
    """`levels[codes]` of 16 levels, by the four bits of each code."""
    codes = codes.astype(jnp.int32)
    found: list[Any] = [jnp.float32(x) for x in levels]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        found = [
            jnp.where(odd, hi, lo)
            for lo, hi in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]
