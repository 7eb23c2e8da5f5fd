"""From the nodes of a tree to A and B of each PyTorch module."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flora._peft.factors import is_channel_last, positions
from flora._peft.keys import Lora
from flora._peft.kinds.bias import apart, biases, joined_bias
from flora._peft.kinds.groups import AcrossGroups, gathered
from flora._peft.kinds.twice import IN
from flora._peft.layouts import leaf_word
from flora._peft.naming.names import Slot, split_name
from flora._tree.blocks import Block
from flora._tree.errors import LoraError, fail
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, uniform


@dataclasses.dataclass(frozen=True)
class Part:
    """The adapter of a module, or of those of its rows that lie in one leaf.

    Attributes:
      lora: A and B as PEFT has them, or with some of B's rows alone.
      slot: where it came from.
      rank: r.
      scale: of B A.
      rank_stabilized: whether the scale is given as alpha/√r.
    """

    lora: Lora
    slot: Slot
    rank: int
    scale: float
    rank_stabilized: bool

    @property
    def alpha(self) -> float:
        """The alpha of that scale; an int where it was one."""
        value = self.scale * (
            math.sqrt(self.rank) if self.rank_stabilized else self.rank
        )
        return round(value) if abs(value - round(value)) < 1e-12 * abs(value) else value


def parts(
    path: str, node: LoraWeight, slots: Sequence[Slot], known: str = ""
) -> Iterator[Part]:
    """The part of a leaf's node that belongs to each module in the leaf."""
    node, c = apart(_as_modules(_with_experts(node, slots), slots))
    stack = node.a.shape[: len(node.layout.stack)]
    a, b = np.asarray(node.a), np.asarray(node.b)
    a = a.reshape(*stack, -1, a.shape[-1])
    b = b.reshape(*stack, b.shape[len(stack)], -1)
    columns = (node.extra or {}).get("magnitude")
    m = None if columns is None else np.asarray(columns).reshape(*stack, -1)
    e = (node.extra or {}).get("e")
    held: dict[tuple[int, ...], list[Block]] = {}
    for block in node.blocks:
        held.setdefault(block.index, []).append(block)
    first = beside_kind(path, node, slots, known)
    for slot in slots:
        kind = kind_of(path, node, slot, known) if not slot.module.tied else ""
        if slot.module.tied:  # the weight's other use
            other = "linear" if first == "embedding" else "embedding"
            kind = slot.module.kind or other
        words_in = first == "embedding" and node.layout.in_ < node.layout.out
        if slot.holes > len(stack) or (slot.holes < len(stack) and kind != "raw"):
            raise LoraError(_stack_problem(path, slot, node, len(stack)))
        at = positions(slot, slots_beside(slots), b.shape[-1])
        for index in np.ndindex(*stack[: slot.holes]):
            own = None if m is None else m[index][..., at]
            around = (held.get(index[:n], ()) for n in range(len(index) + 1))
            own_blocks = [x for some in around for x in some if _share(x, at) == "all"]
            if not node.blocks:
                own_blocks = [Block(index, 0, node.a.shape[-1], node.scale)]
            for block in own_blocks:
                ranks = slice(block.start, block.stop)
                pair = a[index][..., ranks], b[index][..., ranks, at]
                part = _part(node, slot, index, kind, pair, own, words_in)
                part = dataclasses.replace(part, scale=block.scale)
                if e is not None:
                    diag = np.asarray(e)[index][..., ranks]
                    lora = dataclasses.replace(part.lora, diag=diag)
                    part = dataclasses.replace(part, lora=lora)
                yield part if c is None else biased(part, c[index][..., at])


def _with_experts(node: LoraWeight, slots: Sequence[Slot]) -> LoraWeight:
    """The node of a parameter of experts, `[experts, ...]`, with that axis stacked.

    Where a function computes all experts in one product, they share A or B.
    """
    layout = node.layout
    ndim = len(layout.stack) + len(layout.in_) + len(layout.out)
    holes = {s.holes for s in slots if _is_raw(s)}
    if len(holes) != 1 or len(layout.stack) != min(holes) or ndim != min(holes) + 3:
        return node
    n, several = len(layout.stack), max(layout.in_, layout.out, key=len)
    axis = several[0]
    own, other = (node.a, node.b) if axis in layout.in_ else (node.b, node.a)
    own, other = np.asarray(own), np.asarray(other)
    if axis in layout.in_:
        at = n + layout.in_.index(axis)
    else:
        at = n + 1 + layout.out.index(axis)
    own = np.moveaxis(own, at, n)
    other = np.broadcast_to(
        np.expand_dims(other, n), (*own.shape[: n + 1], *other.shape[n:])
    )
    a, b = (own, other) if axis in layout.in_ else (other, own)
    stacked = Layout(
        (*layout.stack, axis),
        tuple(i for i in layout.in_ if i != axis),
        tuple(i for i in layout.out if i != axis),
    )
    return dataclasses.replace(node, a=a, b=b, layout=stacked)


