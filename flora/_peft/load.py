"""From an adapter's directory and a base to an adapted tree."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._peft.config import PeftConfig
from flora._peft.factors import Piece
from flora._peft.file import CONFIG, WEIGHTS
from flora._peft.ignored import Ignored
from flora._peft.keys import PREFIX, TOKENS, Content, Lora
from flora._peft.kinds.bias import layout_of, pieces_of
from flora._peft.kinds.diagonal import expanded
from flora._peft.kinds.replicated import problems as repeats
from flora._peft.kinds.tokens import nodes, rows_of, without_copies
from flora._peft.kinds.twice import IN
from flora._peft.layouts import conv_layout, layouts, leaf_word, turned
from flora._peft.naming.convention import matched_slots
from flora._peft.naming.memory import Memory
from flora._peft.naming.names import Finder, Module, Slot, given_slots, split_name
from flora._peft.naming.renamed import with_renamed
from flora._peft.parameters import (
    expert_layout,
    in_order,
    parameter_layouts,
    turned_embedding,
    turned_parameter,
    with_parameters,
)
from flora._peft.targets import plain, target_problems, unnamed, whole_problems
from flora._peft.ties import Readers, load_problems, tied_modules, without_ties
from flora._peft.whole import is_conv1d
from flora._tree.errors import fail
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, Trained, base_of


@dataclasses.dataclass(frozen=True)
class AdaptedLeaf:
    """One leaf that the adapter adapts.

    Attributes:
      path: of the leaf.
      base: its weight.
      layout: of the weight.
      pieces: the adapters of the modules that lie in it.
      beside: the slots that share its out features.
    """

    path: str
    base: Any
    layout: Layout
    pieces: tuple[Piece, ...]
    beside: tuple[Slot, ...]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which leaf each tensor of a file belongs to.

    Attributes:
      adapted: the adapted leaves, by path.
      rows: the nodes of leaves some of whose rows train, by path.
      whole: for each path `(slot, index, value)` of what trains whole.
      of_base: for each path `(slot, index, value)` that the base must hold.
      memories: for each path of `adapted` and `whole` what it remembers of the file.
      unnamed: likewise, of parameters that need not be in the file.
    """

    adapted: Mapping[str, AdaptedLeaf]
    rows: Mapping[str, LoraWeight]
    whole: Mapping[str, list[tuple[Slot, tuple[int, ...], Any]]]
    of_base: Mapping[str, list[tuple[Slot, tuple[int, ...], Any]]]
    memories: Mapping[str, Memory]
    unnamed: Mapping[str, list[tuple[Slot, tuple[int, ...], Any]]]


def assign(
    folder: Path,
    config: PeftConfig,
    content: Content,
    leaves: Mapping[str, Any],
    names: Any,
    given: Mapping[str, Layout],
    *,
    readers: Readers | None,
    ignored: Ignored,
) -> Assignment:
    """Assigns each tensor to a leaf; all that does not fit is reported at once."""
    file = folder / WEIGHTS
    content = with_parameters(content, config, file)
    named = (
        dataclasses.replace(x, parameter=w) for x in content.loras for w in x.words
    )
    bad = config.pattern_problems(x.site for x in named)
    fail(f"{folder / CONFIG}: {problem}" for problem in bad)
    content = expanded(content, config, file)
    wanted = [
        *(lora.name for lora in content.loras),
        *(f"{module}.weight" for module in content.tokens),
        *map(plain, [*content.whole, *content.of_base]),
    ]
    paths = list(leaves)
    shapes = {p: tuple(getattr(base_of(x), "shape", ())) for p, x in leaves.items()}
    if names is None:
        slots = with_renamed(matched_slots(paths, wanted), content, shapes)
    else:
        slots = given_slots(names, paths)
    if spans := config.layer_replication:
        fail(f"{folder / CONFIG}: {p}" for p in repeats(spans, slots, leaves))
    finder = Finder(slots)
    content = in_order(
        content, config, finder, shapes, given, file, ordered=names is not None
    )
    named = content
    content = without_copies(content, finder)
    content, agreed = without_ties(content, finder, config, file)
    others = {name: content.whole[name] for name in unnamed(config, content)}
    trained = {name: x for name, x in content.whole.items() if name not in others}
    content = dataclasses.replace(content, whole=trained)
    fail(_lost(content, others, finder, file, paths))
    fail(load_problems(content, agreed, finder, config, shapes, readers, file))
    full = {slot.path for n in content.whole for slot, _ in finder.all(plain(n))}
    content, biases = pieces_of(content, config, finder, full)
    sites = _sites(config, content, finder, leaves, given, file)
    for path, pieces in biases.items():
        beside = tuple(s for s in finder.slots if s.path == path)
        base = base_of(leaves[path])
        layout = layout_of(path, base.shape, pieces, beside, file)
        sites[path] = AdaptedLeaf(path, base, layout, tuple(pieces), beside)
    weights, parameters = _universe(slots, sites, shapes)
    tied = {x.module for x in named.loras} - {x.module for x in content.loras}
    fail(
        [
            *target_problems(config, named, weights, parameters, tied, folder, ignored),
            *whole_problems(config, content, parameters, folder, ignored),
        ]
    )

    def placed(named: Mapping[str, Any]) -> dict[str, list]:
        found: dict[str, list] = {}
        for name, value in named.items():
            for slot, index in finder.all(plain(name)):
                found.setdefault(slot.path, []).append((slot, index, value))
        return found

    rows = nodes(content, config, finder, leaves, given, file, ignored)
    fail(
        f"{file}: '{path}' is adapted, and rows of it train alone. Do one of both."
        for path in {*rows} & {*sites}
    )
    whole = {
        path: [(_of_kind(s, leaves[path], x), i, x) for s, i, x in some]
        for path, some in placed(content.whole).items()
    }
    memories = _memories(sites, rows, whole, named, finder, config.about)
    of_base = placed(content.of_base)
    return Assignment(sites, rows, whole, of_base, memories, placed(others))


