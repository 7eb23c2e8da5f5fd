"""Target patterns: from '/'-joined paths to leaves."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from flora._tree.errors import LoraError, LoraTypeError
from flora._tree.nearest import Nearest
from flora._tree.weight import is_leaf

Matcher = str | re.Pattern[str] | Callable[[str, Any], bool]
Pattern = Matcher | Sequence[Matcher]


def path_of(keys: Sequence[Any]) -> str:
    """The '/'-joined path.  The `value` of a Flax box is not part of it."""
    keys = list(keys)
    while (
        len(keys) > 1 and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value"
    ):
        keys.pop()
    return "/".join(jax.tree_util.keystr((k,), simple=True) for k in keys)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """`([(path, leaf)], treedef)`; flora's nodes and quantized weights are leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_of(keys), leaf) for keys, leaf in leaves], treedef


def check_pattern(name: str, pattern: Any) -> None:
    """Raises unless it is a glob, a compiled regex, a callable, or several of them."""
    for part in _parts(pattern):
        if not isinstance(part, str | re.Pattern) and not callable(part):
            raise LoraTypeError(
                f"{name}={pattern!r} holds a {type(part).__name__}. Write a glob such "
                "as '*/kernel', re.compile(...), a callable (path, leaf) -> bool, or a "
                "list of them."
            )


def _parts(pattern: Any) -> list[Any]:
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        return list(pattern)
    return [pattern]


def matches(pattern: Pattern, path: str, leaf: Any) -> bool:
    """Whether any part of the pattern selects the leaf.

    A glob's `*` crosses '/'; the glob must match the end of the path, from the start
    of a segment.  A regex must match the whole path.
    """
    return any(_matches_one(part, path, leaf) for part in _parts(pattern))


def _matches_one(part: Any, path: str, leaf: Any) -> bool:
    if isinstance(part, str):
        return fnmatch.fnmatchcase(path, part) or fnmatch.fnmatchcase(path, f"*/{part}")
    if isinstance(part, re.Pattern):
        return part.fullmatch(path) is not None
    try:
        return bool(part(path, leaf))
    except Exception as error:
        raise LoraError(
            f"The pattern {part!r} failed on '{path}': {error!r}. Write a callable "
            "(path, leaf) -> bool."
        ) from error


def nothing_selected(name: str, pattern: Any, paths: Sequence[str]) -> str:
    """The message for a pattern that selects no leaf, with the nearest names."""
    shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    message = f"{name}={shown!r} selects none of the {len(paths)} leaves."
    near: list[str] = []
    for part in _parts(pattern):
        text = part.pattern if isinstance(part, re.Pattern) else part
        if isinstance(text, str):
            near += _nearest(text, paths)
    near = list(dict.fromkeys(near)) or list(paths[:3])
    message += f" Closest: {', '.join(map(repr, near[:3]))}."
    for part in _parts(pattern):
        if isinstance(part, str) and any(matches(f"{part}/*", p, None) for p in paths):
            message += f" To select what is below, write '{part}/*'."
    if "weight" in str(shown):
        message += " Flax names linear weights 'kernel'."
    return message


def _nearest(text: str, paths: Sequence[str]) -> list[str]:
    plain = re.sub(r"[\*\.\\\^\$\?\+]+", "", text).strip("/")
    return Nearest(paths, 0.4, "/").to(plain, 6)