def _is_raw(slot: Slot) -> bool:
    return split_name(slot.name)[1] not in ("weight", IN)


def beside_kind(path: str, node: LoraWeight, slots: Sequence[Slot], known: str) -> str:
    """The kind of the module whose weight the leaf is."""
    own = [s for s in slots if not s.module.tied]
    return kind_of(path, node, own[0], known) if own else ""


def _share(block: Block, at: np.ndarray) -> str:
    """Whether a block has 'all', 'some' or 'none' of the outputs from `at[0]` on."""
    first, end = block.columns or (at[0], at[-1] + 1)
    if end <= at[0] or at[-1] < first:
        return "none"
    return "all" if first <= at[0] and at[-1] < end else "some"


def _as_modules(node: LoraWeight, slots: Sequence[Slot]) -> LoraWeight:
    """The node, its blocks taken as one where a module has several of them.

    The scales are in B then, since PEFT has one a module.
    """
    wide = math.prod(node.b.shape[len(node.layout.stack) + 1 :])
    beside = slots_beside(slots)
    places = [(slot.holes, positions(slot, beside, wide)) for slot in slots]
    fits = all(
        len(block.index) <= holes and _share(block, at) != "some"
        for holes, at in places
        for block in node.blocks
    )
    if fits:
        return node
    node = uniform(node)
    return dataclasses.replace(node, b=np.asarray(node.b))


def slots_beside(slots: Sequence[Slot]) -> list[Slot]:
    """The slots that share the leaf's out features."""
    return [s for s in slots if not s.module.tied]


def _stack_problem(path: str, slot: Slot, node: LoraWeight, count: int) -> str:
    return (
        f"save: '{path}' ({node.layout}) has {count} stacked axes and its name "
        f"'{slot.name}' {slot.holes} placeholders. Write one for each: "
        f"names={{..., '/{path}': 'model.layers.{{i}}.…'}}, or flora.peft.Module(..., "
        "parameter='…') for experts that PyTorch stacks too."
    )


def kind_of(path: str, node: LoraWeight, slot: Slot, known: str) -> str:
    """'linear', 'conv', 'embedding' or 'raw': by the names, then by convention."""
    word, layout = leaf_word(path), node.layout
    if _is_raw(slot):
        return "raw"
    if split_name(slot.name)[1] == IN:
        return "linear"
    if slot.module.kind == "conv1d":
        return "linear"
    if slot.module.kind or known:
        return slot.module.kind or known
    if word == "embedding":
        return "embedding"
    if isinstance(node.variant, AcrossGroups):
        return "conv"
    if word == "kernel" and len(layout.in_) != 2:
        return "conv" if len(layout.in_) > 2 else "linear"
    # Two in axes may be a window and channels, or heads and their features.
    named = slot.module.name != "-"
    if (
        word == "kernel"
        and "conv" in path.rpartition("/")[0].rpartition("/")[2].lower()
    ):
        return "conv"
    if (word == "kernel" and named) or (
        len(layout.in_) == 1 and layout.in_ > layout.out
    ):
        return "linear"
    raise LoraError(
        f"save: '{path}' ({layout}) may be a linear layer, a convolution or an "
        f"embedding "
        "of PyTorch. Pass fn= and args= to follow it, or write names= of all adapted "
        f"leaves, with '/{path}': flora.peft.Module('{split_name(slot.name)[0]}', "
        "kind='linear'), 'conv' or 'embedding'."
    )


