"""The rule for `ragged_dot`: mixtures of experts whose tokens are sorted by expert."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.factored import Factored
from flora._algebra.low_rank import (
    between_factors,
    compute_dtype_of,
    drop,
    with_columns,
)
from flora._algebra.views import RANK, views
from flora._trace.compat import eval_eqn
from flora._tree.errors import Unfactorable


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
    if w.columns is not None:
        return [_on_columns(ctx, eqn, x, w, rest, (g, n))]
    change = _change(ctx, eqn, x, w, rest[0], (g, k, n))
    return [change if base is None else base + change]


def _on_columns(ctx: Any, eqn: Any, x: Any, w: Factored, rest: Any, axes: Any) -> Any:
    """A ragged product whose columns are scaled, by each expert's own or all alike."""
    g, n = (("w", axis, 0) for axis in axes)
    v = views(w, "w")
    if g in v.column_labels:  # as a product: each token takes its expert's
        order = [v.column_labels.index(label) for label in (g, n)]
        of_experts = lax.transpose(v.columns, order)[:, None, :]
        ones = jnp.ones((x.shape[0], 1), v.columns.dtype)
        columns = lax.ragged_dot(
            ones,
            of_experts,
            rest[0],
            precision=lax.Precision.HIGHEST,
            group_offset=eqn.params["group_offset"],
        )
        v = dataclasses.replace(v, columns=columns, b_labels=("t", n))

    def run(w: Factored, x: Any) -> Any:
        x = x.astype(eqn.invars[0].aval.dtype)
        return ragged_dot_general(ctx, eqn, x, w, *rest)[0]

    out = [("t", x.shape[0]), (n, w.shape[axes[1]])]
    return with_columns(w, x, ctx.salt, run, out, v)


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
    z = between_factors(w, z, ("t", RANK))
    y = times(z * jnp.asarray(w.site.scale, dtype), *factors[1], (RANK, n))
    return y.astype(out.dtype)
