"""The rule for `ragged_dot`: mixtures of experts whose tokens are sorted by expert."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._compat import eval_eqn
from flora._errors import Unfactorable
from flora._factored import Factored
from flora._forms import compute_dtype_of, drop
from flora._views import RANK, views


def ragged_dot_general(ctx: Any, eqn: Any, x: Any, w: Any, *rest: Any) -> list[Any]:
    """y[t] = x[t] W[g] + scale (x[t] A[g]) B[g] for token t of group g.

    The layout says which factors an expert has of its own: with the expert axis in
    `stack` both (what is discovered), in `in_` only A, in `out` only B.
    """
    if isinstance(x, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as the tokens of a ragged product")
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (summed_x, summed), batch = dims.dot_dimension_numbers
    group = dims.rhs_group_dimensions
    if (
        (len(x.shape), len(w.axes), any(batch)) != (2, 3, False)
        or list(summed_x) != [1]
        or list(dims.lhs_ragged_dimensions) != [0]
        or len(group) != 1
    ):
        raise Unfactorable("a ragged product with batch or other ragged axes")
    (k,), (g,) = summed, group
    n = 3 - k - g
    ctx.claim(w, eqn, {g: "stack", k: "in", n: "out"})
    base = None if w.base is None else eval_eqn(eqn, [x, w.base, *rest])[0]
    if w.a is None:
        return [base]
    change = _change(ctx, eqn, x, w, rest[0], (g, k, n))
    return [change if base is None else base + change]


def _change(ctx: Any, eqn: Any, x: Any, w: Factored, sizes: Any, axes: Any) -> Any:
    g, k, n = (("w", axis, 0) for axis in axes)
    v, out = views(w, "w"), eqn.outvars[0].aval
    if any(len(s) > 1 for s in v.segments):
        raise Unfactorable("a ragged product with joined axes")
    dtype = compute_dtype_of(x.dtype, out.dtype)
    factors = [(v.a, v.a_labels), (v.b, v.b_labels)]
    if g not in (*v.a_labels, *v.b_labels):  # an axis of size 1 that W gained
        factors[0] = (v.a[None], (g, *v.a_labels))
    if k in v.b_labels:  # in and out are called the other way round
        factors.reverse()
    if k not in factors[0][1] or n not in factors[1][1]:
        raise Unfactorable("a ragged product across the axes of the weight's layout")

    def times(x: Any, factor: Any, labels: Any, ends: tuple[Any, Any]) -> Any:
        order = (g, *ends) if g in labels else ends
        factor = lax.transpose(factor, [labels.index(label) for label in order])
        if g in labels:
            return lax.ragged_dot(
                x,
                factor.astype(dtype),
                sizes,
                precision=eqn.params["precision"],
                group_offset=eqn.params["group_offset"],
            )
        return jnp.dot(x, factor.astype(dtype), precision=eqn.params["precision"])

    z = times(drop(x, w, ctx.salt).astype(dtype), *factors[0], (k, RANK))
    y = times(z * jnp.asarray(w.site.scale, dtype), *factors[1], (RANK, n))
    return y.astype(out.dtype)
