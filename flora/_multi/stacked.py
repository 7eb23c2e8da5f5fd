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

from flora._algebra.variants import Columns
from flora._multi.conform import (
    RankAndScale,
    aligned,
    common,
    conform_problems,
    conformed,
    flattened,
    not_finite,
    on_arrays,
    require_alike,
    require_rank,
    shape_of,
    unit,
)
from flora._multi.kinds import Values, each_leaf, fixed, united, values_of
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.weight import LoraWeight

BASE = -1  # the index that stands for the base alone
# What one node has once, and what it is where adapters differ.
_SETTINGS = {"dropout": 0.0, "fallback": "materialize", "form": "auto"}


def stack(adapters: Sequence[Any], *, rank: int | None = None, base: Any = None) -> Any:
    """One adapter with a leading axis of adapters on every leaf.

    The adapters need nothing in common but the base.  What one of them leaves frozen
    has zeros for factors there.  Smaller ranks are padded with zeros, which stay zero
    in training because their gradients are zero.  Where scales differ, they are
    multiplied into B, in float32 or wider, and the common scale is 1.  Where variants
    differ, or one adapter has none, each becomes the product that it makes:
    plain factors, or `flora.variants.Columns` where one is a DoRA.  A leaf that one
    adapter trains whole is held whole for all.

    Args:
      adapters: adapters of one base, as `flora.split(adapted)[1]` returns them; `None`
        is the base alone, a place that `put` fills.
      rank: of every leaf of the result; by default each leaf's largest.
      base: the plain tree, where W itself is needed: for variants beside others, and
        for leaves that not all adapters train whole.

    Returns:
      The adapter with A `[k, *stack, *in, rank]`, B `[k, *stack, rank, *out]` and
      `Trained` values `[k, ...]`.  `jax.vmap` over it, `select` from it, or give it to
      `flora.multi.lora`.  Where settings differ, dropout is 0, the form is chosen, and
      a leaf may be formed if any of its adapters allows it.

    Raises:
      LoraError: the adapters differ in structure, layouts or shapes; `base` is needed;
        a rank is above `rank`; or a factor is not finite.  All such leaves are named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.multi
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> def made(rank):
      ...     config = flora.LoraConfig(rank=rank, alpha=8)
      ...     fn = lambda p, x: x @ p["kernel"]
      ...     adapted = flora.init(jax.random.key(0), config, fn, params, x)
      ...     return flora.split(adapted)[1]
      >>> flora.multi.stack([made(1), made(2), None])["kernel"].a.shape
      (3, 4, 2)
    """
    require_rank(rank, "stack")
    leaves, treedef = aligned(adapters, "stack", blocks=True)
    fail(f"stack: {p}" for path, nodes in leaves for p in not_finite(path, nodes))
    values = values_of(base)
    leaves = each_leaf("stack", leaves, lambda path, x: united(path, x, values))
    require_alike(leaves, "stack")
    settled = [(path, _settled(nodes)) for path, nodes in leaves]
    return treedef.unflatten(side_by_side(settled, rank, "stack"))


def _settled(nodes: list[Any]) -> list[Any]:
    """The nodes with one setting each of those that one node has once."""
    if not isinstance(nodes[0], LoraWeight):
        return nodes
    common = {
        name: getattr(nodes[0], name)
        if len({getattr(x, name) for x in nodes}) == 1
        else otherwise
        for name, otherwise in _SETTINGS.items()
    }
    return [dataclasses.replace(x, **common) for x in nodes]


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
        leaves, treedef = aligned([like, adapter], "pad")
        require_alike(leaves, "pad")
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
    made, problems = as_first(leaves)
    fail(f"{verb}: {p}" for p in problems)
    return made


def as_first(leaves: Sequence[tuple[str, list[Any]]]) -> tuple[list[Any], list[str]]:
    """The second nodes, and why some cannot be as the first ones are."""
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
    return made, problems


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


def of_one(stacked: Any) -> Any:
    """The shapes and dtypes of one of the adapters, without the leading axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


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
        one = dataclasses.replace(one, b=only_if(one.b, i, count))
        if one.extra:
            columns = only_if(one.extra["columns"], i, count, of_base=1)
            one = dataclasses.replace(one, extra={"columns": columns})
        return one
    bad = (jnp.asarray(i) < 0) | (jnp.asarray(i) >= count)
    return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x).astype(x.dtype), one)


def _has_zero(node: Any) -> bool:
    """Whether B = 0, and columns of 1, make the base of it."""
    return isinstance(node, LoraWeight) and isinstance(node.variant, Columns | None)


def picked(x: Any, i: Any, count: int) -> Any:
    """`x[i]`, of any `i`."""
    at = jnp.clip(jnp.asarray(i), 0, count - 1)
    return lax.dynamic_index_in_dim(x, at, 0, keepdims=False)


def only_if(b: Any, i: Any, count: int, of_base: float = 0) -> Any:
    """B, or zero for the base alone, or NaN for an index out of range."""
    i = jnp.asarray(i)
    b = jnp.where(i == BASE, of_base, b)
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


def prepare(base: Any, stacked: Any) -> Any:
    """The stacked adapter with its variants worked out, so that no call does it again.

    `flora.multi.lora` divides by the norm of each DoRA in every call.  Here that is
    done once: the result has `flora.variants.Columns` in their place, and VeRA and
    AdaLoRA are plain factors.  It serves; to train, keep what it was made of.

    Args:
      base: the plain tree.
      stacked: what `stack` returned.

    Raises:
      LoraError: a variant has a function between A and B.
    """
    named, treedef, _ = require_stacked(stacked, "prepare")
    made = worked_out("prepare", named, values_of(base))
    return treedef.unflatten([x for _, x in made])


def worked_out(
    verb: str, named: Sequence[tuple[str, Any]], base: Values
) -> list[tuple[str, Any]]:
    """The stacked nodes as plain factors or `Columns`."""

    def one(path: str, node: Any) -> Any:
        if not isinstance(node, LoraWeight) or isinstance(node.variant, Columns | None):
            return node

        def all_of(node: LoraWeight) -> LoraWeight:
            return jax.vmap(lambda x: fixed(path, x, base))(node)

        return on_arrays(all_of, node)

    return each_leaf(verb, named, one)
