"""The rule for `dot_general`: einsum, matmul, Dense, attention, attend."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra import by_platform
from flora._algebra.axes import (
    RANK,
    Axis,
    Factored,
    Name,
    Named,
    Sizes,
    divided,
    fused,
    renamed,
)
from flora._algebra.choice import (
    Form,
    cheapest,
    is_large,
    may_differ,
    named_form,
    target,
    with_kernel,
)
from flora._algebra.choice import Sizes as Counts
from flora._algebra.codes import stored, with_scale, with_scaled_outputs
from flora._algebra.dropout import Seed
from flora._algebra.forms import ROUNDED, Spec, alike, products
from flora._algebra.low_rank import (
    compute_dtype_of,
    low_rank,
    named,
    nonzero,
    seed_of,
    sizes_of,
    sum_dtype,
    widened,
    with_gradient_of_scale,
    with_output_scale,
    without_gradient,
)
from flora._trace.again import Recipe
from flora._trace.compat import INLINE, Eqn, Literal, eval_eqn, relative_scopes
from flora._trace.dequantize import on_quantized
from flora._trace.interpret import Context
from flora._trace.rules.product import (
    Operation,
    Scaling,
    multiplied,
    plain,
    scales_apart,
)
from flora._tree.config import kernel_axes
from flora._tree.errors import Unfactorable
from flora._tree.quantized import is_quantized


def dot_general(ctx: Context, eqn: Eqn, lhs: Any, rhs: Any) -> list[Any]:
    """Y = x W + scale (x A) B for any dimension numbers and either side.

    With weights on both sides, W₁ W₂ = base₁ W₂ + scale₁ A₁ (B₁ W₂) and so on.
    """
    dims = eqn.params["dimension_numbers"]
    for side, w in enumerate((lhs, rhs)):
        if isinstance(w, Factored):
            other = (lhs, rhs)[1 - side].shape
            free = {*range(len(other))} - {*dims[0][1 - side], *dims[1][1 - side]}
            tokens = math.prod(other[i] for i in free)
            ctx.claim(w, eqn, _roles(dims, side, len(w.axes)), tokens=tokens)
    if isinstance(lhs, Factored) and isinstance(rhs, Factored):
        return on_quantized(lambda *two: [_product(ctx, eqn, *two)], [lhs, rhs])
    return [_product(ctx, eqn, lhs, rhs)]


def _roles(dims: Any, side: int, ndim: int) -> dict[int, str]:
    summed, batch = dims[0][side], dims[1][side]
    return {
        i: "in" if i in summed else "stack" if i in batch else "out"
        for i in range(ndim)
    }


def _product(ctx: Context, eqn: Eqn, lhs: Any, rhs: Any) -> Any:
    side = 0 if isinstance(lhs, Factored) else 1
    w, x = ((lhs, rhs), (rhs, lhs))[side]
    if not isinstance(w, Factored):
        return eval_eqn(eqn, [lhs, rhs])[0]
    if w.factors and isinstance(x, Factored) and not x.factors:
        x = x.base  # a weight without factors is an array like any other
    if isinstance(x, Factored):
        if w.output_scale is not None or x.output_scale is not None:
            what = "a product of two weights, of which one has scaled outputs"
            raise Unfactorable(what)
        terms = []
        if w.base is not None:
            terms = [_product(ctx, eqn, *((w.base, x), (x, w.base))[side])]
        if w.factors:
            bare = dataclasses.replace(w.without("key"), base=None)
            terms.append(plain(ctx, Operation(eqn, _change, _scaling, side), bare, x))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]
    if found := _in_form(ctx, eqn, x, w, side):
        return _computed([found])[0]
    return multiplied(ctx, Operation(eqn, _change, _scaling, side), w, x)


def _scaling(operation: Operation, w: Factored, x: Any) -> Scaling:
    met = _meeting(operation.eqn, x, w, operation.at)
    y, x_sizes = [(n, met.sizes[n]) for n in met.y], [*sizes_of(met.x).items()]
    return Scaling(met.w.factors["scale"], y, x_sizes)


def _change(operation: Operation, w: Factored, x: Any) -> Any:
    eqn = operation.eqn
    met, aval = _meeting(eqn, x, w, operation.at), eqn.outvars[0].aval
    precision, dtype = eqn.params["precision"], sum_dtype(aval.dtype)
    change = low_rank(met.x, met.w, met.y, precision=precision, dtype=dtype)
    return lax.reshape(change.array, aval.shape)


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """A product with named axes.

    Attributes:
      x: the operand that is not the weight.
      w: the weight, fused.
      y: the names of the result.
    """

    x: Any
    w: Factored
    y: tuple[Name, ...]

    @property
    def sizes(self) -> dict[Name, int]:
        return sizes_of(self.x) | sizes_of(self.w)


def _meeting(eqn: Eqn, x: Any, w: Factored, side: int) -> _Meeting:
    """Names for the axes of a product; x stands on the side that W does not.

    Where they meet they have x's names, so that products of one x compare.
    """
    summed, batch = eqn.params["dimension_numbers"]
    w, theirs = fused(w), (*summed[1 - side], *batch[1 - side])
    axes: list[tuple[Axis, ...]] = [
        (Axis(f"x{i}", size),) for i, size in enumerate(x.shape)
    ]
    new: dict[Name, Name] = {}
    for i, j in zip(theirs, (*summed[side], *batch[side]), strict=True):
        axes[i] = tuple(
            Axis(f"x{i}.{k}", piece.size) for k, piece in enumerate(w.axes[j])
        )
        mine = (piece.name for piece in w.axes[j])
        new |= dict(zip(mine, (piece.name for piece in axes[i]), strict=True))
    w = renamed(w, new)
    sides = (w.axes, axes) if side == 0 else (axes, w.axes)
    result = [sides[0][i] for i in batch[0]]
    for k in (0, 1):
        gone = {*summed[k], *batch[k]}
        result += [axis for i, axis in enumerate(sides[k]) if i not in gone]
    pieces = [(piece.name, piece.size) for axis in axes for piece in axis]
    return _Meeting(
        named(x, pieces), w, tuple(piece.name for axis in result for piece in axis)
    )


def _ends(met: _Meeting) -> tuple[Named, Named] | None:
    """`(P, Q)`: the factor with all axes that are summed over, and that with the rest.

    `None` if the factors divide W's axes in another way.
    """
    a, b, held = met.w.a, met.w.b, {*met.w.names}
    stack = {*a.names} & {*b.names} - {RANK}
    shared = held & {*met.x.names}
    if stack != shared & {*met.y}:
        return None
    for p, q in ((a, b), (b, a)):
        ends = {*p.names} - {*stack, RANK}, {*q.names} - {*stack, RANK}
        if ends == (shared - {*met.y}, held - shared):
            return p, q
    return None


def _counts(met: _Meeting) -> Counts:
    """How many tokens, inputs and outputs there are."""
    held, sizes = met.w.names, met.sizes

    def count(names: Any) -> int:
        return math.prod(sizes[n] for n in names)

    return Counts(
        tokens=count(n for n in met.x.names if n not in held),
        in_=count(n for n in held if n not in met.y),
        out=count(n for n in held if n not in met.x.names),
        rank=met.w.rank,
        sliced=met.w.settings.sliced,
        stored=is_quantized(met.w.base),
        scaled=met.w.output_scale is not None,
    )


@dataclasses.dataclass(frozen=True)
class _InForm:
    """A product in another form than the plain direct one.

    Attributes:
      spec: what is static.
      together: whether it may be computed with others.
      by_platform: whether its fences depend on what the program is lowered for.
      x, w, p, q: the operands; w may be quantized.
      by: what scales the result's outputs, if anything: w and q hold it too, but for
        its gradient, unless the form is by platform.
      seed: of the mask of dropout.
      shape: of the result.
      again: how x is made again.
      sources: of what.
    """

    spec: Spec
    together: bool
    by_platform: bool
    x: Named
    w: Any
    p: Named
    q: Named
    by: Named | None
    seed: Seed | None
    shape: tuple[int, ...]
    again: "_Again | None"
    sources: Sequence[Any]

    def result(self, y: Any) -> Any:
        """The product as the equation has it, of what was computed."""
        if self.by is not None and self.by_platform:
            sizes = [*zip(self.spec.y, y.shape, strict=True)]
            y = with_output_scale(y, self.by, sizes)
        elif self.by is not None:
            y = with_gradient_of_scale(y, self.by.aligned(self.spec.y))
        return lax.reshape(y, self.shape)


@dataclasses.dataclass(frozen=True)
class _Again:
    """How x is made of other values, with named axes."""

    recipe: Recipe
    names: tuple[Name, ...]
    shape: tuple[int, ...]

    def __call__(self, sources: Sequence[Any]) -> Named:
        x = self.recipe.unnamed()(*sources)
        return Named(lax.reshape(x, self.shape), self.names)


def _in_form(ctx: Context, eqn: Eqn, x: Any, w: Factored, side: int) -> _InForm | None:
    """The product in the form that the weight or the device asks for.

    `None` where that is the plain direct one, or no other applies.
    """
    out, asked = eqn.outvars[0].aval, w.settings.form
    if w.base is None or not w.factors or not may_differ(asked):
        return None
    if w.settings.between is not None:
        return None
    axes = kernel_axes(asked)
    auto = asked == "auto" or axes is not None
    if asked == "auto" and not is_large(x.shape, w.shape):
        return None
    met = _meeting(eqn, x, w, side)
    ends, mesh, by = _ends(met), jax.sharding.get_abstract_mesh(), met.w.output_scale
    if (
        ends is None
        or x.dtype != compute_dtype_of(x.dtype, out.dtype)
        or jnp.issubdtype(out.dtype, jnp.complexfloating)
        or (not mesh.empty and (mesh.manual_axes or mesh.explicit_axes))
        or (by is not None and not _can_scale(by, met, out.dtype))
    ):
        return None
    form = cheapest(_counts(met), target()) if auto else named_form(asked)
    if axes is not None:
        form = with_kernel(form, axes)
    if form is None or (w.key and not _can_drop(form, met)):
        return None
    (p, q), precision = ends, eqn.params["precision"]
    parts = _divided(ctx, eqn, met, side) if form.in_heads else {}
    y = [n for name in met.y for n, _ in parts.get(name, [(name, 0)])]
    rate = w.settings.dropout if w.key else 0.0
    spec = Spec(
        form.forward,
        form.backward,
        tuple(y),
        out.dtype,
        precision,
        kernel=form.kernel,
        written=form.written,
        sliced=w.settings.sliced,
        rate=rate,
        columns=math.prod(x.shape[-1:]),
    )
    w = met.w if scales_apart(eqn) else with_scale(met.w)
    base: Any = stored(w, met.x.names, met.y)
    if parts:  # or a loop's whole stack is laid out anew before it starts
        base = lax.optimization_barrier(base)
    q = Named(widened(q.array, x) * (w.settings.scale / (1 - rate)), q.names)
    if by is not None and not form.by_platform:
        by = Named(nonzero(by.array), by.names)
        fixed = Named(without_gradient(by.array), by.names)
        if (base := with_scaled_outputs(base, fixed)) is None:
            return None
        q = q.times(fixed)
    x, base, p, q = (u.split(parts) for u in (met.x, base, p, q))
    how = form.together, form.by_platform
    by = None if by is None else by.split(parts)
    v, kept = eqn.invars[1 - side], (None, ())
    recipe, sources = kept if isinstance(v, Literal) else ctx.again.get(v, kept)
    again = recipe and _Again(recipe, x.names, x.array.shape)
    seed = seed_of(w, ctx.salt)
    return _InForm(spec, *how, x, base, p, q, by, seed, out.shape, again, sources)


def _can_drop(form: Form, met: _Meeting) -> bool:
    """Whether a form can have another x for the low-rank term."""
    rounded = {form.forward, form.backward} & ROUNDED
    return not rounded and met.w.output_scale is None


def _can_scale(by: Named, met: _Meeting, dtype: Any) -> bool:
    """Whether an output scale meets the result, and the result can hold it."""
    meets_y = {*by.names} <= {*met.y} and not {*by.names} <= {*met.x.names}
    return meets_y and float(jnp.finfo(dtype).tiny) < 1e-37


def _divided(ctx: Context, eqn: Eqn, met: _Meeting, side: int) -> dict[Name, Sizes]:
    """What reshapes beside a product divide W's axes into: heads."""
    y, x = eqn.outvars[0], eqn.invars[1 - side]
    found: dict[Name, Sizes] = {}
    for v, names in ((y, met.y), (x, met.x.names)):
        if not isinstance(v, Literal) and (shape := ctx.reshapes.get(v)):
            parts = divided([(n, met.sizes[n]) for n in names], shape)
            found |= {n: parts[n] for n in parts if n in met.w.names}
    return found


