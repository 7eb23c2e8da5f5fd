"""The rule for `ragged_dot`: mixtures of experts whose tokens are sorted by expert."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import RANK, Factored, Name, Named, fused
from flora._algebra.low_rank import compute_dtype_of, on_hidden, sum_dtype, with_cast
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import Context
from flora._trace.rules.product import Operation, Scaling, multiplied
from flora._tree.errors import Unfactorable


def ragged_dot_general(ctx: Context, eqn: Eqn, x: Any, w: Any, *rest: Any) -> list[Any]:
    """y[t] = x[t] W[g] + scale (x[t] A[g]) B[g] for token t of group g.

    The layout says which factors an expert has of its own: with the expert axis in
    `stack` both (what is discovered), in `in_` only A, in `out` only B.
    """
    if not isinstance(x, Factored) and not isinstance(w, Factored):
        return [_without_weights(ctx, eqn, x, w, *rest)]
    if isinstance(x, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as the tokens of a ragged product")
    g, k, n = axes = _axes(eqn, x, w)
    ctx.claim(w, eqn, {g: "stack", k: "in", n: "out"})
    w = fused(w) if w.factors else w
    if w.factors and any(len(axis) > 1 for axis in w.axes):
        raise Unfactorable("a ragged product with joined axes")
    names = [w.axes[i][0].name if w.axes[i] else f"new{i}" for i in axes]
    operation = Operation(eqn, _change, _scaling, 1, *names, ctx.ragged_dot)
    return [multiplied(ctx, operation, w, x, *rest)]


def _scaling(operation: Operation, w: Factored, x: Any, *rest: Any) -> Scaling:
    """Where experts have scales of their own, each token takes its expert's."""
    eqn, (g, _, n, _) = operation.eqn, operation.static
    y = [("tokens", x.shape[0]), (n, eqn.outvars[0].aval.shape[1])]
    by = w.factors["scale"]
    if g not in by.names or not {*by.names} <= {g, n}:
        return Scaling(by, y)
    of_tokens = lax.ragged_dot(
        jnp.ones((x.shape[0], 1), by.dtype),
        by.aligned((g, "one", n)),
        rest[0],
        precision=lax.Precision.HIGHEST,
        group_offset=eqn.params["group_offset"],
    )
    names = ("tokens", n) if n in by.names else ("tokens", "one")
    return Scaling(Named(of_tokens, names).summed(["one"]), y)


def _without_weights(ctx: Context, eqn: Eqn, x: Any, w: Any, *rest: Any) -> Any:
    """A product of arrays, as the context computes them."""
    p = eqn.params
    usual = jax.make_jaxpr(lax.ragged_dot)(x, w, rest[0]).eqns[-1].params
    if p["ragged_dot_dimension_numbers"] != usual["ragged_dot_dimension_numbers"]:
        return eval_eqn(eqn, [x, w, *rest])[0]
    return ctx.ragged_dot(
        x,
        w,
        *rest,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
        group_offset=p["group_offset"],
    )


def _axes(eqn: Eqn, x: Any, w: Factored) -> tuple[int, int, int]:
    """W's axes of groups, inputs and outputs."""
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
    return group[0], summed[0], 3 - summed[0] - group[0]


def _change(operation: Operation, w: Factored, x: Any, sizes: Any, *offset: Any) -> Any:
    """Scale (x A) B, each product ragged where its factor is an expert's own."""
    (g, k, n, ragged_dot), eqn = operation.static, operation.eqn
    aval = eqn.outvars[0].aval
    dtype = compute_dtype_of(x.dtype, aval.dtype)
    first, second = w.a, w.b
    if g not in (*first.names, *second.names):  # an axis of length 1 that W gained
        first = first.repeated(g, 1)
    if k in second.names:  # in and out are called the other way round
        first, second = second, first
    if k not in first.names or n not in second.names:
        raise Unfactorable("a ragged product across the axes of the weight's layout")
    precision = eqn.params["precision"]

    def times(ends: tuple[Name, Name], x: Any, factor: Named) -> Any:
        array = factor.ordered((g, *ends)).astype(dtype)
        if g not in factor.names:
            return jnp.dot(x, array, precision=precision)
        offset = eqn.params["group_offset"]
        return ragged_dot(x, array, sizes, precision=precision, group_offset=offset)

    z = with_cast(functools.partial(times, (k, RANK)), x, first, dtype)
    z = on_hidden(w, Named(z, ("tokens", RANK))).array
    y = times((RANK, n), z * jnp.asarray(w.settings.scale, dtype), second)
    return y.astype(sum_dtype(aval.dtype))
