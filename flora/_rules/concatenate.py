"""The rule for `concatenate`: projections that a function fuses as it runs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._compat import eval_eqn
from flora._errors import Unfactorable
from flora._factored import Dim, Factored, Site, relayout, sole_dim
from flora._forms import widened


def concatenate(ctx: Any, eqn: Any, *parts: Any) -> list[Factored]:
    """[W₁ | W₂] + [A₁ | A₂] · diag(scale₁ B₁, scale₂ B₂), of rank r₁ + r₂.

    Along in axes it is A that becomes block-diagonal, along stack axes neither.  Parts
    that are not adapted get factors of zeros.
    """
    return [_joined(eqn, eqn.params["dimension"], parts)]


def stack(ctx: Any, eqn: Any, *parts: Any) -> list[Factored]:
    """The parts become stack entries 0, 1, …: `concatenate` along a new axis."""
    at = eqn.params["axis"] % (len(eqn.outvars[0].aval.shape))
    parts = tuple(
        dataclasses.replace(x, axes=(*x.axes[:at], (), *x.axes[at:]))
        if isinstance(x, Factored)
        else lax.expand_dims(x, (at,))
        for x in parts
    )
    return [_joined(eqn, at, parts)]


def _joined(eqn: Any, at: int, parts: tuple[Any, ...]) -> Factored:
    parts = tuple(_with_dim(w, at) if isinstance(w, Factored) else w for w in parts)
    weights = [w for w in parts if isinstance(w, Factored)]
    dim = sole_dim(weights[0], at)
    if any(_elsewhere(w, at) != _elsewhere(weights[0], at) for w in weights):
        raise Unfactorable("a concatenation of weights with other layouts")
    if any(w.base is None for w in weights):
        raise Unfactorable("a concatenation of changes to weights")
    if any(w.site.dropout != weights[0].site.dropout for w in weights):
        raise Unfactorable("a concatenation of weights with other dropout rates")
    bases = [w.base if isinstance(w, Factored) else w for w in parts]
    shapes = [v.aval.shape for v in eqn.invars]
    bases = [lax.reshape(x, shape) for x, shape in zip(bases, shapes, strict=True)]
    (base,) = eval_eqn(eqn, bases)
    whole = dataclasses.replace(dim, size=base.shape[at])
    axes = (*weights[0].axes[:at], (whole,), *weights[0].axes[at + 1 :])
    paths = tuple(p for w in weights for p in w.site.paths)
    rows = all(isinstance(w, Factored) and w.chosen for w in parts)
    fused = dataclasses.replace(
        weights[0],
        base=base,
        axes=axes,
        chosen=weights[0].chosen if rows else (),
        site=dataclasses.replace(weights[0].site, paths=paths, scale=1.0),
    )
    if weights[0].a is None:
        return fused
    shaped = [_with_factors(w, weights[0], at) for w in parts]
    dtype = jnp.result_type(*(f for w in shaped for f in (w.a, w.b)))
    shaped = [
        dataclasses.replace(w, a=w.a.astype(dtype), b=w.b.astype(dtype)) for w in shaped
    ]
    # Where a factor holds the axis, and where it holds the rank.
    held_by_a, held_by_b = fused.dims("stack", "in"), fused.dims("stack", "out")
    rank_a, rank_b = len(held_by_a), len(fused.dims("stack"))
    if dim.role == "stack":
        if len({w.a.shape[-1] for w in shaped}) > 1:
            raise Unfactorable("a concatenation of stacks of other ranks")
        where = fused.dims("stack").index(whole)
        a = lax.concatenate([w.a for w in shaped], where)
        b = lax.concatenate([w.b for w in shaped], where)
        key = fused.key
        if key is not None:
            key = jnp.broadcast_to(key.reshape(-1)[0], a.shape[:rank_b])
        return dataclasses.replace(fused, a=a, b=b, key=key)
    if dim.role == "in":
        a = _block_diagonal([w.a for w in shaped], held_by_a.index(whole), rank_a)
        b = lax.concatenate([w.b for w in shaped], rank_b)
    else:
        where = held_by_b.index(whole)
        a = lax.concatenate([w.a for w in shaped], rank_a)
        b = _block_diagonal([w.b for w in shaped], rank_b, where + (where >= rank_b))
    return dataclasses.replace(fused, a=a, b=b)


def _with_dim(w: Factored, at: int) -> Factored:
    """W with a stack dim of size 1 where axis `at` was added to it."""
    if w.axes[at]:
        return w
    every = [d for axis in w.axes for d in axis]
    first = min([0, *(d.at[0] for d in every)]) - 1  # no axis of the stored weight
    role = "stack" if all(d.role for d in every) else ""
    axes = (*w.axes[:at], (Dim((first,), 1, role),), *w.axes[at + 1 :])
    return relayout(w, w.base, axes)


def _elsewhere(w: Factored, at: int) -> tuple[Any, ...]:
    """The layout, but for the length of the axis that is concatenated."""
    return (
        *w.axes[:at],
        dataclasses.replace(sole_dim(w, at), size=0),
        *w.axes[at + 1 :],
    )


def _with_factors(part: Any, like: Factored, at: int) -> Factored:
    """A part with its scale in B; zeros of rank 1 for one that is not adapted."""
    if isinstance(part, Factored):
        return dataclasses.replace(
            part, a=widened(part.a), b=widened(part.b) * part.site.scale
        )
    dim = dataclasses.replace(like.axes[at][0], size=part.shape[at])
    new = dataclasses.replace(
        like, axes=(*like.axes[:at], (dim,), *like.axes[at + 1 :])
    )
    stack, in_, out = ([d.size for d in new.dims(r)] for r in ("stack", "in", "out"))
    rank = like.a.shape[-1] if dim.role == "stack" else 1
    return dataclasses.replace(
        new,
        a=jnp.zeros((*stack, *in_, rank), widened(like.a).dtype),
        b=jnp.zeros((*stack, rank, *out), widened(like.b).dtype),
        site=Site(()),
    )


def _block_diagonal(blocks: list[Any], row: int, column: int) -> Any:
    """The blocks along the diagonal of axes `row` and `column`, zeros elsewhere."""
    total = sum(block.shape[column] for block in blocks)
    padded, before = [], 0
    for block in blocks:
        width = block.shape[column]
        config = [(0, 0, 0)] * block.ndim
        config[column] = (before, total - before - width, 0)
        padded.append(lax.pad(block, jnp.zeros((), block.dtype), config))
        before += width
    return lax.concatenate(padded, row)
