"""Changing a stack of adapters: another one in a place, one more, one less."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora._multi.conform import aligned, misfits, not_finite, on_arrays
from flora._multi.kinds import Values, fitted, values_of
from flora._multi.stacked import (
    BASE,
    as_first,
    as_index,
    of_one,
    require_stacked,
    stack,
    unstack,
)
from flora._tree.errors import LoraError, fail


def put(
    stacked: Any, i: Any, adapter: Any, *, base: Any = None, grow: bool = False
) -> Any:
    """The stacked adapter with another one in place `i`.

    The result has the structure, shapes and dtypes of `stacked`, so no function that
    runs on it is compiled again; `grow=True` lets it have others where the adapter
    needs them.  scale A B of the new adapter stays as it is; what it leaves frozen has
    zeros.

    Args:
      stacked: what `stack` returned; `stack(..., rank=)` leaves room for higher ranks,
        and `stack([..., None])` for more adapters.
      i: an int or a traced integer scalar, 0 to k-1.  A traced `i` out of range changes
        nothing.
      adapter: of the same base, with any targets; `None` empties the place.
      base: the plain tree, where W itself is needed, as in `stack`.
      grow: True to make room for targets, ranks, dtypes or variants that the stack
        does not have.  `i` cannot be traced then.

    Returns:
      The stacked adapter.

    Raises:
      LoraError: `i` is out of range; the adapter does not fit, or only with
        `grow=True`; `base` is needed; or it is not finite.  All such leaves are named.
    """
    named, treedef, count = require_stacked(stacked, "put")
    i = as_index(i, count, "put")
    if isinstance(i, int) and i == BASE:
        raise LoraError(f"put: i={i}; write one of 0 to {count - 1}.")
    like = treedef.unflatten([of_one(x) for _, x in named])
    pairs, _ = aligned([like, adapter], "put", blocks=True)
    fail(f"put: {p}" for path, (_, x) in pairs for p in not_finite(path, [x]))
    new, problems = _placed(pairs, values_of(base))
    if problems and grow:
        if not isinstance(i, int):
            raise LoraError("put: grow=True makes another stack, for an int i alone.")
        return stack(
            [adapter if n == i else x for n, x in enumerate(unstack(stacked))],
            base=base,
        )
    if problems:
        problems.append(
            "grow=True makes room where an adapter has more than the stack; functions "
            "that run on it are compiled once more."
        )
    fail(f"put: {p}" for p in problems)
    # A negative traced index would count from the end.
    at = i if isinstance(i, int) else jnp.where(i < 0, count, i)
    new = treedef.unflatten(new)

    def replaced(old: Any, x: Any) -> Any:
        return on_arrays(lambda old, x: old.at[at].set(x, mode="drop"), old, x)

    return jax.tree.map(replaced, stacked, new)


def _placed(
    pairs: Sequence[tuple[str, list[Any]]], base: Values
) -> tuple[list[Any], list[str]]:
    """The nodes of an adapter as a stack holds them, and what does not fit it."""
    leaves, problems = [], []
    for path, (like, x) in pairs:
        try:
            nodes = [like, fitted(path, x, like, base)]
        except LoraError as error:
            problems.append(str(error))
            continue
        found = misfits(path, nodes)
        problems += found
        if not found:
            leaves.append((path, nodes))
    made, more = as_first(leaves)
    return made, problems + more


def add(stacked: Any, adapter: Any, *, base: Any = None) -> Any:
    """The stacked adapter with one more behind the others, in place k.

    What runs on it is compiled once more; `put` into a place that `None` left does
    without.

    Args:
      stacked: what `stack` returned.
      adapter: of the same base, with any targets, rank and variant.
      base: the plain tree, where W itself is needed, as in `stack`.

    Raises:
      LoraError: as of `stack`.
    """
    return stack([*unstack(stacked), adapter], base=base)


def remove(stacked: Any, i: int) -> Any:
    """The stacked adapter without the one in place `i`; those behind it move up.

    What runs on it is compiled once more; `put(stacked, i, None)` does without.

    Raises:
      LoraError: `i` is out of range, or the last adapter would go.
    """
    _, _, count = require_stacked(stacked, "remove")
    at = as_index(i, count, "remove")
    if not isinstance(at, int) or at == BASE:
        raise LoraError(f"remove: i={i!r}; write an int, 0 to {count - 1}.")
    if count == 1:
        raise LoraError("remove: it is the last adapter. Run the function on the base.")
    kept = [n for n in range(count) if n != at]
    return jax.tree.map(lambda x: on_arrays(lambda x: x[jnp.array(kept)], x), stacked)
