"""Stacks of matrices as products of thin factors, and merged element by element."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._tree.arrays import compute_dtype
from flora._tree.layout import Layout

Factors = tuple[jax.Array, jax.Array]


def flat_factors(a: Any, b: Any, layout: Layout) -> Factors:
    """`[stack, in, rank]` and `[stack, rank, out]`, in float32 or wider."""
    n, dtype, rank = len(layout.stack), compute_dtype(a.dtype, b.dtype), a.shape[-1]
    stack = int(jnp.prod(jnp.asarray(a.shape[:n]))) if n else 1
    a = a.astype(dtype).reshape(stack, -1, rank)
    return a, b.astype(dtype).reshape(stack, rank, -1)


def flat_matrices(w: Any, layout: Layout) -> jax.Array:
    """A weight as matrices `[stack, in, out]`."""
    order = (*layout.stack, *layout.in_, *layout.out)
    sizes = [1, 1, 1]
    for group, axes in enumerate((layout.stack, layout.in_, layout.out)):
        for i in axes:
            sizes[group] *= w.shape[i]
    return jnp.transpose(w, order).reshape(sizes)


def multiplied(a: Any, b: Any) -> jax.Array:
    """A B of each matrix."""
    return jnp.einsum("sir,sro->sio", a, b, precision=lax.Precision.HIGHEST)


def size(x: Any) -> jax.Array:
    """The Frobenius norm over all axes."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def share(part: Any, whole: Any) -> float:
    """part/whole; 0 of nothing."""
    return float(jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0))


def recompressed(a: Any, b: Any, rank: int) -> tuple[Factors, float]:
    """The best A B of a lower rank, and what is lost, relative: found in the factors.

    A B = Qa (Ra Rbᵀ) Qbᵀ, so that the SVD is of a small matrix (Eckart and Young 1936).
    """
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b, 1, 2))
    core = jnp.einsum("sir,sjr->sij", ra, rb, precision=lax.Precision.HIGHEST)
    u, s, v = jnp.linalg.svd(core, full_matrices=False)
    u, v = multiplied(qa, u), multiplied(v, jnp.swapaxes(qb, 1, 2))
    return _balanced(u, s, v, rank), share(size(s[:, rank:]), size(s))


def compressed(w: Any, rank: int, key: Any = None) -> tuple[Factors, float]:
    """The best A B of a rank for dense matrices, and what is lost, relative.

    Args:
      w: `[stack, in, out]`.
      rank: of A B.
      key: with one, the range of W is found by a random projection, 8 columns wider
        than the rank, and four power iterations (Halko et al. 2011,
        https://arxiv.org/abs/0909.4061): good where singular values fall fast.
    """
    if key is None or rank + 8 >= min(w.shape[1:]):
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = _randomized(w, rank + 8, key)
    a, b = _balanced(u, s, v, rank)
    return (a, b), share(size(w - multiplied(a, b)), size(w))


def _randomized(w: Any, columns: int, key: Any) -> tuple[Any, Any, Any]:
    wide: dict[str, Any] = {"precision": lax.Precision.HIGHEST}
    start = jax.random.normal(key, (w.shape[0], w.shape[2], columns), w.dtype)
    q, _ = jnp.linalg.qr(jnp.einsum("sio,sor->sir", w, start, **wide))
    for _ in range(4):
        p, _ = jnp.linalg.qr(jnp.einsum("sio,sir->sor", w, q, **wide))
        q, _ = jnp.linalg.qr(jnp.einsum("sio,sor->sir", w, p, **wide))
    u, s, v = jnp.linalg.svd(
        jnp.einsum("sir,sio->sro", q, w, **wide), full_matrices=False
    )
    return multiplied(q, u), s, v


def _balanced(u: Any, s: Any, v: Any, rank: int) -> Factors:
    """U √S and √S Vᵀ of the largest singular values, zeros where there are fewer."""
    root = jnp.sqrt(s[:, :rank])
    a, b = u[:, :, :rank] * root[:, None, :], root[:, :, None] * v[:, :rank]
    more = rank - a.shape[2]
    if more > 0:
        a = jnp.pad(a, ((0, 0), (0, 0), (0, more)))
        b = jnp.pad(b, ((0, 0), (0, more), (0, 0)))
    return a, b


# --- Merging element by element ------------------------------------------------------


def merged(
    tasks: Any,
    weights: Sequence[float],
    *,
    method: str,
    density: float,
    sign: str,
    key: Any,
) -> jax.Array:
    """One change of k: thinned out, then summed or voted on.

    Args:
      tasks: `[k, stack, in, out]`, one change of the weight each.
      weights: k.
      method: 'magnitude_prune', 'ties', 'dare_linear' or 'dare_ties'.
      density: the share of elements that stay.
      sign: 'total' or 'frequency'.
      key: of DARE.

    References: Yadav et al. 2023, TIES. https://arxiv.org/abs/2306.01708
      Yu et al. 2023, DARE. https://arxiv.org/abs/2311.03099
    """
    if method.startswith("dare"):
        keep = jax.random.bernoulli(key, density, tasks.shape)
        tasks = jnp.where(keep, tasks / density, 0)
    else:
        tasks = pruned(tasks, density)
    by = jnp.asarray(weights, tasks.dtype)[:, None, None, None]
    if not method.endswith("ties"):
        return jnp.sum(by * tasks, 0)
    vote = jnp.sum(tasks if sign == "total" else jnp.sign(tasks), 0)
    agrees = jnp.sign(tasks) == jnp.where(vote >= 0, 1, -1)
    return jnp.sum(by * tasks * agrees, 0) / jnp.maximum(jnp.sum(agrees, 0), 1)


def pruned(tasks: Any, density: float) -> jax.Array:
    """The int(density · n) largest elements of each matrix; zeros elsewhere."""
    flat = tasks.reshape(-1, tasks.shape[-2] * tasks.shape[-1])
    count = int(density * flat.shape[1])

    def one(x: Any) -> Any:
        _, at = lax.top_k(jnp.abs(x), count)
        return jnp.zeros_like(x).at[at].set(x[at])

    return jax.vmap(one)(flat).reshape(tasks.shape)