def _part(
    node: LoraWeight,
    slot: Slot,
    index: tuple[int, ...],
    kind: str,
    factors: tuple[np.ndarray, np.ndarray],
    m: np.ndarray | None,
    words_in: bool,
) -> Part:
    a, b = factors
    name = slot.at(index)
    module, parameter = split_name(name)
    rank = a.shape[-1]
    if kind == "conv":
        a, b, rank = _as_conv(node, slot, a, b)
        m = m if m is None else m.reshape(1, -1, *(1,) * (a.ndim - 2))
    elif kind == "raw" and a.ndim > 2:
        experts = math.prod(a.shape[:-2])
        a = a.reshape(experts, *a.shape[-2:]).swapaxes(1, 2).reshape(-1, a.shape[-2])
        b = b.reshape(experts, *b.shape[-2:]).transpose(2, 1, 0)
        b = b.reshape(b.shape[0], -1)
    elif kind == "raw" and node.layout.in_ < node.layout.out:
        a, b = b, a  # PyTorch's matrix lies as the leaf does, and is B A
    else:
        if slot.module.columns is not None:
            a = a[np.argsort(slot.module.columns)]
        turned = kind == "embedding" and not words_in
        turned |= slot.module.tied and kind == "linear" and words_in
        if m is not None and (turned or slot.module.tied):
            raise LoraError(
                f"save: '{slot.path}' has a magnitude for each output of one use, and "
                f"PEFT's '{module}' needs others. Ship flora.merge(adapted)."
            )
        a, b = (b, a) if turned else (a.T, b.T)
    lora = Lora(module, a, b, m, None, "linear" if kind == "raw" else kind)
    lora = dataclasses.replace(lora, parameter=parameter, raw=kind == "raw")
    stabilized = node.rank_stabilized and (bool(node.blocks) or rank == node.rank)
    return Part(lora, slot, rank, 1.0, stabilized)


