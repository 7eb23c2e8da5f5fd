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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._tree.errors import Unfactorable
from flora._tree.weight import LoraWeight, product_of


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
class Origin:
    """A leaf that a value was made of.

    Attributes:
      path: the leaf.
      axes: for the first index of a dim's `at` the leaf's axes that it stands for;
        `None` where each stands for itself.
    """

    path: str
    axes: Mapping[int, tuple[int, ...]] | None = None

    def axes_of(self, index: int) -> tuple[int, ...]:
        if self.axes is None:
            return (index,) if index >= 0 else ()
        return self.axes.get(index, ())


@dataclasses.dataclass(frozen=True)
class Site:
    """What stays the same about a weight wherever it travels.

    Attributes:
      origins: the leaf; several where a function joins or adds weights.  Not compared,
        so that layers that call one jitted function share its trace.
      scale: of A B.
      dropout: the rate.
      fallback: 'error' or 'materialize'.
      form: one of `_choice.FORMS`.
      between: what happens to x A before it meets B; `None` for nothing.
      sliced: whether it is the slice of a stack that a step of a loop takes.
    """

    origins: tuple[Origin, ...] = dataclasses.field(compare=False)
    scale: float = 1.0
    dropout: float = 0.0
    fallback: str = "error"
    form: str = "auto"
    between: Callable[[Any], Any] | None = None
    sliced: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(origin.path for origin in self.origins))

    @property
    def path(self) -> str:
        return "' and '".join(self.paths)

    def by_path(
        self, roles: Iterable[tuple[int, str]]
    ) -> Iterator[tuple[str, set[tuple[int, str]]]]:
        """`(index, role)` pairs as each leaf's own `(axis, role)` pairs."""
        for origin in self.origins:
            found = {(a, role) for i, role in roles for a in origin.axes_of(i)}
            yield origin.path, found


@dataclasses.dataclass(frozen=True)
class Factored:
    """(W + scale A B) ⊙ columns inside the interpreter.

    Attributes:
      base: W; `None` for a pure A B.
      a: A, or `None` during discovery.
      b: B, likewise.
      key: dropout keys `[*stack]`, or `None`.
      axes: the dims that each axis is made of.
      site: path and settings.
      chosen: axes of the stored weight of which indices chose rows; such a value can
        pass for activations.
      summed: whether axes were summed away; such a value is small and can be formed.
      columns: a factor for each output, `[*stack, *out]`, or `None`.  It stays apart:
        products are scaled, not W, so that its gradient needs no dense dW.
    """

    base: Any
    a: Any
    b: Any
    key: Any
    axes: tuple[tuple[Dim, ...], ...]
    site: Site
    chosen: tuple[int, ...] = ()
    summed: bool = False
    columns: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(d.size for d in axis) for axis in self.axes)

    def dims(self, *roles: str) -> list[Dim]:
        """The dims of those roles in the order in which a factor holds them."""
        found = [d for axis in self.axes for d in axis]
        return [d for r in roles for d in sorted(d for d in found if d.role == r)]


jax.tree_util.register_dataclass(
    Factored,
    data_fields=["base", "a", "b", "key", "columns"],
    meta_fields=["axes", "site", "chosen", "summed"],
)


@dataclasses.dataclass(frozen=True)
class Squared:
    """The squares of a weight's elements, on their way to a sum.

    Attributes:
      value: W², `[...]`.
      root: the weight.
    """

    value: Any
    root: Factored


jax.tree_util.register_dataclass(Squared, data_fields=["value", "root"], meta_fields=[])


def is_lazy(x: Any) -> bool:
    """Whether x is a weight, or the squares of one, that is not formed."""
    return isinstance(x, Factored | Squared)


def from_weight(weight: LoraWeight, path: str) -> Factored:
    """The interpreter's view of an adapted leaf."""
    product = product_of(weight)
    axes = tuple(
        (Dim((i,), size, weight.layout.role(i)),)
        for i, size in enumerate(weight.base.shape)
    )
    site = Site(
        (Origin(path),),
        weight.scale,
        weight.dropout,
        weight.fallback,
        weight.form,
        product.between,
    )
    key = weight.key if weight.dropout else None
    return Factored(
        weight.base, product.a, product.b, key, axes, site, columns=product.columns
    )


def undiscovered(base: Any, path: str, fallback: str = "error") -> Factored:
    """A weight whose layout is still to be found, or that has no factors."""
    axes = tuple((Dim((i,), size),) for i, size in enumerate(base.shape))
    site = Site((Origin(path),), fallback=fallback)
    return Factored(base, None, None, None, axes, site)


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
        columns=None if w.columns is None else lax.reshape(w.columns, (*stack, *out)),
    )


_ROLES = ("stack", "in", "out")


