"""Rules for weights that a function joins or adds: fused projections, sums, means."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import (
    RANK,
    Axes,
    Axis,
    Factored,
    Name,
    Named,
    by_position,
    require_no_output_scale,
    sources_of,
    swapped,
    with_axis,
)
from flora._algebra.low_rank import widened
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import REPEATS_SUM, Context
from flora._tree.errors import Unfactorable


def concatenate(ctx: Context, eqn: Eqn, *parts: Any) -> list[Factored]:
    """[W₁ | W₂] + [A₁ | A₂] · diag(scale₁ B₁, scale₂ B₂), of rank r₁ + r₂.

    Along in axes it is A that becomes block-diagonal, along stack axes neither.
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
    terms, shape = _alike_in_factors(ctx, (x, y)), eqn.outvars[0].aval.shape
    weights = [w for w in terms if isinstance(w, Factored)]
    for w in weights:
        require_no_output_scale(w, "a sum")
    _require_weights(weights, "sum")
    base = _joint_base(eqn, terms)
    if len(weights) == 2:
        ready = _fitted(weights, shape)
        factors = _summed(_scaled(ready, (1, sign)))
        return _joint(ready, base, ready[0].axes, factors, between=_beside(ready))
    (w,) = weights
    if w.shape != shape:
        raise Unfactorable(REPEATS_SUM)
    new = dataclasses.replace(w, base=base)
    if w is x or sign == 1 or not w.factors:
        return new
    b = Named(widened(w.b.array) * sign, w.b.names)
    return dataclasses.replace(new, factors={**w.factors, "b": b})


def _concatenated(ctx: Context, eqn: Eqn, at: int, parts: Sequence[Any]) -> Factored:
    parts, shape = _alike_in_factors(ctx, parts), eqn.outvars[0].aval.shape
    weights = [w for w in parts if isinstance(w, Factored)]
    _require_weights(weights, "concatenation")
    base = _joint_base(eqn, parts)
    # An axis of size 1 stays one where it is concatenated: it is not repeated.
    ready = _fitted(weights, [1 if i == at else n for i, n in enumerate(shape)])
    like, name, total = ready[0], str(at), shape[at]
    axes = (*like.axes[:at], (Axis(name, total),), *like.axes[at + 1 :])
    alone = len(ready) == len(parts)
    if not like.factors:
        return _joint(ready, base, axes, {}, alone=alone)
    sizes = [x.shape[at] for x in parts]
    starts = [0, *itertools.accumulate(sizes)]
    is_weight = [isinstance(x, Factored) for x in parts]
    held = [*itertools.compress(zip(starts, sizes, strict=False), is_weight)]
    pairs = _scaled(ready, [1] * len(ready))
    between = _beside(ready)
    if like.role(name) == "stack":
        if between is not None:  # it acts on each entry by itself, so on all alike
            if len({(w.settings.between, w.rank) for w in ready}) > 1:
                raise Unfactorable("a stack of weights whose variants differ")
            between = like.settings.between
        rank = max(pair["a"].sizes[RANK] for pair in pairs)
        pairs = [{k: f.padded(RANK, 0, rank - f.sizes[RANK]) for k, f in pair.items()}
                 for pair in pairs]  # fmt: skip
        rest = {k: _with_gaps([pair[k] for pair in pairs], name, is_weight, sizes)
                for k in "ab"}  # fmt: skip
    else:  # a sum of weights with zeros around them
        rest = _summed([
            {k: f.padded(name, start, total - start - size) for k, f in pair.items()}
            for pair, (start, size) in zip(pairs, held, strict=True)
        ])  # fmt: skip
    if found := [w.output_scale for w in ready if w.output_scale is not None]:
        if name not in found[0].names:
            raise Unfactorable("in axes joined, of weights whose outputs are scaled")
        ones = [_filled(found[0], name, size, 1) for _, size in held]
        scales = [w.output_scale or one for w, one in zip(ready, ones, strict=True)]
        rest["scale"] = _with_gaps(scales, name, is_weight, sizes, 1)
    if like.key is not None and name in like.key.names:  # one key for all
        one = like.key.along(name, lambda x, at: jnp.moveaxis(x, at, 0))
        left = tuple(n for n in one.names if n != name)
        rest["key"] = Named(one.array[0], left).repeated(name, total)
    return _joint(ready, base, axes, rest, alone=alone, between=between)


@dataclasses.dataclass(frozen=True)
class _Beside:
    """The functions that variants of joined weights put between A and B.

    Attributes:
      each: a function, or `None` for none, and the rank, of each weight.
    """

    each: tuple[tuple[Callable[[Any], Any] | None, int], ...]

    def __call__(self, z: Any) -> Any:
        parts = lax.split(z, [rank for _, rank in self.each], z.ndim - 1)
        made = [p if f is None else f(p)
                for p, (f, _) in zip(parts, self.each, strict=True)]  # fmt: skip
        return lax.concatenate(made, z.ndim - 1)


