"""Regular expressions out of a file, matched in bounded time.

Python's `re` tries one way after the other, and a name that `(([a-z0-9_.]+)+)+!` does
not match has more ways than there is time for.  Here all ways are followed at once: a
set of positions in the name is the bits of an int, and each part of an expression takes
the positions where it may begin to those where it may end.  What matches is what `re`
matches; backreferences, which no set of positions can hold, are refused.

References: Thompson 1968, "Regular expression search algorithm".
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flora._tree.errors import LoraError

_STEPS = 1_000_000  # of all together, about half a second, and for each name
_STEPS_A_NAME = 300
_MANY = 10**9
_ANY = "\0"  # in a run, any character
_MOST, _DEEPEST, _LONGEST = 100_000, 50, 1_000
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}"
    r"|[0-3][0-7]{2}|[^0-9])",
    re.DOTALL,
)
_COUNT = re.compile(r"\*|\+|\?|\{(?!\})(?P<low>[0-9]*)(?P<comma>,)?(?P<high>[0-9]*)\}")
_GROUP = re.compile(
    r"\((?:\?(?:(?P<look><?[=!])|P<[^\W\d]\w*>|(?P<comment>#[^)]*\))"
    r"|(?P<flags>[aimsu]*(?:-[ims]+)?)(?P<end>[:)])))?"
)
_FLAGS = {x: getattr(re, x.upper()) for x in "aimsu"}
_POSITIONS = [r"^", r"$", r"\A", r"\Z", r"\b", r"\B"]


class Steps:
    """What all expressions of one config may take together, and the names they met.

    Attributes:
      entry: what is matched just now, for messages.
    """

    def __init__(self) -> None:
        self.entry, self._left = "", _STEPS
        self._names: dict[str, Name] = {}

    def spend(self, count: int = 1) -> None:
        """Counts steps, and raises a LoraError once there are too many."""
        self._left -= count
        if self._left < 0:
            raise LoraError(
                f"{self.entry} takes too long to match: more than {_STEPS:,} steps. "
                "Write a simpler expression, or the names themselves."
            )

    def name(self, text: str) -> "Name":
        """The name, which adds to what is left."""
        if text not in self._names:
            self._names[text] = Name(text, self)
            self._left += _STEPS_A_NAME
        return self._names[text]


class Name:
    """A text, and where in it one character or one run of them is, as bits."""

    def __init__(self, text: str, steps: Steps) -> None:
        if len(text) > _LONGEST or not text.isprintable():
            raise LoraError(
                f"{text!r} is a name of {len(text):,} characters; expected printable "
                f"ones, at most {_LONGEST:,}."
            )
        self.text, self.end, self.steps = text, 1 << len(text), steps
        self.where: dict[str, int] = {}
        for i, c in enumerate(text):
            self.where[c] = self.where.get(c, 0) | 1 << i
        self.hits: dict[tuple[str, int], int] = {}


Part = Callable[[Name, int], int]


class Invalid(ValueError):
    """Text that is no regular expression, or one that is refused."""


class Regex:
    """A compiled expression.

    Args:
      text: the expression.
      entry: where it comes from, for messages, such as "target_modules '.*_proj'".
      steps: what it may take; its own if it is alone.

    Raises:
      Invalid: `re` has no such expression, or flora does not match it.
    """

    def __init__(self, text: str, entry: str = "", steps: Steps | None = None) -> None:
        self._entry, self._steps = entry or f"'{text}'", steps or Steps()
        self._part = _Reader(text).whole()

    def ends(self, text: str, start: int = 0) -> int:
        """Where a match that begins at `start` may end, as bits."""
        self._steps.entry = self._entry
        return self._part(self._steps.name(text), 1 << start)

    def match(self, text: str) -> bool:
        """Whether the text begins with a match."""
        return self.ends(text) > 0

    def fullmatch(self, text: str) -> bool:
        """Whether all of the text is a match."""
        return self.ends(text) >> len(text) > 0


def is_plain(key: str) -> bool:
    """Whether an expression is a name, in which dots may stand for any character."""
    return _PLAIN.fullmatch(key) is not None


class Patterns:
    r"""Keys of which the first counts: `re.match(rf"(.*\.)?({key})$", name)`.

    Nearly all keys are names as they are, thousands at times: those are looked up.
    """

    def __init__(self, field: str, keys: Iterable[str], steps: Steps) -> None:
        self._field, self._steps, self.keys = field, steps, tuple(keys)
        # By length, and by where a dot stands for any character.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self._others: list[tuple[int, Regex]] = []
        for n, key in enumerate(self.keys):
            if not is_plain(key):
                entry = f"{field} {key!r}"
                self._others.append((n, Regex(rf"(.*\.)?({key})$", entry, steps)))
                continue
            text = key.removeprefix("^").replace("\\.", _ANY)
            dots = tuple(i for i, c in enumerate(text) if c == ".")
            text = text.replace(_ANY, ".")
            tables = self._plain.setdefault(len(text), {})
            tables.setdefault(dots, {}).setdefault(text, []).append(n)

    def all(self, name: str) -> set[int]:
        """The numbers of the keys that cover the end of a name."""
        found = {n for n, regex in self._others if regex.match(name)}
        words = name.split(".")
        for i in range(len(words)):
            end = ".".join(words[i:])
            for dots, table in self._plain.get(len(end), {}).items():
                self._steps.entry = self._field
                self._steps.spend()
                shown = list(end)
                for at in dots:
                    shown[at] = "."
                hits = table.get("".join(shown), ())
                found |= {n for n in hits if i == 0 or self.keys[n][0] != "^"}
        return found

    def first(self, name: str) -> str | None:
        """The first of them, which counts."""
        found = self.all(name)
        return self.keys[min(found)] if found else None


# --- Parts ----------------------------------------------------------------------------


def _run(run: str) -> Part:
    """Characters as they are; `_ANY` is any, as no name has it."""
    chunks = [(m.start(), m[0]) for m in re.finditer(f"[^{_ANY}]+", run)]

    def part(name: Name, starts: int) -> int:
        name.steps.spend()
        if not starts & (starts - 1):  # one position
            at = starts.bit_length() - 1
            if at + len(run) > len(name.text):
                return 0
            for offset, chunk in chunks:
                if not name.text.startswith(chunk, at + offset):
                    return 0
            return starts << len(run)
        for c in run:
            name.steps.spend()
            all_ = name.end - 1
            starts = (starts & (all_ if c == _ANY else name.where.get(c, 0))) << 1
            if not starts:
                break
        return starts

    return part


class _OneOf:
    """One character, by what `re` says of that set, escape or dot."""

    def __init__(self, text: str, flags: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._accepts = re.compile(text, flags).fullmatch
        except (re.error, OverflowError) as error:
            raise Invalid(str(error)) from error
        self._known: dict[str, bool] = {}
        self._key = text, flags

    def hits(self, name: Name) -> int:
        """Where such characters are."""
        found = name.hits.get(self._key)
        if found is None:
            found = 0
            for c, where in name.where.items():
                if c not in self._known:
                    self._known[c] = self._accepts(c) is not None
                found |= where if self._known[c] else 0
            name.hits[self._key] = found
        return found

    def __call__(self, name: Name, starts: int) -> int:
        name.steps.spend()
        return (starts & self.hits(name)) << 1


def _any_number(one: _OneOf) -> Part:
    """Any number of one character: adding carries a bit along a run of ones."""

    def part(name: Name, starts: int) -> int:
        name.steps.spend()
        hits = one.hits(name)
        return (((starts & hits) + hits) ^ hits) | starts

    return part


def _sequence(parts: Sequence[Part]) -> Part:
    def part(name: Name, starts: int) -> int:
        for one in parts:
            if not starts:
                return 0
            starts = one(name, starts)
        return starts

    return parts[0] if len(parts) == 1 else part


def _either(branches: Sequence[Part]) -> Part:
    def part(name: Name, starts: int) -> int:
        found = 0
        for one in branches:
            found |= one(name, starts)
        return found

    return branches[0] if len(branches) == 1 else part


def _repeated(one: Part, low: int, high: float) -> Part:
    def part(name: Name, starts: int) -> int:
        # Positions only go up: after as many rounds as there are, nothing is new.
        most = len(name.text) + 2
        for _ in range(min(low, most)):
            name.steps.spend()
            before, starts = starts, one(name, starts)
            if starts in (0, before):
                break
        found = new = starts
        for _ in range(int(min(high - low, most))):
            name.steps.spend()
            new = one(name, new) & ~found
            if not new:
                break
            found |= new
        return found

    return part


def _look(one: Part, kind: str) -> Part:
    """Lookahead and lookbehind, `=` or `!`."""

    def part(name: Name, starts: int) -> int:
        if kind[0] == "<":
            found = one(name, 2 * name.end - 1) & starts
        else:
            found, left = 0, starts
            while left:
                name.steps.spend()
                bit = left & -left
                found |= bit if one(name, bit) else 0
                left ^= bit
        return found if kind[-1] == "=" else starts & ~found

    return part


def _position(text: str, flags: int) -> Part:
    """`^`, `$` and so on.  A name has no line breaks."""
    found = re.compile(text, flags)

    def part(name: Name, starts: int) -> int:
        name.steps.spend()
        if text in (r"\A", "^"):
            return starts & 1
        if text in (r"\Z", "$"):
            return starts & name.end
        hits = name.hits.get((text, flags))
        if hits is None:
            ends = (m.start() for m in found.finditer(name.text))
            hits = name.hits[text, flags] = sum(1 << i for i in ends)
        return starts & hits

    return part


# --- Text -----------------------------------------------------------------------------


class _Item(NamedTuple):
    part: Part
    fixed: bool = False  # a position, or repeated: not to be repeated (again)


class _Reader:
    """From the text of an expression to its part."""

    def __init__(self, text: str) -> None:
        if not text.isprintable() or len(text) > _MOST:
            raise Invalid(
                f"it has {len(text):,} characters; expected printable ones, at most "
                f"{_MOST:,}"
            )
        self._text, self._at, self._depth = text, 0, 0
        self._known: dict[tuple[str, int], _OneOf] = {}

    def whole(self) -> Part:
        found = _GROUP.match(self._text)
        flags = 0
        if found and found["end"] == ")":  # (?i) in front
            flags, self._at = _flags(found["flags"], 0), found.end()
        part = self._branches(flags)
        if self._at < len(self._text):
            raise Invalid("unbalanced parenthesis")
        return part

    def _one_of(self, text: str, flags: int) -> _OneOf:
        if (text, flags) not in self._known:
            self._known[text, flags] = _OneOf(text, flags)
        return self._known[text, flags]

    def _branches(self, flags: int) -> Part:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Invalid(f"more than {_DEEPEST} parentheses, one in the other")
        found = [self._items(flags)]
        while self._text.startswith("|", self._at):
            self._at += 1
            found.append(self._items(flags))
        self._depth -= 1
        return _either(found)

    def _items(self, flags: int) -> Part:
        items: list[_Item] = []
        run = ""
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            start = self._at
            item = self._item(flags)
            count = _COUNT.match(self._text, self._at)
            if isinstance(item, str) and count is None:
                run += item
                continue
            if run:
                items.append(_Item(_run(run)))
                run = ""
            if isinstance(item, str):
                item = _Item(
                    self._one_of("." if item == _ANY else re.escape(item), flags)
                )
            if item is None:  # a comment
                continue
            if count is not None:
                item = self._counted(item, count, start)
            items.append(item)
        if run:
            items.append(_Item(_run(run)))
        return _sequence([x.part for x in items]) if items else lambda _, starts: starts

    def _item(self, flags: int) -> _Item | str | None:
        """A part; the character itself where it stands for nothing else."""
        text, at = self._text, self._at
        c = text[at]
        if c == "(":
            return self._group(flags)
        if _COUNT.match(text, at):
            raise Invalid(f"nothing to repeat at position {at}")
        if text[at : at + 2] in _POSITIONS or c in "^$":
            self._at += 2 if c == "\\" else 1
            return _Item(_position(text[at : self._at], flags), fixed=True)
        kind = {"[": _SET, "\\": _ESCAPE}.get(c)
        if kind is None:
            self._at += 1
            if c == ".":
                return _ANY
            return (
                _Item(self._one_of(re.escape(c), flags)) if flags & re.IGNORECASE else c
            )
        found = kind.match(text, at)
        if found is None:
            what = "a set without an end" if c == "[" else "a backreference"
            raise Invalid(f"{what} at position {at}, which flora does not match")
        self._at, one = found.end(), found[0]
        if c == "[" and flags & re.IGNORECASE and not re.fullmatch(_PLAIN_SET, one):
            raise Invalid(f"{one} and (?i), which flora does not match together")
        if c == "\\" and not one[1].isalnum() and not flags & re.IGNORECASE:
            return one[1]
        return _Item(self._one_of(one, flags))

    def _counted(self, item: _Item, count: re.Match[str], start: int) -> _Item:
        self._at = count.end()
        if item.fixed:
            raise Invalid(f"nothing to repeat at position {start}")
        low, high = {"*": (0, _MANY), "+": (1, _MANY), "?": (0, 1)}.get(
            count[0], (-1, -1)
        )
        if low < 0:
            if max(len(count["low"]), len(count["high"])) > 9:
                raise Invalid("a repetition of more than nine digits")
            low = int(count["low"] or 0)
            high = int(count["high"] or _MANY) if count["comma"] else low
        if low > high:
            raise Invalid("a least repetition above the most")
        if self._text.startswith("?", self._at):  # as few as can be: the same matches
            self._at += 1
        elif self._text.startswith("+", self._at):
            raise Invalid("a possessive repetition, which flora does not match")
        if isinstance(item.part, _OneOf) and low < 2 and high == _MANY:
            rest = _any_number(item.part)
            part = _sequence([item.part, rest]) if low else rest
        else:
            part = _repeated(item.part, low, high)
        return _Item(part, fixed=True)

    def _group(self, flags: int) -> _Item | None:
        found = _GROUP.match(self._text, self._at)
        plain = found is not None and found[0] == "("
        other = plain and self._text.startswith("(?", self._at)
        if found is None or found["end"] == ")" or other:
            raise Invalid(
                f"'{self._text[self._at : self._at + 4]}' at position {self._at}, "
                "which flora does not match"
            )
        self._at = found.end()
        if found["comment"]:
            return None
        one = self._branches(_flags(found["flags"] or "", flags))
        if not self._text.startswith(")", self._at):
            raise Invalid("a parenthesis without its end")
        self._at += 1
        return _Item(_look(one, found["look"]) if found["look"] else one)


_PLAIN_SET = r"\[\^?\]?(?:\\[^xuUN0-7]|[ -\[\]-~])*\]"


def _flags(letters: str, flags: int) -> int:
    on, _, off = letters.partition("-")
    for x in on:
        flags |= _FLAGS[x]
    for x in off:
        flags &= ~_FLAGS[x]
    if flags & re.ASCII and flags & re.UNICODE:
        raise Invalid("the flags a and u, one of which excludes the other")
    return flags
