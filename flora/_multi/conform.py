"""Whether adapters fit each other; one leaf's factors at another rank or scale."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._algebra.variants import Columns, DoRA
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.paths import path_of
from flora._tree.weight import LoraWeight, Trained, is_node, uniform


def stop(x: Any) -> bool:
    """Whether x counts as one leaf of an adapter."""
    return x is None or is_node(x)


def flattened(
    adapter: Any, verb: str, *, blocks: bool = False
) -> tuple[list[tuple[str, Any]], Any]:
    """`([(path, node or None)], treedef)` of an adapter, checked to be one.

    Args:
      adapter: what `split` returned.
      verb: for messages.
      blocks: whether a leaf may be a variant with blocks.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=stop)
    named = [(path_of(keys), one_scale(x)) for keys, x in found]
    fail(
        f"{verb}: '{path}' is a {x.variant} that holds several adapters, and {verb} "
        "takes one a leaf. Leave that leaf out, or adapt all of its stack alike."
        for path, x in named
        if isinstance(x, LoraWeight) and x.blocks and not blocks
    )
    fail(
        f"{verb}: '{path}' is a weight of the base. Pass adapters: "
        "flora.split(adapted)[1]."
        for path, x in named
        if not stop(x) or (isinstance(x, LoraWeight) and x.base is not None)
    )
    if not any(is_node(x) for _, x in named):
        raise LoraError(
            f"{verb}: the adapter holds no trained leaf. Pass flora.split(adapted)[1]."
        )
    return named, treedef


def one_scale(node: Any) -> Any:
    """The node with the scales of its blocks in B, unless a variant has blocks."""
    if not isinstance(node, LoraWeight) or not node.blocks or node.variant is not None:
        return node

    def change(a: Any, b: Any) -> Any:
        return uniform(dataclasses.replace(node, a=a, b=b)).b

    b = on_arrays(change, node.a, node.b)
    alpha = float(node.rank)
    return dataclasses.replace(node, b=b, alpha=alpha, rank_stabilized=False, blocks=())


