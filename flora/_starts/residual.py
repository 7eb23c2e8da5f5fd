"""One leaf at a time: factors from values, and the base that is left."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flora._algebra.dense import delta
from flora._algebra.variants import DoRA
from flora._tree.arrays import is_array
from flora._tree.checks import blocks_problem, weight_problems
from flora._tree.errors import LoraError, fail
from flora._tree.finite import require_finite
from flora._tree.matrices import (
    compiled,
    folded,
    matrices,
    nearest,
    place_of,
    placed_as,
    replicated,
    svd,
    widened,
)
from flora._tree.paths import Pattern, check_pattern, matches, named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.selection import idle_entries, nothing_selected
from flora._tree.weight import LoraWeight, base_of, parts_of

Named = list[tuple[str, Any]]


def selected(
    verb: str, adapted: Any, target: Pattern, *, dense: bool = True
) -> tuple[dict[str, LoraWeight], Named, Any]:
    """The chosen adapted leaves, all of them arrays; all leaves; the structure."""
    named, treedef = named_leaves(adapted)
    check_pattern("target", target)
    nodes = {path: x for path, x in named if isinstance(x, LoraWeight)}
    if not nodes:
        raise LoraError(nothing_adapted(verb, named))
    fail(f"{verb}: {p}" for p in idle_entries("target", target, [*nodes.items()]))
    chosen = {path: w for path, w in nodes.items() if matches(target, path, w)}
    if not chosen:
        raise LoraError(f"{verb}: {nothing_selected('target', target, [*nodes])}")
    fail(p for path, w in chosen.items() for p in _value_problems(verb, path, w, dense))
    parts = {
        path if name == "base" else f"{name} of {path}": x
        for path, w in chosen.items()
        for name, x in {"base": w.base, **parts_of(w)}.items()
    }
    require_finite(verb, parts, remedy="Start from finite weights.")
    return chosen, named, treedef


def nothing_adapted(verb: str, named: Named) -> str:
    """The message for a tree without factors."""
    return (
        f"{verb}: none of the tree's {len(named)} leaves is adapted. Pass the tree "
        "that flora.init or flora.join returned."
    )


def _value_problems(verb: str, path: str, w: LoraWeight, dense: bool) -> list[str]:
    if found := blocks_problem(verb, path, w):
        return found
    if problems := weight_problems(path, w):
        return [f"{verb}: {problem}" for problem in problems]
    if problem := variant_problem(verb, path, w):
        return [problem]
    if dense and is_quantized(w.base):
        return [
            f"{verb}: '{path}' is {w.base!r}, and {verb} computes with dense weights. "
            "Start from those, and call flora.quantize.quantize on the result."
        ]
    parts = jax.tree.leaves(dataclasses.replace(w, key=None))
    if not all(is_array(x) for x in parts):
        return [f"{verb}: '{path}' is {w!r} and holds no arrays."]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in parts):
        plan = f"; to plan, jax.eval_shape(flora.starts.{verb}, ...)" if dense else ""
        return [
            f"{verb}: '{path}' is a ShapeDtypeStruct, and {verb} reads values. Pass "
            f"arrays{plan}."
        ]
    return []


def variant_problem(verb: str, path: str, w: LoraWeight, *known: type) -> str:
    """Why the verb cannot deal with a variant; '' for LoRA, DoRA and those it knows."""
    if w.variant is None or isinstance(w.variant, (DoRA, *known)):
        return ""
    names = ", ".join(kind.__name__ for kind in (DoRA, *known))
    return (
        f"{verb}: '{path}' has variant {w.variant!r}, of which {verb} cannot tell what "
        f"its factors do. Use LoRA or {names}, or leave it out of target."
    )


def made(
    w: LoraWeight,
    fn: Callable,
    values: tuple[Any, ...] = (),
    *,
    donate: bool = False,
    **settings: Any,
) -> LoraWeight:
    """The node with the base and factors that `fn(w, *values, **settings)` computes."""
    start = f"flora.starts.{fn.__name__}"
    places = place_of(w.base), place_of(w.a), place_of(w.b)
    bare = dataclasses.replace(w, key=None, extra=None, variant=None)
    run = compiled(fn, places, tuple(settings))
    base, a, b = run(bare, *values, **settings)
    if donate and isinstance(w.base, jax.Array) and not isinstance(w.base, Tracer):
        jax.block_until_ready(base)
        w.base.delete()
    return dataclasses.replace(w, base=base, a=a, b=b, start=start)


def effective(w: LoraWeight) -> jax.Array:
    """W + scale A B, in float32 or wider, not rounded."""
    w = dataclasses.replace(
        w, base=replicated(w.base), a=replicated(w.a), b=replicated(w.b)
    )
    change = delta(w)
    return w.base.astype(change.dtype) + change


def residual(
    w: LoraWeight, x: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The base x − scale A B, rounded to W's dtype, A and B, each where it lay.

    A and B are rounded to the factors' dtype first, so the base makes up for it.
    """
    a, b = folded(w, a, b)
    change = delta(dataclasses.replace(w, base=replicated(w.base), a=a, b=b))
    rest = (x - change).astype(w.base.dtype)
    return placed_as(rest, w.base), placed_as(a, w.a), placed_as(b, w.b)


