"""`Layout`: which axes of a weight are stacked, contracted and produced."""

import dataclasses
import math
from collections.abc import Sequence

from flora._tree.errors import LoraTypeError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are stacked, contracted and produced.

    Attributes:
      stack: axes that index independent matrices (nn.scan, nn.vmap, experts).
      in_: axes that are contracted with activations, or indexed in an embedding.
      out: axes that the product keeps.

    Raises:
      LoraTypeError: an attribute is not a tuple or list of ints.

    Example:
      >>> heads = Layout(in_=(0,), out=(1, 2))  # a kernel [in, heads, dim]
      >>> heads.matrix((64, 8, 32))
      (1, 64, 256)
    """

    stack: tuple[int, ...] = ()
    in_: tuple[int, ...] = (0,)
    out: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("stack", "in_", "out"):  # lists too: a layout must be hashable
            axes = getattr(self, name)
            if not isinstance(axes, tuple | list) or not all(
                isinstance(i, int) and not isinstance(i, bool) for i in axes
            ):
                raise LoraTypeError(
                    f"Layout: {name}={axes!r}. Write a tuple of axes, such as (0, 1)."
                )
            object.__setattr__(self, name, tuple(axes))

    def role(self, axis: int) -> str:
        """'stack', 'in' or 'out'."""
        if axis in self.stack:
            return "stack"
        return "in" if axis in self.in_ else "out"

    def fits(self, ndim: int) -> bool:
        """Whether it names each of `ndim` axes once, with an out axis.

        A bias has no in axis.
        """
        axes = sorted(self.order)
        return axes == list(range(ndim)) and bool(self.out)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes: those of the stack, then in, then out."""
        return (*self.stack, *self.in_, *self.out)

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The sizes of the stack, in and out axes of a weight of that shape."""
        return tuple(
            tuple(shape[i] for i in axes) for axes in (self.stack, self.in_, self.out)
        )

    def matrix(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(stack, in, out): a weight of that shape as `stack` matrices in × out."""
        stack, in_, out = (math.prod(axes) for axes in self.sizes(shape))
        return stack, in_, out

    def factor_shapes(
        self, shape: Sequence[int], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `a` `[*stack, *in, rank]` and `b` `[*stack, rank, *out]`."""
        stack, in_, out = self.sizes(shape)
        return (*stack, *in_, rank), (*stack, rank, *out)

    def __str__(self) -> str:
        named = (("stack", self.stack), ("in", self.in_), ("out", self.out))
        return " ".join(f"{n}={','.join(map(str, a))}" for n, a in named if a)
