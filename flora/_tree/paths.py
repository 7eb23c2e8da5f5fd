"""Target patterns: from '/'-joined paths to leaves."""

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError
from flora._tree.weight import is_leaf

Matcher = str | re.Pattern[str] | Callable[[str, Any], bool]
Pattern = Matcher | Sequence[Matcher]
T = TypeVar("T")


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


def is_static(leaf: Any) -> bool:
    """Whether a leaf is a function, a string or a number of Python's.

    Modules of Equinox hold them: activations, names, rates.
    """
    plain = isinstance(leaf, str | bytes | int | float | complex)
    return not is_array(leaf) and (plain or callable(leaf))


def check_pattern(name: str, pattern: Any) -> None:
    """Raises unless it is a glob, a compiled regex, a callable, or several of them."""
    for entry in entries(pattern):
        if not isinstance(entry, str | re.Pattern) and not callable(entry):
            raise LoraTypeError(
                f"{name}={pattern!r} holds a {type(entry).__name__}. Write a glob such "
                "as '*/kernel', re.compile(...), a callable (path, leaf) -> bool, or a "
                "list of them."
            )


def entries(pattern: Any) -> list[Any]:
    """The globs, regexes and callables that a pattern consists of."""
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        return list(pattern)
    return [pattern]


def matches(pattern: Pattern, path: str, leaf: Any) -> bool:
    """Whether any entry of the pattern selects the leaf.

    A glob's `*` crosses '/'; the glob must match the end of the path, from the start of
    a segment, or the whole path if it starts with '/'.  A regex must match the whole
    path.  A callable is not asked about leaves that are static.
    """
    return any(_matches_one(entry, path, leaf) for entry in entries(pattern))


def _matches_one(entry: Any, path: str, leaf: Any) -> bool:
    if isinstance(entry, str):
        return _regex(entry).fullmatch(path) is not None
    if isinstance(entry, re.Pattern):
        return entry.fullmatch(path) is not None
    if is_static(leaf):
        return False
    try:
        return bool(entry(path, leaf))
    except Exception as error:
        raise LoraError(
            f"The pattern {entry!r} failed on '{path}': {error!r}. Write a callable "
            "(path, leaf) -> bool."
        ) from error


@functools.lru_cache(maxsize=8192)
def _regex(glob: str) -> re.Pattern[str]:
    """What a glob says of a whole path."""
    if glob.startswith("/"):
        return re.compile(fnmatch.translate(glob[1:]))
    return re.compile(rf"(?s:.*/)?{fnmatch.translate(glob)}")


def exactly(path: str) -> str:
    """The glob that selects the leaf of this path and no other."""
    return "/" + re.sub(r"([*?[])", r"[\1]", path)


def first(patterns: Mapping[Any, T], default: T, path: str, leaf: Any) -> T:
    """The value of the first pattern, in the order written, that selects the leaf."""
    for pattern, value in patterns.items():
        if matches(pattern, path, leaf):
            return value
    return default