def _as_conv(
    node: LoraWeight, slot: Slot, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """A `[r, in, *window]` and B `[out, r/groups, 1, ...]`."""
    axes = node.layout.in_
    stack = len(node.layout.stack)
    sizes = node.a.shape[stack : stack + len(axes)]
    rank, groups = a.shape[-1], slot.module.groups
    last = (
        is_channel_last(slot.path, sizes, sizes[:-1])
        and leaf_word(slot.path) != "weight"
    )
    a = a.T.reshape(rank, *sizes)
    a = np.moveaxis(a, -1, 1) if last else a
    b = b.T.reshape(-1, rank, *(1,) * (len(axes) - 1))
    if isinstance(node.variant, AcrossGroups):
        a, b = gathered(a, b.reshape(b.shape[0], rank).T, node.variant.groups)
        return a, b.reshape(*b.shape, *(1,) * (len(axes) - 1)), a.shape[0]
    if groups == 1:
        return a, b, rank
    channels = a.shape[1]
    spread = np.zeros((groups, rank, groups, channels, *a.shape[2:]), a.dtype)
    for k in range(groups):
        spread[k, :, k] = a
    return (
        spread.reshape(groups * rank, groups * channels, *a.shape[2:]),
        b,
        groups * rank,
    )


def joined(parts: Sequence[Part], beside: Sequence[Slot]) -> Part:
    """The adapter of a module whose rows lie in several places.

    Rows in leaves that are not adapted, those of `beside`, have zeros in B.
    """
    first = parts[0]
    whole = first.slot.module.order is None or first.slot.module.tied
    if len(parts) == 1 and whole:
        return _trimmed(first)
    total = len(_rows_of(parts, beside))
    if first.lora.diag is not None:
        raise LoraError(
            f"save: '{first.lora.name}' lies in several leaves, or in another order, "
            "and is KaSA, whose base is truncated as one. Ship flora.merge(adapted)."
        )
    alike = all(
        p.scale == first.scale and np.array_equal(p.lora.a, first.lora.a) for p in parts
    )  # as they were loaded
    rank = first.rank if alike else sum(p.rank for p in parts)
    scale = max((p.scale for p in parts), key=abs)
    dtype = np.result_type(*(p.lora.b.dtype for p in parts))
    experts = first.lora.a.shape[0] // first.rank if first.lora.raw else 1
    b, m, start = np.zeros((total, rank, experts), dtype), np.zeros(total), 0
    for p in parts:
        rows = list(p.slot.module.order or ())
        own = p.lora.b.reshape(len(rows), p.rank, experts)
        ranks = range(start, start + p.rank)
        b[np.ix_(rows, ranks)] = own * dtype.type(p.scale / scale)
        if p.lora.magnitude is not None:
            m[rows] = p.lora.magnitude
        start += 0 if alike else p.rank
    b = b.reshape(total, -1)
    held = [p.lora.a.reshape(experts, p.rank, -1) for p in parts]
    a = held[0] if alike else np.concatenate(held, 1)
    a = a.reshape(experts * rank, -1)
    c = None
    if first.lora.bias is not None:
        some = [(p.scale, p.slot.module.order, np.asarray(p.lora.bias)) for p in parts]
        c = joined_bias(some, scale, total)
    magnitude = first.lora.magnitude
    lora = dataclasses.replace(
        first.lora,
        a=a,
        b=b,
        bias=c,
        magnitude=None if magnitude is None else m.astype(magnitude.dtype),
    )
    stabilized = first.rank_stabilized and alike
    return _trimmed(Part(lora, first.slot, rank, scale, stabilized))


def _rows_of(parts: Sequence[Part], beside: Sequence[Slot]) -> list[int]:
    """All rows of a module, checked."""
    slots = list(dict.fromkeys([*(p.slot for p in parts), *beside]))
    held = [i for p in parts for i in p.slot.module.order or ()]
    rows = sorted(i for s in slots for i in s.module.order or ())
    some = any(p.slot.module.order is None for p in parts)
    if len(held) < len(rows) and parts[0].lora.magnitude is not None:
        raise LoraError(
            f"save: '{parts[0].lora.module}' is DoRA in some of its rows, and PEFT has "
            "a magnitude for each. Adapt all leaves that hold it."
        )
    if some or rows != [*range(len(rows))]:
        where = "', '".join(p.slot.path for p in parts)
        raise LoraError(
            f"save: '{parts[0].lora.name}' is the name of '{where}', whose rows= are "
            "not all of its rows, each once. Write rows= for each, or another name."
        )
    return rows


def biased(part: Part, c: np.ndarray) -> Part:
    """The part with c, of lora_bias."""
    return dataclasses.replace(part, lora=dataclasses.replace(part.lora, bias=c))


def with_biases(
    made: Sequence[Part],
    nodes: Mapping[str, LoraWeight],
    by_path: Mapping[str, Sequence[Slot]],
) -> list[Part]:
    """The parts with what changes the biases, the leaves `nodes`; PEFT has all or none.

    Parts that have none get zeros.
    """
    held, result = biases(nodes, by_path), []
    for part in made:
        if not part.lora.raw:
            scale, c = held.pop(part.lora.module, (part.scale, None))
            if c is not None:
                ratio = c.dtype.type(scale / part.scale)
                part = biased(part, c if scale == part.scale else c * ratio)
        result.append(part)
    fail(
        f"save: the bias of '{module}' is changed, but its weight is not adapted, for "
        "which PEFT has no place. Ship flora.merge(adapted)."
        for module in held
    )
    if all(part.lora.bias is None for part in result):
        return result
    fail(
        f"save: '{part.lora.name}' is adapted beside modules with a lora_bias, which "
        "PEFT has of linear layers and convolutions alone. Ship flora.merge(adapted)."
        for part in result
        if part.lora.raw or part.lora.kind == "embedding" or part.slot.module.tied
    )
    return [
        biased(p, np.zeros_like(p.lora.b, shape=p.lora.b.shape[:1]))
        if p.lora.bias is None
        else p
        for p in result
    ]


def _trimmed(part: Part) -> Part:
    """The part without the zero ranks that stacking layers adds."""
    a, b = part.lora.a, part.lora.b
    stacked = part.slot.holes or part.slot.part[1] > 1
    if part.lora.kind == "conv" or part.lora.raw or not stacked:
        return part
    used = np.flatnonzero((a != 0).any(1) | (b != 0).any(0))
    rank = int(used[-1]) + 1 if used.size else 1
    if rank == part.rank:
        return part
    lora = dataclasses.replace(part.lora, a=a[:rank], b=b[:, :rank])
    if lora.diag is not None:
        return part  # whose rank says how much the base lacks
    return dataclasses.replace(part, lora=lora, rank=rank, rank_stabilized=False)


def is_idle(part: Part) -> bool:
    """Whether it is a layer of a stack that is not adapted."""
    lora = part.lora
    if not part.slot.holes or lora.magnitude is not None:
        return False
    if lora.bias is not None and lora.bias.any():
        return False
    return not lora.a.any() and not lora.b.any()
