"""Names by convention: what PyTorch calls a leaf, as its path says.

HF's Flax models write lists as PyTorch does: `layer/0/wi_0` is `layer.0.wi_0`.  A list
in Linen's `setup` is `layers_0`, `layers_1`, … instead, which looks like names of their
own.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flora._peft.naming.names import INDEX, PARAMETERS, Slot
from flora._tree.errors import LoraError

_COLLECTIONS = ("params", "batch_stats")
_NUMBERS = 8  # of one name, that may be indices
_JOINED = re.compile(rf"(.+)_({INDEX})")
Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A leaf's name, and the other one that it may have, or ''."""

    name: str
    other: str = ""


def spelled(paths: Sequence[str], *, partial: bool = False) -> dict[str, Spelled]:
    """The names that PyTorch would give leaves.

    Where any list is written `layers/0`, all are.  Else modules `layers_0`, `layers_1`,
    … that hold the same modules are a list, `layers.0`.  Layers of their own,
    `dense_0`, may be either; what does not count from 0 is no list, and neither is
    `Dense_0`, as Linen calls what has no name.

    Args:
      paths: of all leaves.
      partial: whether the tree may lack some.
    """
    split = {path: _words(path) for path in paths}
    if any(re.fullmatch(INDEX, w) for words in split.values() for w in words[:-1]):
        return {path: Spelled(_dotted(words, ())) for path, words in split.items()}
    inside: dict[tuple[Words, str], dict[int, set[Words]]] = {}
    for words in split.values():
        for i, word in enumerate(words[:-1]):
            if at := _JOINED.fullmatch(word):
                group = inside.setdefault((words[:i], at[1]), {})
                group.setdefault(int(at[2]), set()).add(words[i + 1 :])
    lists, doubtful = set(), set()
    for (parents, word), group in inside.items():
        if 0 not in group and not partial:
            continue
        held = {frozenset(x) for x in group.values()}
        whole = min(len(x) for one in held for x in one) > 1
        counted = sorted(group) == [*range(len(group))] and len(held) == 1
        if not whole and word[0].isupper():
            continue  # Linen's own names, `Dense_0`, are of no list
        own = {(*parents, f"{word}_{i}") for i in group}
        if whole and (counted or partial):
            lists |= own
        else:
            doubtful |= own
            lists |= own if whole else set()
    found = {}
    for path, words in split.items():
        heads = [words[: i + 1] for i in range(len(words) - 1)]
        unsure = {h for h in heads if h in doubtful}
        name = _dotted(words, lists)
        other = _dotted(words, lists ^ unsure)
        found[path] = Spelled(name, other if unsure else "")
    return found


def _words(path: str) -> Words:
    words = tuple(w for part in path.split("/") for w in part.split("."))
    return words[1:] if len(words) > 1 and words[0] in _COLLECTIONS else words


def _dotted(words: Words, lists: Iterable[Words]) -> str:
    """The name, with `layers_0` as `layers.0` where it is one of the lists'."""
    *parents, last = words
    shown = [
        _JOINED.sub(r"\1.\2", word) if words[: i + 1] in lists else word
        for i, word in enumerate(parents)
    ]
    return ".".join([*shown, PARAMETERS.get(last, last)])


def default_slots(paths: Sequence[str], *, partial: bool = False) -> list[Slot]:
    """Names by convention alone, for leaves that are not stacked."""
    return [Slot(p, x.name) for p, x in spelled(paths, partial=partial).items()]


def doubts(paths: Sequence[str], *, partial: bool) -> dict[str, str]:
    """What to write for each leaf that has two names by the convention."""
    return {
        path: f"save: '{path}' may be '{x.name}' of PyTorch or '{x.other}', an element "
        f"of a list. Write which: names={{..., '/{path}': "
        f"'{x.name.rpartition('.')[0]}'}}."
        for path, x in spelled(paths, partial=partial).items()
        if x.other
    }


