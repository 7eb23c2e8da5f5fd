"""Stacks of matrices as products of thin factors, and merged element by element."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._tree.arrays import compute_dtype
from flora._tree.matrices import stacked, svd
from flora._tree.weight import LoraWeight

Factors = tuple[jax.Array, jax.Array]


def flat_factors(w: LoraWeight) -> Factors:
    """A and B as `[stack, in, rank]` and `[stack, rank, out]`, float32 or wider."""
    dtype = compute_dtype(w.a.dtype, w.b.dtype)
    a, b = stacked(w)
    return a.astype(dtype), b.astype(dtype)


def multiplied(a: Any, b: Any) -> jax.Array:
    """A B for each matrix of the stack."""
    return jnp.einsum("sir,sro->sio", a, b, precision=lax.Precision.HIGHEST)


def size(x: Any) -> jax.Array:
    """The Frobenius norm over all axes."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def share(part: Any, total: Any) -> float:
    """part/total, and 0 where total is 0."""
    return float(jnp.where(total > 0, part / jnp.where(total > 0, total, 1), 0))


def recompressed(a: Any, b: Any, rank: int) -> tuple[Factors, float]:
    """The best A B of a lower rank and its relative error, from the factors alone.

    A B = Qa (Ra Rbᵀ) Qbᵀ, so that the SVD is of a small matrix (Eckart and Young 1936).
    """
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(jnp.swapaxes(b, 1, 2))
    core = jnp.einsum("sir,sjr->sij", ra, rb, precision=lax.Precision.HIGHEST)
    u, s, v = jnp.linalg.svd(core, full_matrices=False)
    u, v = multiplied(qa, u), multiplied(v, jnp.swapaxes(qb, 1, 2))
    return _balanced(u, s, v, rank), share(size(s[:, rank:]), size(s))


def compressed(w: Any, rank: int, key: Any = None) -> tuple[Factors, float]:
    """The best A B of a rank for dense matrices, and its relative error.

    Args:
      w: `[stack, in, out]`.
      rank: of A B.
      key: with one, the range of W is found by a random projection, 8 columns wider
        than the rank, and four power iterations (Halko et al. 2011,
        https://arxiv.org/abs/0909.4061): good where singular values fall fast.
    """
    exact = rank + 8 >= min(w.shape[1:])
    a, b = _balanced(*svd(w, rank, None if exact else key), rank)
    return (a, b), share(size(w - multiplied(a, b)), size(w))


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
      weights: k, of any sign: they count in the sum, not in the vote.
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