def _memories(
    sites: Mapping[str, AdaptedLeaf],
    rows: Mapping[str, LoraWeight],
    whole: Mapping[str, Sequence[tuple[Slot, tuple[int, ...], Any]]],
    named: Content,
    finder: Finder,
    about: Mapping[str, Any],
) -> dict[str, Memory]:
    """What each leaf remembers of the file."""
    ties = tied_modules(named, finder)
    kept: dict[str, dict[str, str]] = {}
    for name, x in named.of_base.items():
        module = split_name(plain(name))[0]
        own = [s.path for s, _ in finder.all(plain(name))] or [ties.get(module, "")]
        for path in own:
            kept.setdefault(path, {})[module] = str(x.dtype)
    found = {}
    for path, site in sites.items():
        kinds = {p.slot.name: p for p in site.pieces}
        slots = [_with_kind(s, kinds.get(s.name, site.pieces[0])) for s in site.beside]
        slots += [s for s in finder.slots if s.path == path and s.module.tied]
        first = site.pieces[0].lora
        own = kept.get(path, {})
        found[path] = Memory(tuple(slots), first.dtype, first.depth, own, about)
    dtypes = {path: some[0][2].dtype for path, some in whole.items()}
    dtypes |= {path: rows_of(node).dtype for path, node in rows.items()}
    known = {s.name: s for some in whole.values() for s, _, _ in some}
    for path, dtype in dtypes.items():
        slots = tuple(known.get(s.name, s) for s in finder.slots if s.path == path)
        own = kept.get(path, {}) if path in rows else {}
        found.setdefault(path, Memory(slots, str(dtype), kept=own, about=about))
    for module, path in ties.items():
        if path in found:
            tied = Slot(path, f"{module}.weight", Module(module, tied=True))
            slots = (*found[path].slots, tied)
            found[path] = dataclasses.replace(found[path], slots=slots)
    return found


def _of_kind(slot: Slot, leaf: Any, x: np.ndarray) -> Slot:
    """The slot with what the file's value says of its module."""
    conv1d = is_conv1d(slot, base_of(leaf), x)
    kind = "conv1d" if conv1d else "conv" if x.ndim > 2 else slot.module.kind
    return dataclasses.replace(slot, module=dataclasses.replace(slot.module, kind=kind))


def _with_kind(slot: Slot, piece: Piece) -> Slot:
    """The slot with what the file says of its module."""
    lora, module = piece.lora, slot.module
    groups = piece.rank // lora.b.shape[1] if lora.kind == "conv" else 1
    name = split_name(slot.name)[0] if module.name == "-" else module.name
    if lora.raw or lora.parameter == "bias":
        return slot
    kind, groups = module.kind or lora.kind, max(groups, module.groups)
    module = dataclasses.replace(module, name=name, kind=kind, groups=groups)
    return dataclasses.replace(slot, module=module)