def _beside(weights: Sequence[Factored]) -> Callable[[Any], Any] | None:
    """What acts on x [A₁ | A₂]: each weight's function on its own part."""
    each = tuple((w.settings.between, w.rank) for w in weights if w.factors)
    return _Beside(each) if any(f is not None for f, _ in each) else None


def _alike_in_factors(ctx: Context, parts: Sequence[Any]) -> Sequence[Any]:
    """The parts, of which weights without factors are arrays beside ones with factors.

    While uses are recorded they stay weights, and none has factors.
    """
    bare = [isinstance(x, Factored) and not x.factors for x in parts]
    if not any(bare) or not any(isinstance(x, Factored) and x.factors for x in parts):
        return parts
    if ctx.log is None:
        pairs = zip(parts, bare, strict=True)
        return [lax.reshape(x.base, x.shape) if b else x for x, b in pairs]
    return [x.frozen(x.base) if isinstance(x, Factored) else x for x in parts]


def _require_weights(weights: Sequence[Factored], what: str) -> None:
    """Rows that an index chose are activations, and are joined as such."""
    if any(w.indexed for w in weights):
        raise Unfactorable("rows of a weight beside other arrays")
    if len({w.settings.dropout for w in weights}) > 1:
        raise Unfactorable(f"a {what} of weights with other dropout rates")


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


def _joint(
    weights: Sequence[Factored],
    base: Any,
    axes: Axes,
    factors: Mapping[str, Named],
    alone: bool = True,
    between: Callable[[Any], Any] | None = None,
) -> Factored:
    """What becomes of weights with one piece an axis, alone or beside arrays."""
    of_axis = [sources_of(itertools.chain(*each))
               for each in zip(*(w.axes for w in weights), strict=True)]  # fmt: skip
    axes = tuple(
        tuple(dataclasses.replace(x, sources=sources) for x in axis)
        for axis, sources in zip(axes, of_axis, strict=True)
    )
    paths = tuple(dict.fromkeys(p for w in weights for p in w.settings.paths))
    settings = dataclasses.replace(
        weights[0].settings, paths=paths, scale=1.0, between=between
    )
    reduced = alone and all(w.reduced for w in weights)
    key = {"key": weights[0].key} if weights[0].key is not None else {}
    return Factored(base, {**key, **factors} if factors else {}, axes, settings,
                    reduced=reduced)  # fmt: skip


def _fitted(weights: Sequence[Factored], shape: Sequence[int]) -> list[Factored]:
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
        for i, role in enumerate(roles):
            size = w.shape[i] if w.shape[i] > 1 else shape[i]
            (held,) = w.axes[i] or (Axis("", 0),)
            if (held.size, w.role(held.name)) != (size, role):
                w = with_axis(w, i, Axis(str(i), size, held.sources), role)
        ready.append(w)
    return ready


def _role(weights: Sequence[Factored], axis: int) -> str:
    """The role of an axis: of a weight that has it, else any; a new one is a stack."""
    found = [(x.size == 1, w.role(x.name)) for w in weights for x in w.axes[axis]]
    return min(found, key=lambda pair: pair[0], default=(0, ""))[1] or "stack"


def _scaled(
    weights: Sequence[Factored], signs: Sequence[complex]
) -> list[dict[str, Named]]:
    """A and B of each weight that has them, in one dtype; B with its scale and sign."""
    pairs = []
    for w, sign in zip(weights, signs, strict=True):
        if w.factors:
            b = widened(w.b.array) * (w.settings.scale * sign)
            a = Named(widened(w.a.array), w.a.names)
            pairs.append({"a": a, "b": Named(b, w.b.names)})
    every = [f.array for pair in pairs for f in pair.values()]
    dtype = jnp.result_type(jnp.float32, *every)
    return [{k: f.astype(dtype) for k, f in pair.items()} for pair in pairs]


def _summed(pairs: Sequence[Mapping[str, Named]]) -> dict[str, Named]:
    """A and B of a sum: side by side along the rank."""
    if not pairs:
        return {}
    return {k: _side_by_side([pair[k] for pair in pairs], RANK) for k in "ab"}


def _side_by_side(factors: Sequence[Named], name: Name) -> Named:
    """Concatenated along an axis, in one dtype, as the first one has its axes."""
    names = factors[0].names
    dtype = jnp.result_type(*(f.array for f in factors))
    arrays = [f.ordered(names).astype(dtype) for f in factors]
    return Named(lax.concatenate(arrays, names.index(name)), names)


def _with_gaps(
    factors: Sequence[Named],
    name: Name,
    is_weight: Sequence[bool],
    sizes: Sequence[int],
    value: int = 0,
) -> Named:
    """Side by side along an axis of all parts, a value for those without factors."""
    rest = iter(factors)
    every = [next(rest) if held else _filled(factors[0], name, size, value)
             for held, size in zip(is_weight, sizes, strict=True)]  # fmt: skip
    return _side_by_side(every, name)


def _filled(like: Named, name: Name, size: int, value: int) -> Named:
    """An array of one value, shaped as another but for one axis."""
    shape = [size if n == name else k for n, k in like.sizes.items()]
    return Named(jnp.full(shape, value, like.array.dtype), like.names)
