"""Rules for functions inside the function: rebuilt with JAX's public transforms."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora import _compat
from flora._errors import Unfactorable
from flora._factored import (
    RANK,
    Dim,
    Factored,
    flattened,
    is_lazy,
    per_dim,
    views,
)
from flora._forms import Labelled, contract
from flora._interpreter import Context, interpret, settle
from flora._trace import filled


def jit(ctx: Context, eqn: Any, *args: Any) -> Any:
    """An inner jit keeps its name, shardings and options."""
    inner = eqn.params["jaxpr"]

    def fn(*args: Any) -> list[Any]:
        return _constrained(interpret(ctx, inner, args), eqn.params["out_shardings"])

    placed = _constrained(args, eqn.params["in_shardings"])
    if ctx.log is not None:  # what is recorded names each caller's leaves
        outs = _compat.jit_like(eqn, fn)(*placed)
    else:
        salt = ctx.salt if _keyed(args) else None
        key = (id(inner), eqn.params["name"], eqn.params["out_shardings"], salt)
        outs = ctx.jitted.setdefault(key, _compat.jit_like(eqn, fn))(*placed)
    return _handed_on(inner, args, outs)


def _handed_on(jaxpr: Any, args: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """The outputs, where a weight that came out as it went in is the very same."""
    return [
        x if i is None or not is_lazy(args[i]) else args[i]
        for x, i in zip(outs, _compat.handed_on(jaxpr), strict=True)
    ]


def _keyed(args: Sequence[Any]) -> bool:
    """Whether any weight has dropout keys."""
    return any(isinstance(x, Factored) and x.key is not None for x in args)


def _constrained(values: Sequence[Any], shardings: Any) -> list[Any]:
    def constrain(x: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return x
        if not isinstance(x, Factored):
            return lax.with_sharding_constraint(x, sharding)
        if x.base is None:
            return x
        return dataclasses.replace(
            x, base=lax.with_sharding_constraint(x.base, sharding)
        )

    return [constrain(x, s) for x, s in zip(values, shardings, strict=True)]


def remat(ctx: Context, eqn: Any, *args: Any) -> Any:
    p = eqn.params

    def fn(*args: Any) -> list[Any]:
        return interpret(ctx, p["jaxpr"], args)

    outs = jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)
    return _handed_on(p["jaxpr"], args, outs)


def scan(ctx: Context, eqn: Any, *args: Any) -> Any:
    """Weights are constants of the loop, or stacks of which each step takes a slice."""
    parts = _compat.scan_parts(eqn)
    first = parts.num_consts
    last = first + parts.num_carry
    consts, init, xs = list(args[:first]), list(args[first:last]), list(args[last:])
    inner, _ = _compat.open_jaxpr(parts.jaxpr)
    fixed = _loop_invariant(
        ctx, eqn, init, inner.invars[first:last], inner.outvars[: parts.num_carry]
    )
    slots = [_scanned(ctx, eqn, x) for x in xs]

    def body(carry: Any, step: Any) -> Any:
        i, state = carry
        weights = [_at_step(w, i) for w in consts]
        rows = [
            _at_step(rebuild(x), i) for (_, rebuild), x in zip(slots, step, strict=True)
        ]
        state = _restored(fixed, state, i)
        outs = interpret(ctx, parts.jaxpr, [*weights, *state, *rows])
        state, ys = outs[: parts.num_carry], outs[parts.num_carry :]
        ys = [settle(ctx, eqn, y, "a weight as a loop's output") for y in ys]
        return (None if i is None else i + 1, _carried(ctx, eqn, fixed, state)), ys

    start = jnp.int32(0) if _keyed(args) else None
    init = _carried(ctx, eqn, fixed, init)
    (_, state), ys = lax.scan(
        body, (start, init), [x for x, _ in slots], **parts.options
    )
    return [fixed.get(k, x) for k, x in enumerate(state)] + ys


def while_(ctx: Context, eqn: Any, *args: Any) -> Any:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    init = list(args[n_cond + n_body :])
    inner, _ = _compat.open_jaxpr(p["body_jaxpr"])
    fixed = _loop_invariant(ctx, eqn, init, inner.invars[n_body:], inner.outvars)

    def cond(carry: Any) -> Any:
        i, state = carry
        weights = [_at_step(w, i) for w in cond_consts]
        state = _restored(fixed, state, i)
        (go,) = interpret(ctx, p["cond_jaxpr"], [*weights, *state])
        return go

    def body(carry: Any) -> Any:
        i, state = carry
        weights = [_at_step(w, i) for w in body_consts]
        state = _restored(fixed, state, i)
        outs = interpret(ctx, p["body_jaxpr"], [*weights, *state])
        return None if i is None else i + 1, _carried(ctx, eqn, fixed, outs)

    start = jnp.int32(0) if _keyed(args) else None
    init = _carried(ctx, eqn, fixed, init)
    _, state = lax.while_loop(cond, body, (start, init))
    return [fixed.get(k, x) for k, x in enumerate(state)]


def cond(ctx: Context, eqn: Any, index: Any, *args: Any) -> Any:
    index = settle(ctx, eqn, index, "a weight as a branch index")

    def branch(jaxpr: Any) -> Callable:
        def fn(*args: Any) -> list[Any]:
            outs = interpret(ctx, jaxpr, args)
            return [settle(ctx, eqn, x, "a weight as a branch's result") for x in outs]

        return fn

    branches = [branch(b) for b in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, *args)
    default = None
    of_platform = {}
    for names, fn in zip(platforms, branches, strict=True):
        if names is None:
            default = fn
        of_platform |= {name: fn for name in names or ()}
    return lax.platform_dependent(*args, default=default, **of_platform)


def _loop_invariant(
    ctx: Context, eqn: Any, init: list[Any], ins: Any, outs: Any
) -> dict[int, Factored]:
    """The carried weights that every step hands on unchanged; others settle."""
    fixed = {}
    for k, x in enumerate(init):
        if isinstance(x, Factored):
            if ins[k] is outs[k]:
                fixed[k] = x
            else:
                init[k] = settle(ctx, eqn, x, "a weight that a loop changes")
    return fixed


def _carried(
    ctx: Context, eqn: Any, fixed: dict[int, Factored], values: Sequence[Any]
) -> list[Any]:
    """What a loop carries: arrays, and `None` for weights that no step changes."""
    return [
        None if k in fixed else settle(ctx, eqn, x, "a weight as a loop's result")
        for k, x in enumerate(values)
    ]


def _restored(fixed: dict[int, Factored], state: Sequence[Any], i: Any) -> list[Any]:
    """The carried values of step i, with those weights in their places."""
    return [_at_step(fixed[k], i) if k in fixed else x for k, x in enumerate(state)]


def _scanned(ctx: Context, eqn: Any, w: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What `lax.scan` slices, and how a step puts its slice together again."""
    if not isinstance(w, Factored):
        return w, lambda x: x
    ctx.claim(w, eqn, {0: "stack"}, firm=False)
    if len(w.axes[0]) > 1:
        w = flattened(w, [0])
    (dim,) = w.axes[0] or (Dim((), 1),)
    leading = per_dim(w, w.base, w.axes, lambda array, at: _to_front(array, at, dim))
    held = {
        name
        for name, roles in (
            ("a", ("stack", "in")),
            ("b", ("stack", "out")),
            ("key", ("stack",)),
        )
        if dim in w.dims(*roles) and getattr(w, name) is not None
    }
    sliced = {"base": w.base} | {name: getattr(leading, name) for name in held}

    def rebuild(step: dict[str, Any]) -> Factored:
        return dataclasses.replace(w, axes=w.axes[1:], **step)

    return sliced, rebuild


