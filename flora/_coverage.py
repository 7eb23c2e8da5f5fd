"""`coverage`: what a function does with each leaf."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flora._discover import Finding, discover
from flora._errors import LoraError, LoraTypeError, human_bytes
from flora._interpreter import Use
from flora._select import named_leaves
from flora._tables import plain_text, table
from flora._trace import is_array
from flora._weight import Layout, LoraWeight, Trained


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
        raise LoraError(
            f"coverage has no leaf '{path}'. See .rows for all {len(self.rows)}."
        )

    def with_status(self, status: str) -> list[str]:
        """The paths of the leaves of one status."""
        return [row.path for row in self.rows if row.status == status]

    def __rich__(self) -> Any:
        counts = ", ".join(
            f"{len(self.with_status(s))} {s}" for s in ("factored", "dense", "unused")
        )
        return table(
            counts,
            ("leaf", "shape", "status", "layout", "read by", ">dense bytes"),
            [
                (
                    r.path,
                    str(r.shape),
                    r.status,
                    str(r.layout or ""),
                    _read_by(r),
                    human_bytes(max((u.bytes for u in r.uses), default=0))
                    if r.status == "dense"
                    else "",
                )
                for r in self.rows
            ],
        )

    def __str__(self) -> str:
        return plain_text(self)


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
        raise LoraTypeError(
            f"coverage: fn is a {type(fn).__name__}; expected the function "
            "to trace. The order is flora.coverage(fn, tree, *args)."
        )
    named, treedef = named_leaves(tree)
    plain = [(path, _plain_leaf(leaf)) for path, leaf in named]
    paths = {
        i: path
        for i, (path, leaf) in enumerate(plain)
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    found = discover(fn, [leaf for _, leaf in plain], treedef, args, kwargs, paths)
    return Coverage(
        tuple(
            _covered(path, leaf, found[path]) for path, leaf in plain if path in found
        )
    )


def _plain_leaf(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return leaf.base
    return leaf.value if isinstance(leaf, Trained) else leaf


def _covered(path: str, leaf: Any, finding: Finding) -> LeafCoverage:
    reason = finding.conflict or (
        "returned, changed, by the function" if finding.returned else ""
    )
    return LeafCoverage(
        path,
        tuple(leaf.shape),
        str(leaf.dtype),
        finding.status,
        finding.layout,
        finding.uses,
        reason,
    )
