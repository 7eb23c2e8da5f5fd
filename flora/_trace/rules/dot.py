"""The rule for `dot_general`: einsum, matmul, Dense, attention, attend."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.choice import (
    Form,
    Sizes,
    cheapest,
    may_differ,
    named_form,
    target,
)
from flora._algebra.factored import Factored
from flora._algebra.forms import Plan, alike, products
from flora._algebra.low_rank import (
    Labelled,
    compute_dtype_of,
    drop,
    low_rank_product,
    relabel,
    widened,
    with_columns,
)
from flora._algebra.views import RANK, Views, views
from flora._trace.compat import eval_eqn, relative_scopes
from flora._tree.errors import Unfactorable


def dot_general(ctx: Any, eqn: Any, lhs: Any, rhs: Any) -> list[Any]:
    """Y = x W + scale (x A) B for any dimension numbers and either side.

    With weights on both sides, W₁ W₂ = base₁ W₂ + scale₁ A₁ (B₁ W₂) and so on.
    """
    dims = eqn.params["dimension_numbers"]
    for side, w in enumerate((lhs, rhs)):
        if isinstance(w, Factored):
            other = (lhs, rhs)[1 - side].shape
            free = set(range(len(other))) - {*dims[0][1 - side], *dims[1][1 - side]}
            rows = math.prod(other[i] for i in free)
            ctx.claim(w, eqn, _roles(dims, side, len(w.axes)), rows=rows)
    return [_product(ctx, eqn, lhs, rhs)]


def _roles(dims: Any, side: int, ndim: int) -> dict[int, str]:
    summed, batch = dims[0][side], dims[1][side]
    return {
        i: "in" if i in summed else "stack" if i in batch else "out"
        for i in range(ndim)
    }


def _product(ctx: Any, eqn: Any, lhs: Any, rhs: Any) -> Any:
    if isinstance(lhs, Factored):
        w, x, side = lhs, rhs, 0
    elif isinstance(rhs, Factored):
        w, x, side = rhs, lhs, 1
    else:
        return eval_eqn(eqn, [lhs, rhs])[0]
    if w.columns is not None:
        return _on_columns(ctx, eqn, x, w, side)
    if w.a is not None and not isinstance(x, Factored):
        planned = _planned(eqn, x, w, side)
        if planned is not None:
            return _computed([planned])[0]
    base = None
    if w.base is not None:
        base = _product(ctx, eqn, *((w.base, x) if side == 0 else (x, w.base)))
    if w.a is None:
        return base
    change = _change(eqn, _named(eqn, drop(x, w, ctx.salt), w, side), w)
    return change if base is None else base + change


def _on_columns(ctx: Any, eqn: Any, x: Any, w: Factored, side: int) -> Any:
    """A product whose columns are scaled."""
    if isinstance(x, Factored):
        raise Unfactorable("a product of two weights, of which one has scaled columns")
    named = _named(eqn, x, w, side)

    def run(w: Factored, x: Any) -> Any:
        x = x.astype(eqn.invars[1 - side].aval.dtype)
        return _product(ctx, eqn, *((w, x) if side == 0 else (x, w)))

    out, x_axes = (
        [(label, named.sizes[label]) for label in labels]
        for labels in (named.out, named.x.labels)
    )
    return with_columns(w, x, ctx.salt, run, out, x_axes=x_axes)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A product with one label an axis.

    Attributes:
      x: the operand that is not the weight.
      w: the labelled factors of W.
      out: labels of the result.
    """

    x: Labelled
    w: Views
    out: tuple[Any, ...]

    @property
    def w_labels(self) -> tuple[Any, ...]:
        return tuple(label for runs in self.w.segments for label, _ in runs)

    @property
    def sizes(self) -> dict[Any, int]:
        runs = [run for runs in self.w.segments for run in runs]
        return self.x.sizes | dict(runs)

    def count(self, labels: Any) -> int:
        return math.prod(self.sizes[n] for n in labels)

    def counts(self, w: Factored) -> Sizes:
        """How many tokens, inputs and outputs there are."""
        held, x = self.w_labels, self.x.labels
        return Sizes(
            tokens=self.count(n for n in x if n not in held),
            in_=self.count(self.summed),
            out=self.count(n for n in held if n not in x),
            rank=w.a.shape[-1],
            sliced=w.site.sliced,
        )

    @property
    def summed(self) -> tuple[Any, ...]:
        return tuple(n for n in self.w_labels if n not in self.out)


def _named(eqn: Any, x: Any, w: Factored, side: int) -> _Named:
    """The labels of a product; x stands on the side that W does not."""
    summed, batch = eqn.params["dimension_numbers"]
    w_views = views(w, "w")
    met = dict(
        zip(
            (*summed[1 - side], *batch[1 - side]),
            (*summed[side], *batch[side]),
            strict=True,
        )
    )
    x_segments = [
        w_views.segments[met[i]] if i in met else (((("x", i), 0), size),)
        for i, size in enumerate(x.shape)
    ]
    segments = (
        [w_views.segments, x_segments] if side == 0 else [x_segments, w_views.segments]
    )
    result = [segments[0][i] for i in batch[0]]
    for k in (0, 1):
        gone = {*summed[k], *batch[k]}
        result += [s for i, s in enumerate(segments[k]) if i not in gone]
    out = tuple(label for s in result for label, _ in s)
    return _Named(relabel(x, x_segments), w_views, out)


