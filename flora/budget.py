"""Ranks by budget: planned before training, or moved during it to where they matter.

Before training, `rank_pattern` divides a number of parameters among the leaves:

    planned = flora.init(key, flora.LoraConfig(rank=1, ...), fn, shapes, x)
    ranks = flora.budget.rank_pattern(planned, 2_000_000)
    config = flora.LoraConfig(rank_pattern=ranks, ...)

During training, AdaLoRA moves ranks between leaves.  Component k of a leaf is column k
of A and row k of B, and `extra["e"][k]` where the variant has one
(`flora.variants.AdaLoRA`).  In each step:

    loss, grads = flora.value_and_grad(loss_fn)(adapted, x)
    seen = flora.budget.observe(seen, adapted, grads)     # from flora.budget.unseen
    ...                                                   # the optimizer's update
    count = flora.budget.components_at(
        step, first, last, warmup=200, final=500, total=5000
    )
    kept = flora.budget.top(flora.budget.scores(seen), count)
    adapted = flora.budget.masked(adapted, kept)

All of this has fixed shapes and belongs inside `jax.jit`.  Components beyond the budget
are zeroed; they keep their gradients and can come back.  At the end, outside of jit,
`flora.budget.compacted(adapted, kept)` removes them.

References: Zhang et al. 2023 (AdaLoRA). https://arxiv.org/abs/2303.10512
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._starts.components import (
    alpha_at,
    best,
    budget_problems,
    by_path,
    components_of,
    gated,
    nodes_of,
    on_components,
    replaced,
    require_paths,
    shares,
    within_budget,
)
from flora._tree.arrays import compute_dtype
from flora._tree.checks import blocks_problem
from flora._tree.errors import LoraError, fail
from flora._tree.matrices import compiled, place_of, stacked
from flora._tree.weight import LoraWeight

__all__ = [
    "Importance",
    "compacted",
    "components_at",
    "masked",
    "observe",
    "orthogonality",
    "patterns",
    "rank_pattern",
    "scores",
    "top",
    "unseen",
]

Kept = Mapping[str, Any]


def rank_pattern(
    adapted: Any,
    parameters: int,
    *,
    importance: str | Mapping[str, float] = "equal",
    smallest: int = 1,
    largest: int | None = None,
) -> dict[str, int]:
    """A rank for each adapted leaf, within a number of trained parameters.

    rank_i ∝ importance_i between `smallest` and `largest`, rounded down.  What rounding
    leaves over goes, one rank at a time, to the leaves that lost most by it (but not
    with 'equal').

    Args:
      adapted: an adapted tree of any rank, of arrays or `jax.ShapeDtypeStruct`s.
      parameters: how many all A and B together may have.
      importance: 'equal' for one rank everywhere; 'parameters' for rank
        ∝ in·out/(in + out), so that each leaf trains the same share of its weight; or
        `{path: number of 0 or more}` with every adapted leaf.
      smallest: the smallest rank of a leaf.
      largest: the largest; a rank is never above the smaller side of the leaf's matrix.

    Returns:
      `{path: rank}` for `LoraConfig.rank_pattern`: full paths with special characters
      escaped, longer ones first, so that each matches its own leaf only.  With one
      alpha the scale alpha/rank differs among leaves; for one scale write
      `alpha_pattern={path: 2 * r for path, r in ranks.items()}`.

    Raises:
      LoraError: the budget is too small for `smallest`; or an importance is missing,
        negative, or for a path that is not an adapted leaf.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.budget
      >>> params = {"wide": jnp.ones((30, 70)), "thin": jnp.ones((30, 10))}
      >>> adapted = flora.init(
      ...     jax.random.key(0), flora.LoraConfig(rank=1, target="*"),
      ...     lambda p, x: (x @ p["wide"], x @ p["thin"]), params, jnp.ones((2, 30)))
      >>> flora.budget.rank_pattern(adapted, 600)
      {'thin': 4, 'wide': 4}
      >>> flora.budget.rank_pattern(adapted, 600, importance="parameters")
      {'thin': 2, 'wide': 5}
    """
    nodes = nodes_of("rank_pattern", adapted)
    sizes = {path: w.layout.matrix(w.base.shape) for path, w in nodes.items()}
    cost = {path: stack * (in_ + out) for path, (stack, in_, out) in sizes.items()}
    fail(budget_problems(parameters, smallest, largest))
    most = {
        path: min(in_, out, largest or in_) for path, (_, in_, out) in sizes.items()
    }
    least = {path: min(smallest, most[path]) for path in nodes}
    needed = sum(least[path] * cost[path] for path in nodes)
    if needed > parameters:
        raise LoraError(
            f"rank_pattern: rank {smallest} in {len(nodes)} leaves takes {needed:,} "
            f"parameters and the budget is {parameters:,}. Write parameters={needed} "
            "or more, or exclude leaves."
        )
    share = shares(importance, sizes)
    exact = within_budget(parameters, share, cost, least, most)
    found = {p: math.floor(r + 1e-9) for p, r in exact.items()}
    left = parameters - sum(r * cost[p] for p, r in found.items())
    if importance != "equal":
        for p in sorted(nodes, key=lambda p: found[p] - exact[p]):
            if share[p] > 0 and found[p] < most[p] and cost[p] <= left:
                found[p], left = found[p] + 1, left - cost[p]
    return by_path(found)


def patterns(adapted: Any) -> dict[str, dict[str, Any]]:
    """The `rank_pattern` and `alpha_pattern` with which `flora.init` makes these ranks.

    Args:
      adapted: an adapted tree, such as `compacted` or `flora.starts.eva` returns.

    Returns:
      `{"rank_pattern": {path: rank}, "alpha_pattern": {path: alpha}}`, with paths as
      `rank_pattern` writes them, for `LoraConfig(..., **patterns(adapted))`.
    """
    nodes = nodes_of("patterns", adapted)
    fail(p for path, w in nodes.items() for p in blocks_problem("patterns", path, w))
    return {
        "rank_pattern": by_path({path: w.rank for path, w in nodes.items()}),
        "alpha_pattern": by_path({path: w.alpha for path, w in nodes.items()}),
    }


@dataclasses.dataclass(frozen=True)
class Importance:
    """Running averages of |p·∂L/∂p| for each trained element, by path.

    Attributes:
      sensitivity: the average; for each path a node with A's and B's shapes.
      uncertainty: the average distance from that average, likewise.
    """

    sensitivity: Mapping[str, LoraWeight]
    uncertainty: Mapping[str, LoraWeight]


jax.tree_util.register_dataclass(
    Importance, data_fields=["sensitivity", "uncertainty"], meta_fields=[]
)


def unseen(adapted: Any) -> Importance:
    """The `Importance` before the first step: float32 zeros, sharded as A and B are."""
    nodes = components_of("unseen", adapted)

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros_like(x, compute_dtype(x.dtype))

    found = [{p: on_components(zeros, w) for p, w in nodes.items()} for _ in range(2)]
    return Importance(*found)


def observe(
    seen: Importance,
    adapted: Any,
    grads: Any,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Importance:
    """The averages after one more step, before or after its update.

    I = |p·∂L/∂p|, S ← β₁ S + (1−β₁) I, U ← β₂ U + (1−β₂) |I − S|.

    Args:
      seen: the averages so far.
      adapted: the tree that the gradients were taken at.
      grads: gradients of the tree, or of its adapter, of the loss without penalties
        such as `orthogonality`.
      beta1: β₁.
      beta2: β₂.

    References: Zhang et al. 2023, eqs. 8 to 10. https://arxiv.org/abs/2303.10512
    """
    nodes = components_of("observe", adapted)
    of = nodes_of("observe", grads)
    require_paths("observe: grads", of, nodes)
    require_paths("observe: seen", seen.sensitivity, nodes)

    def product(p: Any, g: Any) -> Any:
        wide = compute_dtype(p.dtype)
        return jnp.abs(p.astype(wide) * g.astype(wide))

    def moved(i: Any, s: Any) -> Any:
        return beta1 * s + (1 - beta1) * i

    def strayed(i: Any, s: Any, u: Any) -> Any:
        return beta2 * u + (1 - beta2) * jnp.abs(i - s)

    now = {p: on_components(product, w, of[p]) for p, w in nodes.items()}
    mean = {p: on_components(moved, i, seen.sensitivity[p]) for p, i in now.items()}
    off = {
        p: on_components(strayed, i, mean[p], seen.uncertainty[p])
        for p, i in now.items()
    }
    return Importance(mean, off)


def scores(seen: Importance) -> dict[str, jax.Array]:
    """How much each component matters, `{path: [*stack, rank]}`.

    s = S U for each element; the score of component k is the mean of s over A's in
    axes, plus the mean over B's out axes, plus e's s where there is an e.

    References: Zhang et al. 2023, eqs. 7 and 11. https://arxiv.org/abs/2303.10512
    """

    def one(s: LoraWeight, u: LoraWeight) -> jax.Array:
        both = on_components(lambda x, y: x * y, s, u)
        n = len(s.layout.stack)
        total = both.a.mean(tuple(range(n, both.a.ndim - 1)))
        total += both.b.mean(tuple(range(n + 1, both.b.ndim)))
        return total + both.extra["e"] if gated(both) else total

    return {p: one(s, seen.uncertainty[p]) for p, s in seen.sensitivity.items()}


def components_at(
    step: chex.Numeric, first: int, last: int, *, warmup: int, final: int, total: int
) -> chex.Numeric:
    """How many components to keep at a step: a cubic from `first` down to `last`.

    It is `first` until step `warmup`, `last` from step `total − final` on, and between
    them last + (first − last)(1 − (step − warmup)/(total − final − warmup))³, rounded
    down.

    Args:
      step: an int, or an array under jit (float32 may then be one component off).
      first: the count at the start, such as the sum of ranks over leaves and stacked
        layers.
      last: the count at the end.
      warmup: how many steps at the start keep `first`.
      final: how many steps at the end keep `last`.
      total: the number of all steps.

    Returns:
      An int, or an int32 array `[]` under jit.

    Raises:
      LoraError: `last` is not between 1 and `first`, or `warmup` and `final` leave no
        step between them.

    References: Zhang et al. 2023, appendix A. https://arxiv.org/abs/2303.10512
    """
    if not 0 < last <= first or min(warmup, final) < 0 or warmup + final >= total:
        raise LoraError(
            f"components_at: first={first}, last={last}, warmup={warmup}, "
            f"final={final}, total={total}. Expected 0 < last <= first and "
            "warmup + final < total."
        )
    share = (step - warmup) / (total - final - warmup)
    if isinstance(step, numbers.Integral):
        rest = 1 - min(max(share, 0), 1)
        return math.floor(last + (first - last) * rest**3)
    rest = 1 - jnp.clip(share, 0, 1)
    return jnp.floor(last + (first - last) * rest**3).astype(jnp.int32)


def top(found: Mapping[str, chex.Array], count: chex.Numeric) -> dict[str, jax.Array]:
    """Which components are the `count` best of all leaves, `{path: [*stack, rank]}`.

    Args:
      found: what `scores` returns.
      count: an int, or an integer array under jit; exactly this many are kept.

    Returns:
      `{path: booleans [*stack, rank]}`.
    """
    return best(found, count)


def masked(adapted: Any, kept: Kept) -> Any:
    """The tree with the components that are not kept set to zero; shapes stay.

    Where there is an e, e is set to zero and A and B stay, as published; elsewhere row
    k of B is set to zero.  Either still gets gradients, so a component can come back.

    Args:
      adapted: an adapted tree, or an adapter.
      kept: what `top` returns.
    """
    nodes = components_of("masked", adapted)
    require_paths("masked: kept", kept, nodes)

    def one(w: LoraWeight, keep: Any) -> LoraWeight:
        if gated(w):
            e = w.extra["e"]
            e = jnp.where(keep, e, jnp.zeros((), e.dtype))
            return dataclasses.replace(w, extra={**w.extra, "e": e})
        rows = jnp.expand_dims(keep, tuple(range(keep.ndim, w.b.ndim)))
        b = jnp.where(rows, w.b, jnp.zeros((), w.b.dtype))
        return dataclasses.replace(w, b=b)

    return replaced(adapted, {p: one(w, kept[p]) for p, w in nodes.items()})


def compacted(adapted: Any, kept: Kept) -> Any:
    """The tree with smaller ranks: components that are not kept are removed.

    alpha falls with the rank, so that the scale stays and the model is that of
    `masked(adapted, kept)`.  The layers of a stack share one rank, the largest of
    theirs; the others are padded with zero components.

    Args:
      adapted: an adapted tree with its bases.
      kept: what `top` returned, as arrays, not tracers: shapes depend on the values.

    Returns:
      The tree.  A leaf that keeps no component is plain and frozen again.  The
      optimizer's old state does not fit: make a new one.

    Raises:
      LoraError: a leaf has no base, `kept` lacks a leaf or has another one, or `kept`
        holds tracers.
    """
    nodes = components_of("compacted", adapted)
    require_paths("compacted: kept", kept, nodes)
    fail(
        f"compacted: kept has a tracer at '{path}', and ranks depend on its values. "
        "Call compacted outside of jax.jit."
        for path, keep in kept.items()
        if isinstance(keep, Tracer)
    )
    fail(
        f"compacted: '{path}' is an adapter without its base. Write flora.join."
        for path, w in nodes.items()
        if w.base is None
    )
    pruned = components_of("compacted", masked(adapted, kept))
    new = {p: _cut(w, np.asarray(kept[p])) for p, w in pruned.items()}
    return replaced(adapted, new)


def _cut(w: LoraWeight, keep: np.ndarray) -> Any:
    rank = int(keep.sum(-1).max(initial=0))
    if rank == 0:
        return w.base
    n = len(w.layout.stack)
    order = np.argsort(~keep, axis=-1, kind="stable")[..., :rank]

    def taken(x: Any, axis: int) -> Any:
        at = np.expand_dims(order, tuple(i for i in range(n, x.ndim) if i != axis))
        return compiled(jnp.take_along_axis, place_of(x), ("axis",))(x, at, axis=axis)

    a, b = taken(w.a, w.a.ndim - 1), taken(w.b, n)
    made = dataclasses.replace(w, a=a, b=b, rank=rank, alpha=alpha_at(w, rank))
    if not gated(w):
        return made
    return dataclasses.replace(made, extra={**w.extra, "e": taken(w.extra["e"], n)})


def orthogonality(adapted: Any) -> jax.Array:
    """The mean of ‖AᵀA − I‖_F and, where there is an e, of ‖B Bᵀ − I‖_F; for a loss.

    Without an e the singular values are in B, and only A should be orthonormal.  This
    penalty raises |p·∂L/∂p| too and can drown what the loss says about components, so
    give `observe` the gradients of the loss without it.

    References: Zhang et al. 2023, eq. 4. https://arxiv.org/abs/2303.10512
    """
    found = []
    for w in components_of("orthogonality", adapted).values():
        a, b = stacked(w)
        for x in (a, b.mT) if gated(w) else (a,):
            x = x.astype(compute_dtype(x.dtype))
            off = jnp.matmul(x.mT.conj(), x, precision="highest") - jnp.eye(x.shape[-1])
            square = (off * off.conj()).real.sum((1, 2))
            safe = jnp.where(square > 0, square, 1)  # √ has no gradient at 0
            found.append(jnp.where(square > 0, jnp.sqrt(safe), 0))
    return jnp.concatenate(found).mean()
