"""Rules for operations that reshape, slice, cast or scale a weight."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flora._algebra.axes import (
    Axis,
    Factored,
    Name,
    Named,
    new_name,
    regrouped,
    require_linear,
    require_no_output_scale,
    reshaped,
    with_axis,
)
from flora._algebra.codes import with_dtype
from flora._algebra.low_rank import widened
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import REPEATS_PRODUCT, Context, densify
from flora._trace.rules.squares import square
from flora._tree.errors import Unfactorable
from flora._tree.quantized import is_quantized


def _base(eqn: Eqn, w: Factored, *rest: Any) -> Any:
    return None if w.base is None else eval_eqn(eqn, [w.base, *rest])[0]


def on_base(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """Copies, casts, placements and names concern W alone."""
    return [dataclasses.replace(w, base=_base(eqn, w))]


def device_put(ctx: Context, eqn: Eqn, *values: Any) -> list[Any]:
    if any(isinstance(x, Factored) and x.base is None for x in values):
        raise Unfactorable("a placement of a change to a weight")
    bases = [x.base if isinstance(x, Factored) else x for x in values]
    return [
        dataclasses.replace(x, base=y) if isinstance(x, Factored) else y
        for x, y in zip(values, eval_eqn(eqn, bases), strict=True)
    ]


def convert_element_type(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """The factors keep their dtype until a product casts them to the activations'."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"a cast to {eqn.params['new_dtype']}")
    if is_quantized(w.base):
        return [with_dtype(w, eqn.params["new_dtype"])]
    return on_base(ctx, eqn, w)


