"""Patterns that select nothing: which of them, and what would match instead."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flora._tree.indices import Indexed
from flora._tree.nearest import Nearest
from flora._tree.paths import Pattern, entries, exactly, matches

Named = Sequence[tuple[str, Any]]

_HINTS = 5  # so many idle entries get a search for what is near
_WEIGHTS = ("kernel", "embedding", "weight", "w")


def idle_entries(name: str, pattern: Pattern, named: Named) -> list[str]:
    """One line for each entry of a pattern that selects none of the leaves."""
    given = entries(pattern)
    idle = [e for e in given if not any(matches(e, p, x) for p, x in named)]
    several = len(given) > 1
    paths = [p for p, _ in named]
    return [
        nothing_selected(name, e, paths, several=several, hints=i < _HINTS)
        for i, e in enumerate(idle)
    ]


def idle_keys(name: str, patterns: Mapping[Any, Any], named: Named) -> list[str]:
    """One line for each entry of `{pattern: value}` that decides for no leaf.

    The first that selects a leaf decides; a later one can so be left without any.
    """
    hits = {key: [p for p, x in named if matches(key, p, x)] for key in patterns}
    problems, taken = [], {}
    for key in patterns:
        problems += idle_entries(name, key, named)
        for entry in entries(key):
            hit = [p for p, x in named if matches(entry, p, x)]
            if hit and all(p in taken for p in hit):
                by = {taken[p] for p in hit}
                earlier = [other for other in patterns if other in by]
                more = all({*hits[other]} - {*hit} for other in earlier)
                problems.append(shadowed(name, entry, earlier, more=more))
        if not isinstance(key, Indexed):  # the others' indices are left
            taken = dict.fromkeys(hits[key], key) | taken
    return problems


def shadowed(name: str, entry: Any, earlier: Sequence[Any], *, more: bool) -> str:
    """The message for an entry of which others decide all that it selects.

    Args:
      name: of the mapping.
      entry: the pattern.
      earlier: the patterns that decide instead.
      more: whether each of these would be left with something of its own.
    """
    before = ", ".join(map(shown, earlier[:3]))
    remedy = f"Write it before {before}, or take it out." if more else "Take it out."
    return (
        f"{name}: all that {shown(entry)} selects is taken by earlier entries, "
        f"{before}, and the first that selects a leaf decides. {remedy}"
    )


def shown(entry: Any) -> str:
    """How a pattern is written."""
    return repr(entry.pattern if isinstance(entry, re.Pattern) else entry)


def nothing_selected(
    name: str,
    pattern: Any,
    paths: Sequence[str],
    *,
    several: bool = False,
    hints: bool = True,
) -> str:
    """The message for a pattern that selects no leaf, with what would.

    Args:
      name: of the argument.
      pattern: what was written there, or one of several entries.
      paths: of the leaves.
      several: whether it is one entry of several.
      hints: whether to look for what is near.
    """
    what = (
        f"{name} has {shown(pattern)}, which" if several else f"{name}={shown(pattern)}"
    )
    message = f"{what} selects none of the {len(paths)} leaves."
    if not hints:
        return message
    texts = [t for e in entries(pattern) if isinstance(t := _text(e), str)]
    near = list(dict.fromkeys(x for t in texts for x in _nearest(t, paths)))
    closest = [alone(p, paths) for p in near[:3] or paths[:3]]
    if closest:
        message += f" Closest: {', '.join(closest)}."
    for text in dict.fromkeys(texts):
        message += _instead(name, text, paths)
    flax = any(p.rpartition("/")[2] == "kernel" for p in paths)
    if flax and any("weight" in text for text in texts):
        message += " Flax names linear weights 'kernel'."
    return message


def _text(entry: Any) -> Any:
    return entry.pattern if isinstance(entry, re.Pattern) else entry


def alone(path: str, paths: Sequence[str]) -> str:
    """The pattern of one leaf, as written: its path, where that selects no other."""
    plain = [p for p in paths if matches(path, p, None)] == [path]
    return repr(path if plain else exactly(path))


def _nearest(text: str, paths: Sequence[str]) -> list[str]:
    plain = re.sub(r"[\*\.\\\^\$\?\+]+", "", text[:200]).strip("/")
    return Nearest(paths, 0.4, "/").to(plain, 6)


# --- As PEFT and PyTorch write it -----------------------------------------------------


def _instead(name: str, text: str, paths: Sequence[str]) -> str:
    """What selects what a glob would have selected as a module's name or a regex."""
    if text.lower().replace("_", "-") == "all-linear":
        return (
            " For PEFT's 'all-linear' write flora.coverage(fn, tree, ...).all_linear."
        )
    text = text.strip("/")
    if not text:
        return ""
    below = [p for p in paths if matches(f"{text}/*", p, None)]
    if below and name != "target":
        return f" To select what is below, write {f'{text}/*'!r}."
    found = below or _of_module(text, paths)
    last = [p for p in found if p.rpartition("/")[2] in _WEIGHTS]
    found = last if last and name == "target" else found
    globs = next(_globs(text, found, paths), None)
    if globs is None:
        return ""
    return f" Write {globs[0]!r}." if len(globs) == 1 else f" Write {globs!r}."


