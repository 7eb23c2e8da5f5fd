"""`Quantized`: a frozen weight that is stored in fewer bits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flora._tree.arrays import shown
from flora._tree.errors import LoraTypeError


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A frozen weight that is stored in fewer bits, and opened where it is used.

    Attributes:
      stored: what is stored, a pytree with the weight's `shape` and `dtype`; each of
        its arrays has the weight's axes, whole or in blocks.
      opener: makes the dense weight of it.
    """

    stored: Any
    opener: Callable[[Any], Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> Any:
        return self.stored.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        """The weight as an array, `[...]`."""
        return self.opener(self.stored)

    def __repr__(self) -> str:
        parts = jax.tree.leaves(self.stored)
        if not parts or not all(hasattr(x, "dtype") for x in parts):
            return f"Quantized({self.stored!r})"
        return f"Quantized({shown(self)} as {'+'.join(str(x.dtype) for x in parts)})"

    def __jax_array__(self) -> Any:
        raise LoraTypeError(
            f"{self!r} was used as an array. Run the function through flora.lora(fn)."
        )


jax.tree_util.register_dataclass(
    Quantized, data_fields=["stored"], meta_fields=["opener"]
)


def opened(base: Any) -> Any:
    """A weight as an array."""
    return base.dense() if is_stored(base) else base


def abstract(base: Any) -> Any:
    """A stored weight as the array that it stands for, without its values."""
    if not is_stored(base):
        return base
    return jax.ShapeDtypeStruct(base.shape, base.dtype)


def is_stored(x: Any) -> bool:
    """Whether x is a weight stored in fewer bits."""
    return isinstance(x, Quantized)