def _change(eqn: Any, named: _Named, w: Factored) -> Any:
    """What scale A B adds to the product."""
    y = low_rank_product(
        named.x,
        w,
        named.w,
        named.out,
        precision=eqn.params["precision"],
        dtype=eqn.outvars[0].aval.dtype,
    )
    return lax.reshape(y, eqn.outvars[0].aval.shape)


def _ends(named: _Named) -> tuple[Labelled, Labelled] | None:
    """`(P, Q)`: the factor with all axes that are summed over, and that with the rest.

    `None` if the factors divide W's axes in another way.
    """
    a = Labelled(named.w.a, named.w.a_labels)
    b = Labelled(named.w.b, named.w.b_labels)
    stack = {*a.labels} & {*b.labels} - {RANK}
    shared = {n for n in named.w_labels if n in named.x.labels}
    summed, kept = {*named.summed}, {n for n in named.w_labels if n not in shared}
    if stack != shared - summed:
        return None
    for p, q in ((a, b), (b, a)):
        ends = {*p.labels} - {*stack, RANK}, {*q.labels} - {*stack, RANK}
        if ends == (summed, kept):
            return p, q
    return None


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A product in another form than the plain direct one.

    Attributes:
      plan: what is static.
      together: whether it may be computed with others.
      x, w, p, q: the operands, with the axes that the plan says.
      shape: of the result.
    """

    plan: Plan
    together: bool
    x: Any
    w: Any
    p: Any
    q: Any
    shape: tuple[int, ...]


def _planned(eqn: Any, x: Any, w: Factored, side: int) -> _Planned | None:
    """The product in the form that the weight or the device asks for.

    `None` where that is the plain direct one, or no other applies.
    """
    out = eqn.outvars[0].aval
    # Dropout acts on the low-rank term alone.
    if w.base is None or w.key is not None or not may_differ(w.site.form):
        return None
    if w.columns is not None or w.site.between is not None:
        return None
    named = _named(eqn, x, w, side)
    ends, mesh = _ends(named), jax.sharding.get_abstract_mesh()
    if (
        ends is None
        or x.dtype != compute_dtype_of(x.dtype, out.dtype)
        or jnp.issubdtype(out.dtype, jnp.complexfloating)
        or (not mesh.empty and (mesh.manual_axes or mesh.explicit_axes))
    ):
        return None
    if w.site.form == "auto":
        form = cheapest(named.counts(w), target())
    else:
        form = named_form(w.site.form)
    return form and _in_form(eqn, named, ends, w, form)


def _in_form(
    eqn: Any, named: _Named, ends: tuple[Labelled, Labelled], w: Factored, form: Form
) -> _Planned:
    """X W + scale (x A) B, ready to be computed."""
    (p, q), out = ends, eqn.outvars[0].aval
    plan = Plan(
        form.forward,
        form.backward,
        tuple(named.x.labels),
        named.w_labels,
        tuple(p.labels),
        tuple(q.labels),
        named.out,
        out.dtype,
        eqn.params["precision"],
    )
    base = lax.reshape(w.base, [named.sizes[n] for n in named.w_labels])
    scaled = widened(q.array, named.x.array) * w.site.scale
    return _Planned(
        plan, form.together, named.x.array, base, p.array, scaled, out.shape
    )


def _computed(planned: Sequence[_Planned]) -> list[Any]:
    """The products, all of one x."""
    plans = tuple(each.plan for each in planned)
    ws, ps, qs = zip(*((each.w, each.p, each.q) for each in planned), strict=True)
    ys: Any = products(plans, planned[0].x, ws, ps, qs)
    return [lax.reshape(y, e.shape) for y, e in zip(ys, planned, strict=True)]


def together(eqns: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Products of the same activations, as far as they can be computed at once.

    Args:
      eqns: the equations.
      values: `(lhs, rhs)` of each.

    Returns:
      The results; `None` for each product that is to be computed alone.
    """
    found: dict[int, _Planned] = {}
    for i, (eqn, (lhs, rhs)) in enumerate(zip(eqns, values, strict=True)):
        side = int(isinstance(rhs, Factored))
        w, x = ((lhs, rhs), (rhs, lhs))[side]
        if isinstance(w, Factored) and w.a is not None and not isinstance(x, Factored):
            planned = _planned(eqn, x, w, side)
            if planned and planned.together:
                found[i] = planned
    first = next(iter(found.values()), None)
    found = {i: p for i, p in found.items() if first and alike(first.plan, p.plan)}
    results: list[Any] = [None] * len(eqns)
    if len(found) < 2:
        return results
    scopes = relative_scopes([eqns[i] for i in found])
    named = [
        dataclasses.replace(p, plan=dataclasses.replace(p.plan, scope=scope))
        for p, scope in zip(found.values(), scopes, strict=True)
    ]
    for i, y in zip(found, _computed(named), strict=True):
        results[i] = y
    return results
