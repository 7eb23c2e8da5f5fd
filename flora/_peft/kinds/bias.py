"""PEFT's `lora_bias`: y = x W + bias + scale ((x A) B + c), where c trains too.

Where the base has a bias, c is a change of it, bias + scale c, which merges.  Where it
has none, or that one trains whole itself, c is one more row of B, and the hidden value
that meets it is 1.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._peft.config import PeftConfig
from flora._peft.factors import Piece, positions
from flora._peft.keys import PREFIX, Content, Lora
from flora._peft.naming.names import Finder, Slot, split_name
from flora._tree.blocks import Block
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, Product


@dataclasses.dataclass(frozen=True)
class Added:
    """The variant of a bias: bias + scale A B, where A is 1 and B is c, `[1, *out]`."""

    frozen = ("a",)

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b)


@dataclasses.dataclass(frozen=True)
class Biased:
    """The variant of a weight whose last row of B is c; no sum with W is that."""

    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b, None, _with_one)


def _with_one(z: Any) -> Any:
    return z.at[..., -1].set(1)


def pieces_of(
    content: Content, config: PeftConfig, finder: Finder, whole: Collection[str]
) -> tuple[Content, dict[str, list[Piece]]]:
    """The content without what changes a bias of the base, and these changes by leaf.

    A bias that trains whole itself, one of the leaves `whole`, is left alone.
    """
    kept, found = [], {}
    for lora in content.loras:
        hits = [] if lora.bias is None else finder.all(f"{lora.module}.bias")
        if hits and not any(slot.path in whole for slot, _ in hits):
            c = np.asarray(lora.bias).reshape(-1, 1)
            one = np.ones_like(c[:1])
            own = Lora(lora.module, one, c, parameter="bias", dtype=lora.dtype)
            for slot, index in hits:
                piece = Piece(own, slot, index, 1, float(config.scale(lora.site)))
                found.setdefault(slot.path, []).append(piece)
            lora = dataclasses.replace(lora, bias=None)
        kept.append(lora)
    return dataclasses.replace(content, loras=tuple(kept)), found


def layout_of(
    path: str,
    shape: Sequence[int],
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    file: Path,
) -> Layout:
    """The layout of a bias, which has no in axis, checked against its pieces."""
    shape, holes = tuple(shape), pieces[0].slot.holes
    axes = tuple(range(len(shape)))
    layout = Layout(axes[:holes], (), axes[holes:])
    size = math.prod(shape[holes:])
    for p in pieces:
        order = p.slot.module.order
        at = positions(p.slot, beside, size)
        own = len(p.lora.b) if order is None else len(order)
        if len(at) != own or any(i >= n for i, n in zip(p.index, shape, strict=False)):
            raise LoraError(
                f"{file}: '{PREFIX}{p.lora.module}.lora_B.bias' has {len(p.lora.b)} "
                f"values at {p.index}; expected {len(at)} for '{path}' of shape "
                f"{shape}. Is it the adapter of another base?"
            )
    return layout


def biases(
    nodes: Mapping[str, LoraWeight], by_path: Mapping[str, Sequence[Slot]]
) -> dict[str, tuple[float, np.ndarray]]:
    """`{module: (scale, c)}` of the biases that are changed."""
    found: dict[str, list[tuple[float, Any, np.ndarray]]] = {}
    for path, x in nodes.items():
        n = len(x.layout.stack)
        c = np.asarray(x.b).reshape(*x.b.shape[: n + 1], -1)
        beside = [slot for slot in by_path[path] if not slot.module.tied]
        for slot in beside:
            at = positions(slot, beside, c.shape[-1])
            for index in np.ndindex(*c.shape[: slot.holes]):
                held = [b for b in x.blocks if _holds(b, index, at)]
                if x.blocks and not held:
                    continue
                scale = held[0].scale if held else x.scale
                row = held[0].start if held else 0
                name = split_name(slot.at(index))[0]
                some = found.setdefault(name, [])
                some.append((scale, slot.module.order, c[index][..., row, at]))
    return {
        name: (s[0][0], joined_bias(s, s[0][0], _rows_of(name, by_path)))
        for name, s in found.items()
    }


def _rows_of(module: str, by_path: Mapping[str, Sequence[Slot]]) -> int:
    """How many rows of a module's bias leaves hold that have some of them each."""
    slots = (s for some in by_path.values() for s in some)
    return sum(
        len(s.module.order or ())
        for s in slots
        if s.index(f"{module}.bias") is not None
    )