def aligned(
    adapters: Sequence[Any], verb: str, *, blocks: bool = False
) -> tuple[list[tuple[str, list[Any]]], Any]:
    """`([(path, nodes of that leaf)], treedef)` of adapters of one base.

    A node is `None` where an adapter has nothing, and an adapter may be `None`, which
    has nothing anywhere.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise LoraTypeError(
            f"{verb}: adapters is a {type(adapters).__name__}; expected a list of one "
            "or more adapters, such as [flora.split(adapted)[1], ...]."
        )
    each = [None if x is None else flattened(x, verb, blocks=blocks) for x in adapters]
    at = next((i for i, x in enumerate(each) if x is not None), None)
    if at is None:
        raise LoraError(f"{verb}: all adapters are None. Pass one that has leaves.")
    first, treedef = each[at]  # type: ignore[misc]
    for i, found in enumerate(each):
        if found is not None and found[1] != treedef:
            raise LoraError(_other_structure(verb, (at, i), first, found[0]))
    nothing = [(path, None) for path, _ in first]
    rows = [nothing if found is None else found[0] for found in each]
    return [
        (path, [named[j][1] for named in rows]) for j, (path, _) in enumerate(first)
    ], treedef


def require_alike(
    leaves: Sequence[tuple[str, list[Any]]], verb: str, *, gaps: bool = False
) -> None:
    """Raises unless the nodes of each leaf are of one kind, layout and shape.

    With `gaps` an adapter may have nothing where others have a node.
    """
    fail(
        f"{verb}: {p}"
        for path, nodes in leaves
        for p in misfits(path, nodes, gaps=gaps)
    )


def _other_structure(verb: str, at: tuple[int, int], first: Any, other: Any) -> str:
    ours, theirs = ({path for path, _ in named} for named in (first, other))
    parts = [
        f"only adapter {n} has {', '.join(map(repr, sorted(some)[:3]))}"
        for n, some in ((at[0], ours - theirs), (at[1], theirs - ours))
        if some
    ]
    return (
        f"{verb}: adapters {at[0]} and {at[1]} have other structures: "
        + ("; ".join(parts) or "they are other containers")
        + ". Pass adapters of one base."
    )


def misfits(path: str, nodes: Sequence[Any], *, gaps: bool = False) -> list[str]:
    """How the nodes of one leaf differ where they must not, each from the first."""
    some = [
        (i, _described(x)) for i, x in enumerate(nodes) if x is not None or not gaps
    ]
    return [
        f"'{path}' is {some[0][1]} in adapter {some[0][0]}, but {what} in adapter {i}. "
        "Adapters of one base and one target fit."
        for i, what in some
        if what != some[0][1]
    ]


def _described(x: Any) -> str:
    """All of a node that may not differ."""
    if x is None:
        return "frozen"
    if isinstance(x, Trained):
        return f"trained whole {shape_of(x.value)}"
    n = len(x.layout.stack)
    a, b = shape_of(x.a), shape_of(x.b)
    extra = jax.tree.map(shape_of, x.extra)
    return f"W with {x.layout}, A {a[:-1]} x rank, B rank x {b[:n] + b[n + 1 :]}" + (
        f", {x.variant} {extra}" if x.variant is not None or extra else ""
    )


def shape_of(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))


# --- One leaf ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RankAndScale:
    """The static settings of a node that can change without changing scale A B."""

    rank: int
    alpha: float
    rank_stabilized: bool = False

    @classmethod
    def of(cls, node: LoraWeight) -> "RankAndScale":
        return cls(node.rank, node.alpha, node.rank_stabilized)

    @property
    def scale(self) -> float:
        return LoraWeight(None, None, None, **dataclasses.asdict(self)).scale


def unit(rank: int) -> RankAndScale:
    """That rank, with scale 1."""
    return RankAndScale(rank, float(rank))


def common(nodes: Sequence[LoraWeight], rank: int) -> RankAndScale:
    """One rank and scale for all: their own where they agree, else scale 1."""
    if len({RankAndScale.of(x) for x in nodes}) == 1 and nodes[0].rank == rank:
        return RankAndScale.of(nodes[0])
    scale = nodes[0].scale
    agree = all(x.scale == scale for x in nodes) and scale * rank / rank == scale
    return RankAndScale(rank, scale * rank) if agree else unit(rank)


def conformed(node: LoraWeight, to: RankAndScale) -> LoraWeight:
    """The same scale A B with another rank and scale: zeros, and a factor in B.

    B comes in float32 or wider if it had to be multiplied.
    """
    new = dataclasses.replace(node, **dataclasses.asdict(to))
    more, factor = to.rank - node.rank, node.scale / new.scale
    at = len(node.layout.stack)

    def change(a: Any, b: Any) -> tuple[Any, Any]:
        if factor != 1:
            b = b.astype(jnp.promote_types(b.dtype, jnp.float32)) * factor
        if more:
            a = jnp.pad(a, [(0, more if i == a.ndim - 1 else 0) for i in range(a.ndim)])
            b = jnp.pad(b, [(0, more if i == at else 0) for i in range(b.ndim)])
        return a, b

    a, b = on_arrays(change, node.a, node.b)
    return dataclasses.replace(new, a=a, b=b)


def on_arrays(fn: Callable, *args: Any) -> Any:
    """`fn` of arrays, or abstractly where any of them is abstract."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args)):
        return jax.eval_shape(fn, *args)
    return fn(*args)


def conform_problems(path: str, node: LoraWeight, to: RankAndScale) -> list[str]:
    """What keeps a node from taking another rank and scale."""
    if to.rank < node.rank:
        return [
            f"'{path}' has rank {node.rank}, above {to.rank}. Pass a larger rank, or "
            "lower its own by flora.multi.combine([adapter], [1], rank=...)."
        ]
    free = isinstance(node.variant, DoRA | Columns | None)  # they read scale A B alone
    if RankAndScale.of(node) != to and not free:
        return [
            f"'{path}' is a {node.variant}, whose rank {node.rank} and scale "
            f"{node.scale:g} are its own. Pass adapters of one config."
        ]
    return []


def require_rank(rank: Any, verb: str) -> None:
    """Raises unless rank is `None` or an int of at least 1."""
    if rank is not None and (isinstance(rank, bool) or not _is_int(rank) or rank < 1):
        raise LoraError(f"{verb}: rank={rank!r}. Write an int of at least 1, or None.")


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer)


def not_finite(path: str, nodes: Sequence[Any]) -> list[str]:
    """A factor that is NaN or infinite would reach other adapters' rows: 0 · NaN."""
    return [
        f"'{path}' of adapter {i} is not finite. Leave that adapter out."
        for i, x in enumerate(nodes)
        if not all(map(_finite, jax.tree.leaves(x)))
    ]


def _finite(x: Any) -> bool:
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray):
        return True
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return True
    with jax.ensure_compile_time_eval():  # an array that a traced function closes over
        return bool(jnp.isfinite(x).all())
