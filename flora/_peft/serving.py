"""Adapters that vLLM and SGLang apply in full: one rank and alpha/r everywhere."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flora._peft.names import Slot, split_name
from flora._peft.parts import Part
from flora._tree.errors import LoraError, fail
from flora._tree.weight import base_of

# Projections of one input that servers compute together and look up together.
_TOGETHER = ("q_proj", "k_proj", "v_proj")


def for_serving(
    made: Sequence[Part],
    whole: Any,
    named: Sequence[tuple[str, Any]],
    by_path: Mapping[str, Sequence[Slot]],
) -> list[Part]:
    """The same adapter with zeros up to the largest rank, and scales taken into B."""
    fail(_problems(made, whole))
    made = _with_neighbors(made, named, by_path)
    rank = max(p.rank for p in made)
    scale = max((p.scale for p in made), key=abs)
    return [_padded(part, rank, scale) for part in made]


def _problems(made: Sequence[Part], whole: Any) -> Iterator[str]:
    for name in whole.values:
        yield (
            f"save: '{name}' trains whole, which SGLang ignores and vLLM refuses. Ship "
            "flora.merge(adapted), or train without it."
        )
    for part in made:
        lora = part.lora
        if lora.magnitude is not None:
            yield (
                f"save: '{lora.module}' is DoRA, which vLLM and SGLang refuse and no "
                "plain adapter equals. Ship flora.merge(adapted)."
            )
        elif lora.bias is not None:
            yield (
                f"save: '{lora.module}' has a lora_bias, which vLLM and SGLang refuse. "
                "Ship flora.merge(adapted), or train without it."
            )
        elif lora.kind == "conv":
            yield (
                f"save: '{lora.module}' is a convolution, which vLLM and SGLang do not "
                "adapt. Ship flora.merge(adapted), or train without it."
            )
        elif part.slot.module.tied:
            yield (
                f"save: '{lora.module}' shares its weight with an embedding, which "
                "SGLang does not adapt. Ship flora.merge(adapted), or train without it."
            )


def _padded(part: Part, rank: int, scale: float) -> Part:
    lora = part.lora
    ratio = part.scale / scale if scale else 0.0
    a, b = lora.a, (lora.b * lora.b.dtype.type(ratio)).astype(lora.b.dtype)
    if lora.raw and a.shape[0] != part.rank:
        experts, more = a.shape[0] // part.rank, rank - part.rank
        a = a.reshape(experts, part.rank, -1)
        a = np.pad(a, ((0, 0), (0, more), (0, 0))).reshape(experts * rank, -1)
        b = b.reshape(b.shape[0], part.rank, experts)
        b = np.pad(b, ((0, 0), (0, more), (0, 0))).reshape(-1, rank * experts)
    else:
        more = rank - a.shape[0]
        a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
    lora = dataclasses.replace(lora, a=a, b=b)
    return dataclasses.replace(
        part, lora=lora, rank=rank, scale=scale, rank_stabilized=False
    )


def _with_neighbors(
    made: Sequence[Part],
    named: Sequence[tuple[str, Any]],
    by_path: Mapping[str, Sequence[Slot]],
) -> list[Part]:
    """Zeros for q, k and v beside one that is adapted, which SGLang needs."""
    held = {p.lora.name: p for p in made}
    wanted: dict[str, Part] = {}
    for part in made:
        head, _, last = part.lora.module.rpartition(".")
        if last in _TOGETHER and not part.lora.raw:
            for word in _TOGETHER:
                name = f"{head}.{word}.weight".lstrip(".")
                if name not in held:
                    wanted.setdefault(name, part)
    result = list(made)
    for path, leaf in named:
        for slot in by_path.get(path, ()):
            for name, like in wanted.items():
                if slot.index(name) is not None:
                    result.append(_zeros(name, slot, base_of(leaf), like))
    return result


def _zeros(name: str, slot: Slot, base: Any, like: Part) -> Part:
    r, in_ = like.lora.a.shape
    size = int(np.prod(base.shape[slot.holes :]))
    rows = slot.module.order
    out = len(tuple(rows)) if rows is not None else size // in_ // slot.part[1]
    if rows is None and size != in_ * out * slot.part[1]:
        raise LoraError(
            f"save: '{name}' must be written as zeros for SGLang, but '{slot.path}' of "
            f"shape {tuple(base.shape)} does not have {in_} in features. Adapt it too."
        )
    lora = dataclasses.replace(
        like.lora,
        module=split_name(name)[0],
        a=np.zeros((r, in_), like.lora.a.dtype),
        b=np.zeros((out, r), like.lora.b.dtype),
    )
    return dataclasses.replace(like, lora=lora, slot=slot)