def pissa(w: LoraWeight, key: Any, *, passes: int) -> tuple[jax.Array, ...]:
    """A = U_r √(S_r/scale), B = √(S_r/scale) V_rᵀ."""
    x = effective(w)
    return residual(w, x, *nearest(w, x, key, passes=passes))


def olora(w: LoraWeight) -> tuple[jax.Array, ...]:
    """Wᵀ = Q R, A = (R_r)ᵀ, B = (Q_r)ᵀ."""
    x = effective(w)
    q, r = jnp.linalg.qr(matrices(x, w.layout).mT)
    a, b = r[:, : w.rank].mT, q[:, :, : w.rank].mT
    return residual(w, x, widened(a, w.rank), widened(b, w.rank, 1))


def lora_ga(
    w: LoraWeight,
    grad: jax.Array,
    key: Any,
    *,
    passes: int,
    scaling: str,
    gamma: float,
    direction: str,
) -> tuple[jax.Array, ...]:
    """A and B along singular directions of the gradient `[...]`."""
    x, r = effective(w), w.rank
    g = matrices(replicated(grad).astype(x.dtype), w.layout)
    # As many triplets again as are used make the sketch as good as PEFT's.
    u, s, v = svd(g, 2 * r, key, passes=passes, oversample=2 * r)
    u, s, v = widened(u, 2 * r), widened(s, 2 * r), widened(v, 2 * r, 1)
    first, second = slice(None, r), slice(r, 2 * r)
    of_a, of_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    }[direction]
    a, b = u[:, :, of_a], v[:, of_b, :]
    size = 1.0 if scaling == "unit" else g.shape[-1] ** 0.25 / gamma**0.5
    if scaling == "peft":
        b = s[:, of_b, None] * b
    else:
        a = size * a
    return residual(w, x, a, size * b)


def gradients_of(
    chosen: Mapping[str, LoraWeight], grads: Any
) -> Iterator[tuple[str, Any]]:
    """The gradient of each chosen leaf in a tree, or in an iterator of trees."""
    for tree in grads if isinstance(grads, Iterator) else (grads,):
        found = [(path, g) for path, g in named_leaves(tree)[0] if path in chosen]
        fail(
            f"lora_ga: grads has {_kind_of(g)} at '{path}'; expected a dense gradient "
            f"of shape {tuple(chosen[path].base.shape)}. Write "
            "flora.starts.base_gradients(loss_fn, adapted, ...), or jax.grad of the "
            "loss of the plain tree."
            for path, g in found
            if not is_array(g)
            or isinstance(g, jax.ShapeDtypeStruct)
            or tuple(g.shape) != tuple(chosen[path].base.shape)
        )
        gradients = {f"the gradient of {path}": g for path, g in found}
        remedy = "Look at the loss of the plain model."
        require_finite("lora_ga", gradients, remedy=remedy)
        yield from found


def _kind_of(g: Any) -> str:
    return f"{g.dtype}{list(g.shape)}" if is_array(g) else f"a {type(g).__name__}"


def plain_problems(path: str, w: LoraWeight, first: Any, base: Any) -> list[str]:
    """Why a trained leaf cannot be written against its original weight."""
    if not isinstance(first, LoraWeight):
        return [
            f"to_plain: '{path}' has no factors in start. Pass the tree that the start "
            "returned, or its adapter."
        ]
    if base is None:
        return [f"to_plain: original has no '{path}'. Pass the plain parameters."]
    if problem := variant_problem("to_plain", path, w):
        return [problem]
    if found := blocks_problem("to_plain", path, w):
        return found
    same = ("layout", "rank", "alpha", "rank_stabilized", "variant", "blocks")
    differ = [name for name in same if getattr(w, name) != getattr(first, name)]
    parts = [
        name
        for name in ("a", "b")
        for x, y in [(getattr(w, name), getattr(first, name))]
        if (x.shape, x.dtype) != (y.shape, y.dtype)
    ]
    if differ or parts:
        return [
            f"to_plain: '{path}' has another {(differ + parts)[0]} in start than after "
            "training. Pass the start of this very run."
        ]
    shape = tuple(getattr(base_of(base), "shape", ()))
    wanted = w.layout.factor_shapes(shape, w.rank) if w.layout.fits(len(shape)) else ()
    if wanted != (tuple(w.a.shape), tuple(w.b.shape)):
        return [
            f"to_plain: '{path}' has shape {shape} in original, which its factors "
            f"{tuple(w.a.shape)} and {tuple(w.b.shape)} do not fit."
        ]
    return []


def side_by_side(
    a: Any, a0: Any, b: Any, b0: Any, *, axis: int
) -> tuple[jax.Array, jax.Array]:
    """[A A₀] and [B ; −B₀], with B's rank at that axis."""
    return jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], axis)
