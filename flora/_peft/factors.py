"""From the tensors of adapted modules to the node of a leaf.

A `[r, in]`, B `[out, r]` of PEFT are the transposes of flora's a and b.  Layers and
experts that share a leaf are stacked; modules that share its out features become blocks
of one b, whose rank is the sum of theirs.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flora._peft.keys import Lora
from flora._peft.kinds.groups import AcrossGroups, blocks, spread
from flora._peft.kinds.twice import AddedTwice
from flora._peft.layouts import leaf_word
from flora._peft.naming.names import Slot
from flora._tree.blocks import Block
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, Variant


@dataclasses.dataclass(frozen=True)
class Piece:
    """The adapter of one parameter and where in a leaf it belongs."""

    lora: Lora
    slot: Slot
    index: tuple[int, ...]
    rank: int
    alpha: float
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (
            math.sqrt(self.rank) if self.rank_stabilized else self.rank
        )


def positions(slot: Slot, beside: Sequence[Slot], out: int) -> np.ndarray:
    """Which of a leaf's out features a parameter's rows are, in order."""
    k, n = slot.part
    if n == 1:
        return np.arange(out)
    widths = [_width(s, out) for s in sorted(beside, key=lambda s: s.part)]
    if sum(widths) != out:
        raise LoraError(
            f"names: the modules of '{slot.path}' have {' + '.join(map(str, widths))} "
            f"rows; the leaf has {out} out features. Write rows= for each."
        )
    return np.arange(sum(widths[:k]), sum(widths[: k + 1]))


def _width(slot: Slot, out: int) -> int:
    rows = slot.module.order
    return out // slot.part[1] if rows is None else len(tuple(rows))


def is_channel_last(path: str, sizes: Sequence[int], window: Sequence[int]) -> bool:
    """Whether the channels come after the window among a kernel's in axes."""
    last, first = tuple(sizes[:-1]) == (*window,), tuple(sizes[1:]) == (*window,)
    return last and not (first and leaf_word(path) == "weight")


def matrices(piece: Piece, layout: Layout, shape: Sequence[int]) -> tuple[Any, Any]:
    """A `[*experts, in, r]` and b `[*experts, r, n]`, features as the leaf has them."""
    lora, slot = piece.lora, piece.slot
    stack, in_, _ = layout.sizes(shape)
    experts = stack[slot.holes :]
    if lora.kind == "conv":
        a, b = _of_conv(lora, slot, in_)
    elif experts or lora.a.shape[0] != piece.rank:
        count = math.prod(experts)
        a = lora.a.reshape(count, -1, lora.a.shape[1]).swapaxes(1, 2)
        b = lora.b.reshape(lora.b.shape[0], -1, count).transpose(2, 1, 0)
        a = a.reshape(*experts, *a.shape[1:])
        b = b.reshape(*experts, *b.shape[1:])
    else:
        a, b = lora.a.T, lora.b.T
    if slot.module.columns is not None:
        a = a[..., list(slot.module.columns), :]
    return a, b if slot.module.order is None else b[..., _rows(slot)]


def _rows(slot: Slot) -> list[int]:
    return list(slot.module.order or ())


def _of_conv(lora: Lora, slot: Slot, in_: Sequence[int]) -> tuple[Any, Any]:
    """A `[window · in, r]` and b `[r, out]` of a convolution."""
    _, channels, *window = lora.a.shape
    last = is_channel_last(slot.path, in_, window)
    own = in_[-1] if last else in_[0]
    b = lora.b.reshape(lora.b.shape[:2])
    groups = channels // own
    a = lora.a
    if groups == 1:
        b = b.T
    elif (own := _apart(a, groups)) is None:
        a, b = spread(a, b, groups)
    else:
        a, b = own, blocks(b, groups)
    if last:
        a = np.moveaxis(a, 1, -1)
    return a.reshape(a.shape[0], -1).T, b


