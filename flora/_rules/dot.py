"""The rule for `dot_general`: einsum, matmul, Dense, attention, attend."""

import math
from typing import Any

from jax import lax

from flora._compat import eval_eqn
from flora._factored import Factored
from flora._forms import drop, low_rank_product, relabel
from flora._views import views


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
        terms = lhs.base is not None and _product(ctx, eqn, lhs.base, rhs)
        w, x, side = lhs, rhs, 0
    elif isinstance(rhs, Factored):
        terms = rhs.base is not None and eval_eqn(eqn, [lhs, rhs.base])[0]
        w, x, side = rhs, lhs, 1
    else:
        return eval_eqn(eqn, [lhs, rhs])[0]
    if w.a is None:
        return terms
    change = _change(eqn, drop(x, w, ctx.salt), w, side)
    return change if terms is False else terms + change


def _change(eqn: Any, x: Any, w: Factored, side: int) -> Any:
    """What scale A B adds to the product; x stands on the side that W does not."""
    (summed, batch), out_shape = (
        eqn.params["dimension_numbers"],
        eqn.outvars[0].aval.shape,
    )
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
    y = low_rank_product(
        relabel(x, x_segments),
        w,
        w_views,
        [label for s in result for label, _ in s],
        precision=eqn.params["precision"],
        dtype=eqn.outvars[0].aval.dtype,
    )
    return lax.reshape(y, out_shape)
