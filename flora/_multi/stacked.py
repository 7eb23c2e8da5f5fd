"""Adapters of one base side by side: a leading axis of adapters on every leaf."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flora._multi.conform import (
    RankAndScale,
    aligned,
    common,
    conform_problems,
    conformed,
    flattened,
    not_finite,
    on_arrays,
    require_rank,
    shape_of,
    unit,
)
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.weight import LoraWeight

BASE = -1  # the index that stands for the base alone
_SETTINGS = ("dropout", "fallback", "form")


def stack(adapters: Sequence[Any], *, rank: int | None = None) -> Any:
    """One adapter with a leading axis of adapters on every leaf.

    scale A B of each adapter stays as it is.  Smaller ranks are padded with zeros,
    which stay zero in training because their gradients are zero.  Where scales differ,
    they are multiplied into B, in float32 or wider, and the common scale is 1.

    Args:
      adapters: adapters of one base, as `flora.split(adapted)[1]` returns them.
      rank: of every leaf of the result; by default each leaf's largest.

    Returns:
      The adapter with A `[k, *stack, *in, rank]`, B `[k, *stack, rank, *out]` and
      `Trained` values `[k, ...]`.  `jax.vmap` over it, `select` from it, or give it to
      `flora.multi.lora`.

    Raises:
      LoraError: the adapters differ in structure, targets, layouts, shapes or settings;
        a rank is above `rank`; or a factor is not finite.  All such leaves are named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.multi
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> def made(rank):
      ...     config = flora.LoraConfig(rank=rank, alpha=8)
      ...     fn = lambda p, x: x @ p["kernel"]
      ...     adapted = flora.init(jax.random.key(0), config, fn, params, x)
      ...     return flora.split(adapted)[1]
      >>> flora.multi.stack([made(1), made(2)])["kernel"].a.shape
      (2, 4, 2)
    """
    require_rank(rank, "stack")
    leaves, treedef = aligned(adapters, "stack")
    fail(
        f"stack: {p}" for path, nodes in leaves for p in _setting_problems(path, nodes)
    )
    fail(f"stack: {p}" for path, nodes in leaves for p in not_finite(path, nodes))
    return treedef.unflatten(side_by_side(leaves, rank, "stack"))


def side_by_side(
    leaves: Sequence[tuple[str, list[Any]]], rank: int | None, verb: str
) -> list[Any]:
    """The nodes of each leaf as one."""
    ranks = [
        rank or max((x.rank for x in nodes if isinstance(x, LoraWeight)), default=1)
        for _, nodes in leaves
    ]
    statics = [
        common(nodes, r) if isinstance(nodes[0], LoraWeight) else unit(r)
        for (_, nodes), r in zip(leaves, ranks, strict=True)
    ]
    fail(
        f"{verb}: {p}"
        for (path, nodes), to in zip(leaves, statics, strict=True)
        for x in nodes
        if isinstance(x, LoraWeight)
        for p in conform_problems(path, x, to)
    )
    stacked = []
    for (_, nodes), to in zip(leaves, statics, strict=True):
        if isinstance(nodes[0], LoraWeight):
            nodes = [_bare(conformed(x, to)) for x in nodes]
        stacked.append(jax.tree.map(_stacked, *nodes))
    return stacked


def _bare(node: LoraWeight) -> LoraWeight:
    return dataclasses.replace(node, base=None, key=None)


def _stacked(*arrays: Any) -> Any:
    return on_arrays(lambda *xs: jnp.stack(xs), *arrays)


def _setting_problems(path: str, nodes: Sequence[Any]) -> list[str]:
    if not isinstance(nodes[0], LoraWeight):
        return []
    found = []
    for name in _SETTINGS:
        values = list(dict.fromkeys(getattr(x, name) for x in nodes))
        if len(values) > 1:
            found.append(
                f"'{path}' has {name}={' and '.join(map(repr, values))}. One node has "
                "one. Write flora.multi.pad(adapter, like=adapters[0]) to take its "
                "settings, or one LoraConfig."
            )
    return found


def pad(adapter: Any, *, rank: int | None = None, like: Any = None) -> Any:
    """The same adapter with another rank, so that it is swapped without recompiling.

    scale A B stays as it is.  Adapters padded to one rank have the same tree structure,
    shapes and dtypes, so a jitted function that has run with one runs with all.

    Args:
      adapter: what `flora.split(adapted)[1]` returns.
      rank: of every leaf of the result.  Its scale is 1; the old scale is multiplied
        into B, which becomes float32 or wider.
      like: instead of `rank`, an adapter whose ranks, scales, settings and dtypes the
        result takes.

    Returns:
      The adapter.  Where the scale changes, B is rounded once; all else is exact.

    Raises:
      LoraError: a rank is above `rank`; or the adapters do not fit, or a dtype cannot
        hold the result.  All such leaves are named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.multi
      >>> node = flora.LoraWeight(None, jnp.ones((4, 1)), jnp.ones((1, 3)), alpha=2.0)
      >>> padded = flora.multi.pad({"kernel": node}, rank=2)["kernel"]
      >>> padded.scale, padded.b.tolist()
      (1.0, [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    """
    require_rank(rank, "pad")
    if (rank is None) == (like is None):
        raise LoraError("pad: pass either rank= or like=.")
    if like is not None:
        (leaves, treedef) = aligned([like, adapter], "pad")
        return treedef.unflatten(_alike(leaves, "pad"))
    assert rank is not None
    named, treedef = flattened(adapter, "pad")
    lora = [(path, x) for path, x in named if isinstance(x, LoraWeight)]
    fail(f"pad: {p}" for path, x in lora for p in conform_problems(path, x, unit(rank)))
    return treedef.unflatten(
        [
            _bare(_widened(conformed(x, unit(rank))))
            if isinstance(x, LoraWeight)
            else x
            for _, x in named
        ]
    )


def _widened(node: LoraWeight) -> LoraWeight:
    def wide(b: Any) -> Any:
        return b.astype(jnp.promote_types(b.dtype, jnp.float32))

    return dataclasses.replace(node, b=on_arrays(wide, node.b))


def _alike(leaves: Sequence[tuple[str, list[Any]]], verb: str) -> list[Any]:
    """The second node of each leaf as the first one is."""
    problems, made = [], []
    for path, (like, x) in leaves:
        if isinstance(x, LoraWeight):
            found = conform_problems(path, x, RankAndScale.of(like))
            problems += found
            if found:
                continue
            new = conformed(x, RankAndScale.of(like))
            settings = {name: getattr(like, name) for name in _SETTINGS}
            x = dataclasses.replace(_bare(new), **settings)
        problems += _dtype_problems(path, like, x)
        made.append(jax.tree.map(_cast, x, like))
    fail(f"{verb}: {p}" for p in problems)
    return made


def _dtype_problems(path: str, like: Any, x: Any) -> list[str]:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(like), strict=True)
    return [
        f"'{path}' would be rounded from {new.dtype} to {old.dtype}. Write "
        "flora.multi.pad(adapter, rank=...) for both, which widens."
        for new, old in pairs
        if jnp.promote_types(new.dtype, old.dtype) != old.dtype
    ]


def _cast(x: Any, like: Any) -> Any:
    return on_arrays(lambda x: x.astype(like.dtype), x)


# --- Choosing ------------------------------------------------------------------------


def require_stacked(stacked: Any, verb: str) -> tuple[list[tuple[str, Any]], Any, int]:
    """`(named nodes, treedef, k)` of a stacked adapter."""
    named, treedef = flattened(stacked, verb)
    problems, counts = [], {}
    for path, x in named:
        if isinstance(x, LoraWeight):
            n = len(x.layout.stack)
            ndim = 2 + n + len(x.layout.in_), 2 + n + len(x.layout.out)
            if (np.ndim(x.a), np.ndim(x.b)) != ndim:
                problems.append(
                    f"{verb}: '{path}' has a {shape_of(x.a)} and b {shape_of(x.b)}, no "
                    "axis of adapters. Pass what flora.multi.stack([...]) returns."
                )
        counts.update(
            dict.fromkeys((s[:1] for s in map(shape_of, jax.tree.leaves(x))), path)
        )
    fail(problems)
    if len(counts) != 1 or () in counts:
        raise LoraError(
            f"{verb}: the leaves hold {sorted(str(c) for c in counts)} adapters. Pass "
            "what flora.multi.stack([...]) returns."
        )
    return named, treedef, next(iter(counts))[0]


def as_index(i: Any, count: int, verb: str) -> Any:
    """An int or a traced scalar; `None` and -1 are the base alone."""
    if i is None:
        return BASE
    if is_array(i) and np.shape(i) == () and jnp.issubdtype(i.dtype, jnp.integer):
        if isinstance(i, Tracer):
            return i
        i = int(i)
    try:
        i = operator.index(i)
    except TypeError:
        raise LoraTypeError(
            f"{verb}: i is {i!r}; expected an int, an integer scalar, or None for the "
            "base alone."
        ) from None
    if isinstance(i, bool) or not BASE <= i < count:
        raise LoraError(
            f"{verb}: i={i!r}; there are {count} adapters, 0 to {count - 1}, and -1 or "
            "None is the base alone."
        )
    return i


def select(stacked: Any, i: Any) -> Any:
    """Adapter `i` of a stacked one.

    Args:
      stacked: what `stack` returned.
      i: an int or a traced integer scalar.  -1 or `None` is the base alone: B = 0.  A
        traced `i` out of range gives NaN.

    Returns:
      An adapter for `flora.join`, of the same structure for every `i`.

    Raises:
      LoraError: `i` is out of range; or it stands for the base although a leaf trains
        whole or has a variant.
    """
    named, treedef, count = require_stacked(stacked, "select")
    i = as_index(i, count, "select")
    if isinstance(i, int) and i == BASE:
        fail(
            f"select: '{path}' {'trains whole' if kind is None else f'is a {kind}'}, "
            "so no adapter stands for the base alone. Run the function on the base."
            for path, x in named
            if x is not None and not _has_zero(x)
            for kind in [getattr(x, "variant", None)]
        )
    return treedef.unflatten([chosen(x, i, count) for _, x in named])


def chosen(node: Any, i: Any, count: int) -> Any:
    """One of the stacked nodes."""
    if isinstance(i, int) and i != BASE:
        return jax.tree.map(lambda x: x[i], node)
    one = jax.tree.map(lambda x: picked(x, i, count), node)
    if _has_zero(node):
        return dataclasses.replace(one, b=only_if(one.b, i, count))
    bad = (jnp.asarray(i) < 0) | (jnp.asarray(i) >= count)
    return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x).astype(x.dtype), one)


def _has_zero(node: Any) -> bool:
    """Whether B = 0 makes the base of it."""
    return isinstance(node, LoraWeight) and node.variant is None


def picked(x: Any, i: Any, count: int) -> Any:
    """`x[i]`, of any `i`."""
    at = jnp.clip(jnp.asarray(i), 0, count - 1)
    return lax.dynamic_index_in_dim(x, at, 0, keepdims=False)


def only_if(b: Any, i: Any, count: int) -> Any:
    """B, or zero for the base alone, or NaN for an index out of range."""
    i = jnp.asarray(i)
    b = jnp.where(i == BASE, 0, b)
    return jnp.where((i < BASE) | (i >= count), jnp.nan, b).astype(b.dtype)


def unstack(stacked: Any) -> list[Any]:
    """The adapters of a stacked one, as `select` gives them.

    Raises:
      LoraError: it is not stacked.
    """
    named, treedef, count = require_stacked(stacked, "unstack")
    return [
        treedef.unflatten([chosen(x, i, count) for _, x in named]) for i in range(count)
    ]


def put(stacked: Any, i: Any, adapter: Any) -> Any:
    """The stacked adapter with another one in place `i`.

    The result has the structure, shapes and dtypes of `stacked`, so no function that
    runs on it is compiled again.  scale A B of the new adapter stays as it is.

    Args:
      stacked: what `stack` returned; `stack(..., rank=)` leaves room for higher ranks.
      i: an int or a traced integer scalar, 0 to k-1.  A traced `i` out of range changes
        nothing.
      adapter: of the same base and targets.

    Returns:
      The stacked adapter.

    Raises:
      LoraError: `i` is out of range; or the adapter does not fit, has a higher rank or
        a wider dtype, or is not finite.  All such leaves are named.
    """
    named, treedef, count = require_stacked(stacked, "put")
    i = as_index(i, count, "put")
    if isinstance(i, int) and i == BASE:
        raise LoraError(f"put: i={i}; write one of 0 to {count - 1}.")
    like = treedef.unflatten([jax.tree.map(_of_one, x) for _, x in named])
    leaves, _ = aligned([like, adapter], "put")
    fail(f"put: {p}" for path, (_, x) in leaves for p in not_finite(path, [x]))
    new = treedef.unflatten(_alike(leaves, "put"))
    # A negative traced index would count from the end.
    at = i if isinstance(i, int) else jnp.where(i < 0, count, i)
    return jax.tree.map(lambda old, x: old.at[at].set(x, mode="drop"), stacked, new)


def _of_one(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
