"""The rule for `dot_general`: einsum, matmul, Dense, attention, attend."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._choice import (
    Form,
    Sizes,
    cheapest,
    is_tpu,
    named_form,
    target_kind,
)
from flora._compat import eval_eqn
from flora._factored import Factored
from flora._forms import (
    Labelled,
    compute_dtype_of,
    drop,
    low_rank_product,
    relabel,
    widened,
)
from flora._products import Plan, product
from flora._views import RANK, Views, views


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
    if w.a is not None and not isinstance(x, Factored):
        planned = _planned(eqn, x, w, side)
        if planned is not None:
            return planned
    base = None
    if w.base is not None:
        base = _product(ctx, eqn, *((w.base, x) if side == 0 else (x, w.base)))
    if w.a is None:
        return base
    change = _change(eqn, _named(eqn, drop(x, w, ctx.salt), w, side), w)
    return change if base is None else base + change


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


def _planned(eqn: Any, x: Any, w: Factored, side: int) -> Any:
    """The product in the form that the weight or the device asks for.

    `None` where that is the plain direct one, or no other applies.
    """
    name, out = w.site.form, eqn.outvars[0].aval
    kind = target_kind() if name == "auto" else ""
    # Dropout acts on the low-rank term alone.
    plain = w.base is None or w.key is not None or name == "direct"
    if plain or (name == "auto" and not is_tpu(kind)):
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
    form = cheapest(named.counts(w), kind) if name == "auto" else named_form(name)
    return form and _in_form(eqn, named, ends, w, form)


def _in_form(
    eqn: Any, named: _Named, ends: tuple[Labelled, Labelled], w: Factored, form: Form
) -> Any:
    """X W + scale (x A) B in another form than the plain direct one."""
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
    return lax.reshape(product(plan, named.x.array, base, p.array, scaled), out.shape)