def flattened(w: Factored, at: Iterable[int] | None = None) -> Factored:
    """The same weight with one dim an axis (or each axis of `at`), numbered anew.

    All axes: by position, so that weights of other leaves compare.
    """
    first = _FRESH
    if at is not None:
        first += max([0, *(d.at[0] + 1 for axis in w.axes for d in axis)])
    mine = range(len(w.axes)) if at is None else at
    big = {i: tuple(d for d in w.axes[i] if d.size > 1) or w.axes[i][:1] for i in mine}
    w = relayout(w, w.base, [big.get(i, axis) for i, axis in enumerate(w.axes)])
    if any(len({d.role for d in dims}) > 1 for dims in big.values()):
        raise Unfactorable("an axis that joins axes of other roles")
    new = {
        i: Dim((first + i,), w.shape[i], dims[0].role)
        for i, dims in big.items()
        if dims
    }
    axes = tuple((new[i],) if i in new else axis for i, axis in enumerate(w.axes))
    renamed = {dim.at[0]: tuple(d.at[0] for d in big[i]) for i, dim in new.items()}
    kept = {d.at[0]: (d.at[0],) for axis in axes for d in axis if d not in new.values()}
    merged = dataclasses.replace(w, axes=axes, site=_renumbered(w.site, renamed | kept))
    if w.a is None:
        return merged

    parts = {d: big[i] for i, d in new.items()}

    def order(*roles: str) -> list[int]:
        """Where the dims of each new dim were, in the order of the new ones."""
        held = w.dims(*roles)
        found = [p for d in merged.dims(*roles) for p in parts.get(d, (d,))]
        return [held.index(d) for d in found]

    stack, a, b = order("stack"), order("stack", "in"), order("stack", "out")
    n = len(stack)
    merged = dataclasses.replace(
        merged,
        a=lax.transpose(w.a, [*a, len(a)]),
        b=lax.transpose(w.b, [*b[:n], n, *(i + 1 for i in b[n:])]),
        key=None if w.key is None else w.key.transpose(stack),
        columns=None if w.columns is None else lax.transpose(w.columns, b),
    )
    return relayout(merged, w.base, axes)


_FRESH = 1000  # above every axis of a stored weight


def _renumbered(site: Site, renamed: Mapping[int, tuple[int, ...]]) -> Site:
    def of(origin: Origin) -> Origin:
        axes = {
            new: tuple(sorted({a for i in old for a in origin.axes_of(i)}))
            for new, old in renamed.items()
        }
        return Origin(origin.path, axes)

    return dataclasses.replace(site, origins=tuple(map(of, site.origins)))


def swapped(w: Factored) -> Factored:
    """The same weight with in and out, and so A and B, called the other way round."""
    require_no_columns(w, "in and out axes that change places")
    role = {"in": "out", "out": "in"}
    axes = tuple(
        tuple(dataclasses.replace(d, role=role.get(d.role, d.role)) for d in axis)
        for axis in w.axes
    )
    new = dataclasses.replace(w, axes=axes)
    if w.a is None:
        return new
    n = len(w.dims("stack"))
    return dataclasses.replace(
        new, a=jnp.moveaxis(w.b, n, -1), b=jnp.moveaxis(w.a, -1, n)
    )


def grown(w: Factored, base: Any, axis: int, dim: Dim) -> Factored:
    """The same weight repeated along an axis of size 1, which becomes `dim`."""
    axes = list(w.axes)
    axes[axis] = ()
    w = relayout(w, base, axes)
    axes[axis] = (dim,)
    new = dataclasses.replace(w, axes=tuple(axes))
    if w.a is None:
        return new

    def repeat(array: Any, held: list[Dim], rank_at: int) -> Any:
        if dim not in held:
            return array
        at = held.index(dim)
        at += at >= rank_at
        shape = (*array.shape[:at], dim.size, *array.shape[at:])
        kept = [i for i in range(len(shape)) if i != at]
        return lax.broadcast_in_dim(array, shape, kept)

    stack, in_, out = (new.dims(role) for role in _ROLES)
    a = repeat(w.a, [*stack, *in_], len([*stack, *in_]))
    b = repeat(w.b, [*stack, *out], len(stack))
    key = w.key
    if key is not None:
        key = jnp.broadcast_to(key.reshape(-1)[0], [d.size for d in stack])
    columns = w.columns
    if columns is not None:
        columns = repeat(columns, [*stack, *out], columns.ndim + 1)
    return dataclasses.replace(new, a=a, b=b, key=key, columns=columns)


def require_no_columns(w: Factored, what: str) -> None:
    """Raises where a rule cannot keep the factors of the outputs apart."""
    if w.columns is not None:
        raise Unfactorable(f"{what}, of a weight whose columns are scaled")


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
    columns = w.columns
    if columns is not None:
        columns = fn(columns, dict(enumerate([*stack, *out])))
    return dataclasses.replace(new, a=a, b=b, key=key, columns=columns)


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
