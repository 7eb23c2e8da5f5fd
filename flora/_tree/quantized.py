"""`Quantized`: a frozen weight stored in fewer bits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

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
