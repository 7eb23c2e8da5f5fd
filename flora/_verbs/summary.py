"""`summary`: what a tree holds, leaf by leaf."""

import collections
import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.arrays import bits_of, is_array
from flora._tree.errors import human_bytes
from flora._tree.layout import Layout
from flora._tree.paths import named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, Trained, factor_sizes, trained_parts
from flora._verbs.tables import plain_text, table


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """One leaf of a tree.  Sizes in elements; `bytes` counts base and factors.

    `full_rank` is min(in, out): A B has no more, whatever a larger `rank` costs.  Where
    adapters of several ranks or scales lie in a leaf, `rank` is the columns of A,
    `alpha` is `None`, and `adapters` says how they differ.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    rank: int | None
    alpha: float | None
    parameters: int
    trained: int
    bytes: int
    trained_bytes: int
    full_rank: int | None = None
    adapters: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found; prints as a table."""

    rows: tuple[LeafSummary, ...]

    @property
    def parameters(self) -> int:
        """Elements of the plain tree."""
        return sum(row.parameters for row in self.rows)

    @property
    def trained(self) -> int:
        """Elements that train."""
        return sum(row.trained for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def trained_bytes(self) -> int:
        return sum(row.trained_bytes for row in self.rows)

    def __rich__(self) -> Any:
        share = 100 * self.trained / max(self.parameters, 1)
        shown = [r for r in self.rows if r.role != "frozen"] or list(self.rows)
        cells = [
            (
                r.path,
                r.role,
                str(r.shape),
                r.dtype,
                str(r.layout or ""),
                r.adapters or _rank(r),
                "" if r.alpha is None else f"{r.alpha:g}",
                f"{r.parameters:,}",
                f"{r.trained:,}",
                human_bytes(r.bytes),
            )
            for r in shown
        ]
        rest = [r for r in self.rows if r not in shown]
        if rest:
            cells.append(
                (
                    f"{len(rest)} other leaves",
                    "frozen",
                    "",
                    "",
                    "",
                    "",
                    "",
                    f"{sum(r.parameters for r in rest):,}",
                    "0",
                    human_bytes(sum(r.bytes for r in rest)),
                )
            )
        return table(
            f"{self.trained:,} of {self.parameters:,} parameters train "
            f"({share:.2f} %); {human_bytes(self.bytes)}, of them "
            f"{human_bytes(self.trained_bytes)} trained",
            (
                "leaf",
                "role",
                "shape",
                "dtype",
                "layout",
                ">rank",
                ">alpha",
                ">parameters",
                ">trained",
                ">bytes",
            ),
            cells,
        )

    def __str__(self) -> str:
        return plain_text(self)


def summary(tree: Any) -> Summary:
    """Leaf by leaf: role, shape, layout, rank, parameters and bytes.

    The table shows the leaves that train and sums up the others; `.rows` has them all.
    A rank above min(in, out) reads '16 > 8': it computes what rank 8 would, for more.

    Args:
      tree: an adapted or plain tree, of arrays or `ShapeDtypeStruct`s.

    Returns:
      A `Summary`: `.rows` and totals as data; prints as a table.
    """
    named, _ = named_leaves(tree)
    return Summary(tuple(_summarize(path, leaf) for path, leaf in named))


def _rank(row: LeafSummary) -> str:
    """The rank, marked where A B cannot have it."""
    rank, full = row.rank, row.full_rank
    if not isinstance(rank, int) or not isinstance(full, int) or rank <= full:
        return str(row.rank or "")
    return f"{row.rank} > {row.full_rank}"


def _full_rank(leaf: LoraWeight) -> int | None:
    """min(in, out), which the factors tell of an adapter too."""
    if not (is_array(leaf.a) and is_array(leaf.b)):
        return None
    _, in_, out = factor_sizes(leaf)
    return min(math.prod(in_), math.prod(out))


def _summarize(path: str, leaf: Any) -> LeafSummary:
    if isinstance(leaf, LoraWeight):
        shape, dtype = _shape_dtype(leaf.base)
        held = [_shape_dtype(x) for x in (leaf.a, leaf.b, *(leaf.extra or {}).values())]
        factors = [_shape_dtype(x) for x in trained_parts(leaf).values()]
        trained = sum(math.prod(s) for s, _ in factors) - _idle(leaf)
        held_bytes = sum(math.prod(s) * _itemsize(d) for s, d in held)
        trained_bytes = sum(math.prod(s) * _itemsize(d) for s, d in factors)
        size = math.prod(shape) if leaf.base is not None else 0
        return LeafSummary(
            path,
            "lora",
            shape,
            str(dtype),
            leaf.layout,
            leaf.rank,
            None if leaf.blocks else leaf.alpha,
            size,
            trained,
            _bytes(leaf.base) + held_bytes,
            trained_bytes,
            _full_rank(leaf),
            _adapters(leaf),
        )
    role, value = (
        ("train", leaf.value) if isinstance(leaf, Trained) else ("frozen", leaf)
    )
    shape, dtype = _shape_dtype(value)
    size = math.prod(shape)
    size_bytes = _bytes(value)
    trains = role == "train"
    return LeafSummary(
        path,
        role,
        shape,
        str(dtype),
        None,
        None,
        None,
        size,
        size if trains else 0,
        size_bytes,
        size_bytes if trains else 0,
    )


def _idle(leaf: LoraWeight) -> int:
    """How many elements of A and B lie outside of all blocks."""
    if not leaf.blocks:
        return 0
    stack, in_, out = factor_sizes(leaf)
    size = math.prod(leaf.a.shape) + math.prod(leaf.b.shape)
    for block in leaf.blocks:
        first, end = block.columns or (0, math.prod(out))
        matrices = math.prod(stack[len(block.index) :])
        size -= matrices * block.rank * (math.prod(in_) + end - first)
    return size


def _adapters(leaf: LoraWeight) -> str:
    """The ranks of a leaf's blocks and how many have each, such as '4 (×2), 8'."""
    counts = collections.Counter(block.rank for block in leaf.blocks)
    return ", ".join(
        f"{rank} (×{n})" if n > 1 else str(rank) for rank, n in sorted(counts.items())
    )


def _shape_dtype(x: Any) -> tuple[tuple[int, ...], Any]:
    """Of an array or a Python number; `(0,)` and the type's name for other leaves."""
    if is_array(x):
        return tuple(x.shape), x.dtype
    if is_quantized(x):
        return x.shape, "+".join(str(part.dtype) for part in jax.tree.leaves(x))
    if isinstance(x, numbers.Number):
        return (), jnp.result_type(x)
    return (0,), "" if x is None else type(x).__name__


def _bytes(x: Any) -> int:
    """Bytes of an array, or of all arrays of a weight stored in fewer bits, packed."""
    if is_quantized(x):
        bits = [part.size * bits_of(part.dtype) for part in jax.tree.leaves(x)]
        return sum(bits) // 8
    shape, dtype = _shape_dtype(x)
    return math.prod(shape) * _itemsize(dtype)


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 0)