def _lost(
    content: Content,
    others: Iterable[str],
    finder: Finder,
    file: Path,
    paths: Sequence[str],
) -> Iterator[str]:
    keys = {x.name: x.key("a") for x in content.loras}
    keys |= {f"{m}.weight": f"{PREFIX}{m}.….{TOKENS}" for m in content.tokens}
    whole = (*content.whole, *content.of_base, *others)
    keys |= {plain(n): f"{PREFIX}{n}" for n in whole}
    for name, key in keys.items():
        if not finder.all(name):
            yield (
                f"{file}: '{key}' belongs to '{name}', which none of the base's "
                f"{len(paths)} leaves is, such as '{paths[0] if paths else ''}'. Is it "
                "the adapter of another base? If not, pass names={leaf: module}, or "
                f"ignore='{split_name(name)[0] or key}.*' to leave it out."
            )


def _sites(
    config: PeftConfig,
    content: Content,
    finder: Finder,
    leaves: Mapping[str, Any],
    given: Mapping[str, Layout],
    file: Path,
) -> dict[str, AdaptedLeaf]:
    pieces: dict[str, list[Piece]] = {}
    for lora in content.loras:
        for slot, index in finder.all(lora.name):
            rank, alpha = config.rank(lora.site), config.alpha(lora.site)
            lora = _padded(lora, rank) if config.residual else lora
            piece = Piece(lora, slot, index, rank, float(alpha), config.use_rslora)
            pieces.setdefault(slot.path, []).append(piece)
    slots: dict[str, list[Slot]] = {}
    for slot in finder.slots:
        if not slot.module.tied:
            slots.setdefault(slot.path, []).append(slot)
    problems: list[str] = []
    sites = {}
    conv1d = config.fan_in_fan_out and turned(
        (p, base_of(x)) for p, x in leaves.items()
    )
    for path, found in pieces.items():
        beside = tuple(slots.get(path, ()))
        base = base_of(leaves[path])
        bad = [p for piece in found for p in _rank_problems(piece, file)]
        layout = None
        if not bad:
            flips = conv1d, config.fan_in_fan_out
            layout, bad = _layout(path, base, found, beside, given, flips, file)
        if layout is not None and not bad:
            found, bad = _checked(path, base, layout, found, beside, file)
        problems += bad
        if layout is not None and not bad:
            sites[path] = AdaptedLeaf(path, base, layout, tuple(found), beside)
    fail(problems)
    return sites


def _padded(lora: Lora, rank: int) -> Lora:
    """With zeros up to the rank: PiSSA and OLoRA draw at most min(in, out) of them."""
    a, b = np.asarray(lora.a), np.asarray(lora.b)
    drawn = a.shape[0]
    if lora.raw or a.ndim != 2 or drawn != min(a.shape[1], b.shape[0]) or drawn > rank:
        return lora
    more = (0, rank - drawn)
    return dataclasses.replace(
        lora, a=np.pad(a, (more, (0, 0))), b=np.pad(b, ((0, 0), more))
    )


def _rank_problems(piece: Piece, file: Path) -> Iterator[str]:
    lora, rank = piece.lora, piece.rank
    a, b = lora.a.shape[0], lora.b.shape[1]
    if lora.raw:
        if a != b or a % rank:
            yield (
                f"{file}: '{lora.key('a')}' has {a} rows and '{lora.key('b')}' {b} "
                f"columns; expected both to be {rank} times the number of experts, "
                f"since {CONFIG} gives rank {rank}. Correct r or rank_pattern."
            )
        return
    groups = a // b if lora.kind == "conv" and b and a % b == 0 else 1
    if a != rank or b * groups != rank:
        yield (
            f"{file}: {_shapes(lora)}; expected rank {rank}, that {CONFIG} gives for "
            f"'{lora.site}', as A's rows and B's columns. {_rank_remedy(lora, rank)}"
        )
    elif any(n != 1 for n in lora.b.shape[2:]):
        wanted = (*lora.b.shape[:2], *(1 for _ in lora.b.shape[2:]))
        yield (
            f"{file}: '{lora.key('b')}' has shape {lora.b.shape}; expected {wanted}. "
            "Save the adapter anew."
        )


