"""`coverage`: what a function does with each leaf, and what adapting it would cost."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from flora._trace.discover import Finding, discover
from flora._trace.interpret import Use
from flora._trace.roles import Parts, parts_in
from flora._trace.stage import stage
from flora._tree.arrays import bits_of, is_array
from flora._tree.errors import LoraError, LoraTypeError, human_bytes
from flora._tree.layout import Layout
from flora._tree.paths import named_leaves
from flora._tree.quantized import abstract
from flora._tree.weight import LoraWeight, base_of
from flora._verbs.tables import plain_text, table

STATUSES = ("factored", "dense", "unused", "vector", "integer")
ROLES = ("linear", "conv", "embedding", "attention", "head")
_ROLE_OF = {
    "dot_general": "linear",
    "ragged_dot_general": "linear",
    "conv_general_dilated": "conv",
    "gather": "embedding",
    "dynamic_slice": "embedding",
    "output": "embedding",
}


@dataclasses.dataclass(frozen=True)
class LeafCoverage:
    """What a function does with one leaf.

    Attributes:
      path: the leaf.
      shape: its shape.
      dtype: its dtype.
      status: 'factored', 'dense', 'unused', 'vector': too few axes for factors, those
        of a stack aside, or met element by element only; or 'integer'.
      layout: the layout that its uses imply, or `None`.
      uses: the operations that read it, with the user's source lines.
      reason: why it is dense, or ''.
      roles: of a factored leaf, some of 'linear' (multiplied), 'conv' (convolved),
        'embedding' (looked up, by indices or by one-hot products), 'attention' (makes
        queries, keys or values, or takes what attention gives), 'head' (nothing is
        multiplied after it).
      rank: that of its factors, in an adapted tree.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    layout: Layout | None
    uses: tuple[Use, ...]
    reason: str = ""
    roles: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def full_rank(self) -> int:
        """min(in, out): A B has no higher rank, whatever a larger one costs."""
        _, in_, out = self._sizes()
        return min(in_, out)

    @property
    def rank_parameters(self) -> int:
        """Parameters of A and B for each unit of rank: stack · (in + out)."""
        stack, in_, out = self._sizes()
        return stack * (in_ + out)

    @property
    def rank_flops(self) -> float:
        """FLOPs of (x A) B for each unit of rank, as a share of x W's: 1/in + 1/out."""
        _, in_, out = self._sizes()
        return (in_ + out) / max(in_ * out, 1)

    def _sizes(self) -> tuple[int, int, int]:
        return self.layout.matrix(self.shape) if self.layout else (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Leaves that a coverage report chose; stands where a target pattern does."""

    paths: tuple[str, ...]
    what: str

    def __call__(self, path: str, leaf: Any) -> bool:
        return path in self._set

    @functools.cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.paths)

    def __repr__(self) -> str:
        return f"<{self.what}: {len(self.paths)} leaves>"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What `coverage` found; prints as a table.

    `all_linear`, `all_but_head`, `attention` and `select` are targets for `LoraConfig`.
    """

    rows: tuple[LeafCoverage, ...]

    def __getitem__(self, path: str) -> LeafCoverage:
        for row in self.rows:
            if isinstance(path, str) and row.path == path:
                return row
        raise LoraError(
            f"coverage has no leaf {path!r}. See .rows for all {len(self.rows)}."
        )

    def with_status(self, status: str) -> list[str]:
        """The paths of the leaves of one status."""
        if not isinstance(status, str) or status not in STATUSES:
            raise LoraError(f"status={status!r}; they are {', '.join(STATUSES)}.")
        return [row.path for row in self.rows if row.status == status]

    @property
    def all_linear(self) -> Selection:
        """What is multiplied, without the head and embeddings: PEFT's 'all-linear'."""
        return self.select("linear", without=("head", "embedding"))

    @property
    def all_but_head(self) -> Selection:
        """What is multiplied, convolved or looked up, without the head."""
        return self.select("linear", "conv", "embedding", without="head")

    @property
    def attention(self) -> Selection:
        """What makes queries, keys and values, and what takes attention's result."""
        return self.select("attention")

    def select(self, *roles: str, without: str | Sequence[str] = ()) -> Selection:
        """The factored leaves that play one of the roles and none of `without`.

        Args:
          *roles: some of 'linear', 'conv', 'embedding', 'attention', 'head'.
          without: one role, or several.

        Returns:
          A pattern for `LoraConfig.target`, `exclude` and the others.

        Raises:
          LoraError: there is no such role, or no leaf that plays it.
        """
        several = isinstance(without, tuple | list | set | frozenset)
        others = tuple(without) if several else (without,)
        given = (*roles, *others)
        unknown = [r for r in given if not isinstance(r, str) or r not in ROLES]
        if unknown or not roles:
            raise LoraError(
                f"select got the roles {unknown or '()'}; they are {', '.join(ROLES)}."
            )
        paths = tuple(
            row.path
            for row in self.rows
            if set(roles) & set(row.roles) and not set(others) & set(row.roles)
        )
        what = " or ".join(roles) + "".join(f", no {r}" for r in others)
        if not paths:
            known = {r: sum(r in row.roles for row in self.rows) for r in ROLES}
            counts = ", ".join(f"{n} {r}" for r, n in known.items())
            raise LoraError(f"No leaf is {what}. Of the factored leaves are {counts}.")
        return Selection(paths, what)

    def __rich__(self) -> Any:
        found = {s: len(self.with_status(s)) for s in STATUSES}
        counts = ", ".join(f"{n} {s}" for s, n in found.items() if n or s != "integer")
        factored = [r for r in self.rows if r.status == "factored"]
        total = sum(r.rank_parameters for r in factored)
        return table(
            f"{counts}; all that can be factored: {total:,} parameters a rank",
            (
                "leaf",
                "shape",
                "status",
                "roles",
                "layout",
                "read by",
                ">full rank",
                ">parameters/rank",
                ">FLOPs/rank",
                ">dense bytes",
            ),
            [_cells(row) for row in self.rows],
        )

    def __str__(self) -> str:
        return plain_text(self)


def _cells(row: LeafCoverage) -> tuple[str, ...]:
    factored, dense = row.status == "factored", row.status == "dense"
    size = max((u.bytes for u in row.uses), default=0)
    return (
        row.path,
        str(row.shape),
        row.status,
        ", ".join(row.roles),
        str(row.layout or ""),
        _read_by(row),
        _full_rank(row) if factored else "",
        f"{row.rank_parameters:,}" if factored else "",
        f"+{100 * row.rank_flops:.2f} %" if factored else "",
        human_bytes(size) if dense and size else "",
    )


def _full_rank(row: LeafCoverage) -> str:
    """min(in, out), marked where the factors' rank is above it."""
    above = row.rank is not None and row.rank > row.full_rank
    return f"{row.full_rank} < {row.rank}" if above else f"{row.full_rank}"


def _read_by(row: LeafCoverage) -> str:
    uses = [u for u in row.uses if u.binding]
    if row.status == "dense":
        uses = [u for u in row.uses if u.dense] or uses
    lines = dict.fromkeys(
        f"{u.primitive} at {u.source}"
        + (f" ({u.dense})" if u.dense and row.status == "dense" else "")
        for u in uses
    )
    return "\n".join([*lines, *([row.reason] if row.reason else [])])


def coverage(fn: Callable, tree: Any, *args: Any, **kwargs: Any) -> Coverage:
    """For every weight: what reads it, where, and whether it can be factored.

    Traces `fn(tree, *args, **kwargs)` once, abstractly.  Works before anything is
    adapted, so it helps to choose targets.

    Args:
      fn: a function of a parameter tree first.
      tree: a plain or adapted tree, of arrays or `ShapeDtypeStruct`s.
      *args: the other arguments of one call.
      **kwargs: likewise.

    Returns:
      A `Coverage`, of which `.rows` has the data and which prints as a table:
      'factored' leaves with layout, roles, full rank min(in, out) ('8 < 16' where the
      factors of an adapted tree have 16) and cost for each unit of rank, 'dense' ones
      (read by an operation that has no factored rule) with operation, source line and
      bytes, 'unused' ones, 'vector's (norms, biases, tables of positions, stacked or
      not), which `LoraConfig.train` can train whole, and 'integer's (int8 weights and
      other arrays of integers), which can do neither.
      `.all_linear`, `.all_but_head`, `.attention` and `.select(...)` choose targets by
      role.

    Example:
      >>> import jax.numpy as jnp, flora
      >>> def fn(params, x):
      ...     return jnp.tanh(x @ params["hidden"]) @ params["out"]
      >>> params = {"hidden": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}
      >>> report = flora.coverage(fn, params, jnp.ones((2, 4)))
      >>> report["out"].roles, report.all_linear.paths
      (('linear', 'head'), ('hidden',))
    """
    if not callable(fn):
        raise LoraTypeError(
            f"coverage: fn is a {type(fn).__name__}; expected the function "
            "to trace. The order is flora.coverage(fn, tree, *args)."
        )
    named, treedef = named_leaves(tree)
    plain = [(path, abstract(base_of(leaf))) for path, leaf in named]
    leaves = [leaf for _, leaf in plain]
    if not any(map(_is_floating, leaves)):
        raise LoraError(
            f"coverage: the tree ({type(tree).__name__}) has no floating arrays. "
            "Pass the parameters. The order is flora.coverage(fn, tree, *args)."
        )
    paths = {i: p for i, (p, x) in enumerate(plain) if _is_followed(x)}
    staged = stage(fn, leaves, treedef, args, kwargs, verb="flora.coverage")
    found = discover(staged, leaves, paths)
    parts = parts_in(staged, paths, found)
    ranks = {path: x.rank for path, x in named if isinstance(x, LoraWeight)}
    rows = (
        _covered(path, x, found.get(path), parts, ranks.get(path))
        for path, x in plain
        if _is_floating(x) or _is_integer(x)
    )
    return Coverage(tuple(rows))


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_integer(leaf: Any) -> bool:
    """Whether it may be a weight in fewer bits: a counter or a key is none."""
    ints = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
    return ints and len(leaf.shape) >= 1


def _is_followed(leaf: Any) -> bool:
    if _is_floating(leaf):
        return True
    return _is_integer(leaf) and len(leaf.shape) >= 2 and bits_of(leaf.dtype) <= 8


def _covered(
    path: str, leaf: Any, finding: Finding | None, parts: Parts, rank: int | None
) -> LeafCoverage:
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    if not _is_floating(leaf):
        layout, uses = (finding.layout, finding.uses) if finding else (None, ())
        reason = f"factors need a floating weight, and this one is {dtype}"
        return LeafCoverage(path, shape, dtype, "integer", layout, uses, reason)
    assert finding is not None
    status, reason = finding.status, finding.conflict
    roles = _roles(path, finding, parts) if status == "factored" else ()
    bare = status == "dense" and _is_vector(shape, finding)
    if bare or (status == "factored" and parts.are_vectors(path)):
        status, reason, roles = "vector", "", ()
    elif finding.returned and not reason:
        reason = "returned, changed, by the function"
    return LeafCoverage(
        path, shape, dtype, status, finding.layout, finding.uses, reason, roles, rank
    )


def _is_vector(shape: tuple[int, ...], finding: Finding) -> bool:
    """Whether a leaf has one axis, those of a stack aside, or is only met by elements.

    A norm's scale and a bias are as large as the features; activations repeat them.
    """
    stack = {i for use in finding.uses for i, r in use.roles if r == "stack"}
    if sum(n > 1 for i, n in enumerate(shape) if i not in stack) < 2:
        return True
    dense = finding.dense
    return bool(dense) and all(use.repeats for use in dense)


def _roles(path: str, finding: Finding, parts: Parts) -> tuple[str, ...]:
    found = {_ROLE_OF.get(use.primitive, "") for use in finding.uses if use.binding}
    if path in parts.looked_up:
        found |= {"embedding"}
        found -= set() if path in parts.multiplied else {"linear"}
    found |= {"attention"} if path in parts.attention else set()
    found |= {"head"} if path in parts.head else set()
    return tuple(role for role in ROLES if role in found)
