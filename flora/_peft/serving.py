"""Adapters that vLLM and SGLang apply in full: one rank and alpha/r everywhere."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from flora._peft.naming.names import Slot, split_name
from flora._peft.parts import Part
from flora._tree.errors import LoraError, fail
from flora._tree.weight import LoraWeight, base_of

# Modules that a server computes as one, and looks up together.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("gate_proj", "x_proj"),  # Mamba's in_proj
    ("q_a_proj", "kv_a_proj_with_mqa"),  # of latent attention
    ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),  # of gated delta nets
    ("in_proj_qkv", "in_proj_z"),  # the same, in vLLM
    ("wq_du", "wk_dv", "wv_dv", "wr_du"),
)
# vLLM takes all experts of a layer or none, and both parameters that are stacked.
_OF_EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_STACKED = ("gate_up_proj", "down_proj")
_EXPERT = re.compile(r"((?:.+\.)?experts)\.[0-9]+\.(\w+)")
_DOWN = ("down_proj", "w2")

Group = tuple[str, tuple[str, ...]]


def for_serving(made: Sequence[Part], whole: Any) -> list[Part]:
    """The same adapter with zeros up to the largest rank, and scales taken into B."""
    fail(_problems(made, whole))
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
        elif lora.inner:
            yield (
                f"save: '{lora.module}' is of an nn.MultiheadAttention, which vLLM and "
                "SGLang do not adapt. Ship flora.merge(adapted), or train without it."
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


def with_neighbors(
    made: Sequence[Part],
    named: Sequence[tuple[str, Any]],
    by_path: Mapping[str, Sequence[Slot]],
) -> list[Part]:
    """Zeros for what servers look up together with what is adapted."""
    held = {p.lora.name for p in made}
    wanted: dict[Group, Part] = {}
    for part in made:
        for group in _groups(part.lora.name) if part.lora.kind == "linear" else ():
            wanted.setdefault(group, part)
    if any(isinstance(x, LoraWeight) and x.base is None for _, x in named):
        fail(_bare_problems(wanted, held))
        return [*made]
    lacking: dict[str, tuple[Part, list[tuple[Slot, Any]]]] = {}
    for path, leaf in named:
        shape = getattr(base_of(leaf), "shape", ())
        for slot in by_path.get(path, ()):
            if slot.module.tied or len(shape) <= slot.holes:
                continue
            for index in np.ndindex(*shape[: slot.holes]):
                name = slot.at(index)
                likes = [wanted[g] for g in _groups(name) if g in wanted]
                if likes and name not in held:
                    places = lacking.setdefault(name, (likes[0], []))[1]
                    places.append((slot, shape))
    return [*made, *(_zeros(name, *found) for name, found in lacking.items())]


def _groups(name: str) -> list[Group]:
    """What a parameter belongs to, each with the words of its modules."""
    module, parameter = split_name(name)
    if parameter in _STACKED:
        return [(module, _STACKED)]
    if parameter != "weight":
        return []
    if expert := _EXPERT.fullmatch(module):
        return [(expert[1], words) for words in _OF_EXPERTS if expert[2] in words]
    head, last = split_name(module)
    return [(head, words) for words in _TOGETHER if last in words]


def _bare_problems(wanted: Mapping[Group, Part], held: Set[str]) -> Iterator[str]:
    """Neighbors of which an adapter without its base does not tell."""
    for (head, words), part in wanted.items():
        if part.lora.raw:
            names = [f"{head}.{word}" for word in words]
        else:
            front = split_name(part.lora.module)[0]
            names = [f"{front}.{word}.weight".lstrip(".") for word in words]
        lacking = [n for n in names if n not in held]
        # Servers fill in these themselves.
        if lacking and [split_name(n)[0][-6:] for n in lacking] != ["k_proj"]:
            yield (
                f"save: '{part.lora.name}' is adapted and '{lacking[0]}' is not; "
                "servers read both or none, and an adapter without its base does not "
                "tell whether zeros are to be written. Pass flora.join(base, adapter)."
            )


def _zeros(name: str, like: Part, places: Sequence[tuple[Slot, Any]]) -> Part:
    """An adapter of a parameter that changes nothing.

    Its A is of the shape of `like`'s, or, of down beside gate and up, of B's.
    """
    lora, (slot, shape) = like.lora, places[0]
    r, in_, out = *lora.a.shape, lora.b.shape[0]
    experts = r // like.rank if lora.raw else 1
    size = math.prod(shape[slot.holes :]) // slot.part[1] // experts
    rows = [len(s.module.order or ()) for s, _ in places]
    if _is_down(name) == _is_down(lora.name):
        size = in_ * sum(rows) if all(rows) else size
        out = size // in_
    elif _is_down(name):
        in_, out = size // in_, in_
    else:
        in_, out = out, size // out
    if in_ * out != size:
        raise LoraError(
            f"save: '{name}' must be written as zeros for servers, but '{slot.path}' "
            f"of shape {tuple(shape)} does not fit '{lora.name}', which has "
            f"{lora.a.shape[1]} in features. Adapt it too."
        )
    module, parameter = split_name(name)
    zeros = dataclasses.replace(
        lora,
        module=module,
        parameter=parameter,
        a=np.zeros((r, in_), lora.a.dtype),
        b=np.zeros((out, lora.b.shape[1]), lora.b.dtype),
    )
    return dataclasses.replace(like, lora=zeros, slot=slot)


def _is_down(name: str) -> bool:
    module, parameter = split_name(name)
    return parameter in _DOWN or split_name(module)[1] in _DOWN