def _shapes(lora: Lora) -> str:
    return (
        f"'{lora.key('a')}' has shape {lora.a.shape} and '{lora.key('b')}' "
        f"{lora.b.shape}"
    )


def _rank_remedy(lora: Lora, rank: int) -> str:
    turned = lora.a.shape[1], lora.b.shape[0]
    if turned == (rank, rank):
        return "A and B seem to be transposed, or exchanged: save the adapter anew."
    if lora.a.shape[0] == lora.b.shape[1]:
        return f"Write {lora.a.shape[0]} in r or rank_pattern, or save it anew."
    return "A and B are of different adapters, or damaged: save the adapter anew."


def _layout(
    path: str,
    base: Any,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    given: Mapping[str, Layout],
    flips: tuple[bool, bool],
    file: Path,
) -> tuple[Layout | None, list[str]]:
    """The layout of a leaf, or what is wrong."""
    piece, shape = pieces[0], tuple(base.shape)
    lora, slot = piece.lora, piece.slot
    if path in given:
        return expert_layout(piece, shape, given[path]), []
    word = leaf_word(path)
    torch = word in ("weight", IN) and not flips[1] and lora.kind == "linear"
    if lora.kind == "conv":
        window = lora.a.shape[2:]
        layout = conv_layout(path, shape, slot.holes, window, lora.b.shape[0])
        found = [layout] if layout else []
    elif lora.raw:
        experts = lora.a.shape[0] // piece.rank
        found = parameter_layouts(lora, slot, shape, experts)
    else:
        sizes = lora.a.shape[1], _out_features(piece, beside)
        first = torch or (flips[0] and leaf_word(path) == "kernel")
        found = layouts(path, shape, slot.holes, sizes, out_first=first)
    if other := _other_kind(lora, slot, file):
        return None, [other]
    if len(found) == 1:
        return found[0], []
    a, b = f"'{lora.key('a')}' {lora.a.shape}", f"'{lora.key('b')}' {lora.b.shape}"
    if found:
        return None, [
            f"'{path}' of shape {shape} can lie in {len(found)} ways for {a} and {b}: "
            f"{'; '.join(map(str, found[:3]))}. Pass fn= and args= to follow it, or a "
            "tree that flora.init adapted."
        ]
    wanted = "A (r, in) and B (out, r) for in and out features that are axes of"
    if len(shape) - slot.holes == 2 and not lora.raw and lora.kind != "conv":
        first, last = reversed(shape[-2:]) if flips[0] or torch else shape[-2:]
        wanted = f"{_expected(lora, first, last)} for"
    return None, [
        f"{file}: {_shapes(lora)}; expected {wanted} the base's '{path}' of shape "
        f"{shape}. {_REMEDY}"
    ]


def _other_kind(lora: Lora, slot: Slot, file: Path) -> str:
    """A linear layer's factors for an embedding or the reverse, by the names alone."""
    word = leaf_word(slot.path)
    kind = {"embedding": "embedding", "kernel": "linear"}.get(word)
    named = slot.module.name != "-" or lora.raw or lora.kind == "conv"
    if named or kind in (None, lora.kind):
        return ""
    wanted = dataclasses.replace(lora, kind=kind)
    return (
        f"{file}: '{lora.key('a')}' is there; expected '{wanted.key('a')}', since the "
        f"base's '{slot.path}' is called {word!r}. {_REMEDY}"
    )


_REMEDY = "Is it the adapter of another base? Or pass names={leaf: module}."


def _out_features(piece: Piece, beside: Sequence[Slot]) -> int:
    """How many out features the leaf has, of all modules that share it."""
    own = piece.lora.b.shape[0]
    widths = [
        len(s.module.order) if s.module.order is not None else own for s in beside
    ]
    return sum(widths) if beside else own


