"""Rules for operations that only change how a weight looks."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flora._algebra.factored import (
    Dim,
    Factored,
    grown,
    per_dim,
    relayout,
    require_no_columns,
    sole_dim,
    split_axes,
)
from flora._algebra.low_rank import widened
from flora._trace.compat import eval_eqn
from flora._trace.interpret import settle
from flora._trace.rules.squares import square
from flora._tree.errors import Unfactorable


def _base(eqn: Any, w: Factored, *rest: Any) -> Any:
    return None if w.base is None else eval_eqn(eqn, [w.base, *rest])[0]


def on_base(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    """Copies, casts, placements and names concern W alone."""
    return [dataclasses.replace(w, base=_base(eqn, w))]


def device_put(ctx: Any, eqn: Any, *values: Any) -> list[Any]:
    if any(isinstance(x, Factored) and x.base is None for x in values):
        raise Unfactorable("a placement of a change to a weight")
    bases = [x.base if isinstance(x, Factored) else x for x in values]
    return [
        dataclasses.replace(x, base=y) if isinstance(x, Factored) else y
        for x, y in zip(values, eval_eqn(eqn, bases), strict=True)
    ]


def convert_element_type(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    """The factors keep their dtype until a product casts them to the activations'."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"a cast to {eqn.params['new_dtype']}")
    return on_base(ctx, eqn, w)