def _of_module(text: str, paths: Sequence[str]) -> list[str]:
    """The leaves of the modules that PEFT would select, or of a regex of the path."""
    text = re.sub(r"^\^?(base_model\\?\.model\\?\.)?(model\\?\.)?", "", text)
    dotted = text.replace("/", ".").removesuffix(".weight")
    glob = f"{dotted.replace('.', '/')}/*"
    regexes = [r for t in {text, dotted} if (r := _compiled(t)) is not None]
    found = []
    for path in paths:
        words = _dotted(path).split(".")
        ends = [".".join(words[i:]) for i in range(len(words))]
        ends += [".".join(words[i:-1]) for i in range(len(words) - 1)]
        if (
            dotted in ends
            or matches(glob, path, None)
            or any(r.fullmatch(x) for r in regexes for x in (*ends, path))
        ):
            found.append(path)
    return found


def _dotted(path: str) -> str:
    """A path as PyTorch would name it: 'layers.0.q_proj.kernel'."""
    words = path.split("/")
    words = words[1:] if len(words) > 1 and words[0] == "params" else words
    return ".".join(re.sub(r"_(\d+)$", r".\1", word) for word in words)


def _compiled(text: str) -> re.Pattern[str] | None:
    """The text as a regex, if it is one that matches in bounded time."""
    repeats = len(re.findall(r"[*+{]", text))
    if repeats > 3 or len(text) > 200 or re.search(r"\)[*+{]", text):
        return None
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return None


def _globs(
    text: str, found: Sequence[str], paths: Sequence[str]
) -> Iterator[list[str]]:
    """Short lists of globs that select these leaves and no others."""
    words = list(dict.fromkeys(p.rpartition("/")[2] for p in found))
    tried = [[f"{text}/{w}" for w in words], [f"{text}/*/{w}" for w in words]]
    for n in range(2, 1 + max((p.count("/") + 1 for p in found), default=0)):
        for fixed in (True, False):
            tails = dict.fromkeys(_tail(p, n, fixed=fixed) for p in found)
            tried.append(list(tails))
    tried.append([exactly(p) for p in found])
    for globs in tried:
        chosen = [p for p in paths if len(globs) <= 8 and matches(globs, p, None)]
        if found and chosen == [*found]:
            yield globs


def _tail(path: str, n: int, *, fixed: bool) -> str:
    """The last n words of a path as a glob, with its numbers or with any."""
    tail = exactly("/".join(path.split("/")[-n:])).removeprefix("/")
    return tail if fixed else re.sub(r"\d+", "*", tail)