def _checked(
    path: str,
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    file: Path,
) -> tuple[list[Piece], list[str]]:
    """The pieces as the layout needs them, and those that do not fit."""
    shape = tuple(base.shape)
    if not layout.fits(len(shape)):
        return [], [f"'{path}' of shape {shape} does not have the layout {layout}."]
    stack, (_, in_, out) = layout.sizes(shape)[0], layout.matrix(shape)
    new, problems = [], []
    for piece in pieces:
        lora, slot = piece.lora, piece.slot
        piece = turned_parameter(turned_embedding(piece, layout), layout, shape)
        if any(i >= n for i, n in zip(piece.index, stack, strict=False)):
            problems.append(
                f"{file}: '{lora.key('a')}' is index {piece.index} of the stack "
                f"'{path}', which has {stack}. Is it the adapter of a deeper base?"
            )
            continue
        rows = slot.module.order
        have = in_, out
        need = piece.lora.a.shape[1], piece.lora.b.shape[0]
        if lora.kind == "conv":
            window, channels = lora.a.shape[2:], lora.a.shape[1]
            groups = max(1, piece.rank // lora.b.shape[1])
            need = int(np.prod(window)) * channels // groups, need[1]
        if rows is not None or slot.part[1] > 1:
            need, have = (need[0], 0), (have[0], 0)
        experts = int(np.prod(stack[slot.holes :]))
        if need != have or (lora.raw and lora.a.shape[0] != piece.rank * experts):
            problems.append(
                f"{file}: {_shapes(lora)}; expected {_expected(lora, in_, out)} for "
                f"the {in_} in and {out} out features of the base's '{path}' of shape "
                f"{shape} ({layout}). {_REMEDY}"
            )
            continue
        m = piece.lora.magnitude
        if m is not None and not m.any():
            problems.append(
                f"{file}: '{lora.key('magnitude')}' is zero throughout, which leaves "
                "nothing of the weight; expected its norms, trained. Save the adapter "
                "anew."
            )
            continue
        if m is not None and m.size != piece.lora.b.shape[0]:
            wanted = (piece.lora.b.shape[0],)
            if lora.kind == "conv":
                wanted = (1, *wanted, *(1 for _ in lora.a.shape[2:]))
            problems.append(
                f"{file}: '{lora.key('magnitude')}' has shape {m.shape}; expected "
                f"{wanted}, one for each output. Save the adapter anew."
            )
            continue
        new.append(piece)
    return new, problems


def _expected(lora: Lora, in_: int, out: int) -> str:
    """The shapes that the factors of a leaf with so many features have in a file."""
    r = lora.b.shape[1]
    if lora.kind == "embedding":
        return f"A ({r}, {in_}) and B ({out}, {r})"
    if lora.kind == "conv":
        window = lora.a.shape[2:]
        ones = ", 1" * len(window)
        a = ", ".join(map(str, (lora.a.shape[0], in_ // math.prod(window), *window)))
        return f"A ({a}) and B ({out}, {r}{ones})"
    return f"A ({lora.a.shape[0]}, {in_}) and B ({out}, {r})"


def _universe(
    slots: Sequence[Slot],
    sites: Mapping[str, AdaptedLeaf],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[str], list[str]]:
    """The base's modules that have a weight, and all of its parameters."""
    weights, parameters = [], []
    for slot in slots:
        shape = shapes[slot.path]
        stack = shape[: slot.holes]
        if slot.path in sites:
            stack = sites[slot.path].layout.sizes(shape)[0][: slot.holes]
        names = [slot.at(i) for i in np.ndindex(*stack)]
        parameters += names
        last = leaf_word(slot.path) in ("kernel", "embedding", "weight")
        if last and len(shape) - slot.holes >= 2:
            weights += [split_name(n)[0] for n in names if n.endswith(".weight")]
    return sorted({*weights}), parameters


def expected_layouts(leaves: Mapping[str, Any]) -> dict[str, Layout]:
    """The layouts of an adapted tree's nodes, by path."""
    return {p: x.layout for p, x in leaves.items() if isinstance(x, LoraWeight)}


def coverage_problems(
    leaves: Mapping[str, Any], found: Assignment, file: Path
) -> Iterator[str]:
    """What only the adapted tree holds, and what only the file holds."""
    held = {p for p, x in leaves.items() if isinstance(x, LoraWeight)}
    filled = {*found.adapted, *found.rows}
    if not held:
        return
    for path in sorted(held - filled):
        yield (
            f"'{path}' is adapted in the tree, but {file} has no factors for it. Pass "
            "the plain tree, or adapt with the same targets."
        )
    for path in sorted(filled - held):
        yield (
            f"{file} has factors for '{path}', which is not adapted in the tree. Pass "
            "the plain tree, or adapt with the same targets."
        )
    for path, leaf in leaves.items():
        if isinstance(leaf, Trained) and path not in found.whole:
            yield (
                f"'{path}' trains whole in the tree, but {file} does not hold it. Pass "
                "the plain tree."
            )
