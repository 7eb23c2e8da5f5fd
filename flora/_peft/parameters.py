"""Adapters that a file names only in part: raw parameters and tied weights."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

from flora._peft.config import PeftConfig
from flora._peft.factors import Piece
from flora._peft.keys import Content, Lora
from flora._peft.layouts import layouts, leaf_word
from flora._peft.naming.names import Finder, Slot
from flora._peft.targets import ends, selects
from flora._tree.errors import LoraError
from flora._tree.layout import Layout

_NESTED = 5  # adapters of one module, all orders of which are tried


def with_parameters(content: Content, config: PeftConfig, file: Path) -> Content:
    """Which modules have raw parameters adapted: those that no name selects."""
    if not config.target_parameters:
        return content
    words: dict[str, list[str]] = {}  # the parameters, by what ends their module
    for entry in dict.fromkeys(config.target_parameters):
        module, _, word = entry.rpartition(".")
        words.setdefault(module, []).append(word)

    def known(lora: Lora) -> Lora:
        owned = [w for end in ends(lora.module) for w in words.get(end, ())]
        any_module = [] if selects(config, lora.module) else words.get("", ())
        held = [*any_module, *owned]
        hits = sorted({*held}, key=order.__getitem__)
        if not hits:
            return lora
        return dataclasses.replace(lora, raw=True, parameter="|".join(hits))

    names = dict.fromkeys(e.rpartition(".")[2] for e in config.target_parameters)
    order = {word: n for n, word in enumerate(names)}
    return dataclasses.replace(content, loras=tuple(map(known, content.loras)))


def in_order(
    content: Content,
    config: PeftConfig,
    finder: Finder,
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Layout],
    file: Path,
    *,
    ordered: bool,
) -> Content:
    """Which parameter of a module each nested adapter is of.

    PEFT nests them in the order in which the module declares them, the last outside.
    Sizes tell them apart, or else the order of the names that were given.
    """
    groups: dict[str, list[Lora]] = {}
    for lora in content.loras:
        if lora.raw:
            groups.setdefault(lora.module, []).append(lora)
    found: dict[int, Lora] = {}
    for module, loras in groups.items():
        inner_first = sorted(loras, key=lambda x: -x.depth)
        words = inner_first[0].words
        held = [w for w in words if finder.all(f"{module}.{w}")]
        if len(loras) > _NESTED:
            raise LoraError(
                f"{file}: '{module}' has adapters of {len(loras)} parameters, one in "
                f"the other; expected at most {_NESTED}. Save the adapter anew."
            )
        if len(held) < len(loras):
            raise LoraError(
                f"{file}: '{module}' has adapters of {len(loras)} parameters; of "
                f"{', '.join(words)} the base has {', '.join(held) or 'none'}. Name "
                "their leaves: names={'…': flora.peft.Module('…', parameter='…')}."
            )
        fits = []
        for some in itertools.permutations(held, len(loras)):
            named = [
                dataclasses.replace(x, parameter=w)
                for x, w in zip(inner_first, some, strict=True)
            ]
            if all(_may_fit(x, config, finder, shapes, given) for x in named):
                fits.append(named)
        if len(fits) > 1 and ordered:  # as the names declare them
            at = {s.name: i for i, s in enumerate(finder.slots)}
            fits.sort(key=lambda f: [at.get(x.name, 0) for x in f])
        elif len(fits) > 1:
            raise LoraError(
                f"{file}: '{module}' has adapters of {', '.join(held)} with shapes "
                "that fit either way. Pass names= with these leaves in the order in "
                "which the PyTorch module declares them."
            )
        if not fits:
            sizes = ", ".join(f"A {x.a.shape} B {x.b.shape}" for x in inner_first)
            have = [shapes[finder.all(f"{module}.{w}")[0][0].path] for w in held]
            raise LoraError(
                f"{file}: the adapters of '{module}' have {sizes}; the leaves of "
                f"{', '.join(held)} have {', '.join(map(str, have))}, which do not "
                "fit. Is the adapter one of another base?"
            )
        for old, new in zip(inner_first, fits[0], strict=True):
            found[id(old)] = new
    return dataclasses.replace(
        content, loras=tuple(found.get(id(x), x) for x in content.loras)
    )


def _may_fit(
    lora: Lora,
    config: PeftConfig,
    finder: Finder,
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Layout],
) -> bool:
    rank = config.rank(lora.site)
    experts, rest = divmod(lora.a.shape[0], rank)
    if rest:
        return False

    def fits(slot: Slot) -> bool:
        found = parameter_layouts(lora, slot, shapes[slot.path], experts)
        known = given.get(slot.path)
        return any(known is None or _agree(x, known) for x in found)

    return all(fits(slot) for slot, _ in finder.all(lora.name))


def expert_layout(piece: Piece, shape: tuple[int, ...], found: Layout) -> Layout:
    """The layout with the axis of experts stacked, as PEFT has it.

    A function that computes all experts in one product reads that axis as one of those
    that are in or out.
    """
    lora, slot = piece.lora, piece.slot
    if not lora.raw or len(shape) - slot.holes != 3 or len(found.stack) > slot.holes:
        return found
    experts = lora.a.shape[0] // piece.rank
    options = parameter_layouts(lora, slot, shape, experts)
    options = [x for x in options if _agree(x, found)]
    return options[0] if len(options) == 1 else found


def _agree(stacked: Layout, found: Layout) -> bool:
    """Whether they differ in nothing but axes that are stacked in one of them."""
    own = {*stacked.stack}
    return {*stacked.in_} == {*found.in_} - own and {*stacked.out} == {*found.out} - own


def parameter_layouts(
    lora: Lora, slot: Slot, shape: tuple[int, ...], experts: int
) -> list[Layout]:
    ndim = len(shape) - slot.holes
    stack = slot.holes + (1 if experts > 1 or ndim == 3 else 0)
    rows = slot.module.order
    sizes = lora.a.shape[1], lora.b.shape[0] if rows is None else len(rows)
    found = layouts(slot.path, shape, stack, sizes)
    return [x for x in found if shape[x.stack[-1]] == experts] if ndim == 3 else found


def turned_parameter(piece: Piece, layout: Layout, shape: tuple[int, ...]) -> Piece:
    """A raw matrix's factors, exchanged where the leaf reads it the other way round.

    PEFT adds B A to a raw matrix as it is, whatever its axes mean.
    """
    lora, slot = piece.lora, piece.slot
    free = [i for i in range(len(shape)) if i not in layout.stack]
    matrix = len(shape) - slot.holes == 2 and len(free) == 2
    if not lora.raw or not matrix or lora.a.shape[0] != piece.rank:
        return piece
    sizes = tuple(shape[i] for i in free)
    kept, other = (
        (lora.b.shape[0], lora.a.shape[1]) == sizes,
        lora.b.shape[0] == sizes[1],
    )
    as_named = leaf_word(slot.path) not in ("kernel", "embedding")
    same = kept and (as_named or not other or sizes[0] != sizes[1])
    columns = free[1] if same else free[0]
    if columns in layout.in_:
        return piece
    return dataclasses.replace(
        piece, lora=dataclasses.replace(lora, a=lora.b.T, b=lora.a.T)
    )


def turned_embedding(piece: Piece, layout: Layout) -> Piece:
    """An embedding's factors, exchanged where the layout is that of a product."""
    lora = piece.lora
    if lora.kind != "embedding" or layout.in_ < layout.out:
        return piece
    if lora.magnitude is not None:
        raise LoraError(
            f"'{piece.slot.path}' has the layout {layout}, of a product; the "
            f"magnitudes of '{lora.module}' are of a lookup. Pass the plain tree, and "
            "no fn=."
        )
    return dataclasses.replace(
        piece, lora=dataclasses.replace(lora, a=lora.b.T, b=lora.a.T)
    )