def matched_slots(paths: Sequence[str], wanted: Iterable[str]) -> list[Slot]:
    """Names by HF's convention, written as the wanted parameters write them.

    A leaf may lack the first words of a name, or have more of them, if all do; a number
    that a leaf lacks counts along an axis of it.
    """
    wanted = sorted({*wanted})
    leaves: dict[Words, str] = {}
    twice: dict[str, str] = {}
    names = _as_written(paths, wanted)
    for path in paths:
        first = leaves.setdefault(_apart(names[path]), path)
        if first != path:
            twice[first] = path
    found: dict[str, str] = {}
    shift, table = max(
        ((shift, _table(leaves, shift[1])) for shift in _SHIFTS),
        key=lambda s: (_hits(s[1], wanted, s[0]), -sum(s[0])),
    )
    for name in wanted:
        for words, template in _forms(name, shift):
            path = table.get(words)
            if path in twice:
                raise LoraError(
                    f"'{name}' may be '{path}' or '{twice[path]}'. Pass "
                    "names={leaf: module}."
                )
            if path is not None:
                found.setdefault(path, template)
                break
    prefix = _prefix(wanted, shift)
    for path in leaves.values():
        if path not in found:
            found[path] = ".".join([*prefix, _without(names[path], shift[1])])
    return [Slot(path, found[path]) for path in leaves.values()]


def _as_written(paths: Sequence[str], wanted: Iterable[str]) -> dict[str, str]:
    """The names by convention, with `wi_0` where the wanted names have any `wi_1`."""
    split = [name.split(".") for name in wanted]
    joined = {at[1] for words in split for w in words if (at := _JOINED.fullmatch(w))}
    listed = {
        w
        for words in split
        for w, after in itertools.pairwise(words)
        if re.fullmatch(INDEX, after)
    }

    def likelihood(name: str) -> int:
        heads = [at[1] for w in name.split(".") if (at := _JOINED.fullmatch(w))]
        return sum((h in joined) - (h in listed) for h in heads)

    return {
        path: max((x.name, x.other or x.name), key=likelihood)
        for path, x in spelled(paths).items()
    }


def _without(name: str, count: int) -> str:
    """The name without its first words."""
    words = name.split(".")
    while count > 0 and len(words) > 1:
        count -= len(_apart(f"{words.pop(0)}.")) - 1
    return ".".join(words)


def _apart(name: str) -> Words:
    """Its words, with all numbers apart."""
    *parents, last = name.split(".")
    return (*(x for w in parents for x in _JOINED.sub(r"\1.\2", w).split(".")), last)


# How many first words names may have, or leaves may have, that the others lack.
_SHIFTS = ((0, 0), *((n, 0) for n in (1, 2, 3)), *((0, n) for n in (1, 2, 3)))


def _table(leaves: Mapping[Words, str], dropped: int) -> dict[Words, str | None]:
    """The leaves by what is left of their names; `None` where two have the same."""
    found: dict[Words, str | None] = {}
    for words, path in leaves.items():
        left = words[dropped:]
        found[left] = None if left in found else path
    return found


def _hits(
    table: Mapping[Words, str | None], wanted: Sequence[str], shift: tuple[int, int]
) -> int:
    return sum(
        any(table.get(words) for words, _ in _forms(name, shift)) for name in wanted
    )


def _prefix(wanted: Sequence[str], shift: tuple[int, int]) -> list[str]:
    heads = {tuple(name.split(".")[: shift[0]]) for name in wanted}
    return list(heads.pop()) if len(heads) == 1 else []


def _forms(name: str, shift: tuple[int, int]) -> Iterator[tuple[Words, str]]:
    """The words of a name, all and without one or two of its numbers."""
    raw = name.split(".")
    head, body = raw[: shift[0]], raw[shift[0] :]
    if not body:
        return
    numbers = [i for i, w in enumerate(body) if re.fullmatch(INDEX, w)][:_NUMBERS]
    pairs = [(i, j) for i in numbers for j in numbers if i < j]
    for removed in [(), *((i,) for i in numbers), *pairs]:
        kept = [w for i, w in enumerate(body) if i not in removed]
        holes = iter("ijk")
        shown = [
            f"{{{next(holes)}}}" if i in removed else w for i, w in enumerate(body)
        ]
        yield _apart(".".join(kept)), ".".join([*head, *shown])
