"""Weights as stacks of matrices `[stack, in, out]`, factors and decompositions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._tree.layout import Layout
from flora._tree.placement import mesh_of, spec_of
from flora._tree.weight import LoraWeight


def matrices(x: Any, layout: Layout) -> Any:
    """An array of a weight's shape as `[stack, in, out]`."""
    return x.transpose(layout.order).reshape(layout.matrix(x.shape))


def stacked(w: LoraWeight) -> tuple[jax.Array, jax.Array]:
    """A and B as `[stack, in, rank]` and `[stack, rank, out]`."""
    count = math.prod(w.a.shape[: len(w.layout.stack)])
    rank = w.a.shape[-1]
    return w.a.reshape(count, -1, rank), w.b.reshape(count, rank, -1)


def folded(w: LoraWeight, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors `[stack, in, rank]` and `[stack, rank, out]` in w's axes and dtypes."""
    n = len(w.layout.stack)
    shape_a = (*w.a.shape[:-1], a.shape[-1])
    shape_b = (*w.b.shape[:n], b.shape[1], *w.b.shape[n + 1 :])
    return a.reshape(shape_a).astype(w.a.dtype), b.reshape(shape_b).astype(w.b.dtype)


def svd(
    x: jax.Array,
    count: int,
    key: Any = None,
    *,
    passes: int = 4,
    oversample: int = 8,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first singular triplets U `[..., n, count]`, s `[..., count]` and Vᴴ.

    Without a key exact.  With one, the range of x is sketched by x Ω with
    `count + oversample` Gaussian columns and `passes` power iterations.

    References: Halko et al. 2011, algorithms 4.4 and 5.1. https://arxiv.org/abs/0909.4061
    """
    if key is None:
        u, s, v = jnp.linalg.svd(replicated(x), full_matrices=False)
        return u[..., :count], s[..., :count], v[..., :count, :]
    mul = functools.partial(jnp.matmul, precision="highest")
    width = min(count + oversample, *x.shape[-2:])
    x, adjoint = replicated(x), replicated(x).mT.conj()
    omega = jax.random.normal(key, (*x.shape[:-2], x.shape[-1], width), x.dtype)
    q = jnp.linalg.qr(mul(x, omega))[0]
    for _ in range(passes):
        q = jnp.linalg.qr(mul(adjoint, q))[0]
        q = jnp.linalg.qr(mul(x, q))[0]
    u, s, v = jnp.linalg.svd(mul(q.mT.conj(), x), full_matrices=False)
    return mul(q, u[..., :count]), s[..., :count], v[..., :count, :]


def nearest(
    w: LoraWeight, x: jax.Array, key: Any = None, *, passes: int = 4
) -> tuple[jax.Array, jax.Array]:
    """A `[stack, in, rank]` and B `[stack, rank, out]` whose scale A B is nearest to x.

    A = U_r √(S_r/scale), B = √(S_r/scale) V_rᵀ, of x `[...]` in W's shape.  Ranks above
    min(in, out) are zeros.
    """
    u, s, v = svd(matrices(x, w.layout), w.rank, key, passes=passes)
    root = jnp.sqrt(s / w.scale)
    a, b = u * root[:, None, :], root[:, :, None] * v
    return widened(a, w.rank), widened(b, w.rank, 1)


def widened(x: jax.Array, rank: int, axis: int = -1) -> jax.Array:
    """x with zeros after what it has along an axis, up to the rank."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, max(rank - x.shape[axis], 0))
    return jnp.pad(x, more)


def replicated(x: jax.Array) -> jax.Array:
    """Replicated, on a mesh with explicit axes; decompositions need that."""
    if not isinstance(x, Tracer) or spec_of(x) is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh_of(x), Spec()))


def placed_as(x: jax.Array, like: Any) -> jax.Array:
    """The array with the sharding of `like`, on a mesh with explicit axes."""
    if not isinstance(like, Tracer) or (spec := spec_of(like)) is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh_of(like), spec))


def place_of(x: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh; `None` for tracers and single devices."""
    found = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


@functools.cache
def compiled(fn: Callable, places: Any, static: tuple[str, ...] = ()) -> Callable:
    """`fn`, compiled once for leaves of one shape, layout and place."""
    return jax.jit(fn, static_argnames=static, out_shardings=places)