# Traced, differentiated and transposed once for all layers that are alike.
_products = jax.jit(products, static_argnums=(0, 1), inline=INLINE)
_by_platform = jax.jit(by_platform.products, static_argnums=0, inline=INLINE)


def _computed(found: Sequence[_InForm]) -> list[Any]:
    """The products, all of one x."""
    each = tuple(one.spec for one in found)
    fields = ((one.w, one.p, one.q, one.seed) for one in found)
    ws, ps, qs, seeds = zip(*fields, strict=True)
    first = found[0]
    ys: Any
    if first.by_platform:
        ys = _by_platform(each, first.x, ws, ps, qs, seeds)
    else:
        ys = _products(each, first.again, first.x, first.sources, ws, ps, qs, seeds)
    return [one.result(y) for y, one in zip(ys, found, strict=True)]


def together(
    each: Sequence[Context], eqns: Sequence[Eqn], values: Sequence[Any]
) -> list[Any]:
    """Products of the same activations, as far as they can be computed at once.

    Args:
      each: the contexts.
      eqns: the equations.
      values: `(lhs, rhs)` of each.

    Returns:
      The results; `None` for each product that is to be computed alone.
    """
    found: dict[int, _InForm] = {}
    given = zip(each, eqns, values, strict=True)
    for i, (ctx, eqn, (lhs, rhs)) in enumerate(given):
        side = int(isinstance(rhs, Factored))
        w, x = ((lhs, rhs), (rhs, lhs))[side]
        if isinstance(w, Factored) and not isinstance(x, Factored):
            one = _in_form(ctx, eqn, x, w, side)
            if one and one.together:
                found[i] = one
    if found:
        first, *_ = found.values()
        like = first.spec, first.p
        found = {i: x for i, x in found.items() if alike(like, (x.spec, x.p))}
    results: list[Any] = [None] * len(eqns)
    if len(found) < 2:
        return results
    scopes = relative_scopes([eqns[i] for i in found])
    scoped = [
        dataclasses.replace(x, spec=dataclasses.replace(x.spec, scope=scope))
        for x, scope in zip(found.values(), scopes, strict=True)
    ]
    for i, y in zip(found, _computed(scoped), strict=True):
        results[i] = y
    return results