def _to_front(array: Any, at: dict[int, Dim], dim: Dim) -> Any:
    where = [i for i, d in at.items() if d == dim]
    return jnp.moveaxis(array, where[0], 0) if where else array


def _at_step(w: Any, i: Any) -> Any:
    """Every step of a loop draws its own dropout mask."""
    if not isinstance(w, Factored) or w.key is None:
        return w
    keys = w.key.reshape(-1)
    folded = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys).reshape(w.key.shape)
    return dataclasses.replace(w, key=folded)


def custom_jvp_call(ctx: Context, eqn: Any, *args: Any) -> Any:
    """The user's rule at W, along the tangent scale (dA B + A dB)."""
    jaxpr = eqn.params["call_jaxpr"]
    if ctx.log is not None:
        return interpret(ctx, jaxpr, args)
    if _keyed(args):
        raise Unfactorable("dropout in a function with a derivative of its own")
    flat, tree = jax.tree.flatten(args)

    @jax.custom_jvp
    def call(*flat: Any) -> list[Any]:
        outs = interpret(ctx, jaxpr, jax.tree.unflatten(tree, flat))
        return [settle(ctx, eqn, x, "a weight as the result") for x in outs]

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        args = jax.tree.unflatten(tree, primals)
        moved = jax.tree.unflatten(tree, tangents)
        at = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]

        def both(primals: Any, tangents: Any) -> Any:
            def fn(*some: Any) -> Any:
                return _compat.eval_eqn(eqn, filled(primals, at, some))

            return jax.jvp(fn, [primals[i] for i in at], tangents)

        like = _examples(args, eqn.invars)
        rule = jax.make_jaxpr(both)(like, [like[i] for i in at])

        def along(part: Callable[[Any, Any], Any]) -> list[Any]:
            outs = interpret(ctx, rule, [*args, *(part(args[i], moved[i]) for i in at)])
            return [settle(ctx, eqn, x, "a weight as the result") for x in outs]

        # Linear in the tangents, so that it can be transposed: dA B first, then A dB.
        first, second = along(_along_a), along(_along_b)
        n = len(eqn.outvars)
        rest = zip(first[n:], second[n:], strict=True)
        return first[:n], [jnp.add(dy, more) for dy, more in rest]

    return call(*flat)