def stop_gradient(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    stopped = dataclasses.replace(w, base=_base(eqn, w))
    if w.a is None:
        return [stopped]
    a, b, columns = lax.stop_gradient((w.a, w.b, w.columns))
    return [dataclasses.replace(stopped, a=a, b=b, columns=columns)]


def optimization_barrier(ctx: Any, eqn: Any, *values: Any) -> list[Any]:
    """Factors apart: beside them a frozen base would be differentiated too."""
    bases = [x.base if isinstance(x, Factored) else x for x in values]
    factors = [(x.a, x.b, x.key, x.columns) for x in values if isinstance(x, Factored)]
    rest = iter(lax.optimization_barrier(factors))

    def join(x: Any, base: Any) -> Any:
        if not isinstance(x, Factored):
            return base
        a, b, key, columns = next(rest)
        return dataclasses.replace(x, base=base, a=a, b=b, key=key, columns=columns)

    outs = lax.optimization_barrier(bases)
    return [join(x, base) for x, base in zip(values, outs, strict=True)]


def transpose(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    axes = tuple(w.axes[i] for i in eqn.params["permutation"])
    return [dataclasses.replace(w, base=_base(eqn, w), axes=axes)]


def reshape(ctx: Any, eqn: Any, w: Factored, *dynamic: Any) -> list[Factored]:
    if dynamic:
        raise Unfactorable("a reshape of dynamic shape")
    order = eqn.params.get("dimensions") or range(len(w.axes))
    axes = split_axes([w.axes[i] for i in order], eqn.params["new_sizes"])
    return [relayout(w, _base(eqn, w), axes)]


def squeeze(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    return _without(ctx, eqn, w, eqn.params["dimensions"])


def reduce_sum(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    """Sums A over W's in axes and B over its out axes: Σ W + scale (Σ A) (Σ B)."""
    gone = set(eqn.params["axes"])
    if all(w.shape[i] == 1 for i in gone):
        return _without(ctx, eqn, w, gone)
    if w.chosen:
        raise Unfactorable("a sum over rows of the weight")
    dims = {d for i in gone for d in w.axes[i]}
    if any(d.role == "out" and d.size > 1 for d in dims):
        require_no_columns(w, "a sum over out axes")
    if any(d.role == "stack" and d.size > 1 for d in dims):
        raise Unfactorable("a sum over a stack of weights")

    def total(array: Any, at: dict[int, Dim]) -> Any:
        return array.sum([i for i, d in at.items() if d in dims])

    units = tuple(d for d in dims if d.role == "stack")
    w = relayout(w, w.base, [tuple(d for d in x if d not in units) for x in w.axes])
    axes = [axis for i, axis in enumerate(w.axes) if i not in gone]
    new = per_dim(w, _base(eqn, w), axes, total)
    return [dataclasses.replace(new, summed=True)]


def _without(ctx: Any, eqn: Any, w: Factored, dimensions: Any) -> list[Factored]:
    gone = {d % len(w.axes) for d in dimensions}
    _suggest_stack(ctx, eqn, w, gone)
    axes = [axis for i, axis in enumerate(w.axes) if i not in gone]
    return [relayout(w, _base(eqn, w), axes)]


def broadcast_in_dim(ctx: Any, eqn: Any, w: Factored, *dynamic: Any) -> list[Factored]:
    """Axes of size 1 come in; a longer one repeats B, as an out axis would."""
    shape, at = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if dynamic:
        raise Unfactorable("a broadcast of dynamic shape")
    base = _base(eqn, w)
    axes: list[tuple[Dim, ...]] = [()] * len(shape)
    for i, axis in zip(at, w.axes, strict=True):
        axes[i] = axis
    new = dataclasses.replace(w, base=base, axes=tuple(axes))
    longer = [i for i, n in enumerate(shape) if n != new.shape[i]]
    if longer and w.chosen:
        raise Unfactorable("a broadcast that repeats rows of the weight")
    for i in longer:
        new = _repeated(new, base, i, shape[i])
    return [new]


def _repeated(w: Factored, base: Any, axis: int, size: int) -> Factored:
    """W with an axis of size 1 made longer: B repeats, as along an out axis."""
    every = [d for axis in w.axes for d in axis]
    role = "out" if all(d.role for d in every) else ""
    lowest = min([0, *(d.at[0] for d in every)])
    return grown(w, base, axis, Dim((lowest - 1,), size, role))


def tile(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    """Each axis becomes one of repetitions and itself, joined."""
    if w.chosen:
        raise Unfactorable("a broadcast that repeats rows of the weight")
    base, reps = _base(eqn, w), eqn.params["reps"]
    apart = [part for axis in w.axes for part in ((), axis)]
    new = dataclasses.replace(w, base=base, axes=tuple(apart))
    for i, n in enumerate(reps):
        if n != 1:
            new = _repeated(new, base, 2 * i, n)
    axes = tuple((*new.axes[2 * i], *new.axes[2 * i + 1]) for i in range(len(w.axes)))
    return [dataclasses.replace(new, axes=axes)]


def pad(ctx: Any, eqn: Any, w: Any, value: Any) -> list[Factored]:
    """W gets the value around it, the factors zeros, scaled columns ones."""
    if not isinstance(w, Factored) or isinstance(value, Factored) or w.chosen:
        raise Unfactorable("a weight as the padding")
    base = _base(eqn, w, value)
    config, axes = eqn.params["padding_config"], list(w.axes)
    wide = {i: c for i, c in enumerate(config) if tuple(c) != (0, 0, 0)}
    dims = {sole_dim(w, i): c for i, c in wide.items()}
    if w.key is not None and any(d.role == "stack" for d in dims):
        raise Unfactorable("padding of a stack with dropout")
    for i in wide:
        size = eqn.outvars[0].aval.shape[i]
        axes[i] = (dataclasses.replace(axes[i][0], size=size),)

    def pad_factor(array: Any, at: dict[int, Dim]) -> Any:
        if array is w.key:
            return array
        around = 1 if array is w.columns else 0
        edges = [dims.get(at[i], (0, 0, 0)) if i in at else (0, 0, 0)
                 for i in range(array.ndim)]  # fmt: skip
        return lax.pad(array, jnp.asarray(around, array.dtype), edges)

    return [per_dim(w, base, axes, pad_factor)]


def slice_(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.axes)
    cuts = {}
    for i, size in enumerate(w.shape):
        cut = slice(p["start_indices"][i], p["limit_indices"][i], strides[i])
        if cut != slice(0, size, 1):
            cuts[i] = (cut, len(range(*cut.indices(size))))
    return [_cut(ctx, eqn, w, _base(eqn, w), cuts, _take)]


def split(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    axis, start, pieces = eqn.params["axis"], 0, []
    bases = len(eqn.outvars) * [None] if w.base is None else eval_eqn(eqn, [w.base])
    for base, size in zip(bases, eqn.params["sizes"], strict=True):
        cut = {axis: (slice(start, start + size, 1), size)}
        pieces.append(_cut(ctx, eqn, w, base, cut, _take))
        start += size
    return pieces


def _take(array: Any, cut: slice, at: int) -> Any:
    return lax.slice_in_dim(array, cut.start, cut.stop, cut.step, at)


def dynamic_slice(ctx: Any, eqn: Any, w: Any, *starts: Any) -> list[Factored]:
    if not isinstance(w, Factored):
        raise Unfactorable("a weight as an index")
    sizes = eqn.params["slice_sizes"]
    if len(starts) != len(sizes):
        raise Unfactorable("a slice of dynamic shape")
    cuts = {
        i: ((starts[i], sizes[i]), sizes[i])
        for i, size in enumerate(w.shape)
        if sizes[i] != size
    }

    def take(array: Any, cut: tuple[Any, int], at: int) -> Any:
        return lax.dynamic_slice_in_dim(array, *cut, axis=at)

    new = _cut(ctx, eqn, w, _base(eqn, w, *starts), cuts, take)
    if any(size != 1 for _, size in cuts.values()):
        return [new]
    known = all(d.role for axis in w.axes for d in axis)
    if known or sum(n > 1 for i, n in enumerate(w.shape) if i not in cuts) <= 1:
        rows = {d.at[0] for i in cuts for d in w.axes[i] if d.role != "stack"}
        new = dataclasses.replace(new, chosen=tuple(sorted({*w.chosen, *rows})))
    return [new]


def _cut(
    ctx: Any, eqn: Any, w: Factored, base: Any, cuts: dict[int, Any], take: Any
) -> Factored:
    """Cuts axes: W's stack axes in both factors, in axes in A, out axes in B."""
    chosen = {sole_dim(w, i): cut for i, (cut, _) in cuts.items()}
    _suggest_stack(ctx, eqn, w, cuts)
    axes = list(w.axes)
    for i, (_, size) in cuts.items():
        axes[i] = (dataclasses.replace(axes[i][0], size=size),)

    def cut_factor(array: Any, positions: dict[int, Dim]) -> Any:
        for at, dim in positions.items():
            if dim in chosen:
                array = take(array, chosen[dim], at)
        return array

    return per_dim(w, base, axes, cut_factor)


def rev(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    flipped = [i for i in eqn.params["dimensions"] if w.shape[i] > 1]
    dims = {sole_dim(w, i) for i in flipped}

    def flip(array: Any, at: dict[int, Dim]) -> Any:
        return lax.rev(array, [i for i, d in at.items() if d in dims])

    return [per_dim(w, _base(eqn, w), w.axes, flip)]


def mul(ctx: Any, eqn: Any, x: Any, y: Any) -> list[Any]:
    """c·W, where c varies along no axis, or along axes of one factor only; W·W."""
    if isinstance(x, Factored) and isinstance(y, Factored):
        if eqn.invars[0] is eqn.invars[1]:
            return square(ctx, eqn, x)
        x, y = _one_formed(ctx, eqn, x, y)
    w, c = (x, y) if isinstance(x, Factored) else (y, x)
    base = w.base
    if base is not None:
        (base,) = eval_eqn(eqn, [base if v is w else v for v in (x, y)])
    return [_scaled(eqn, w, base, c, lax.mul)]


def _one_formed(ctx: Any, eqn: Any, x: Factored, y: Factored) -> tuple[Any, Any]:
    """Two weights of which the smaller is formed: a sum, or a scale for W's columns."""

    def size(w: Factored) -> tuple[bool, int]:
        return not w.summed, sum(n > 1 for n in w.shape)

    small = min((x, y), key=size)
    if not small.summed and size(small)[1] > 1:
        raise Unfactorable("a product of two weights, element by element")
    formed = settle(ctx, eqn, small, "a factor of another weight")
    return (formed, y) if small is x else (x, formed)


def div(ctx: Any, eqn: Any, w: Any, c: Any) -> list[Factored]:
    if isinstance(w, Factored) and isinstance(c, Factored):
        w, c = _one_formed(ctx, eqn, w, c)
    if not isinstance(w, Factored):
        raise Unfactorable("a division by a weight")
    return [_scaled(eqn, w, _base(eqn, w, c), c, lax.div)]


def neg(ctx: Any, eqn: Any, w: Factored) -> list[Factored]:
    scaled = dataclasses.replace(w, base=_base(eqn, w))
    return [scaled if w.b is None else dataclasses.replace(scaled, b=-w.b)]


def _scaled(eqn: Any, w: Factored, base: Any, c: Any, apply: Any) -> Factored:
    """Scales A where c varies along in axes, else B."""
    c = _narrowed(jnp.asarray(c))
    if eqn.outvars[0].aval.shape != w.shape:
        raise Unfactorable("a product that repeats the weight")
    varies = [i for i, n in enumerate(c.shape) if n > 1]
    if len(varies) > 1 and len(varies) == sum(n > 1 for n in w.shape):
        raise Unfactorable("a factor for each element of the weight")
    new = dataclasses.replace(w, base=base)
    if w.a is None:
        return new
    dims = [d for i in varies for d in w.axes[i]]
    c = lax.reshape(c, [d.size for d in dims])
    if not any(d.role == "in" for d in dims):
        held = [*w.dims("stack"), None, *w.dims("out")]
        return dataclasses.replace(new, b=_times(w.b, _spread(c, dims, held), apply))
    if not any(d.role == "out" for d in dims):
        held = [*w.dims("stack", "in"), None]
        return dataclasses.replace(new, a=_times(w.a, _spread(c, dims, held), apply))
    raise Unfactorable("a factor that varies along in and out axes")


def _narrowed(c: Any) -> Any:
    """A known array (a mask, say) with axes along which it is constant cut to one."""
    if isinstance(c, Tracer):
        return c
    values = np.asarray(c)
    for i in range(values.ndim):
        first = values.take([0], axis=i)
        if (values == first).all():
            values = first
    return jnp.asarray(values)


def _times(factor: Any, c: Any, apply: Any) -> Any:
    """Scales in float32 or wider: a small c would vanish in a narrow factor."""
    factor = widened(factor, c)
    return apply(factor, jnp.broadcast_to(c.astype(factor.dtype), factor.shape))


def _spread(c: Any, dims: list[Dim], held: list[Dim | None]) -> Any:
    """C with its axes moved to where a factor holds those dims."""
    where = [held.index(d) for d in dims]
    c = lax.transpose(c, sorted(range(len(where)), key=where.__getitem__))
    return lax.expand_dims(c, [i for i in range(len(held)) if i not in where])


def _suggest_stack(ctx: Any, eqn: Any, w: Factored, axes: Any) -> None:
    ctx.claim(w, eqn, {i: "stack" for i in axes}, firm=False)