def _holds(block: Block, index: Sequence[int], at: np.ndarray) -> bool:
    first, end = block.columns or (at[0], at[-1] + 1)
    mine = tuple(index[: len(block.index)]) == block.index
    return mine and first <= at[0] and at[-1] < end


def joined_bias(
    some: Sequence[tuple[float, Sequence[int] | None, np.ndarray]],
    scale: float,
    total: int,
) -> np.ndarray:
    """The c of a module, of `(its scale, rows, c)` in each leaf that it lies in.

    It has `total` rows, zeros where no leaf has them.
    """
    own, rows, c = some[0]
    if rows is None:
        return c
    whole = np.zeros(total, c.dtype)
    for own, rows, values in some:
        whole[list(rows or ())] = values * c.dtype.type(own / scale)
    return whole


def with_bias(
    weight: LoraWeight, pieces: Sequence[Piece], beside: Sequence[Slot]
) -> LoraWeight:
    """The node with one more rank for the biases that its pieces have, if any."""
    held = [p for p in pieces if p.lora.bias is not None]
    if not held:
        return weight
    if weight.variant is not None:
        raise LoraError(
            f"'{pieces[0].slot.path}' is {weight.variant!r}, which flora does not have "
            "together with lora_bias. Train without one of them."
        )
    n = len(weight.layout.stack)
    b = np.asarray(weight.b).reshape(*weight.b.shape[: n + 1], -1)
    c = np.zeros((*b.shape[:n], 1, b.shape[-1]), b.dtype)
    blocks, rank = [*weight.blocks], weight.a.shape[-1]
    for p in held:
        at = positions(p.slot, beside, b.shape[-1])
        own = np.asarray(p.lora.bias)
        own = own if p.slot.module.order is None else own[list(p.slot.module.order)]
        c[p.index][..., 0, at] = own
        columns = None if len(at) == b.shape[-1] else (int(at[0]), int(at[-1]) + 1)
        blocks.append(Block(p.index, rank, rank + 1, p.scale, columns))
    a = np.asarray(weight.a)
    new = dataclasses.replace(
        weight,
        a=np.concatenate([a, np.zeros_like(a[..., :1])], -1),
        b=np.concatenate([b, c], n).reshape(
            *weight.b.shape[:n], rank + 1, *weight.b.shape[n + 1 :]
        ),
        rank=rank + 1,
        variant=Biased(),
    )
    if weight.blocks:
        return dataclasses.replace(new, blocks=tuple(blocks))
    alpha = weight.scale * (rank + 1)
    return dataclasses.replace(new, alpha=alpha, rank_stabilized=False)


def apart(weight: LoraWeight) -> tuple[LoraWeight, np.ndarray | None]:
    """The reverse of `with_bias`: the weight, and c as `[*stack, out]`."""
    if not isinstance(weight.variant, Biased):
        return weight, None
    n, rank = len(weight.layout.stack), weight.a.shape[-1] - 1
    b = np.asarray(weight.b).reshape(*weight.b.shape[: n + 1], -1)
    blocks = tuple(x for x in weight.blocks if x.start < rank)
    alpha = weight.alpha if weight.blocks else weight.scale * rank
    return dataclasses.replace(
        weight,
        a=np.asarray(weight.a)[..., :rank],
        b=np.take(np.asarray(weight.b), range(rank), n),
        rank=rank,
        alpha=alpha,
        rank_stabilized=False,
        blocks=blocks,
        variant=None,
    ), b[..., rank, :]
