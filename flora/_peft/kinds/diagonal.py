"""BD-LoRA: an A or a B of blocks on its diagonal, of which PEFT saves the blocks alone.

References: https://huggingface.co/docs/peft/developer_guides/lora#bd-lora
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._peft.config import CONFIG, PeftConfig
from flora._peft.factors import Piece
from flora._peft.keys import Content, Lora
from flora._peft.parts import Part
from flora._tree.errors import LoraError, fail
from flora._tree.weight import LoraWeight, Product


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """The variant: A, or B, is zero outside of its blocks and stays so.

    Attributes:
      side: 'a' or 'b'.
      blocks: how many there are; the k-th has the k-th part of the ranks and of the in
        or out features.
    """

    side: str
    blocks: int
    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        n, a, b = len(weight.layout.stack), weight.a, weight.b
        if self.side == "a":
            sizes = a.shape[n:-1]
            own = self._own(int(np.prod(sizes)), a.shape[-1])
            return Product(a * own.reshape(*sizes, -1).astype(a.dtype), b)
        sizes = b.shape[n + 1 :]
        own = self._own(int(np.prod(sizes)), b.shape[n]).T
        return Product(a, b * own.reshape(-1, *sizes).astype(b.dtype))

    def _own(self, features: int, rank: int) -> np.ndarray:
        """Which of `[features, rank]` lie in a block."""
        of_features = np.arange(features) * self.blocks // features
        return of_features[:, None] == np.arange(rank) * self.blocks // rank


def expanded(content: Content, config: PeftConfig, file: Path) -> Content:
    """The content with A and B in full, zeros outside of their blocks."""
    if not config.use_bdlora:
        return content
    fail(_problems(content, config, file))
    loras = [
        _expanded(lora, *config.diagonal_of(lora.module)) for lora in content.loras
    ]
    return dataclasses.replace(content, loras=tuple(loras))


def _problems(content: Content, config: PeftConfig, file: Path) -> list[str]:
    found = []
    for lora in content.loras:
        side, blocks = config.diagonal_of(lora.module)
        if lora.kind != "linear" or lora.raw:
            found.append(
                f"{file}: '{lora.key('a')}' is of no linear layer, the only one that "
                "PEFT's use_bdlora takes. Save the adapter anew."
            )
        elif side == "both" or (side == "" and config.use_bdlora["match_strict"]):
            found.append(
                f"{file.parent / CONFIG}: use_bdlora names '{lora.module}' in "
                f"{'both lists' if side else 'no list'}. Name it in one, or set "
                "match_strict: false for those in none."
            )
        elif side:
            shape = getattr(lora, side).shape
            if shape[0] % blocks or lora.a.shape[0] % blocks:
                found.append(
                    f"{file}: '{lora.key(side)}' has shape {shape} and rank "
                    f"{lora.a.shape[0]}, no multiples of nblocks, {blocks}. Correct it."
                )
    return found


def _expanded(lora: Lora, side: str, blocks: int) -> Lora:
    if not side or blocks == 1:
        return lora
    held = np.asarray(getattr(lora, side))
    rows, wide = held.shape[0] // blocks, held.shape[1]
    full = np.zeros((held.shape[0], wide * blocks), held.dtype)
    for k in range(blocks):
        at = slice(k * rows, (k + 1) * rows)
        full[at, k * wide : (k + 1) * wide] = held[at]
    return dataclasses.replace(lora, diagonal=(side, blocks), **{side: full})


def variant_of(
    new: LoraWeight, pieces: Sequence[Piece], file: Path
) -> BlockDiagonal | None:
    """The variant of a leaf's node, whose modules must be alike."""
    kinds = {p.lora.diagonal for p in pieces}
    if kinds == {None}:
        return None
    slot = pieces[0].slot
    alone = slot.part[1] == 1 and slot.module.order is slot.module.columns is None
    alike = all(p.rank == new.rank for p in pieces)
    if len(kinds) > 1 or not alone or not alike or new.variant is not None:
        raise LoraError(
            f"{file}: '{slot.path}' holds modules that use_bdlora makes of other "
            "blocks, or of other ranks, or features in another order, for which flora "
            "has no block-diagonal factors. Give each module a leaf of its own."
        )
    side, blocks = kinds.pop() or ("", 1)
    return BlockDiagonal(side, blocks)


def compact(part: Part, variant: Any) -> Part:
    """The part with the blocks alone, if its factors are block-diagonal."""
    if not isinstance(variant, BlockDiagonal):
        return part
    a, b, k = part.lora.a, part.lora.b, variant.blocks
    held = a if variant.side == "a" else b
    if held.shape[0] % k or held.shape[1] % k or part.rank % k:
        raise LoraError(
            f"save: '{part.lora.module}' has {k} blocks and its A {a.shape} and B "
            f"{b.shape} do not. Ship flora.merge(adapted)."
        )
    rows, wide = held.shape[0] // k, held.shape[1] // k
    blocks = [
        held[i * rows : (i + 1) * rows, i * wide : (i + 1) * wide] for i in range(k)
    ]
    new = {variant.side: np.concatenate(blocks)}
    lora = dataclasses.replace(part.lora, diagonal=(variant.side, k), **new)
    return dataclasses.replace(part, lora=lora)


def config_of(made: Sequence[Part]) -> Mapping[str, Any] | None:
    """What use_bdlora says of the parts; `None` if none is block-diagonal."""
    sides = {p.lora.module: p.lora.diagonal for p in made}
    counts = {x[1] for x in sides.values() if x}
    if not counts:
        return None
    if len(counts) > 1:
        raise LoraError(
            f"save: leaves have {sorted(counts)} blocks on their diagonals; PEFT has "
            "one number for all. Ship flora.merge(adapted)."
        )
    named = {
        side: [m for m, x in sides.items() if x and x[0] == side] for side in ("a", "b")
    }
    fail(
        f"save: PEFT would take '{module}' for block-diagonal as '{other}' is, whose "
        "name is a part of its name. Rename one of them."
        for side, modules in named.items()
        for other in modules
        for module, own in sides.items()
        if other in module and (own is None or own[0] != side)
    )
    return {
        "target_modules_bd_a": named["a"] or None,
        "target_modules_bd_b": named["b"] or None,
        "nblocks": counts.pop(),
        "match_strict": all(sides.values()),
    }
