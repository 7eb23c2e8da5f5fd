"""Rules for functions inside the function: rebuilt with JAX's public transforms."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import Axis, Factored, Named, fused, is_lazy
from flora._trace import compat
from flora._trace.compat import Eqn
from flora._trace.dequantize import in_slices
from flora._trace.interpret import Context, densify, interpret
from flora._tree.quantized import is_quantized


def jit(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    """An inner jit keeps its name, shardings and options."""
    inner = eqn.params["jaxpr"]

    def fn(*args: Any) -> list[Any]:
        return _constrained(interpret(ctx, inner, args), eqn.params["out_shardings"])

    placed = _constrained(args, eqn.params["in_shardings"])
    if ctx.log is not None:  # what is recorded names each caller's leaves
        outs = compat.jit_like(eqn, fn)(*placed)
    else:
        salt = ctx.salt if keyed(args) else None
        key = (id(inner), eqn.params["name"], eqn.params["out_shardings"], salt)
        outs = ctx.jitted.setdefault(key, compat.jit_like(eqn, fn))(*placed)
    return _handed_on(inner, args, outs)


def _handed_on(jaxpr: Any, args: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """The outputs, where a weight that came out as it went in is the very same."""
    if not any(is_lazy(x) for x in outs):
        return list(outs)
    return [
        x if i is None or not is_lazy(args[i]) else args[i]
        for x, i in zip(outs, compat.handed_on(jaxpr), strict=True)
    ]


def keyed(args: Sequence[Any]) -> bool:
    """Whether any weight has dropout keys."""
    return any(isinstance(x, Factored) and x.key is not None for x in args)


def _constrained(values: Sequence[Any], shardings: Any) -> list[Any]:
    def constrain(x: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return x
        if not isinstance(x, Factored):
            return lax.with_sharding_constraint(x, sharding)
        if x.base is None or is_quantized(x.base):
            return x
        return dataclasses.replace(
            x, base=lax.with_sharding_constraint(x.base, sharding)
        )

    return [constrain(x, s) for x, s in zip(values, shardings, strict=True)]


def remat(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    p = eqn.params
    ctx = dataclasses.replace(ctx, keeps=False)

    def fn(*args: Any) -> list[Any]:
        return interpret(ctx, p["jaxpr"], args)

    outs = jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*args)
    return _handed_on(p["jaxpr"], args, outs)


def scan(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    """Weights are constants of the loop, or stacks of which each step takes a slice."""
    parts = compat.scan_parts(eqn)
    first = parts.num_consts
    last = first + parts.num_carry
    consts, init, xs = list(args[:first]), list(args[first:last]), list(args[last:])
    through = compat.handed_on(parts.jaxpr)
    fixed = _loop_invariant(ctx, eqn, init, through, first)
    kept = {
        k: args[i]
        for k, i in enumerate(through[parts.num_carry :])
        if i is not None and i >= last and isinstance(args[i], Factored)
    }
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
        ys = [
            None if k in kept else densify(ctx, eqn, y, "a weight as a loop's output")
            for k, y in enumerate(ys)
        ]
        return (None if i is None else i + 1, _carried(ctx, eqn, fixed, state)), ys

    start = jnp.int32(0) if keyed(args) else None
    init = _carried(ctx, eqn, fixed, init)
    (_, state), ys = lax.scan(
        body, (start, init), [x for x, _ in slots], **parts.options
    )
    ys = [kept.get(k, y) for k, y in enumerate(ys)]
    return [fixed.get(k, x) for k, x in enumerate(state)] + ys


def while_(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    init = list(args[n_cond + n_body :])
    fixed = _loop_invariant(ctx, eqn, init, compat.handed_on(p["body_jaxpr"]), n_body)

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

    start = jnp.int32(0) if keyed(args) else None
    init = _carried(ctx, eqn, fixed, init)
    _, state = lax.while_loop(cond, body, (start, init))
    return [fixed.get(k, x) for k, x in enumerate(state)]


def cond(ctx: Context, eqn: Eqn, index: Any, *args: Any) -> Any:
    """Branches can return weights, if those of all branches look alike.

    The derivative of a branch does: what it remembers are weights.
    """
    index = densify(ctx, eqn, index, "a weight as a branch index")
    like = _returned_weights(ctx, eqn, args)

    def branch(jaxpr: Any) -> Callable:
        def fn(*args: Any) -> list[Any]:
            outs = interpret(ctx, jaxpr, args)
            return [
                _as_weight(x, like[k])
                if k in like
                else densify(ctx, eqn, x, "a weight as a branch's result")
                for k, x in enumerate(outs)
            ]

        return fn

    branches = [branch(b) for b in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs = lax.switch(index, branches, *args)
        return [
            dataclasses.replace(x, settings=like[k].settings) if k in like else x
            for k, x in enumerate(outs)
        ]
    default = None
    of_platform = {}
    for names, fn in zip(platforms, branches, strict=True):
        if names is None:
            default = fn
        of_platform |= {name: fn for name in names or ()}
    return lax.platform_dependent(*args, default=default, **of_platform)


def _returned_weights(
    ctx: Context, eqn: Eqn, args: Sequence[Any]
) -> dict[int, Factored]:
    """What a weight that branches return looks like, for each output that is one."""
    branches = eqn.params["branches"]
    lazy = [is_lazy(x) for x in args]
    if eqn.params.get("branches_platforms"):
        return {}
    if not any(compat.may_return(b, lazy) for b in branches):
        return {}
    outs = [
        jax.eval_shape(lambda *a, b=b: interpret(ctx, b, a), *args) for b in branches
    ]
    found = {}
    for k, values in enumerate(zip(*outs, strict=True)):
        weights = [x for x in values if isinstance(x, Factored)]
        if weights and all(_look_alike(x, weights[0]) for x in weights):
            paths = tuple(dict.fromkeys(p for w in weights for p in w.settings.paths))
            settings = dataclasses.replace(weights[0].settings, paths=paths)
            found[k] = dataclasses.replace(weights[0], settings=settings)
    return found


def _look_alike(x: Factored, y: Factored) -> bool:
    same = jax.tree.structure(x) == jax.tree.structure(y) and x.key is None
    leaves = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False)
    return same and all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in leaves)


def _as_weight(x: Any, like: Factored) -> Factored:
    """An array as a weight whose factors are zero."""
    if isinstance(x, Factored):
        return x
    make = {"scale": jnp.ones}
    factors = {
        k: Named(make.get(k, jnp.zeros)(f.array.shape, f.array.dtype), f.names)
        for k, f in like.factors.items()
    }
    base = None if like.base is None else x
    return dataclasses.replace(like, base=base, factors=factors)


def _loop_invariant(
    ctx: Context, eqn: Eqn, init: list[Any], through: Sequence[int | None], first: int
) -> dict[int, Factored]:
    """The carried weights that every step hands on unchanged; others are made dense."""
    fixed = {}
    for k, x in enumerate(init):
        if isinstance(x, Factored):
            if through[k] == first + k:
                fixed[k] = x
            else:
                init[k] = densify(ctx, eqn, x, "a weight that a loop changes")
    return fixed


def _carried(
    ctx: Context, eqn: Eqn, fixed: dict[int, Factored], values: Sequence[Any]
) -> list[Any]:
    """What a loop carries: arrays, and `None` for weights that no step changes."""
    return [
        None if k in fixed else densify(ctx, eqn, x, "a weight as a loop's result")
        for k, x in enumerate(values)
    ]


def _restored(fixed: dict[int, Factored], state: Sequence[Any], i: Any) -> list[Any]:
    """The carried values of step i, with those weights in their places."""
    return [_at_step(fixed[k], i) if k in fixed else x for k, x in enumerate(state)]


def _scanned(ctx: Context, eqn: Eqn, w: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What `lax.scan` slices, and how a step puts its slice together again."""
    if not isinstance(w, Factored):
        return w, lambda x: x
    ctx.claim(w, eqn, {0: "stack"}, binding=False)
    w = fused(w, [0])
    (stack,) = w.axes[0] or (Axis("", 1),)
    w = in_slices(w, stack.size)
    held = {k: f.along(stack.name, lambda x, at: jnp.moveaxis(x, at, 0)).array
            for k, f in _by_name(w).items() if stack.name in f.names}  # fmt: skip
    settings = dataclasses.replace(w.settings, sliced=True)

    def rebuild(step: tuple[Any, Mapping[str, Any]]) -> Factored:
        base, sliced = step
        factors = _by_name(w)
        for k, array in sliced.items():
            names = tuple(n for n in factors[k].names if n != stack.name)
            factors[k] = Named(array, names)
        scale = factors.pop(_SCALE, None)
        return dataclasses.replace(
            w,
            base=base,
            axes=w.axes[1:],
            factors=factors,
            settings=settings,
            base_scale=scale,
        )

    return (w.base, held), rebuild


_SCALE = "scale of the base"


def _by_name(w: Factored) -> dict[str, Named]:
    """The factors and, if it is apart, the base's scale."""
    by = {} if w.base_scale is None else {_SCALE: w.base_scale}
    return {**w.factors, **by}


def _at_step(w: Any, i: Any) -> Any:
    """Every step of a loop draws its own dropout mask."""
    if not isinstance(w, Factored) or w.key is None:
        return w
    keys = w.key.array

    def folded(k: Any) -> Any:
        return jax.random.fold_in(k, i)

    new = jax.vmap(folded)(keys.reshape(-1)).reshape(keys.shape)
    return dataclasses.replace(w, factors={**w.factors, "key": Named(new, w.key.names)})
