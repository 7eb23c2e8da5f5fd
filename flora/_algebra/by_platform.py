"""Products for a platform that is not known before they are lowered.

    y = x W + z Q,   z = x [P₁ P₂ …] for all products of one x

What is traced on a CPU or a GPU may be lowered for a TPU, alone or as one platform of
several.  There the form is `forms.products`' direct one, on a GPU it may be thin_last,
elsewhere what JAX derives.  The three differ by their fences alone, which are left to
`lax.platform_dependent`.  The backward pass is the transpose, which JAX takes, of

    dy = dx W + dz Q + z dQ,   dz = dx [P₁ P₂ …] + x [dP₁ dP₂ …]

so that, unlike there, forward mode works.  Kept for it are x, z, W, P and Q.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from flora._algebra.axes import Named
from flora._algebra.forms import Arrays, Seeds, Spec, apart, hidden_terms

Each = tuple[Spec, ...]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def products(
    each: Each, x: Named, ws: Sequence[Any], ps: Arrays, qs: Arrays, seeds: Seeds
) -> Sequence[Any]:
    """X W + (x P) Q for each W; see `forms.products`.

    Args:
      each: what is static; the form is a GPU's, thin_last or direct.
      x: activations.
      ws: the frozen weights, some may be `Stored`; they get no gradient.
      ps: the factors that x meets.
      qs: the other ones, with the scale in them.
      seeds: of the masks of dropout, as there.
    """
    return _sums(each, x, ws, ps, qs, seeds)[0]


@functools.partial(products.defjvp, symbolic_zeros=True)
def _jvp(each: Each, primals: Any, tangents: Any) -> Any:
    x, ws, ps, qs, seeds = primals
    ys, zs = _sums(each, x, ws, ps, qs, seeds)
    dx, _, dps, dqs, _ = map(_arrays, tangents)
    # What is made of P and Q alone is not kept, but made again.
    changes = jax.checkpoint(functools.partial(_changes, each), prevent_cse=False)
    return ys, changes((x, ws, zs, ps, qs, seeds), (dx, dps, dqs))


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


def _sums(
    each: Each, x: Named, ws: Sequence[Any], ps: Arrays, qs: Arrays, seeds: Seeds
) -> tuple[Sequence[Any], Arrays]:
    """Each y and each z."""
    x = Named(_fenced(x.array), x.names)  # W, P and dP read it
    zs = apart(hidden_terms(each, x, _cast(ps, x), qs, seeds), qs)
    ys = []
    for spec, w, z, q in zip(each, ws, zs, qs, strict=True):
        with spec.scoped():
            y = _written(spec, spec.base(x, w))
            ys.append(_added(y, spec.change(z, q)).array)
    return tuple(ys), tuple(zs)


def _changes(each: Each, known: Any, moves: Any) -> Sequence[Any]:
    """Each dy; the products of dx stand in the order in which dx is to be summed."""
    x, ws, zs, ps, qs, seeds = known
    dx, dps, dqs = moves
    ps, qs, none = _cast(ps, x), _cast(qs, x), [None] * len(each)
    moved = none if dx is None else hidden_terms(each, dx, ps, qs, seeds)
    turned = none if dps is None else hidden_terms(each, x, _cast(dps, x), qs, seeds)
    dz = [_added(u, v) for u, v in zip(moved, turned, strict=False)]
    dqs = none if dqs is None else _cast(dqs, x)
    dzs = none if dz[0] is None else apart(dz, qs)
    dys = []
    if dx is not None:  # in the transpose, what all base products sum up
        dx = _written(each[0], dx)
    for spec, w, z, q, dz, dq in zip(each, ws, zs, qs, dzs, dqs, strict=True):
        with spec.scoped():
            y = None if dx is None else spec.base(dx, w)
            change = _added(_term(spec, dz, q), _term(spec, z, dq))
            dys.append(_added(y, change).array)
    return _fenced(tuple(dys))  # in the transpose W, Q and dQ read it


def _fenced(x: Any) -> Any:
    """What a TPU is to write once, instead of computing it anew for each reader."""
    return lax.platform_dependent(x, tpu=lax.optimization_barrier, default=lambda x: x)


def _written(spec: Spec, u: Named) -> Named:
    """What a GPU is to write before the low-rank term is added, where that pays."""
    if spec.forward == "direct":
        return u
    fence = lax.optimization_barrier
    gpu = {"cuda": fence, "rocm": fence}
    y = lax.platform_dependent(u.array, **gpu, default=lambda x: x)
    return Named(y, u.names)


def _term(spec: Spec, z: Named | None, q: Named | None) -> Named | None:
    """Z Q."""
    return None if z is None or q is None else spec.term(z, q)


def _cast(factors: Arrays, x: Named) -> list[Named]:
    return [f.astype(x.dtype) for f in factors]


def _added(u: Named | None, v: Named | None) -> Any:
    """The sum; `None` is zero."""
    if u is None or v is None:
        return v if u is None else u
    return Named(u.array + v.array, u.names)
