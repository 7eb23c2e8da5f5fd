"""Notes on errors of the user's own functions: that flora called them, and how."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flora._tree.arrays import is_array, shown
from flora._tree.errors import LoraError, Unfactorable

_SHOWN = 8  # so many arrays of one argument


def note_call(
    error: Exception,
    verb: str,
    fn: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    first: str = "tree",
) -> None:
    """Adds to an error that `fn` raised which verb called it and with what.

    Errors of flora's own say so themselves.

    Args:
      error: what was raised.
      verb: such as 'flora.init'.
      fn: the function.
      args: its arguments after the first.
      kwargs: its keyword arguments.
      first: what its first argument is.
    """
    if isinstance(error, LoraError | Unfactorable):
        return
    given = [first, *map(_argument, args)]
    given += [f"{name}={_argument(x)}" for name, x in kwargs.items()]
    note = f"{verb} called {_name(fn)}({', '.join(given)})."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _name(fn: Any) -> str:
    fn = getattr(fn, "func", fn)  # of a functools.partial
    return getattr(fn, "__qualname__", None) or f"a {type(fn).__name__}"


def _argument(x: Any) -> str:
    if is_array(x):
        return shown(x)
    if x is None or isinstance(x, bool | int | float | str | type):
        return repr(x) if len(repr(x)) <= 40 else "..."
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    arrays = [(jax.tree_util.keystr(k), leaf) for k, leaf in leaves if is_array(leaf)]
    if not arrays:
        short = isinstance(x, tuple | list) and len(repr(x)) <= 40
        return repr(x) if short else f"<{type(x).__name__}>"
    some = ", ".join(f"{k}: {shown(leaf)}" for k, leaf in arrays[:_SHOWN])
    more = f", and {len(arrays) - _SHOWN} more" if len(arrays) > _SHOWN else ""
    return f"<{type(x).__name__} of {some}{more}>"
