"""Rules for functions with derivatives of their own."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import (
    RANK,
    Factored,
    Named,
    require_linear,
    require_no_output_scale,
)
from flora._algebra.low_rank import contract, sizes_of
from flora._trace import compat
from flora._trace.compat import Eqn, P
from flora._trace.interpret import Context, densify, interpret
from flora._trace.rules.control import keyed
from flora._trace.stage import filled
from flora._tree.errors import LoraError, Unfactorable


def _computing(rule: Callable) -> Callable:
    """While uses are recorded, a function counts as what it computes."""

    @functools.wraps(rule)
    def run(ctx: Context, eqn: Eqn, *args: Any) -> Any:
        if ctx.log is not None:
            if eqn.primitive is P.custom_vjp_call:  # dA and dB are found from its dW
                for x in args:
                    if isinstance(x, Factored) and not (x.indexed or x.reduced):
                        ctx.note_gradient(x, eqn, "its own derivative forms dW")
            return interpret(ctx, eqn.params["call_jaxpr"], args)
        if ctx.ragged_dot is not lax.ragged_dot and compat.has_experts(eqn):
            raise LoraError(
                f"'{eqn.primitive.name}' at {ctx.line(eqn)} has products with experts "
                "(ragged_dot) inside a function with a derivative of its own, which no "
                "mixed batch maps. Run its adapters one at a time, by flora.lora."
            )
        if keyed(args):
            raise Unfactorable("dropout in a function with a derivative of its own")
        adapted = [x for x in args if isinstance(x, Factored) and x.factors]
        for x in adapted:
            what = "a function with a derivative of its own"
            require_no_output_scale(x, what)
            require_linear(x, what)
        # A weight without factors is an array like any other.
        args = tuple(
            x.base if isinstance(x, Factored) and not x.factors else x for x in args
        )
        return rule(ctx, eqn, *args) if adapted else compat.eval_eqn(eqn, args)

    return run


@_computing
def custom_jvp_call(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    """The user's rule at W, along the tangent scale (dA B + A dB)."""
    jaxpr = eqn.params["call_jaxpr"]
    flat, tree = jax.tree.flatten(args)

    @jax.custom_jvp
    def call(*flat: Any) -> list[Any]:
        outs = interpret(ctx, jaxpr, jax.tree.unflatten(tree, flat))
        return [densify(ctx, eqn, x, "a weight as the result") for x in outs]

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        args = jax.tree.unflatten(tree, primals)
        moved = jax.tree.unflatten(tree, tangents)
        at = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]

        def both(primals: Any, tangents: Any) -> Any:
            def fn(*some: Any) -> Any:
                return compat.eval_eqn(eqn, filled(primals, at, some))

            return jax.jvp(fn, [primals[i] for i in at], tangents)

        like = _examples(args, eqn.invars)
        rule = jax.make_jaxpr(both)(like, [like[i] for i in at])

        def along(part: Callable[[Any, Any], Any]) -> list[Any]:
            outs = interpret(ctx, rule, [*args, *(part(args[i], moved[i]) for i in at)])
            pairs, what = (
                zip(outs, rule.out_avals, strict=True),
                "a weight as the result",
            )
            return [densify(ctx, eqn, x, what, like) for x, like in pairs]

        # Linear in the tangents, so that it can be transposed: dA B first, then A dB.
        first, second = along(_along_a), along(_along_b)
        n = len(eqn.outvars)
        rest = zip(first[n:], second[n:], strict=True)
        return first[:n], [jnp.add(dy, more) for dy, more in rest]

    return call(*flat)


def _along_a(x: Any, dx: Any) -> Any:
    return _change(x, a=dx.a, b=x.b) if isinstance(x, Factored) else dx


def _along_b(x: Any, dx: Any) -> Any:
    return _change(x, a=x.a, b=dx.b) if isinstance(x, Factored) else jnp.zeros_like(dx)


def _change(x: Factored, **factors: Named) -> Factored:
    return dataclasses.replace(x, base=None, factors=factors)


@_computing
def custom_vjp_call(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    """The user's forward and backward, whose dW becomes dA and dB."""
    jaxpr = eqn.params["call_jaxpr"]
    flat, tree = jax.tree.flatten(args)
    at = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]
    pullback: list[Any] = []

    def forward(*full: Any) -> Any:
        def fn(*some: Any) -> Any:
            return compat.eval_eqn(eqn, filled(full, at, some))

        outs, vjp = jax.vjp(fn, *(full[i] for i in at))
        residuals, vjp_tree = jax.tree.flatten(vjp)
        pullback[:] = [vjp_tree]
        return outs, residuals

    @jax.custom_vjp
    def call(*flat: Any) -> list[Any]:
        outs = interpret(ctx, jaxpr, jax.tree.unflatten(tree, flat))
        return [densify(ctx, eqn, x, "a weight as the result") for x in outs]

    def fwd(*flat: Any) -> Any:
        args = jax.tree.unflatten(tree, flat)
        outs = interpret(
            ctx, jax.make_jaxpr(forward)(*_examples(args, eqn.invars)), args
        )
        n = len(eqn.outvars)
        ys = [densify(ctx, eqn, x, "a weight as the result") for x in outs[:n]]
        return ys, (outs[n:], args)

    def bwd(saved: Any, cotangents: Any) -> Any:
        residuals, args = saved
        (vjp_tree,) = pullback
        like = [r.base if isinstance(r, Factored) else r for r in residuals]
        rule = jax.make_jaxpr(lambda res, cts: jax.tree.unflatten(vjp_tree, res)(cts))(
            like, _examples(cotangents, eqn.outvars)
        )
        grads = interpret(ctx, rule, [*residuals, *cotangents])
        grads = [densify(ctx, eqn, g, "a weight as a gradient") for g in grads]
        of_arg = dict(zip(at, grads, strict=True))
        return tuple(
            ct for i, x in enumerate(args) for ct in _cotangent(x, of_arg.get(i))
        )

    call.defvjp(fwd, bwd)
    return call(*flat)


def _cotangent(x: Any, g: Any) -> list[Any]:
    """The cotangents of x's leaves; dA, dB as the gradient of ⟨dW, scale A B⟩."""
    if not isinstance(x, Factored):
        return [g]

    def inner(factors: Any) -> Any:
        w = dataclasses.replace(x, factors=factors)
        sizes = sizes_of(w)
        dw = g.astype(w.a.array.dtype).reshape([*sizes.values()])
        kept = [n for n in sizes if n in w.b.names] + [RANK]
        z = contract(Named(dw, tuple(sizes)), w.a, kept)
        return w.settings.scale * jnp.sum(contract(z, w.b, []).array)

    found = jax.tree.leaves(jax.grad(inner)(dict(x.factors)))
    return found if x.base is None else [None, *found]


def _examples(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """What to trace with in the place of values.

    Real arrays where there are any: inside `shard_map` their types say more than
    shapes.
    """
    examples = []
    for x, v in zip(values, variables, strict=True):
        array = x.base if isinstance(x, Factored) else x
        if array is None or getattr(array, "dtype", None) != v.aval.dtype:
            array = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        examples.append(array)
    return examples


def _differentiable(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)
