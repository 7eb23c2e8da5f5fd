"""`combine`: one adapter from several."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._algebra.dense import delta
from flora._multi.conform import aligned, not_finite, require_alike, require_rank
from flora._multi.kinds import each_leaf, values_of, worked_out_alike
from flora._multi.lowrank import (
    compressed,
    flat_factors,
    merged,
    multiplied,
    recompressed,
)
from flora._tree.arrays import compute_dtype, is_array
from flora._tree.errors import LoraError, fail
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.matrices import matrices
from flora._tree.weight import LoraWeight, Trained
from flora._verbs.tables import plain_text, table

_IN_FACTORS = ("linear", "cat", "svd", "peft_linear")
_DENSE = ("magnitude_prune", "ties", "dare_linear", "dare_ties")


@dataclasses.dataclass(frozen=True)
class Combined:
    """An adapter, and how far it is from what it approximates.

    Attributes:
      adapter: for `flora.join`.
      errors: for each leaf ‖ΔW - wanted ΔW‖ / ‖wanted ΔW‖ (Frobenius).
    """

    adapter: Any
    errors: Mapping[str, float]

    def __rich__(self) -> Any:
        worst = max(self.errors.values(), default=0.0)
        rows = [(path, f"{error:.2e}") for path, error in self.errors.items()]
        return table(f"largest error {worst:.2e}", ("leaf", ">relative error"), rows)

    def __str__(self) -> str:
        return plain_text(self)


def combine(
    adapters: Sequence[Any],
    weights: Sequence[float],
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    key: Any = None,
    base: Any = None,
) -> Combined:
    """One adapter from several: ΔW = w₁ ΔW₁ + ... + w_k ΔW_k, or by a vote.

    With ΔW_i = scale_i A_i B_i, whatever alpha, rank or rank_stabilized each has:

    - "linear", "cat": the sum, exactly: A = [A_1 ... A_k], B = [w_i scale_i B_i]; the
      rank is the sum of ranks.  "linear" with `rank` is the best of that rank.
      Adapters may differ in targets, and in what trains whole: ΔW is zero where one
      has none.
    - "svd": the best of `rank`, by default the largest of the ranks.  Found in the
      factors: no dense ΔW is formed.
    - "peft_linear": what PEFT calls linear, A = Σ ±√|w_i scale_i| A_i and the same for
      B.  It contains products of A_i with B_j, so its ΔW is another one.
    - "magnitude_prune", "ties", "dare_linear", "dare_ties": on each dense ΔW, one leaf
      at a time, then the best approximation of `rank` (by default the largest).  Before
      that the rank is full, so look at the errors.  Pruning keeps int(density · n)
      elements of each matrix.  As in PEFT the vote is on the changes themselves, and
      weights, of any sign, count in the sum alone.

    Variants whose ΔW is of low rank (VeRA, AdaLoRA) combine as that; DoRA's is not, so
    it takes `base` and a method that approximates: "svd", a dense one, or a `rank`.

    Args:
      adapters: adapters of one base.
      weights: one number for each adapter, of any sign.
      method: one of the above.
      rank: of the result.
      density: the share of elements that stay, in (0, 1], for the dense methods.
      sign: how to vote on signs: 'total' (by the sum) or 'frequency' (by the count).
      key: a PRNG key for "dare_..."; it is consumed.  A leaf's draw depends only
        on the key and its path.
      base: the plain tree, for variants, and for leaves that train whole: v = v₀ +
        Σ w_i (v_i - v₀), or voted on.  Not needed where all adapters train a leaf whole
        and the weights of a sum add up to 1.

    Returns:
      A `Combined`: the adapter, of scale 1 and float32 or wider, with the settings of
      the first; and each leaf's error against the ΔW that the method defines.

    Raises:
      LoraError: the adapters do not fit each other, or one is not finite; the method
        needs another setting or does not take one; or a leaf needs the `base` that is
        missing.  All such leaves are named.

    Example:
      >>> import jax.numpy as jnp, flora, flora.multi
      >>> a, b = jnp.ones((2, 1)), jnp.ones((1, 2))
      >>> one = {"w": flora.LoraWeight(None, a, b, alpha=3.0)}
      >>> both = flora.multi.combine([one, one], [1.0, -0.5])
      >>> both.adapter["w"].rank, both.errors
      (2, {'w': 0.0})

    References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
      Yadav et al. 2023, TIES. https://arxiv.org/abs/2306.01708
      Yu et al. 2023, DARE. https://arxiv.org/abs/2311.03099
    """
    leaves, treedef = aligned(adapters, "combine", blocks=True)
    weights = _weights(weights, len(adapters))
    fail(_option_problems(weights, method, rank, density, sign))
    if method.startswith("dare"):
        require_key(key, "combine")
        key = consumed(key)
    elif key is not None:
        raise LoraError(f"combine: method={method!r} draws nothing. Leave out key=.")
    fail(f"combine: {p}" for path, nodes in leaves for p in not_finite(path, nodes))
    how, values = (
        _How(weights, method, rank, density or 1.0, sign, key),
        values_of(base),
    )
    leaves = each_leaf(
        "combine", leaves, lambda path, x: worked_out_alike(path, x, values)
    )
    require_alike(leaves, "combine", gaps=True)
    fail(p for path, nodes in leaves for p in _node_problems(path, nodes, how, values))
    errors: dict[str, float] = {}
    made = []
    for path, nodes in leaves:
        kinds = {type(x) for x in nodes} - {type(None)}
        if LoraWeight in kinds:
            node, errors[path] = _of_factors(path, nodes, how, values.get(path))
        else:
            node = _of_whole(path, nodes, how, values.get(path)) if kinds else None
        made.append(node)
    return Combined(treedef.unflatten(made), errors)


@dataclasses.dataclass(frozen=True)
class _How:
    """The arguments of `combine`, checked."""

    weights: list[float]
    method: str
    rank: int | None
    density: float
    sign: str
    key: Any

    @property
    def approximates(self) -> bool:
        """Whether the result is of a rank that need not hold all of it."""
        return self.method in (*_DENSE, "svd") or self.rank is not None

    def dense(self, path: str, tasks: Any) -> jax.Array:
        key = (
            None if self.key is None else jax.random.fold_in(self.key, path_salt(path))
        )
        options = {"density": self.density, "sign": self.sign, "key": key}
        return merged(tasks, self.weights, method=self.method, **options)


def _weights(weights: Any, count: int) -> list[float]:
    values = (
        list(weights) if isinstance(weights, Sequence | np.ndarray | jax.Array) else []
    )
    if len(values) != count or not all(map(_is_finite, values)):
        raise LoraError(
            f"combine: weights={weights!r}; expected {count} finite numbers, one for "
            "each adapter."
        )
    return [float(w) for w in values]


def _is_finite(x: Any) -> bool:
    scalar = isinstance(x, numbers.Real) or (is_array(x) and np.shape(x) == ())
    return scalar and math.isfinite(float(x))


def _option_problems(
    weights: list[float], method: Any, rank: Any, density: Any, sign: Any
) -> list[str]:
    require_rank(rank, "combine")
    if method not in (*_IN_FACTORS, *_DENSE):
        known = ", ".join((*_IN_FACTORS, *_DENSE))
        return [f"combine: method={method!r}. Write one of {known}."]
    found = []
    if method in ("cat", "peft_linear") and rank is not None:
        found.append(f"combine: method={method!r} has its own rank. Leave out rank=.")
    if (density is None) == (method in _DENSE):
        what = "needs" if density is None else "takes no"
        found.append(f"combine: method={method!r} {what} density=.")
    elif density is not None and not (_is_finite(density) and 0 < density <= 1):
        found.append(f"combine: density={density!r}. It must lie in (0, 1].")
    if sign not in ("total", "frequency"):
        found.append(f"combine: sign={sign!r}. Write 'total' or 'frequency'.")
    return found


def _node_problems(
    path: str, nodes: Sequence[Any], how: _How, values: Mapping[str, Any]
) -> list[str]:
    given = [x for x in nodes if x is not None]
    if any(isinstance(x, LoraWeight) for x in given):
        found = []
        if given[0].variant is not None and not how.approximates:
            found.append(
                f"combine: '{path}' is a DoRA in one of the adapters, whose change is "
                "no scale A B. Write method='svd' or rank=, which come near it, with "
                "base=."
            )
        ranks = sorted({x.rank for x in given})
        if how.method == "peft_linear" and (len(ranks) > 1 or len(given) < len(nodes)):
            what = f"has ranks {ranks}" if len(ranks) > 1 else "is not in all adapters"
            found.append(
                f"combine: '{path}' {what}; 'peft_linear' adds up factors "
                "of one rank. Write method='linear', which is exact for any."
            )
        return found
    if not given:
        return []
    first = given[0]
    sums_to_one = how.method in _IN_FACTORS and abs(sum(how.weights) - 1) < 1e-6
    value = values.get(path)
    if value is None and not sums_to_one:
        return [
            f"combine: '{path}' trains whole, and changes of it are to be weighted by "
            f"{how.weights}. Pass base=, the plain tree."
        ]
    if value is not None and np.shape(value) != np.shape(first.value):
        return [
            f"combine: '{path}' has shape {np.shape(first.value)} in the adapters and "
            f"{np.shape(value)} in base. Pass the base that they were trained on."
        ]
    return []


def variant_problems(verb: str, path: str, node: Any) -> list[str]:
    if not isinstance(node, LoraWeight) or node.variant is None:
        return []
    return [
        f"{verb}: '{path}' is a {node.variant}, whose change is no scale A B. Use "
        "flora.merge and flora.multi.extract."
    ]


def _of_factors(
    path: str, nodes: Sequence[Any], how: _How, base: Any
) -> tuple[LoraWeight, float]:
    """The combined node of a leaf, and its error."""
    some = [(x, w) for x, w in zip(nodes, how.weights, strict=True) if x is not None]
    given = [x for x, _ in some]
    rank, error = how.rank or max(x.rank for x in given), 0.0
    if how.method in _DENSE or given[0].variant is not None:
        tasks = _changes(nodes, base)
        if how.method in _DENSE:
            total = how.dense(path, tasks)
        else:
            total = jnp.tensordot(jnp.asarray(how.weights, tasks.dtype), tasks, 1)
        (a, b), error = compressed(total, rank)
    elif how.method == "peft_linear":
        a, b = _peft_linear(given, how.weights)
    else:
        pairs = [flat_factors(x) for x in given]
        a = jnp.concatenate([a for a, _ in pairs], 2)
        weighted = [w * x.scale * b for (x, w), (_, b) in zip(some, pairs, strict=True)]
        b = jnp.concatenate(weighted, 1)
        if how.method == "svd" or how.rank is not None:
            (a, b), error = recompressed(a, b, rank)
    return _as_node(given[0], a, b), error


def _changes(nodes: Sequence[Any], base: Any) -> jax.Array:
    """The dense ΔW of each adapter, `[k, stack, in, out]`; zeros where it has none."""

    def change(x: LoraWeight) -> jax.Array:
        if x.variant is None:
            a, b = flat_factors(x)
            return multiplied(a, x.scale * b)
        return matrices(delta(dataclasses.replace(x, base=base)), x.layout)

    found = [None if x is None else change(x) for x in nodes]
    like = next(x for x in found if x is not None)
    return jnp.stack([jnp.zeros_like(like) if x is None else x for x in found])


def _peft_linear(nodes: Sequence[LoraWeight], weights: list[float]) -> Any:
    made_a, made_b = [], []
    for x, w in zip(nodes, weights, strict=True):
        a, b = flat_factors(x)
        root = math.sqrt(abs(w * x.scale))
        made_a.append(math.copysign(root, w) * a)
        made_b.append(root * b)
    return sum(made_a[1:], made_a[0]), sum(made_b[1:], made_b[0])


def _as_node(like: LoraWeight, a: Any, b: Any) -> LoraWeight:
    """Flat factors of scale 1 in a node's shapes, plain."""
    n, rank = len(like.layout.stack), a.shape[2]
    return dataclasses.replace(
        like,
        base=None,
        key=None,
        extra=None,
        variant=None,
        a=a.reshape(*like.a.shape[:-1], rank),
        b=b.reshape(*like.b.shape[:n], rank, *like.b.shape[n + 1 :]),
        rank=rank,
        alpha=float(rank),
        rank_stabilized=False,
    )


def _of_whole(path: str, nodes: Sequence[Any], how: _How, old: Any) -> Any:
    """The combined value of a leaf that trains whole."""
    like = nodes[0].value
    dtype = compute_dtype(*(x.value.dtype for x in nodes))
    start = jnp.zeros(like.shape, dtype) if old is None else jnp.asarray(old, dtype)
    tasks = jnp.stack([x.value.astype(dtype) - start for x in nodes])
    if how.method in _DENSE:
        flat = tasks.reshape(len(nodes), 1, 1, -1)
        change = how.dense(path, flat).reshape(like.shape)
    else:
        change = jnp.tensordot(jnp.asarray(how.weights, dtype), tasks, 1)
    return Trained((start + change).astype(like.dtype))
