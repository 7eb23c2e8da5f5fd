"""Tables for people: `summary` and `coverage`."""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from flora._discover import Finding, discover
from flora._errors import LoraError, LoraTypeError, human_bytes
from flora._interpreter import Use
from flora._select import named_leaves
from flora._trace import is_array
from flora._weight import Layout, LoraWeight, Trained


@dataclasses.dataclass(frozen=True)
class LeafSummary:
    """One leaf of a tree.  Sizes in elements; `bytes` counts base and factors."""

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
            (r.path, r.role, str(r.shape), r.dtype, str(r.layout or ""), str(r.rank or ""),
             "" if r.alpha is None else f"{r.alpha:g}", f"{r.parameters:,}",
             f"{r.trained:,}", human_bytes(r.bytes)) for r in shown
        ]
        rest = [r for r in self.rows if r not in shown]
        if rest:
            cells.append((
                f"{len(rest)} other leaves", "frozen", "", "", "", "", "",
                f"{sum(r.parameters for r in rest):,}", "0",
                human_bytes(sum(r.bytes for r in rest)),
            ))
        return _table(
            f"{self.trained:,} of {self.parameters:,} parameters train ({share:.2f} %); "
            f"{human_bytes(self.bytes)}, of them {human_bytes(self.trained_bytes)} trained",
            ("leaf", "role", "shape", "dtype", "layout", ">rank", ">alpha", ">parameters",
             ">trained", ">bytes"),
            cells,
        )

    def __str__(self) -> str:
        return _plain(self)


def summary(tree: Any) -> Summary:
    """Leaf by leaf: role, shape, layout, rank, parameters and bytes.

    The table shows the leaves that train and sums up the others; `.rows` has them all.

    Args:
      tree: an adapted or plain tree, of arrays or `ShapeDtypeStruct`s.

    Returns:
      A `Summary`: `.rows` and totals as data; prints as a table.
    """
    named, _ = named_leaves(tree)
    return Summary(tuple(_summarize(path, leaf) for path, leaf in named))


def _summarize(path: str, leaf: Any) -> LeafSummary:
    if isinstance(leaf, LoraWeight):
        shape, dtype = _shape_dtype(leaf.base)
        factors = [_shape_dtype(leaf.a), _shape_dtype(leaf.b)]
        trained = sum(math.prod(s) for s, _ in factors)
        trained_bytes = sum(math.prod(s) * _itemsize(d) for s, d in factors)
        size = math.prod(shape) if leaf.base is not None else 0
        return LeafSummary(path, "lora", shape, str(dtype), leaf.layout, leaf.rank,
                           leaf.alpha, size, trained,
                           size * _itemsize(dtype) + trained_bytes, trained_bytes)
    role, value = ("train", leaf.value) if isinstance(leaf, Trained) else ("frozen", leaf)
    shape, dtype = _shape_dtype(value)
    size = math.prod(shape)
    size_bytes = size * _itemsize(dtype)
    trains = role == "train"
    return LeafSummary(path, role, shape, str(dtype), None, None, None, size,
                       size if trains else 0, size_bytes, size_bytes if trains else 0)


def _shape_dtype(x: Any) -> tuple[tuple[int, ...], Any]:
    if x is None:
        return (), ""
    if is_array(x):
        return tuple(x.shape), x.dtype
    return jnp.shape(x), jnp.result_type(x)


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 0)


@dataclasses.dataclass(frozen=True)
class LeafCoverage:
    """What a function does with one leaf.

    Attributes:
      path: the leaf.
      shape: its shape.
      dtype: its dtype.
      status: 'factored', 'dense' or 'unused'.
      layout: the layout that its uses imply, or `None`.
      uses: the operations that read it, with the user's source lines.
      reason: why it is dense, or ''.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    layout: Layout | None
    uses: tuple[Use, ...]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What `coverage` found; prints as a table."""

    rows: tuple[LeafCoverage, ...]

    def __getitem__(self, path: str) -> LeafCoverage:
        for row in self.rows:
            if row.path == path:
                return row
        raise LoraError(f"coverage has no leaf '{path}'. See .rows for all "
                        f"{len(self.rows)}.")

    def with_status(self, status: str) -> list[str]:
        """The paths of the leaves of one status."""
        return [row.path for row in self.rows if row.status == status]

    def __rich__(self) -> Any:
        counts = ", ".join(f"{len(self.with_status(s))} {s}"
                           for s in ("factored", "dense", "unused"))
        return _table(
            counts, ("leaf", "shape", "status", "layout", "read by", ">dense bytes"),
            [(r.path, str(r.shape), r.status, str(r.layout or ""), _read_by(r),
              human_bytes(max((u.bytes for u in r.uses), default=0))
              if r.status == "dense" else "") for r in self.rows],
        )

    def __str__(self) -> str:
        return _plain(self)


def _read_by(row: LeafCoverage) -> str:
    uses = [u for u in row.uses if u.firm]
    if row.status == "dense":
        uses = [u for u in row.uses if u.dense] or uses
    lines = list(dict.fromkeys(f"{u.primitive} at {u.source}" for u in uses))
    return "\n".join([*lines, *([row.reason] if row.reason else [])])


def coverage(fn: Callable, tree: Any, *args: Any, **kwargs: Any) -> Coverage:
    """For every array leaf: what reads it, where, and whether it can be factored.

    Traces `fn(tree, *args, **kwargs)` once, abstractly.  Works before anything is
    adapted, so it helps to choose targets.

    Args:
      fn: a function of a parameter tree first.
      tree: a plain or adapted tree, of arrays or `ShapeDtypeStruct`s.
      *args: the other arguments of one call.
      **kwargs: likewise.

    Returns:
      A `Coverage`: 'factored' leaves with their layouts, 'dense' ones (read by an
      operation that has no factored rule) with operation, source line and bytes, and
      'unused' ones.
    """
    if not callable(fn):
        raise LoraTypeError(f"coverage: fn is a {type(fn).__name__}; expected the function "
                            "to trace. The order is flora.coverage(fn, tree, *args).")
    named, treedef = named_leaves(tree)
    plain = [(path, _plain_leaf(leaf)) for path, leaf in named]
    paths = {i: path for i, (path, leaf) in enumerate(plain)
             if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)}
    found = discover(fn, [leaf for _, leaf in plain], treedef, args, kwargs, paths)
    return Coverage(tuple(
        _covered(path, leaf, found[path]) for path, leaf in plain if path in found
    ))


def _plain_leaf(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return leaf.base
    return leaf.value if isinstance(leaf, Trained) else leaf


def _covered(path: str, leaf: Any, finding: Finding) -> LeafCoverage:
    reason = finding.conflict or ("returned by the function" if finding.returned else "")
    return LeafCoverage(path, tuple(leaf.shape), str(leaf.dtype), finding.status,
                        finding.layout, finding.uses, reason)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left",
                         no_wrap=name[0] == ">", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _plain(report: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDE).print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))


_WIDE = 240  # a table takes the columns that it needs, and these at most
