"""The value that the interpreter carries: a weight W and its factors, never summed.

W's axes are refined into *dims*.  A dim belongs to one axis of the stored weight and
has one role.  `axes` says which dims each axis of the value at hand is made of, so
transposing regroups and touches no array, and reshaping at most splits a dim.  The
factors always hold their dims sorted: `a` is `[*stack, *in, rank]` and `b` is
`[*stack, rank, *out]`.

During discovery the factors are `None` and the roles are not yet known.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from flora._errors import Unfactorable
from flora._weight import LoraWeight


@dataclasses.dataclass(frozen=True, order=True)
class Dim:
    """A piece of an axis of the stored weight.

    Attributes:
      at: `(axis, ...)`, which axis it came from and where in it; sorts in row order.
      size: its length.
      role: 'stack', 'in', 'out', or '' while it is being discovered.
    """

    at: tuple[int, ...]
    size: int
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Site:
    """What stays the same about a weight wherever it travels.

    Attributes:
      paths: the leaf; several where a function concatenates weights.  Not compared, so
        that layers that call one jitted function share its trace.
      scale: of A B.
      dropout: the rate.
      fallback: 'error' or 'materialize'.
    """

    paths: tuple[str, ...] = dataclasses.field(compare=False)
    scale: float = 1.0
    dropout: float = 0.0
    fallback: str = "error"

    @property
    def path(self) -> str:
        return "' and '".join(self.paths)


@dataclasses.dataclass(frozen=True)
class Factored:
    """W + scale A B inside the interpreter.

    Attributes:
      base: W; `None` for a pure A B.
      a: A, or `None` during discovery.
      b: B, likewise.
      key: dropout keys `[*stack]`, or `None`.
      axes: the dims that each axis is made of.
      site: path and settings.
      chosen: axes of the stored weight of which indices chose rows; such a value can
        pass for activations.
    """

    base: Any
    a: Any
    b: Any
    key: Any
    axes: tuple[tuple[Dim, ...], ...]
    site: Site
    chosen: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(d.size for d in axis) for axis in self.axes)

    def dims(self, *roles: str) -> list[Dim]:
        """The dims of those roles in the order in which a factor holds them."""
        found = [d for axis in self.axes for d in axis]
        return [d for r in roles for d in sorted(d for d in found if d.role == r)]


jax.tree_util.register_dataclass(
    Factored,
    data_fields=["base", "a", "b", "key"],
    meta_fields=["axes", "site", "chosen"],
)


def from_weight(weight: LoraWeight, path: str) -> Factored:
    """The interpreter's view of an adapted leaf."""
    axes = tuple(
        (Dim((i,), size, weight.layout.role(i)),)
        for i, size in enumerate(weight.base.shape)
    )
    site = Site((path,), weight.scale, weight.dropout, weight.fallback)
    key = weight.key if weight.dropout else None
    return Factored(weight.base, weight.a, weight.b, key, axes, site)


def undiscovered(base: Any, path: str) -> Factored:
    """A weight whose layout is still to be found."""
    axes = tuple((Dim((i,), size),) for i, size in enumerate(base.shape))
    return Factored(base, None, None, None, axes, Site((path,)))


def relayout(w: Factored, base: Any, axes: Sequence[tuple[Dim, ...]]) -> Factored:
    """The same weight with other axes: dims regrouped, split, or of size 1 dropped."""
    new = dataclasses.replace(w, base=base, axes=tuple(axes))
    if w.a is None:
        return new
    stack, in_, out = (tuple(d.size for d in new.dims(r)) for r in _ROLES)
    rank = w.a.shape[-1]
    return dataclasses.replace(
        new,
        a=lax.reshape(w.a, (*stack, *in_, rank)),
        b=lax.reshape(w.b, (*stack, rank, *out)),
        key=None if w.key is None else w.key.reshape(stack),
    )


_ROLES = ("stack", "in", "out")


