"""Products for a platform that is not known before they are lowered.

    on a TPU     y = x W + z Q with z = x [P₁ P₂ …] for all products of one x at once
    elsewhere    y = x W + (x P) Q for each by itself: the direct form

What is traced on a CPU or a GPU may be lowered for a TPU, alone or as one platform of
several.  So the form is chosen by `lax.platform_dependent`, once in y and once in

    dy = dx W + (dx P + x dP) Q + z dQ

whose transpose, which JAX takes, is the backward pass of `forms.products`.  Unlike
there, forward mode works.  What is kept is the same on all platforms: x, z, W, P, Q.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from flora._algebra.axes import Named
from flora._algebra.forms import (
    Arrays,
    Spec,
    _forward,
    _hidden,
    _joined,
    _parts,
)
from flora._algebra.low_rank import SCOPE

Each = tuple[Spec, ...]


class _Moves(NamedTuple):
    """Tangents; `None` for those that are zero."""

    x: Named | None
    ps: Arrays | None
    qs: Arrays | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def products(each: Each, x: Named, ws: Arrays, ps: Arrays, qs: Arrays) -> Sequence[Any]:
    """X W + (x P) Q for each W; see `forms.products`.

    Args:
      each: what is static; "forward" is the form on a TPU, "backward" is 'direct'.
      x: activations.
      ws: the frozen weights; they get no gradient.
      ps: the factors that x meets.
      qs: the other ones, with the scale in them.
    """
    return _sums(each, x, ws, ps, qs)[0]


@functools.partial(products.defjvp, symbolic_zeros=True)
def _jvp(each: Each, primals: Any, tangents: Any) -> Any:
    x, ws, ps, qs = primals
    ys, zs = _sums(each, x, ws, ps, qs)
    dx, _, dps, dqs = map(_arrays, tangents)
    # What is computed of x, z, P and Q alone is not kept, but computed again.
    changes = jax.checkpoint(functools.partial(_changes, each), prevent_cse=False)
    return ys, changes((x, ws, zs, ps, qs), _Moves(dx, dps, dqs))


def _arrays(tangents: Any) -> Any:
    """Tangents as arrays; `None` if all are zero."""
    if all(map(_is_zero, jax.tree.leaves(tangents, is_leaf=_is_zero))):
        return None
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x,
        tangents,
        is_leaf=_is_zero,
    )


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _sums(each: Each, *operands: Any) -> tuple[Sequence[Any], Arrays]:
    """Each y and each z."""

    def at_once(x: Named, ws: Arrays, ps: Arrays, qs: Arrays) -> Any:
        ys, (_, _, z, _, _) = _forward(each, x, ws, ps, qs)
        return tuple(ys), tuple(_parts(z, qs))

    def apart(x: Named, ws: Arrays, ps: Arrays, qs: Arrays) -> Any:
        ys, zs = [], []
        for spec, w, p, q in zip(each, ws, ps, qs, strict=True):
            with _scope(spec):
                y = spec.times(w, x, spec.y, spec.dtype)
                with jax.named_scope(SCOPE):
                    p = p.astype(x.dtype)
                    zs.append(spec.times(x, p, _hidden(x, p, [q])))
                    change = _times(spec, zs[-1], q)
                ys.append(_added(y, change).array)
        return tuple(ys), tuple(zs)

    return lax.platform_dependent(*operands, tpu=at_once, default=apart)


def _changes(each: Each, known: Any, moves: _Moves) -> Sequence[Any]:
    """Each dy, by terms in the order whose transpose adds up dx as the form has it."""
    x, _, _, ps, qs = known
    dtype = x.dtype
    ps, qs = ([f.astype(dtype) for f in factors] for factors in (ps, qs))
    dps, dqs = (
        [None] * len(each) if factors is None else [f.astype(dtype) for f in factors]
        for factors in (moves.ps, moves.qs)
    )

    def at_once(known: Any, p: Named, moves: Any) -> Any:
        x, ws, zs, _, qs = known
        dx, dps, dqs = moves
        dp = None if dps[0] is None else _joined(dps)
        with jax.named_scope(SCOPE):
            dz = _hidden_change(each[0], x, p, qs[0], dx, dp)
        dzs = [None] * len(each) if dz is None else _parts(dz, qs)
        dys = []
        for spec, w, z, q, dz, dq in zip(each, ws, zs, qs, dzs, dqs, strict=True):
            with _scope(spec):
                y = None if dx is None else spec.times(w, dx, spec.y, spec.dtype)
                with jax.named_scope(SCOPE):
                    change = _added(_times(spec, dz, q), _times(spec, z, dq))
                dys.append(lax.optimization_barrier(_added(y, change).array))
        return tuple(dys)

    def apart(known: Any, _: Named, moves: Any) -> Any:
        x, ws, zs, ps, qs = known
        dx, dps, dqs = moves
        dys = []
        for spec, w, z, p, q, dp, dq in zip(
            each, ws, zs, ps, qs, dps, dqs, strict=True
        ):
            with _scope(spec):
                y = None if dx is None else spec.times(w, dx, spec.y, spec.dtype)
                with jax.named_scope(SCOPE):
                    dz = _hidden_change(spec, x, p, q, dx, dp)
                    change = _added(_times(spec, dz, q), _times(spec, z, dq))
                dys.append(_added(y, change).array)
        return tuple(dys)

    operands = (*known[:3], ps, qs), _joined(ps), (moves.x, dps, dqs)
    return lax.platform_dependent(*operands, tpu=at_once, default=apart)


def _hidden_change(
    spec: Spec, x: Named, p: Named, q: Named, dx: Named | None, dp: Named | None
) -> Named | None:
    """Dx P + x dP."""
    z = _hidden(x, p, [q])
    return _added(
        None if dx is None else spec.times(dx, p, z),
        None if dp is None else spec.times(x, dp, z),
    )


def _times(spec: Spec, z: Named | None, q: Named | None) -> Named | None:
    """Z Q."""
    if z is None or q is None:
        return None
    return spec.times(z, q.astype(z.dtype), spec.y, spec.dtype)


def _added(u: Named | None, v: Named | None) -> Any:
    """The sum; `None` is zero."""
    if u is None or v is None:
        return v if u is None else u
    return Named(u.array + v.array, u.names)


def _scope(spec: Spec) -> contextlib.AbstractContextManager:
    return jax.named_scope(spec.scope) if spec.scope else contextlib.nullcontext()
