"""`Block`: one of the adapters that share the A and B of a weight.

Layers of a stack may have ranks and scales of their own, or none, and so may the
modules that share a weight's out features.  A and B are as they would be alone, side by
side along the rank; what is outside all blocks is zero and stays so.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Block:
    """The adapter of some indices of a stack, in some of the out features.

    ΔW there is scale A[..., start:stop] B[start:stop, ...].

    Attributes:
      index: along the first axes of the stack; it holds for all indices of the others.
      start: its first rank.
      stop: behind its last rank.
      scale: of its A B.
      columns: its first out feature and the one behind its last, all out axes taken as
        one; `None` for all.
    """

    index: tuple[int, ...]
    start: int
    stop: int
    scale: float
    columns: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.stop - self.start


Blocks = Sequence[Block]


def gates(
    blocks: Blocks, stack: Sequence[int], rank: int, out: Sequence[int]
) -> jax.Array:
    """What B is multiplied by, `[*stack, rank, *out]`: 0 outside of all blocks.

    The out axes have length 1 where all blocks have all out features.
    """
    scales = np.zeros((*stack, rank))
    for block in blocks:
        scales[block.index][..., block.start : block.stop] = block.scale
    if all(block.columns is None for block in blocks):
        return jnp.asarray(scales.reshape(*stack, rank, *(1 for _ in out)))
    width = int(np.prod(out))
    spans = sorted({block.columns or (0, width) for block in blocks})
    rows, columns = np.full(scales.shape, -1), np.full(width, -2)
    for i, (first, end) in enumerate(spans):
        columns[first:end] = i
    for block in blocks:
        at = spans.index(block.columns or (0, width))
        rows[block.index][..., block.start : block.stop] = at
    own = jnp.asarray(rows)[..., None] == jnp.asarray(columns)
    return jnp.where(own, scales[..., None], 0.0).reshape(*stack, rank, *out)


def covered(blocks: Blocks, stack: Sequence[int], out: Sequence[int]) -> np.ndarray:
    """Which outputs of which matrices are adapted, bool `[*stack, *out]`."""
    found = np.zeros((*stack, int(np.prod(out))), bool)
    for block in blocks:
        found[block.index][..., slice(*(block.columns or (None,)))] = True
    return found.reshape(*stack, *out)


def problem(blocks: Blocks, stack: Sequence[int], rank: int, out: int) -> str:
    """Why blocks do not fit a weight's stack, rank and out features; or ''."""
    for block in blocks:
        first, end = block.columns or (0, out)
        index = zip(block.index, stack, strict=False)
        if (
            len(block.index) > len(stack)
            or any(not 0 <= i < n for i, n in index)
            or not 0 <= block.start < block.stop <= rank
            or not 0 <= first < end <= out
        ):
            return (
                f"{block} does not lie in a stack of shape {(*stack,)}, rank {rank} "
                f"and {out} out features"
            )
    return ""