def per_dim(
    w: Factored,
    base: Any,
    axes: Sequence[tuple[Dim, ...]],
    fn: Callable[[Any, dict[int, Dim]], Any],
) -> Factored:
    """The same weight after `fn(array, {position: old dim})` acted on each array."""
    new = dataclasses.replace(w, base=base, axes=tuple(axes))
    if w.a is None:
        return new
    stack, in_, out = (w.dims(r) for r in _ROLES)
    key = None if w.key is None else fn(w.key, dict(enumerate(stack)))
    after_rank = {len(stack) + 1 + i: d for i, d in enumerate(out)}
    a = fn(w.a, dict(enumerate([*stack, *in_])))
    b = fn(w.b, dict(enumerate(stack)) | after_rank)
    return dataclasses.replace(new, a=a, b=b, key=key)


def sole_dim(w: Factored, axis: int) -> Dim:
    """The dim of an axis that consists of just one."""
    if len(w.axes[axis]) != 1:
        raise Unfactorable(f"axis {axis} joins several axes of the stored weight")
    return w.axes[axis][0]


def split_axes(
    axes: Sequence[tuple[Dim, ...]], shape: Sequence[int]
) -> tuple[tuple[Dim, ...], ...]:
    """Refines the dims of `axes` so that they group, in row order, into `shape`."""
    if 0 in shape:
        raise Unfactorable("a weight with no elements")
    todo = [d for axis in axes for d in axis if d.size != 1][::-1]
    units = [d for axis in axes for d in axis if d.size == 1]
    grouped = []
    for size in shape:
        group: list[Dim] = []
        while size > 1:
            dim = todo.pop()
            if size % dim.size == 0:
                group.append(dim)
                size //= dim.size
            elif dim.size % size == 0:
                group.append(dataclasses.replace(dim, at=(*dim.at, 0), size=size))
                rest = dim.size // size
                todo.append(dataclasses.replace(dim, at=(*dim.at, 1), size=rest))
                size = 1
            else:
                raise Unfactorable("a reshape that regroups the weight's elements")
        grouped.append(tuple(group))
    return _keep_units(grouped, units)


def _keep_units(
    grouped: list[tuple[Dim, ...]], units: list[Dim]
) -> tuple[tuple[Dim, ...], ...]:
    """Hands dims of size 1 back to axes of size 1, in order; the others drop out."""
    return tuple(g if g or not units else (units.pop(0),) for g in grouped)


@dataclasses.dataclass(frozen=True)
class Views:
    """The factors of a weight as labelled arrays.

    Attributes:
      a, b: the factors.
      a_labels, b_labels: one label an axis; the rank's label is `RANK`.
      segments: for each axis of W its `(label, size)`s; more than one where the axis
        mixes roles.
    """

    a: Any
    b: Any
    a_labels: tuple[Any, ...]
    b_labels: tuple[Any, ...]
    segments: tuple[tuple[tuple[Any, int], ...], ...]


RANK = "rank"


def views(w: Factored, name: Any) -> Views:
    """Labels the factors by the axes of W that they belong to.

    Neighbouring dims of an axis that share a role form one label `(name, axis, i)`.
    """
    segments: list[list[tuple[Any, str, list[Dim]]]] = []
    for i, axis in enumerate(w.axes):
        runs: list[tuple[Any, str, list[Dim]]] = []
        for dim in axis:
            if runs and runs[-1][1] == dim.role:
                runs[-1][2].append(dim)
            else:
                runs.append(((name, i, len(runs)), dim.role, [dim]))
        segments.append(runs)
    every = [run for runs in segments for run in runs]

    def view(array: Any, before: str, after: str, rank_at: int):
        runs = [run for role in (before, after) for run in every if run[1] == role]
        held = w.dims(before, after)
        perm = [held.index(d) for run in runs for d in run[2]]
        perm = [i + (i >= rank_at) for i in perm]
        perm.insert(rank_at, rank_at)
        labels = [run[0] for run in runs]
        sizes = [math.prod(d.size for d in run[2]) for run in runs]
        at = len(runs) if rank_at == len(held) else sum(r[1] == before for r in runs)
        labels.insert(at, RANK)
        sizes.insert(at, array.shape[rank_at])
        return lax.reshape(lax.transpose(array, perm), sizes), tuple(labels)

    a, a_labels = view(w.a, "stack", "in", len(w.dims("stack", "in")))
    b, b_labels = view(w.b, "stack", "out", len(w.dims("stack")))
    shown = tuple(
        tuple((label, math.prod(d.size for d in dims)) for label, _, dims in runs)
        for runs in segments
    )
    return Views(a, b, a_labels, b_labels, shown)
