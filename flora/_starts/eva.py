"""Principal directions of each layer's inputs, computed with a custom VJP.

Between x A and B stands the identity with a backward pass of its own, which returns
z = x A instead of the cotangent.  The gradient of A is then Xᵀ z = (Xᵀ X) A, summed
over all uses of the weight: one step of subspace iteration, for any function that has a
gradient, without ever holding X.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._starts.components import alpha_at, best, replaced
from flora._starts.residual import selected
from flora._tree.arrays import compute_dtype, is_array
from flora._tree.errors import LoraError, fail
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.matrices import compiled, place_of, replicated
from flora._tree.paths import Pattern, named_leaves
from flora._tree.weight import LoraWeight, Product, is_leaf
from flora._verbs.lora import lora

PROBES = 8  # directions outside of the subspace, to estimate what it leaves out


@jax.custom_vjp
def _handed_on(z: jax.Array) -> jax.Array:
    return z


_handed_on.defvjp(lambda z: (z, z), lambda z, _: (z,))


@dataclasses.dataclass(frozen=True)
class Watched:
    """A variant whose gradient for A is (Xᵀ X) A, where B is zero."""

    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b, None, _handed_on)


def eva(
    key: Any,
    adapted: Any,
    fn: Callable,
    batches: Iterable[tuple[Any, ...]],
    *,
    target: Pattern = "*",
    rho: float = 2.0,
    passes: int = 4,
) -> Any:
    """The tree with A along the principal directions of each layer's inputs, B = 0.

    Ranks move to the layers whose directions explain most: of all leaves and stacked
    layers the first round(rho·rank) directions compete by λ_i / tr(Xᵀ X), and as many
    win as there were ranks.  alpha changes too, so the scale stays.  The directions are
    those of Xᵀ X, uncentered (PEFT subtracts the mean of x), over all batches.  For a
    tied embedding a lookup counts as one input of each direction.

    Args:
      key: a PRNG key for the first directions and for estimating traces; it is
        consumed.
      adapted: an adapted tree of arrays; its bases may be quantized.  A and B are
        replaced, so the model becomes that of the bases.
      fn: the function of the plain tree, such as `model.apply`; floating outputs must
        depend on the layers in a way that can be differentiated.
      batches: argument tuples for `fn(tree, *batch)`: a list, not an iterator, since it
        is read `passes` times.
      target: which adapted leaves.
      rho: how many times its rank a leaf may win; 1 keeps all ranks.
      passes: how many passes to make over all batches; each is a power iteration.

    Returns:
      A new tree.  A leaf that wins no rank is plain and frozen again.  The layers of a
      stack share the largest rank among them, padded with zeros in A and B, which stay
      zero.  `flora.budget.patterns` returns the new ranks.

    Raises:
      LoraError: nothing is selected, a leaf holds no values or receives no inputs, or
        `batches` is empty or an iterator.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.starts
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> fn, x = lambda p, x: x @ p["kernel"], jnp.zeros((5, 6)).at[:, 2].set(1.0)
      >>> key, config = jax.random.key(0), flora.LoraConfig(rank=1)
      >>> adapted = flora.init(key, config, fn, params, x)
      >>> start = flora.starts.eva(jax.random.key(1), adapted, fn, [(x,)])
      >>> abs(start["kernel"].a[:, 0]).round(3).tolist()
      [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    References: Paischer et al. 2024 (EVA). https://arxiv.org/abs/2410.07170
    """
    require_key(key, "eva")
    _require(fn, batches, rho, passes)
    chosen, _, _ = selected("eva", adapted, target, dense=False)
    fail(
        f"eva: '{path}' is a tracer, and ranks depend on values. Call eva outside of "
        "jit."
        for path, w in chosen.items()
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(w))
    )
    root = consumed(key)
    keys = {p: jax.random.fold_in(root, path_salt(p)) for p in chosen}
    watch = {p: _Watch.of(w, rho) for p, w in chosen.items()}
    moments = _moments(adapted, watch, fn, list(batches))
    q = {p: w.run(_random, keys[p]) for p, w in watch.items()}
    for _ in range(passes - 1):
        q = {p: watch[p].run(_spanned, y) for p, y in moments(q).items()}
    q = {p: w.run(_with_probes, q[p], keys[p]) for p, w in watch.items()}
    found = {p: _directions(watch[p], q[p], y) for p, y in moments(q).items()}
    _require_inputs({p: total for p, (_, _, total) in found.items()})
    shares = {p: s / total[:, None] for p, (_, s, total) in found.items()}
    kept = best(shares, sum(w.rank * watch[p].stack for p, w in chosen.items()))
    new = {p: _started(w, found[p][0], np.asarray(kept[p])) for p, w in chosen.items()}
    return replaced(adapted, new)


def _require(fn: Any, batches: Any, rho: Any, passes: Any) -> None:
    if not callable(fn):
        raise LoraError(
            f"eva: fn is a {type(fn).__name__}; expected the function to run. The "
            "order is eva(key, adapted, fn, batches)."
        )
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise LoraError(
            f"eva: batches is a {type(batches).__name__}; expected a list of argument "
            "tuples, which is gone through several times. Write list(batches)."
        )
    if isinstance(rho, bool) or not isinstance(rho, int | float) or rho < 1:
        raise LoraError(f"rho={rho!r}. Write a number of at least 1, such as 2.")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 2:
        raise LoraError(f"passes={passes!r}. Write an int of at least 2, such as 4.")


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A leaf while its inputs are watched.

    Attributes:
      node: with B = 0 of rank `count + probes`; A is still missing.
      place: of A.
      stack: how many matrices.
      in_: rows of A.
      count: directions that compete.
      probes: directions besides, for the trace.
      dtype: that of A, float32 at least.
    """

    node: LoraWeight
    place: Any
    stack: int
    in_: int
    count: int
    probes: int
    dtype: Any

    @staticmethod
    def of(w: LoraWeight, rho: float) -> "_Watch":
        stack, in_, out = w.layout.matrix(w.base.shape)
        count = min(round(rho * w.rank), in_, out)
        probes = min(PROBES, in_ - count)
        node = dataclasses.replace(
            w,
            a=None,
            b=_zeros(w, count + probes),
            key=None,
            extra=None,
            rank=count + probes,
            fallback="error",
            form="direct",
            dropout=0.0,
            variant=Watched(),
        )
        dtype = compute_dtype(w.a.dtype)
        return _Watch(node, place_of(w.a), stack, in_, count, probes, dtype)

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (self.stack, self.in_, self.count, self.probes, self.dtype)

    def run(self, fn: Callable, *values: Any) -> jax.Array:
        """`fn` of `[stack, in, ...]` arrays as an array of A's axes, where A lay."""
        _, in_, _ = self.node.layout.sizes(self.node.base.shape)
        shape = (*self.node.b.shape[: len(self.node.layout.stack)], *in_)
        run = compiled(_on_matrices, self.place, ("fn", "sizes", "shape"))
        return run(*values, fn=fn, sizes=self.sizes, shape=shape)


def _on_matrices(*values: Any, fn: Callable, sizes: Any, shape: Any) -> jax.Array:
    made = fn(*(_flat(x, sizes) for x in values), sizes)
    return made.reshape((*shape, -1))


def _flat(x: Any, sizes: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return replicated(x).reshape(sizes[0], sizes[1], -1)


def _zeros(w: LoraWeight, rank: int) -> jax.Array:
    _, shape = w.layout.factor_shapes(w.base.shape, rank)
    return jnp.zeros(shape, w.b.dtype, device=place_of(w.b))


def _moments(
    adapted: Any, watch: Mapping[str, _Watch], fn: Callable, batches: list[Any]
) -> Callable:
    """`{path: A}` to `{path: (Xᵀ X) A}`, over all batches."""
    if not batches:
        raise LoraError("eva: batches is empty. Write a list of argument tuples.")
    named, treedef = named_leaves(adapted)
    leaves = {p: watch[p].node if p in watch else x for p, x in named}
    values = {p: x for p, x in leaves.items() if is_array(x) or is_leaf(x)}

    @jax.jit
    def of_batch(a: Any, values: Any, batch: Any) -> Any:
        def total(a: Any) -> jax.Array:
            nodes = {p: dataclasses.replace(values[p], a=x) for p, x in a.items()}
            tree = treedef.unflatten([{**leaves, **values, **nodes}[p] for p in leaves])
            outs = jax.tree.leaves(lora(fn)(tree, *batch))
            return sum((_sum(y) for y in outs if _differentiable(y)), jnp.float32(0))

        return jax.grad(total)(a)

    def run(a: Any) -> Any:
        found = None
        for batch in batches:
            args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            new = of_batch(a, values, args)
            found = new if found is None else jax.tree.map(jnp.add, found, new)
        return found

    return run


def _differentiable(y: Any) -> bool:
    return is_array(y) and jnp.issubdtype(y.dtype, jnp.inexact)


def _sum(y: jax.Array) -> jax.Array:
    return y.real.astype(jnp.float32).sum()


def _random(key: Any, sizes: Any) -> jax.Array:
    stack, in_, count, probes, dtype = sizes
    drawn = jax.random.normal(key, (stack, in_, count + probes), dtype)
    return jnp.linalg.qr(drawn)[0]


def _spanned(y: jax.Array, sizes: Any) -> jax.Array:
    return jnp.linalg.svd(y, full_matrices=False)[0]


def _with_probes(q: jax.Array, key: Any, sizes: Any) -> jax.Array:
    """The first directions, then random ones orthogonal to them instead of the rest."""
    stack, in_, count, probes, _ = sizes
    q = q[:, :, :count]
    p = jax.random.normal(jax.random.fold_in(key, 1), (stack, in_, probes), q.dtype)
    for _ in range(2):  # the second time for what rounding left
        p = p - jnp.matmul(
            q, jnp.matmul(q.mT, p, precision="highest"), precision="highest"
        )
        p = jnp.linalg.qr(p)[0]
    return jnp.concatenate([q, p], -1)


def _directions(w: _Watch, q: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
    """Eigenvectors `[stack, in, count]`, eigenvalues and trace of Xᵀ X, from Xᵀ X Q."""
    return compiled(_eigen, None, ("sizes",))(q, y, sizes=w.sizes)


def _eigen(q: jax.Array, y: jax.Array, *, sizes: Any) -> tuple[Any, Any, Any]:
    _, in_, count, probes, _ = sizes
    q, y = _flat(q, sizes), _flat(y, sizes)
    u, s, _ = jnp.linalg.svd(y[:, :, :count], full_matrices=False)
    diagonal = (q * y).sum(1)
    outside = diagonal[:, count:].sum(-1) * (in_ - count) / max(probes, 1)
    return u, s, diagonal[:, :count].sum(-1) + outside


def _require_inputs(totals: Mapping[str, jax.Array]) -> None:
    fail(
        f"eva: '{path}' receives no inputs in these batches, or infinite ones, or fn's "
        "floating outputs do not depend on it in a way that can be differentiated. "
        "Leave it out of target, or return other outputs."
        for path, total in totals.items()
        if not bool(jnp.all((total > 0) & jnp.isfinite(total)))
    )


def _started(w: LoraWeight, u: jax.Array, keep: np.ndarray) -> Any:
    """The leaf with the directions that won, or its base if none did."""
    won = keep.sum(-1)
    rank = int(won.max())
    if rank == 0:
        return w.base
    columns = (np.arange(rank) < won[:, None]).astype(np.float32)
    shape = (*w.a.shape[:-1], rank)
    run = compiled(_columns, place_of(w.a), ("shape", "dtype"))
    a = run(u, columns, shape=shape, dtype=jnp.dtype(w.a.dtype))
    b, alpha = _zeros(w, rank), alpha_at(w, rank)
    return dataclasses.replace(w, a=a, b=b, rank=rank, alpha=alpha)


def _columns(u: Any, columns: Any, *, shape: Any, dtype: Any) -> jax.Array:
    return (u[:, :, : shape[-1]] * columns[:, None, :]).reshape(shape).astype(dtype)
