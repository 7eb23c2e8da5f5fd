"""Rules for weights that a function joins or adds: fused projections, sums, means."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import (
    RANK,
    Axis,
    Factored,
    Name,
    Named,
    by_position,
    require_no_output_scale,
    swapped,
    with_axis,
)
from flora._algebra.low_rank import widened
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import Context
from flora._tree.errors import Unfactorable

Factors = dict[str, Named]


def concatenate(ctx: Context, eqn: Eqn, *parts: Any) -> list[Factored]:
    """[W₁ | W₂] + [A₁ | A₂] · diag(scale₁ B₁, scale₂ B₂), of rank r₁ + r₂.

    Along in axes it is A that becomes block-diagonal, along stack axes neither.  Parts
    that are not adapted get factors of zeros.
    """
    return [_concatenated(ctx, eqn, eqn.params["dimension"], parts)]


def stack(ctx: Context, eqn: Eqn, *parts: Any) -> list[Factored]:
    """The parts become stack entries 0, 1, …: `concatenate` along a new axis."""
    at = eqn.params["axis"] % (len(eqn.outvars[0].aval.shape))
    parts = tuple(
        dataclasses.replace(x, axes=(*x.axes[:at], (), *x.axes[at:]))
        if isinstance(x, Factored)
        else lax.expand_dims(x, (at,))
        for x in parts
    )
    return [_concatenated(ctx, eqn, at, parts)]


def add(ctx: Context, eqn: Eqn, x: Any, y: Any) -> list[Factored]:
    """W₁ + W₂ + [A₁ | A₂] [scale₁ B₁; scale₂ B₂]; an array is added to W alone."""
    return [_sum(ctx, eqn, x, y, 1)]


def sub(ctx: Context, eqn: Eqn, x: Any, y: Any) -> list[Factored]:
    return [_sum(ctx, eqn, x, y, -1)]


def complex_(ctx: Context, eqn: Eqn, x: Any, y: Any) -> list[Factored]:
    """W₁ + i W₂, as spectral layers keep complex weights."""
    return [_sum(ctx, eqn, x, y, 1j)]


def _sum(ctx: Context, eqn: Eqn, x: Any, y: Any, sign: complex) -> Factored:
    """The sum x + sign y."""
    terms, shape = _with_factors(ctx, (x, y)), eqn.outvars[0].aval.shape
    weights = [w for w in terms if isinstance(w, Factored)]
    for w in weights:
        require_no_output_scale(w, "a sum")
    _require_weights(weights, "sum")
    if len(weights) == 1 and weights[0].shape != shape:
        raise Unfactorable("a sum that repeats the weight")
    base = _joint_base(eqn, terms)
    if len(weights) == 1:
        new = dataclasses.replace(weights[0], base=base)
        if not new.factors or sign == 1 or weights[0] is x:
            return new
        b = Named(widened(new.b.array) * sign, new.b.names)
        return dataclasses.replace(new, factors={**new.factors, "b": b})
    ready = _alike(weights, shape)
    total = _joint(ready[0], weights, base, ready[0].axes)
    if not total.factors:
        return total
    one, other = _with_scales(ready)
    if sign != 1:
        other["b"] = Named(other["b"].array * sign, other["b"].names)
    return dataclasses.replace(
        total,
        factors={
            **total.factors,
            "a": _side_by_side([one["a"], other["a"]], RANK),
            "b": _side_by_side([one["b"], other["b"]], RANK),
        },
    )


def _with_factors(ctx: Context, parts: Sequence[Any]) -> Sequence[Any]:
    """The parts, of which weights without factors are arrays beside ones with factors.

    While uses are recorded they stay weights, and none has factors.
    """
    bare = [isinstance(x, Factored) and not x.factors for x in parts]
    if not any(bare) or not any(isinstance(x, Factored) and x.factors for x in parts):
        return parts
    if ctx.log is None:
        return [x.base if b else x for x, b in zip(parts, bare, strict=True)]
    return [x.frozen(x.base) if isinstance(x, Factored) else x for x in parts]


def _side_by_side(factors: Sequence[Named], name: Name) -> Named:
    """Concatenated along an axis, in one dtype, as the first one has its axes."""
    names = factors[0].names
    dtype = jnp.result_type(*(f.array for f in factors))
    arrays = [f.ordered(names).astype(dtype) for f in factors]
    return Named(lax.concatenate(arrays, names.index(name)), names)


def _joint_base(eqn: Eqn, terms: Sequence[Any]) -> Any:
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
    if any(w.indexed for w in weights):
        raise Unfactorable("rows of a weight beside other arrays")
    if len({w.settings.dropout for w in weights}) > 1:
        raise Unfactorable(f"a {what} of weights with other dropout rates")


def _joint(
    like: Factored, weights: Sequence[Factored], base: Any, axes: Any
) -> Factored:
    """What becomes of all weights, but for its factors."""
    every = [*zip(*(w.axes for w in weights), strict=True)]
    axes = tuple(
        tuple(dataclasses.replace(x, sources=_sources(each)) for x in axis)
        for axis, each in zip(axes, every, strict=True)
    )
    paths = tuple(dict.fromkeys(p for w in weights for p in w.settings.paths))
    settings = dataclasses.replace(like.settings, paths=paths, scale=1.0)
    reduced = all(w.reduced for w in weights)
    return dataclasses.replace(
        like, base=base, axes=axes, settings=settings, reduced=reduced
    )


def _sources(axes: Iterable[Sequence[Axis]]) -> tuple[tuple[str, int], ...]:
    return tuple(dict.fromkeys(s for axis in axes for x in axis for s in x.sources))


def _alike(weights: Sequence[Factored], shape: Sequence[int]) -> list[Factored]:
    """The weights with one piece an axis, named and held by factors alike.

    Axes of size 1 that `shape` has longer are repeated.
    """
    weights = [by_position(w) for w in weights]
    roles = [_role(weights, i) for i in range(len(shape))]
    swap, ready = {"in": "out", "out": "in"}, []
    for w in weights:
        mine = [w.role(axis[0].name) if axis else "" for axis in w.axes]
        real = [i for i, n in enumerate(w.shape) if n > 1]
        if w.factors and any(mine[i] != roles[i] for i in real):
            if any(swap.get(mine[i], mine[i]) != roles[i] for i in real):
                raise Unfactorable("weights of other layouts, joined")
            w = swapped(w)
        ready.append(_fitted(w, roles, shape))
    return ready


def _role(weights: Sequence[Factored], axis: int) -> str:
    """The role of an axis: of a weight that has it, else any; a new one is a stack."""
    found = [(x.size == 1, w.role(x.name)) for w in weights for x in w.axes[axis]]
    return min(found, key=lambda pair: pair[0], default=(0, ""))[1] or "stack"


def _fitted(w: Factored, roles: Sequence[str], shape: Sequence[int]) -> Factored:
    """A piece for every axis, repeated where `shape` is longer than W."""
    for i, role in enumerate(roles):
        size = w.shape[i] if w.shape[i] > 1 else shape[i]
        (held,) = w.axes[i] or (Axis("", 0),)
        if (held.size, w.role(held.name)) != (size, role):
            w = with_axis(w, i, Axis(str(i), size, held.sources), role)
    return w


def _with_scales(weights: Sequence[Factored]) -> list[Factors]:
    """A and B of each weight, with its scale in B, in one dtype."""
    pairs = [
        {"a": Named(widened(w.a.array), w.a.names),
         "b": Named(widened(w.b.array) * w.settings.scale, w.b.names)}
        for w in weights
    ]  # fmt: skip
    dtype = jnp.result_type(*(f.array for pair in pairs for f in pair.values()))
    return [{k: f.astype(dtype) for k, f in pair.items()} for pair in pairs]


def _concatenated(ctx: Context, eqn: Eqn, at: int, parts: Sequence[Any]) -> Factored:
    parts = _with_factors(ctx, parts)
    weights = [w for w in parts if isinstance(w, Factored)]
    _require_weights(weights, "concatenation")
    base, shape = _joint_base(eqn, parts), eqn.outvars[0].aval.shape
    # An axis of size 1 stays one where it is concatenated: it is not repeated.
    one = [1 if i == at else n for i, n in enumerate(shape)]
    ready = _alike(weights, one)
    like, name = ready[0], str(at)
    whole = (*like.axes[:at], (Axis(name, shape[at]),), *like.axes[at + 1 :])
    fused = _joint(like, weights, base, whole)
    if len(weights) < len(parts):
        fused = dataclasses.replace(fused, reduced=False)
    if not fused.factors:
        return fused
    rest = iter(ready)
    each = [next(rest) if isinstance(x, Factored) else None for x in parts]
    shaped = _with_scales([_or_zeros(w, like, name, x.shape[at])
                           for w, x in zip(each, parts, strict=True)])  # fmt: skip
    factors = dict(fused.factors) | _joined_factors(
        [x["a"] for x in shaped], [x["b"] for x in shaped], name, like.role(name)
    )
    scales = [w and w.output_scale for w in each]
    if found := next((s for s in scales if s is not None), None):
        if name not in found.names:
            raise Unfactorable("in axes joined, of weights whose outputs are scaled")
        sizes = [x.shape[at] for x in parts]
        factors["scale"] = _side_by_side(
            [s or _filled(jnp.ones, found, name, n)
             for s, n in zip(scales, sizes, strict=True)], name)  # fmt: skip
    if like.key is not None and like.role(name) == "stack":
        key = like.key.first(name)  # one key for all
        factors["key"] = Named(key.array[0], key.names[1:]).repeated(name, shape[at])
    return dataclasses.replace(fused, factors=factors)


def _filled(make: Callable, like: Named, name: Name, size: int) -> Named:
    """An array of zeros or ones, shaped as another but for one axis."""
    shape = [size if n == name else k for n, k in like.sizes.items()]
    return Named(make(shape, like.array.dtype), like.names)


def _or_zeros(w: Factored | None, like: Factored, name: Name, size: int) -> Factored:
    """The weight; factors of rank 1, all zeros, for a part that is not adapted."""
    if w is not None:
        return w
    a = _filled(jnp.zeros, _filled(jnp.zeros, like.a, RANK, 1), name, size)
    b = _filled(jnp.zeros, _filled(jnp.zeros, like.b, RANK, 1), name, size)
    return dataclasses.replace(like, factors={"a": a, "b": b})


def _joined_factors(
    a: Sequence[Named], b: Sequence[Named], name: Name, role: str
) -> Factors:
    """A and B of what is joined along an axis of that name and role."""
    if role == "stack":
        rank = max(f.sizes[RANK] for f in a)
        a, b = ([_padded(f, rank) for f in each] for each in (a, b))
        return {"a": _side_by_side(a, name), "b": _side_by_side(b, name)}
    if role == "in":
        return {"a": _block_diagonal(a, name), "b": _side_by_side(b, RANK)}
    return {"a": _side_by_side(a, RANK), "b": _block_diagonal(b, name)}


def _padded(f: Named, rank: int, before: int = 0) -> Named:
    """A factor with zeros before and after along the rank."""
    edge = (before, rank - before - f.sizes[RANK], 0)
    config = [edge if n == RANK else (0, 0, 0) for n in f.names]
    return Named(lax.pad(f.array, jnp.zeros((), f.array.dtype), config), f.names)


def _block_diagonal(blocks: Sequence[Named], name: Name) -> Named:
    """The blocks along the diagonal of an axis and the rank, zeros elsewhere."""
    ranks = [f.sizes[RANK] for f in blocks]
    before = [sum(ranks[:i]) for i in range(len(ranks))]
    padded = [_padded(f, sum(ranks), at) for f, at in zip(blocks, before, strict=True)]
    return _side_by_side(padded, name)
