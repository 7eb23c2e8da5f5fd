"""The names closest to one that is not there."""

import bisect
import difflib
import functools
from collections.abc import Iterable

_QUESTIONS, _AROUND, _NAMES, _LONGEST = 20, 10, 20_000, 1_000


class Nearest:
    """Names to choose from.

    difflib takes the product of two names' lengths, which for thousands of names is
    minutes.  Here it sees those alone that come next to the one asked for in the order
    of the alphabet, read forwards or backwards; and only the first 20 questions are
    answered, since a message shows no more.

    Args:
      names: the names.
      cutoff: how alike they must be, from 0 to 1.
      separator: if given, the ends of names that start after one are compared too.
    """

    def __init__(
        self, names: Iterable[str], cutoff: float = 0.6, separator: str = ""
    ) -> None:
        self._names, self._left = list(names), _QUESTIONS
        self._cutoff, self._separator = cutoff, separator

    @functools.cached_property
    def _ends(self) -> dict[str, str]:
        """The names and their ends, each with a name that it is of."""
        found: dict[str, str] = {}
        for name in self._names[:_NAMES]:
            if len(name) > _LONGEST:
                continue
            found.setdefault(name, name)
            words = name.split(self._separator)[1:] if self._separator else []
            for n in range(len(words)):
                found.setdefault(self._separator.join(words[n:]), name)
        return found

    @functools.cached_property
    def _orders(self) -> tuple[list[str], list[str]]:
        return sorted(self._ends), sorted(end[::-1] for end in self._ends)

    def to(self, name: str, most: int = 1) -> list[str]:
        """The names closest to this one, the closest first."""
        if not name or len(name) > _LONGEST or not self._left:
            return []
        self._left -= 1
        forwards, backwards = self._orders
        around = [
            *_beside(forwards, name),
            *(x[::-1] for x in _beside(backwards, name[::-1])),
        ]
        near = difflib.get_close_matches(
            name, dict.fromkeys(around), 2 * most, self._cutoff
        )
        return list(dict.fromkeys(self._ends[end] for end in near))[:most]


def _beside(order: list[str], name: str) -> list[str]:
    at = bisect.bisect_left(order, name)
    return order[max(at - _AROUND, 0) : at + _AROUND]
