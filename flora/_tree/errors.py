"""The errors that flora raises: what was passed, what was expected, what to write."""

import itertools
import re
from collections.abc import Iterable

_ONE, _LIST = 2_000, 4_000  # characters of a message at most
# What a terminal obeys, what turns text round or ends a line, and halves of characters.
_UNSHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff]"
)
_FILE = re.compile(r"[^'\"]*[/\\][^/\\]+\.\w+")  # at the start of what is said of it
_WORD = re.compile(r"\S{300,}")


class LoraError(ValueError):
    """A call that flora cannot serve.  The message names leaf, reason and remedy.

    What a file says is quoted in it: control characters are escaped, and what is very
    long is shortened in its middle.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_shortened(_shown(str(message)), _LIST))


class LoraTypeError(LoraError, TypeError):
    """A `LoraError` for an argument of the wrong type."""


class Unfactorable(Exception):
    """Raised by a rule that has no factored form; never leaves the interpreter."""


def fail(problems: Iterable[str], error: type[LoraError] = LoraError) -> None:
    """Raises one error that lists every problem; returns if there is none."""
    rest = iter(problems)
    first = [_shortened(_shown(p), _ONE) for p in itertools.islice(rest, 20)]
    count = len(first) + sum(1 for _ in rest)
    if not first:
        return
    if count == 1:
        raise error(first[0])
    text, shown, file = "", 0, ""
    for problem in first:
        if shown and len(text) + len(problem) > _LIST - 100:
            break
        where, colon, said = problem.partition(": ")
        if not colon or not _FILE.fullmatch(where):
            where, said = "", problem
        elif where != file:
            text = f"{text}\n{where}:"
        file = where
        text, shown = f"{text}\n  - {said}", shown + 1
    more = "" if shown == count else f"\n  - and {count - shown} more"
    raise error(f"{count} problems:{text}{more}")


def _shown(text: str) -> str:
    return _UNSHOWN.sub(lambda m: ascii(m[0])[1:-1], text)


def _shortened(text: str, most: int) -> str:
    """The text with at most so many characters, and no word of more than 300."""
    text = _WORD.sub(lambda m: _cut(m[0], 200), text)
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head, tail = most * 3 // 4 - 25, most // 4 - 25
    return f"{text[:head]} … {len(text) - head - tail:,} more … {text[-tail:]}"


def human_bytes(count: float) -> str:
    """A byte count as text, such as '64.0 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
