"""Leaves for names of another version of a model.

`vit.layers.0.attention.q_proj` is `vit/encoder/layer/0/attention/attention/query`:
words that mean the same count as one.  A name is a leaf's if its words are among the
leaf's in their order, or the other way round; or if it is in the same layer so, and no
other leaf there has its sizes.  What fits several leaves stays without one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from flora._peft.keys import Content, Lora
from flora._peft.layouts import layouts, leaf_word
from flora._peft.naming.names import INDEX, PARAMETERS, Finder, Slot, split_name
from flora._peft.targets import plain

_SAME = {
    "attn": "attention",
    "block": "layer",
    "blocks": "layer",
    "h": "layer",
    "key": "k",
    "layers": "layer",
    "out": "o",
    "output": "o",
    "query": "q",
    "value": "v",
}
_EMPTY = {"dense", "lin", "linear", "proj", "self"}
_NUMBER = re.compile(INDEX)
Shape = tuple[int, ...]
Fits = Callable[[str, Shape], bool]


def with_renamed(
    slots: Sequence[Slot], content: Content, shapes: Mapping[str, Shape]
) -> list[Slot]:
    """The slots, those of leaves that a name without one is for by that name."""
    finder = Finder(slots)
    lost = {n: fits for n, fits in _wanted(content) if not finder.all(n)}
    if not lost:
        return [*slots]
    wanted = {n for n, _ in _wanted(content)}
    free = [s.path for s in slots if not s.holes and s.name not in wanted]
    found = _assigned(lost, {p: shapes[p] for p in free})
    alike = dict(_templates(found))
    return [dataclasses.replace(s, name=_name(s, found, alike)) for s in slots]


def _wanted(content: Content) -> Iterator[tuple[str, Fits]]:
    """Each parameter of the file, and whether a leaf has its sizes."""
    for lora in content.loras:
        if not lora.raw and lora.kind in ("linear", "embedding"):
            yield lora.name, _fits_lora(lora)
    for name, x in (*content.whole.items(), *content.of_base.items()):
        yield plain(name), _fits_whole(x)


def _fits_lora(lora: Lora) -> Fits:
    sizes = lora.a.shape[1], lora.b.shape[0]

    def fits(path: str, shape: Shape) -> bool:
        if len(shape) == 2:
            turned = leaf_word(path) == "weight" and lora.kind == "linear"
            return shape == (sizes[::-1] if turned else sizes)
        return len(shape) > 2 and bool(layouts(path, shape, 0, sizes))

    return fits


def _fits_whole(x: np.ndarray) -> Fits:
    return lambda path, shape: sorted(shape) == sorted(x.shape)


def _assigned(lost: Mapping[str, Fits], free: Mapping[str, Shape]) -> dict[str, str]:
    """A leaf for each name that has one: `{leaf: name}`."""
    at = {path: _leaf_words(path) for path in free}
    found: dict[str, str] = {}
    taken: set[str] = set()

    def settle(near: Callable[[Sequence[str], Sequence[str]], bool]) -> None:
        """Names and leaves that have only each other."""
        options = {
            name: [
                path
                for path, words in at.items()
                if path not in found
                and words[-1] == split_name(name)[1]
                and near(_words(name), words)
                and fits(path, free[path])
            ]
            for name, fits in lost.items()
            if name not in taken
        }
        for name, paths in options.items():
            if len(paths) > 1:  # `norm` is not the norm of a layer
                same = [p for p in paths if _numbers(p) == _numbers(name)]
                options[name] = same or paths
        for name, paths in options.items():
            rivals = [n for n, some in options.items() if n != name and paths == some]
            if len(paths) == 1 and not rivals:
                found[paths[0]] = name
                taken.add(name)

    def follow() -> None:
        """Biases of modules whose weights have leaves."""
        homes = {split_name(n)[0]: p.rpartition("/")[0] for p, n in found.items()}
        for name in lost.keys() - taken:
            module, parameter = split_name(name)
            for path, words in at.items():
                own = path.rpartition("/")[0] == homes.get(module)
                if own and path not in found and words[-1] == parameter:
                    found[path] = name
                    taken.add(name)

    settle(lambda name, leaf: _within(name, leaf) or _within(leaf, name))
    follow()
    settle(lambda name, leaf: name[-1] == "weight" and _are_of_one_layer(name, leaf))
    follow()
    settle(_are_of_one_layer)
    return found


def _leaf_words(path: str) -> list[str]:
    head, _, last = path.rpartition("/")
    return _words(f"{head}.{PARAMETERS.get(last, last)}")


def _words(name: str) -> list[str]:
    *parents, last = re.split(r"[/.]", name)
    words = [w for p in parents for w in p.lower().split("_")]
    return [*(_SAME.get(w, w) for w in words if w not in _EMPTY), last]


def _within(few: Sequence[str], many: Sequence[str]) -> bool:
    """Whether all of the words are among the others, in their order."""
    left = iter(many)
    return all(word in left for word in few)


def _are_of_one_layer(name: Sequence[str], leaf: Sequence[str]) -> bool:
    one, other = _layer(name), _layer(leaf)
    return bool(one and other) and (_within(one, other) or _within(other, one))


def _layer(words: Sequence[str]) -> Sequence[str]:
    """The words up to the last number."""
    last = max((i for i, w in enumerate(words) if _NUMBER.fullmatch(w)), default=-1)
    return words[: last + 1]


def _templates(found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What the names of other layers are, by what is left of a leaf's path."""
    for path, name in found.items():
        numbers = _numbers(path), _numbers(name)
        if numbers[0] == numbers[1]:
            yield _numberless(path), _numberless(name)


def _name(slot: Slot, found: Mapping[str, str], alike: Mapping[str, str]) -> str:
    if slot.path in found:
        return found[slot.path]
    template = alike.get(_numberless(slot.path))
    if template is None:
        return slot.name
    numbers = iter(_numbers(slot.path))
    words = (next(numbers) if w == "#" else w for w in template.split("."))
    return ".".join(words)


def _numbers(path: str) -> list[str]:
    return [w for w in re.split(r"[/.]", path) if _NUMBER.fullmatch(w)]


def _numberless(path: str) -> str:
    """A dotted path with '#' for each number."""
    words = re.split(r"[/.]", path)
    return ".".join("#" if _NUMBER.fullmatch(w) else w for w in words)