def _apart(a: np.ndarray, groups: int) -> np.ndarray | None:
    """A `[r, in/g, *window]` if no group reads the channels of another."""
    r, channels, *window = a.shape
    parts = a.reshape(groups, r // groups, groups, channels // groups, *window)
    own = np.stack([parts[k, :, k] for k in range(groups)])
    if np.count_nonzero(parts) > np.count_nonzero(own):
        return None
    return own.reshape(r, channels // groups, *window)


def across(piece: Piece, layout: Layout, shape: Sequence[int]) -> int:
    """How many groups a convolution's adapter reads across; 0 if it does not."""
    lora = piece.lora
    if lora.kind != "conv" or lora.b.shape[1] == piece.rank:
        return 0
    groups = piece.rank // lora.b.shape[1]
    return groups if _apart(lora.a, groups) is None else 0


def node(
    path: str,
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
) -> LoraWeight:
    """The node of a leaf, its factors and magnitude NumPy arrays."""
    shape = tuple(base.shape)
    stack, in_, out = layout.sizes(shape)
    _, rows, wide = layout.matrix(shape)
    made = [(p, *matrices(p, layout, shape)) for p in pieces]
    used: dict[tuple[int, ...], int] = {}
    for p, a, _ in made:
        used[p.index] = used.get(p.index, 0) + a.shape[-1]
    rank = max(used.values())
    dtype = np.result_type(*(x.dtype for _, a, b in made for x in (a, b)))
    a_all = np.zeros((*stack, rows, rank), dtype)
    b_all = np.zeros((*stack, rank, wide), dtype)
    blocks, ends = [], dict.fromkeys(used, 0)
    for p, a, b in made:
        ranks = slice(ends[p.index], ends[p.index] + a.shape[-1])
        ends[p.index] = ranks.stop
        a_all[p.index][..., :, ranks] = a
        at = positions(p.slot, beside, wide)
        b_all[p.index][..., ranks, at] = b
        columns = None if len(at) == wide else (int(at[0]), int(at[-1]) + 1)
        blocks.append(Block(p.index, ranks.start, ranks.stop, p.scale, columns))
    first = pieces[0]
    one = _is_one(blocks, pieces, stack)
    own = not one or rank == first.rank  # a convolution in groups has ranks of its own
    return LoraWeight(
        base,
        a_all.reshape(*stack, *in_, rank),
        b_all.reshape(*stack, rank, *out),
        layout=layout,
        rank=rank,
        alpha=float(first.alpha if own else first.scale * rank),
        rank_stabilized=own and first.rank_stabilized,
        variant=_variant(path, pieces, layout, shape),
        blocks=() if one else tuple(blocks),
    )


def _variant(
    path: str, pieces: Sequence[Piece], layout: Layout, shape: Sequence[int]
) -> Variant | None:
    if any(p.lora.inner for p in pieces):
        return AddedTwice()
    groups = max(across(p, layout, shape) for p in pieces)
    if not groups:
        return None
    if layout.stack or any(p.lora.magnitude is not None for p in pieces):
        raise LoraError(
            f"'{path}' is a convolution in {groups} groups whose adapter reads across "
            "them; flora has that neither for stacked kernels nor with DoRA. Train "
            "without that layer in target_modules."
        )
    return AcrossGroups(groups)


def _is_one(
    blocks: Sequence[Block], pieces: Sequence[Piece], stack: Sequence[int]
) -> bool:
    """Whether the blocks are one adapter of the whole leaf."""
    alike = {(p.rank, p.alpha, p.rank_stabilized) for p in pieces}
    parts = {(x.start, x.stop, x.columns) for x in blocks}
    every = math.prod(stack[: len(blocks[0].index)])
    return len(alike) == len(parts) == 1 and len(blocks) == every


def magnitude(
    layout: Layout,
    shape: Sequence[int],
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
) -> Any:
    """DoRA's magnitudes `[*stack, *out]` of a leaf; 0 where it is not adapted."""
    stack, _, out = layout.sizes(shape)
    found = np.zeros((*stack, layout.matrix(shape)[2]), np.float64)
    for p in pieces:
        m = np.asarray(p.lora.magnitude).reshape(-1)
        m = m if p.slot.module.order is None else m[_rows(p.slot)]
        found[(*p.index, positions(p.slot, beside, found.shape[-1]))] = m
    dtype = np.result_type(*(np.asarray(p.lora.magnitude).dtype for p in pieces))
    return found.astype(dtype).reshape(*stack, *out)
