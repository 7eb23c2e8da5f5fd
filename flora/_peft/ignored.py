"""What a caller of `load` lets pass: keys of the file and entries of its config."""

from collections.abc import Iterable
from typing import Any

from flora._tree.errors import fail
from flora._tree.paths import Pattern, check_pattern, entries, matches
from flora._tree.selection import shown


class Ignored:
    """A pattern over dotted names, that remembers which of its entries were of use.

    Args:
      pattern: as in `LoraConfig`, with dots in the place of '/'.
    """

    def __init__(self, pattern: Pattern = ()) -> None:
        check_pattern("ignore", pattern)
        self._idle = entries(pattern)
        self._entries = [*self._idle]

    def __call__(self, name: str, value: Any = None) -> bool:
        """Whether a key, or an entry of the config, is to be passed over."""
        hits = [x for x in self._entries if _matches(x, name, value)]
        self._idle = [x for x in self._idle if x not in hits]
        return bool(hits)

    def require_used(self, names: Iterable[str]) -> None:
        """Raises for entries that nothing was passed over for."""
        some = ", ".join(map(repr, list(names)[:3]))
        fail(
            f"flora.peft.load: ignore has {shown(x)}, which is no key of the file, "
            f"such as {some}, and no entry of its config. Take it out."
            for x in self._idle
        )


def _matches(entry: Any, name: str, value: Any) -> bool:
    if isinstance(entry, str):
        entry, name = entry.replace(".", "/"), name.replace(".", "/")
    return matches(entry, name, value)
