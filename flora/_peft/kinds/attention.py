"""The two weights of `nn.MultiheadAttention`, which PEFT adapts together."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from flora._peft.kinds.twice import IN, OUT, AddedTwice
from flora._peft.naming.names import Finder, Slot, split_name
from flora._peft.parts import Part
from flora._tree.errors import LoraError
from flora._tree.weight import LoraWeight


def attentions(
    made: Sequence[Part], nodes: Mapping[str, LoraWeight], slots: Sequence[Slot]
) -> list[Part]:
    """The parts, those of each attention with one rank and scale, and both there.

    PEFT adds ΔW of `out_proj` twice: B is halved, unless it was read from such a file.
    """
    finder = Finder(slots)
    found: dict[str, dict[str, Part]] = {}
    rest = []
    for part in made:
        owner, last = split_name(part.lora.module)
        node = nodes.get(part.slot.path)  # a server's zeros have none
        twice = node is not None and isinstance(node.variant, AddedTwice)
        if part.lora.parameter == IN:
            found.setdefault(part.lora.module, {})[IN] = part
        elif last == OUT and (twice or finder.all(f"{owner}.{IN}")):
            b = part.lora.b if twice else part.lora.b * part.lora.b.dtype.type(0.5)
            lora = dataclasses.replace(part.lora, b=b, inner=True)
            pair = found.setdefault(owner, {})
            pair[OUT] = dataclasses.replace(part, lora=lora)
        elif twice:
            raise LoraError(
                f"save: '{part.slot.path}' is the {OUT} of an nn.MultiheadAttention, "
                f"where PEFT adds ΔW twice, but named '{part.lora.module}'. Name it "
                f"'….{OUT}'."
            )
        else:
            rest.append(part)
    return rest + [p for module, pair in found.items() for p in _paired(module, pair)]


def _paired(module: str, pair: Mapping[str, Part]) -> list[Part]:
    first = next(iter(pair.values()))
    if any(p.lora.magnitude is not None for p in pair.values()):
        raise LoraError(
            f"save: '{module}' is an nn.MultiheadAttention, which PEFT does not adapt "
            "by DoRA. Ship flora.merge(adapted)."
        )
    rank = max(p.rank for p in pair.values())
    lead = pair.get(IN, first)
    width = lead.lora.a.shape[1] if IN in pair else first.lora.b.shape[0]
    both = []
    for word, name, rows in ((IN, module, 3 * width), (OUT, f"{module}.{OUT}", width)):
        part = pair.get(word)
        if part is None:  # PEFT has both
            a = np.zeros((rank, width), lead.lora.a.dtype)
            b = np.zeros((rows, rank), lead.lora.b.dtype)
            lora = dataclasses.replace(lead.lora, module=name, a=a, b=b)
            lora = dataclasses.replace(
                lora, parameter=word if word == IN else "weight", inner=word == OUT
            )
            both.append(dataclasses.replace(lead, lora=lora, rank=rank))
            continue
        more, ratio = rank - part.rank, part.scale / lead.scale if lead.scale else 0
        a, b = part.lora.a, part.lora.b
        b = b if ratio == 1 else (b * b.dtype.type(ratio)).astype(b.dtype)
        a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
        lora = dataclasses.replace(part.lora, a=a, b=b)
        both.append(
            dataclasses.replace(
                part,
                lora=lora,
                rank=rank,
                scale=lead.scale,
                rank_stabilized=lead.rank_stabilized,
            )
        )
    return both