def _along_a(x: Any, dx: Any) -> Any:
    if not isinstance(x, Factored):
        return dx
    return dataclasses.replace(x, base=None, a=dx.a, key=None)


def _along_b(x: Any, dx: Any) -> Any:
    if not isinstance(x, Factored):
        return jnp.zeros_like(dx)
    return dataclasses.replace(x, base=None, b=dx.b, key=None)


def custom_vjp_call(ctx: Context, eqn: Any, *args: Any) -> Any:
    """The user's forward and backward, whose dW becomes dA and dB."""
    jaxpr = eqn.params["call_jaxpr"]
    if ctx.log is not None:
        return interpret(ctx, jaxpr, args)
    if _keyed(args):
        raise Unfactorable("dropout in a function with a derivative of its own")
    flat, tree = jax.tree.flatten(args)
    at = [i for i, v in enumerate(eqn.invars) if _differentiable(v.aval)]
    pullback: list[Any] = []

    def forward(*full: Any) -> Any:
        def fn(*some: Any) -> Any:
            return _compat.eval_eqn(eqn, filled(full, at, some))

        outs, vjp = jax.vjp(fn, *(full[i] for i in at))
        residuals, vjp_tree = jax.tree.flatten(vjp)
        pullback[:] = [vjp_tree]
        return outs, residuals

    @jax.custom_vjp
    def call(*flat: Any) -> list[Any]:
        outs = interpret(ctx, jaxpr, jax.tree.unflatten(tree, flat))
        return [settle(ctx, eqn, x, "a weight as the result") for x in outs]

    def fwd(*flat: Any) -> Any:
        args = jax.tree.unflatten(tree, flat)
        outs = interpret(
            ctx, jax.make_jaxpr(forward)(*_examples(args, eqn.invars)), args
        )
        n = len(eqn.outvars)
        ys = [settle(ctx, eqn, x, "a weight as the result") for x in outs[:n]]
        return ys, (outs[n:], args)

    def bwd(saved: Any, cotangents: Any) -> Any:
        residuals, args = saved
        (vjp_tree,) = pullback
        like = [r.base if isinstance(r, Factored) else r for r in residuals]
        rule = jax.make_jaxpr(lambda res, cts: jax.tree.unflatten(vjp_tree, res)(cts))(
            like, _examples(cotangents, eqn.outvars)
        )
        grads = interpret(ctx, rule, [*residuals, *cotangents])
        grads = [settle(ctx, eqn, g, "a weight as a gradient") for g in grads]
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

    def inner(a: Any, b: Any) -> Any:
        v = views(dataclasses.replace(x, a=a, b=b), "w")
        pairs = [pair for axis in v.segments for pair in axis]
        labels = [label for label, _ in pairs]
        dw = Labelled(g.astype(a.dtype).reshape([n for _, n in pairs]), labels)
        kept = [n for n in labels if n in v.b_labels] + [RANK]
        z = contract(dw, Labelled(v.a, v.a_labels), kept)
        return x.site.scale * jnp.sum(contract(z, Labelled(v.b, v.b_labels), []).array)

    da, db = jax.grad(inner, (0, 1))(x.a, x.b)
    return [
        *([] if x.base is None else [None]),
        da,
        db,
        *([] if x.key is None else [None]),
    ]


def _examples(values: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """What to trace with in the place of values.

    Real arrays where there are any: inside `shard_map` their types say more than shapes.
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