def stop_gradient(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    keyless = {k: f for k, f in w.factors.items() if k != "key"}
    factors = {**w.factors, **lax.stop_gradient(keyless)}
    return [dataclasses.replace(w, base=_base(eqn, w), factors=factors)]


def optimization_barrier(ctx: Context, eqn: Eqn, *values: Any) -> list[Any]:
    """Each factor apart: beside it all that it passes with would be differentiated."""
    bases = [x.base if isinstance(x, Factored) else x for x in values]
    return [
        x.on_factors(lax.optimization_barrier, base=base)
        if isinstance(x, Factored)
        else base
        for x, base in zip(values, lax.optimization_barrier(bases), strict=True)
    ]


def transpose(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    axes = tuple(w.axes[i] for i in eqn.params["permutation"])
    return [dataclasses.replace(w, base=_base(eqn, w), axes=axes)]


def reshape(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    order = eqn.params["dimensions"] or range(len(w.axes))
    turned = dataclasses.replace(w, axes=tuple(w.axes[i] for i in order))
    return [reshaped(turned, _base(eqn, w), eqn.params["new_sizes"])]


def squeeze(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    return _without(ctx, eqn, w, eqn.params["dimensions"])


def _without(
    ctx: Context, eqn: Eqn, w: Factored, axes: Iterable[int]
) -> list[Factored]:
    gone = {i % len(w.axes) for i in axes}
    _suggest_stack(ctx, eqn, w, gone)
    left = [axis for i, axis in enumerate(w.axes) if i not in gone]
    return [regrouped(w, _base(eqn, w), left)]


def reduce_sum(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """Sums A over W's in axes and B over its out axes: Σ W + scale (Σ A) (Σ B)."""
    gone = {*eqn.params["axes"]}
    if all(w.shape[i] == 1 for i in gone):
        return _without(ctx, eqn, w, gone)
    if w.indexed:
        raise Unfactorable("a sum over rows of the weight")
    roles = {w.role(x.name) for i in gone for x in w.axes[i] if x.size > 1}
    if "in" in roles:
        require_linear(w, "a sum over in axes")
    if "out" in roles:
        require_no_output_scale(w, "a sum over out axes")
    if "stack" in roles:
        raise Unfactorable("a sum over a stack of weights")
    base = _base(eqn, w)
    units = {x for i in gone for x in w.axes[i] if x.size == 1}
    w = regrouped(w, base, [[x for x in axis if x not in units] for axis in w.axes])
    names = [x.name for i in gone for x in w.axes[i]]
    axes = tuple(axis for i, axis in enumerate(w.axes) if i not in gone)
    return [w.on_factors(lambda f: f.summed(names), axes=axes, reduced=True)]


def broadcast_in_dim(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """Axes of size 1 come in; a longer one repeats B, as an out axis would."""
    shape, at = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    axes: list[tuple[Axis, ...]] = [()] * len(shape)
    for i, axis in zip(at, w.axes, strict=True):
        axes[i] = axis
    new = dataclasses.replace(w, base=_base(eqn, w), axes=tuple(axes))
    return [_repeated(new, enumerate(shape))]


def _repeated(w: Factored, sizes: Iterable[tuple[int, int]]) -> Factored:
    """W with axes of size 1 as long as `(axis, size)` says: B repeats along them."""
    longer = [(i, n) for i, n in sizes if n != w.shape[i]]
    if longer and w.indexed:
        raise Unfactorable("a broadcast that repeats rows of the weight")
    for i, n in longer:
        w = with_axis(w, i, Axis(new_name(w), n))
    return w


def tile(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """Each axis becomes one of repetitions and itself, joined."""
    apart = tuple(part for axis in w.axes for part in ((), axis))
    new = dataclasses.replace(w, base=_base(eqn, w), axes=apart)
    new = _repeated(new, ((2 * i, n) for i, n in enumerate(eqn.params["reps"])))
    pairs = zip(new.axes[::2], new.axes[1::2], strict=True)
    return [dataclasses.replace(new, axes=tuple((*one, *two) for one, two in pairs))]


def pad(ctx: Context, eqn: Eqn, w: Any, value: Any) -> list[Factored]:
    """W gets the value around it, the factors zeros, an output scale ones."""
    if not isinstance(w, Factored) or isinstance(value, Factored) or w.indexed:
        raise Unfactorable("a weight as the padding")
    edges = {
        w.sole(i).name: (edge, eqn.outvars[0].aval.shape[i])
        for i, edge in enumerate(eqn.params["padding_config"])
        if tuple(edge) != (0, 0, 0)
    }
    if w.key is not None and any(w.role(n) == "stack" for n in edges):
        raise Unfactorable("padding of a stack with dropout")

    def around(f: Named, what: int) -> Named:
        for name, (edge, _) in edges.items():
            f = f.padded(name, *edge, value=what)
        return f

    factors = {k: around(f, int(k == "scale")) for k, f in w.factors.items()}
    axes = w.resized({name: size for name, (_, size) in edges.items()})
    base = _base(eqn, w, value)
    return [dataclasses.replace(w, base=base, axes=axes, factors=factors)]


Cuts = Mapping[int, tuple[Callable[[Any, int], Any], int]]


def slice_(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.axes)
    cuts = {}
    for i, size in enumerate(w.shape):
        cut = slice(p["start_indices"][i], p["limit_indices"][i], strides[i])
        if cut != slice(0, size, 1):
            cuts[i] = _static(cut), len(range(*cut.indices(size)))
    return [_cut(ctx, eqn, w, _base(eqn, w), cuts)]


def split(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    axis, start, pieces = eqn.params["axis"], 0, []
    bases = len(eqn.outvars) * [None] if w.base is None else eval_eqn(eqn, [w.base])
    for base, size in zip(bases, eqn.params["sizes"], strict=True):
        cut = {axis: (_static(slice(start, start + size, 1)), size)}
        pieces.append(_cut(ctx, eqn, w, base, cut))
        start += size
    return pieces


def _static(cut: slice) -> Callable[[Any, int], Any]:
    return lambda x, at: lax.slice_in_dim(x, cut.start, cut.stop, cut.step, at)


def dynamic_slice(ctx: Context, eqn: Eqn, w: Any, *starts: Any) -> list[Factored]:
    if not isinstance(w, Factored):
        raise Unfactorable("a weight as an index")
    sizes = eqn.params["slice_sizes"]

    def take(start: Any, size: int) -> Callable[[Any, int], Any]:
        return lambda x, at: lax.dynamic_slice_in_dim(x, start, size, axis=at)

    cuts = {
        i: (take(starts[i], sizes[i]), sizes[i])
        for i, size in enumerate(w.shape)
        if sizes[i] != size
    }
    new = _cut(ctx, eqn, w, _base(eqn, w, *starts), cuts)
    if any(size != 1 for _, size in cuts.values()):
        return [new]
    if w.factors or sum(n > 1 for i, n in enumerate(w.shape) if i not in cuts) <= 1:
        rows = [x for i in cuts for x in w.axes[i] if w.role(x.name) != "stack"]
        new = dataclasses.replace(new, indexed=(*w.indexed, *rows))
    return [new]


def _cut(ctx: Context, eqn: Eqn, w: Factored, base: Any, cuts: Cuts) -> Factored:
    """Cuts axes: W's stack axes in both factors, in axes in A, out axes in B."""
    _suggest_stack(ctx, eqn, w, cuts)
    new = dataclasses.replace(w, base=base)
    for i, (take, size) in cuts.items():
        name = w.sole(i).name
        axes = new.resized({name: size})
        new = new.on_factors(lambda f, n=name, t=take: f.along(n, t), axes=axes)
    return new


def rev(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    new = dataclasses.replace(w, base=_base(eqn, w))
    for i in (i for i in eqn.params["dimensions"] if w.shape[i] > 1):
        name = w.sole(i).name
        new = new.on_factors(
            lambda f, n=name: f.along(n, lambda x, at: lax.rev(x, [at]))
        )
    return [new]


def mul(ctx: Context, eqn: Eqn, x: Any, y: Any) -> list[Any]:
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


def _one_formed(ctx: Context, eqn: Eqn, x: Factored, y: Factored) -> tuple[Any, Any]:
    """Two weights of which the smaller is formed: a sum, or a scale for the outputs."""

    def size(w: Factored) -> tuple[bool, int]:
        return not w.reduced, sum(n > 1 for n in w.shape)

    small = min((x, y), key=size)
    if not small.reduced and size(small)[1] > 1:
        raise Unfactorable("a product of two weights, element by element")
    what, like = "a factor of another weight", eqn.invars[0].aval  # both operands'
    formed = densify(ctx, eqn, small, what, like)
    return (formed, y) if small is x else (x, formed)


def div(ctx: Context, eqn: Eqn, w: Any, c: Any) -> list[Factored]:
    if isinstance(w, Factored) and isinstance(c, Factored):
        w, c = _one_formed(ctx, eqn, w, c)
    if not isinstance(w, Factored):
        raise Unfactorable("a division by a weight")
    return [_scaled(eqn, w, _base(eqn, w, c), c, lax.div)]


def neg(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    new = dataclasses.replace(w, base=_base(eqn, w))
    if not w.factors:
        return [new]
    b = Named(-w.b.array, w.b.names)
    return [dataclasses.replace(new, factors={**w.factors, "b": b})]


def _scaled(eqn: Eqn, w: Factored, base: Any, c: Any, apply: Callable) -> Factored:
    """Scales A where c varies along in axes, else B."""
    c = _narrowed(jnp.asarray(c))
    if eqn.outvars[0].aval.shape != w.shape:
        raise Unfactorable(REPEATS_PRODUCT)
    varies = [i for i, n in enumerate(c.shape) if n > 1]
    if len(varies) > 1 and len(varies) == sum(n > 1 for n in w.shape):
        raise Unfactorable("a factor for each element of the weight")
    new = dataclasses.replace(w, base=base)
    if not w.factors:
        return new
    pieces = [x for i in varies for x in w.axes[i]]
    scale = Named(lax.reshape(c, [x.size for x in pieces]), _names(pieces))
    roles = {w.role(n) for n in scale.names}
    if {"in", "out"} <= roles:
        raise Unfactorable("a factor that varies along in and out axes")
    # In float32 or wider: a small c would vanish in a narrow factor.
    k = "a" if "in" in roles else "b"
    wide = Named(widened(w.factors[k].array, c), w.factors[k].names)
    return dataclasses.replace(new, factors={**w.factors, k: wide.times(scale, apply)})


def _names(pieces: Sequence[Axis]) -> tuple[Name, ...]:
    return tuple(x.name for x in pieces)


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


def _suggest_stack(ctx: Context, eqn: Eqn, w: Factored, axes: Iterable[int]) -> None:
    ctx.claim(w, eqn, dict.fromkeys(axes, "stack"), binding=False)
