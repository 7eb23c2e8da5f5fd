"""Globs that name indices of a stack: in 'layers/3/*/kernel' the 3 is a layer.

Layers that a loop runs over share one leaf, whose path has no number.  A glob that
matches no leaf as it stands is therefore read again without the segments of it that are
numbers; what they match are indices of the stacked axes, in order, and `*` between them
is all of an axis.
"""

import dataclasses
import fnmatch
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flora._tree.errors import LoraError
from flora._tree.paths import entries, matches

_NUMBER = re.compile(r"(\d|\[[^\]/]*\d[^\]/]*\])+")  # '3', '1[0-5]', '[!0]'


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A glob that names indices, as an entry of a pattern: it selects their leaves."""

    glob: str

    def __call__(self, path: str, leaf: Any) -> bool:
        """Whether it names indices of the leaf, should that have stacked axes."""
        return any(
            matches(rest, path, leaf)
            for count in range(1, len(getattr(leaf, "shape", ())) - 1)
            for _, rest in _readings(self.glob, count)
        )

    def __repr__(self) -> str:
        return repr(self.glob)

    def named(self, path: str, stack: Sequence[int]) -> np.ndarray:
        """Which matrices of a leaf's stack it names, bool `[*stack]`.

        Raises:
          LoraError: it has one number, the leaf two stacked axes, and nothing says
            which the number belongs to.
        """
        found = np.zeros(tuple(stack), bool)
        for where in _of_glob(self.glob, path, stack):
            found |= where
        return found


def with_indices(pattern: Any, named: Sequence[tuple[str, Any]]) -> Any:
    """The pattern with `Indexed` in the place of globs that name indices."""
    found = [_read(entry, named) for entry in entries(pattern)]
    return found if isinstance(pattern, list | tuple) else found[0]


def _read(entry: Any, named: Sequence[tuple[str, Any]]) -> Any:
    if not isinstance(entry, str) or not any(map(_NUMBER.fullmatch, entry.split("/"))):
        return entry
    if any(matches(entry, path, leaf) for path, leaf in named):
        return entry
    indexed = Indexed(entry)
    return indexed if any(indexed(path, leaf) for path, leaf in named) else entry


def _of_glob(glob: str, path: str, stack: Sequence[int]) -> Iterator[np.ndarray]:
    exact = [
        at for at, rest in _readings(glob, len(stack)) if matches(rest, path, None)
    ]
    for at in exact:
        segments = [glob.split("/")[k] for k in at]
        yield functools.reduce(
            np.multiply.outer, map(_matched, segments, stack), np.array(True)
        )
    if exact or len(stack) < 2:
        return
    for (k,), rest in _readings(glob, 1):
        if matches(rest, path, None):
            segments = glob.split("/")
            axis = _axis(glob, k, path, stack)
            shape = [1] * len(stack)
            shape[axis] = stack[axis]
            one = _matched(segments[k], stack[axis])
            yield np.broadcast_to(one.reshape(shape), tuple(stack))


def _axis(glob: str, k: int, path: str, stack: Sequence[int]) -> int:
    """The axis of the one number in a glob, by where a `*` can be the others."""
    segments = glob.split("/")
    if any("*" in s for s in segments[k + 1 :]):
        return 0
    if any("*" in s for s in segments[:k]):
        return len(stack) - 1
    first = "/".join([*segments[: k + 1], "*", *segments[k + 1 :]])
    last = "/".join([*segments[:k], "*", *segments[k:]])
    raise LoraError(
        f"'{glob}' names one index, and '{path}' has {len(stack)} stacked axes, of "
        f"{' and '.join(map(str, stack))}. Write '{first}' for the first, or '{last}' "
        "for the last."
    )


def _matched(segment: str, size: int) -> np.ndarray:
    """Which of the numbers below a size a segment of a glob matches."""
    return np.array([fnmatch.fnmatchcase(str(i), segment) for i in range(size)])


@functools.cache
def _readings(glob: str, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The ways to read `count` segments as indices: which, and the glob without them.

    At least one is a number, the others may be `*`.
    """
    segments = glob.split("/")
    numbers = [bool(_NUMBER.fullmatch(s)) for s in segments]
    free = [k for k, s in enumerate(segments) if numbers[k] or s == "*"]
    found = []
    for at in itertools.combinations(free, count):
        rest = "/".join(s for k, s in enumerate(segments) if k not in at)
        if rest and any(numbers[k] for k in at):
            found.append((at, rest))
    return tuple(found)
