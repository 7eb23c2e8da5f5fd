"""Rules for weights that a function joins or adds: fused projections, sums, means."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.factored import (
    Dim,
    Factored,
    Site,
    flattened,
    grown,
    require_no_columns,
    swapped,
)
from flora._algebra.low_rank import widened
from flora._trace.compat import eval_eqn
from flora._tree.errors import Unfactorable


def concatenate(ctx: Any, eqn: Any, *parts: Any) -> list[Factored]:
    """[W₁ | W₂] + [A₁ | A₂] · diag(scale₁ B₁, scale₂ B₂), of rank r₁ + r₂.

    Along in axes it is A that becomes block-diagonal, along stack axes neither.  Parts
    that are not adapted get factors of zeros.
    """
    return [_concatenated(eqn, eqn.params["dimension"], parts)]


def stack(ctx: Any, eqn: Any, *parts: Any) -> list[Factored]:
    """The parts become stack entries 0, 1, …: `concatenate` along a new axis."""
    at = eqn.params["axis"] % (len(eqn.outvars[0].aval.shape))
    parts = tuple(
        dataclasses.replace(x, axes=(*x.axes[:at], (), *x.axes[at:]))
        if isinstance(x, Factored)
        else lax.expand_dims(x, (at,))
        for x in parts
    )
    return [_concatenated(eqn, at, parts)]


def add(ctx: Any, eqn: Any, x: Any, y: Any) -> list[Factored]:
    """W₁ + W₂ + [A₁ | A₂] [scale₁ B₁; scale₂ B₂]; an array is added to W alone."""
    return [_sum(eqn, x, y, 1)]


def sub(ctx: Any, eqn: Any, x: Any, y: Any) -> list[Factored]:
    return [_sum(eqn, x, y, -1)]


def complex_(ctx: Any, eqn: Any, x: Any, y: Any) -> list[Factored]:
    """W₁ + i W₂, as spectral layers keep complex weights."""
    return [_sum(eqn, x, y, 1j)]


def _sum(eqn: Any, x: Any, y: Any, sign: complex) -> Factored:
    """The sum x + sign y."""
    terms, shape = (x, y), eqn.outvars[0].aval.shape
    weights = [w for w in terms if isinstance(w, Factored)]
    for w in weights:
        require_no_columns(w, "a sum")
    _require_weights(weights, "sum")
    if len(weights) == 1 and weights[0].shape != shape:
        raise Unfactorable("a sum that repeats the weight")
    base = _joint_base(eqn, terms)
    if len(weights) == 1:
        new = dataclasses.replace(weights[0], base=base)
        if weights[0] is y and new.a is not None and sign != 1:
            new = dataclasses.replace(new, b=widened(new.b) * sign)
        return new
    first, second = _alike(weights, shape)
    total = dataclasses.replace(
        first,
        base=base,
        summed=first.summed and second.summed,
        site=_joint_site([first, second]),
    )
    if first.a is None:
        return total
    one, other = _with_scaled_factors([first, second])
    rank = len(first.dims("stack"))
    return dataclasses.replace(
        total,
        a=lax.concatenate([one.a, other.a], one.a.ndim - 1),
        b=_concatenated_arrays([one.b, _signed(other.b, sign)], rank),
    )


def _signed(b: Any, sign: complex) -> Any:
    return b if sign == 1 else b * sign


def _concatenated_arrays(arrays: Sequence[Any], at: int) -> Any:
    dtype = jnp.result_type(*arrays)
    return lax.concatenate([x.astype(dtype) for x in arrays], at)


def _joint_base(eqn: Any, terms: Sequence[Any]) -> Any:
    """What the operation gives on the bases; `None` if all are mere changes."""
    if all(isinstance(x, Factored) and x.base is None for x in terms):
        return None
    bases = []
    for x, v in zip(terms, eqn.invars, strict=True):
        base = x.base if isinstance(x, Factored) else x
        if base is None:
            base = jnp.zeros(v.aval.shape, v.aval.dtype)
        bases.append(lax.reshape(base, v.aval.shape))
    return eval_eqn(eqn, bases)[0]


def _require_weights(weights: Sequence[Factored], what: str) -> None:
    """Rows that an index chose are activations, and are joined as such."""
    if any(w.chosen for w in weights):
        raise Unfactorable("rows of a weight beside other arrays")
    if len({w.site.dropout for w in weights}) > 1:
        raise Unfactorable(f"a {what} of weights with other dropout rates")


def _alike(weights: Sequence[Factored], shape: Sequence[int]) -> list[Factored]:
    """The weights with one dim an axis, the same dims in all but for their sizes.

    Axes of size 1 that `shape` has longer are repeated.
    """
    weights = [flattened(w) for w in weights]
    roles = [_role(weights, i) for i in range(len(shape))]
    swap = {"in": "out", "out": "in"}
    ready = []
    for w in weights:
        mine = [axis[0].role if axis else "" for axis in w.axes]
        real = [i for i, n in enumerate(w.shape) if n > 1]
        if any(mine[i] != roles[i] for i in real):
            if any(swap.get(mine[i], mine[i]) != roles[i] for i in real):
                raise Unfactorable("weights of other layouts, joined")
            w = swapped(w)
        ready.append(_fitted(w, roles, shape))
    return ready


def _role(weights: Sequence[Factored], axis: int) -> str:
    """The role of an axis: of a weight that has it, else any; a new one is a stack."""
    found = [d for w in weights for d in w.axes[axis]]
    found.sort(key=lambda d: d.size == 1)
    every = [d for w in weights for a in w.axes for d in a]
    return found[0].role if found else "stack" if all(d.role for d in every) else ""


def _fitted(w: Factored, roles: Sequence[str], shape: Sequence[int]) -> Factored:
    """Factors with a dim for every axis, repeated where `shape` is longer than W."""
    for i, role in enumerate(roles):
        size = w.shape[i] if w.shape[i] > 1 else shape[i]
        at = w.axes[i][0].at if w.axes[i] else (_UNNAMED - i,)
        if w.axes[i] != (Dim(at, size, role),):
            w = grown(w, w.base, i, Dim(at, size, role))
    return flattened(w)


_UNNAMED = -1000  # below every axis that a function can add


def _joint_site(parts: Sequence[Factored]) -> Site:
    origins = tuple(o for w in parts for o in w.site.origins)
    return dataclasses.replace(parts[0].site, origins=origins, scale=1.0)


def _with_scaled_factors(parts: Sequence[Factored]) -> list[Factored]:
    """The parts with their scales in B, in one dtype."""
    scaled = [
        dataclasses.replace(w, a=widened(w.a), b=widened(w.b) * w.site.scale)
        for w in parts
    ]
    dtype = jnp.result_type(*(f for w in scaled for f in (w.a, w.b)))
    return [
        dataclasses.replace(w, a=w.a.astype(dtype), b=w.b.astype(dtype)) for w in scaled
    ]


def _concatenated(eqn: Any, at: int, parts: Sequence[Any]) -> Factored:
    weights = [w for w in parts if isinstance(w, Factored)]
    _require_weights(weights, "concatenation")
    base, shape = _joint_base(eqn, parts), eqn.outvars[0].aval.shape
    # An axis of size 1 stays one where it is concatenated: it is not repeated.
    one = [1 if i == at else n for i, n in enumerate(shape)]
    ready = _alike(weights, one)
    like = ready[0]
    whole = dataclasses.replace(like.axes[at][0], size=shape[at])
    fused = dataclasses.replace(
        like,
        base=base,
        axes=(*like.axes[:at], (whole,), *like.axes[at + 1 :]),
        summed=all(isinstance(x, Factored) and x.summed for x in parts),
        site=_joint_site(ready),
    )
    if like.a is None:
        return fused
    if any(w.columns is not None for w in ready):
        fused = dataclasses.replace(
            fused, columns=_joined_columns(fused, whole, parts, ready)
        )
    rest = iter(ready)
    shaped = _with_scaled_factors(
        [next(rest) if isinstance(x, Factored) else _zeros(x, like, at) for x in parts]
    )
    return _with_joined_factors(fused, whole, shaped)


def _joined_columns(
    fused: Factored, whole: Dim, parts: Sequence[Any], ready: Sequence[Factored]
) -> Any:
    """Scaled columns side by side; ones where a part has none."""
    held = fused.dims("stack", "out")
    if whole not in held:
        raise Unfactorable("in axes joined, of weights whose columns are scaled")
    at, rest, found = held.index(whole), iter(ready), []
    for part in parts:
        w = next(rest) if isinstance(part, Factored) else None
        if w is None or w.columns is None:
            like = next(x.columns for x in ready if x.columns is not None)
            size = part.shape[fused.axes.index((whole,))]
            shape = [*like.shape[:at], size, *like.shape[at + 1 :]]
            found.append(jnp.ones(shape, like.dtype))
        else:
            found.append(w.columns)
    return _concatenated_arrays(found, at)


def _zeros(part: Any, like: Factored, at: int) -> Factored:
    """Factors of rank 1, all zeros, for a part that is not adapted."""
    dim = dataclasses.replace(like.axes[at][0], size=part.shape[at])
    axes = (*like.axes[:at], (dim,), *like.axes[at + 1 :])
    new = dataclasses.replace(like, axes=axes, site=Site(()))
    stack, in_, out = ([d.size for d in new.dims(r)] for r in ("stack", "in", "out"))
    a = jnp.zeros((*stack, *in_, 1), widened(like.a).dtype)
    b = jnp.zeros((*stack, 1, *out), widened(like.b).dtype)
    return dataclasses.replace(new, a=a, b=b)


def _with_joined_factors(
    fused: Factored, whole: Dim, parts: Sequence[Factored]
) -> Factored:
    held_by_a, held_by_b = fused.dims("stack", "in"), fused.dims("stack", "out")
    rank_a, rank_b = len(held_by_a), len(fused.dims("stack"))
    a, b, key = [w.a for w in parts], [w.b for w in parts], fused.key
    if whole.role == "stack":
        where, rank = held_by_a.index(whole), max(x.shape[-1] for x in a)
        a = lax.concatenate([_padded(x, rank_a, rank) for x in a], where)
        b = lax.concatenate([_padded(x, rank_b, rank) for x in b], where)
        if key is not None:
            key = jnp.broadcast_to(key.reshape(-1)[0], a.shape[:rank_b])
    elif whole.role == "in":
        a = _block_diagonal(a, held_by_a.index(whole), rank_a)
        b = lax.concatenate(b, rank_b)
    else:
        where = held_by_b.index(whole)
        a = lax.concatenate(a, rank_a)
        b = _block_diagonal(b, rank_b, where + (where >= rank_b))
    return dataclasses.replace(fused, a=a, b=b, key=key)


def _padded(x: Any, axis: int, size: int, before: int = 0) -> Any:
    """X with zeros before and after along an axis."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (before, size - before - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _block_diagonal(blocks: list[Any], row: int, column: int) -> Any:
    """The blocks along the diagonal of axes `row` and `column`, zeros elsewhere."""
    total = sum(block.shape[column] for block in blocks)
    padded, before = [], 0
    for block in blocks:
        padded.append(_padded(block, column, total, before))
        before += block.shape[column]
    return lax.concatenate(padded, row)
