"""Arrays with named axes, and the weight that the interpreter carries.

Each axis of W is made of named pieces, and A and B are arrays whose axes carry the same
names.  Which factors hold a name says its role:

    stack: A and B        in: A alone        out: B alone

Transposing a weight regroups names and touches no array, reshaping splits names, a
product contracts them.  While layouts are being discovered there are no factors, and so
no roles: the same rules then act on W and its names alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._tree.errors import Unfactorable
from flora._tree.quantized import apart
from flora._tree.weight import LoraWeight, product_of, scale_of

Name = str
Sizes = Sequence[tuple[Name, int]]

RANK: Name = "rank"


@dataclasses.dataclass(frozen=True)
class Named:
    """An array with one name an axis, in any order.

    Attributes:
      array: the array.
      names: of its axes.
    """

    array: Any
    names: tuple[Name, ...]

    @property
    def sizes(self) -> dict[Name, int]:
        return dict(zip(self.names, self.array.shape, strict=True))

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def astype(self, dtype: Any) -> "Named":
        return Named(self.array.astype(dtype), self.names)

    def ordered(self, names: Sequence[Name]) -> Any:
        """The array with its axes in that order, of which it may lack some."""
        return lax.transpose(
            self.array, [self.names.index(n) for n in names if n in self.names]
        )

    def aligned(self, names: Sequence[Name]) -> Any:
        """The array in that order, of length 1 along the axes that it lacks."""
        missing = [i for i, n in enumerate(names) if n not in self.names]
        return lax.expand_dims(self.ordered(names), missing)

    def along(self, name: Name, fn: Callable[[Any, int], Any]) -> "Named":
        """With `fn(array, axis)` for the axis of that name, if there is one."""
        if name not in self.names:
            return self
        return Named(fn(self.array, self.names.index(name)), self.names)

    def repeated(self, name: Name, size: int) -> "Named":
        """With a new axis in front, along which it is constant."""
        shape = (size, *self.array.shape)
        array = lax.broadcast_in_dim(self.array, shape, range(1, len(shape)))
        return Named(array, (name, *self.names))

    def padded(
        self, name: Name, before: int, after: int, between: int = 0, value: int = 0
    ) -> "Named":
        """With a value around and between the elements along an axis."""
        if name not in self.names:
            return self
        config = [(before, after, between) if n == name else (0, 0, 0)
                  for n in self.names]  # fmt: skip
        edge = jnp.asarray(value, self.array.dtype)
        return Named(lax.pad(self.array, edge, config), self.names)

    def summed(self, names: Iterable[Name]) -> "Named":
        """The sum over the axes of those names, as far as there are any."""
        gone = {n for n in names if n in self.names}
        if not gone:
            return self
        array = self.array.sum([self.names.index(n) for n in gone])
        return Named(array, tuple(n for n in self.names if n not in gone))

    def times(self, other: "Named", apply: Callable = lax.mul) -> "Named":
        """The product with an array that has some of its axes, name by name."""
        by = other.aligned(self.names).astype(self.array.dtype)
        array = apply(self.array, jnp.broadcast_to(by, self.array.shape))
        return Named(array, self.names)

    def renamed(self, new: Mapping[Name, Name]) -> "Named":
        return Named(self.array, tuple(new.get(n, n) for n in self.names))

    def split(self, pieces: Mapping[Name, Sizes]) -> "Named":
        """With axes in the place of some, which must have as many elements."""
        parts = [
            part
            for n, size in zip(self.names, self.array.shape, strict=True)
            for part in pieces.get(n, ((n, size),))
        ]
        array = lax.reshape(self.array, [size for _, size in parts])
        return Named(array, tuple(n for n, _ in parts))

    def merged(self, groups: Mapping[Name, Sequence[Name]]) -> "Named":
        """With one axis in the place of several, `{new: old ones in row order}`."""
        first = {old[0]: new for new, old in groups.items() if old[0] in self.names}
        if not first:
            return self
        gone = {n for new in first.values() for n in groups[new]}
        parts = [
            (first.get(n, n), groups[first[n]] if n in first else (n,))
            for n in self.names
            if n in first or n not in gone
        ]
        size = self.sizes
        array = lax.reshape(
            self.ordered([n for _, old in parts for n in old]),
            [math.prod(size[n] for n in old) for _, old in parts],
        )
        return Named(array, tuple(new for new, _ in parts))


jax.tree_util.register_dataclass(Named, data_fields=["array"], meta_fields=["names"])


@dataclasses.dataclass(frozen=True)
class Axis:
    """A named piece of an axis of a weight.

    Attributes:
      name: equal for equal pieces of two layers' weights, so that layers that call one
        jitted function share its trace.
      size: its length.
      sources: `(path, axis)` of the leaves that it came from.
    """

    name: Name
    size: int
    sources: tuple[tuple[str, int], ...] = dataclasses.field(default=(), compare=False)


Axes = tuple[tuple[Axis, ...], ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same about a weight wherever it travels.

    Attributes:
      paths: the leaf; several where a function joins or adds weights.
      scale: of A B.
      dropout: the rate.
      fallback: 'error' or 'materialize'.
      form: as `LoraConfig.form`.
      between: a function on the hidden x A before it meets B; `None` for none.
      sliced: whether it is the slice of a stack that a step of a loop takes.
    """

    paths: tuple[str, ...] = dataclasses.field(compare=False)
    scale: float = 1.0
    dropout: float = 0.0
    fallback: str = "error"
    form: str = "auto"
    between: Callable[[Any], Any] | None = None
    sliced: bool = False

    @property
    def path(self) -> str:
        return "' and '".join(self.paths)


@dataclasses.dataclass(frozen=True)
class Factored:
    """(W + scale A B) ⊙ output scale inside the interpreter, never summed.

    Attributes:
      base: W, with an axis for each of `axes`; `None` for a pure A B.
      factors: 'a' and 'b'; where there are any 'key', dropout keys by stack axis, and
        'scale', a factor for each output.  That one stays apart: products are scaled,
        not W, so that its gradient needs no dense dW.  Empty during discovery.
      axes: the named pieces of each axis, in row order; none of a new axis of length 1.
      settings: path, scale of A B and more.
      indexed: axes of which indices chose rows; such a value can pass for activations.
      reduced: whether axes were summed away; such a value is small and can be formed.
      base_scale: where the base holds codes in the place of W's elements, what these
        are multiplied by, one for each index of some axes.  It stays apart, too.
    """

    base: Any
    factors: Mapping[str, Named]
    axes: Axes
    settings: Settings
    indexed: tuple[Axis, ...] = ()
    reduced: bool = False
    base_scale: Named | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(x.size for x in axis) for axis in self.axes)

    @property
    def pieces(self) -> tuple[Axis, ...]:
        return tuple(itertools.chain.from_iterable(self.axes))

    @property
    def names(self) -> tuple[Name, ...]:
        return tuple(x.name for x in self.pieces)

    @property
    def a(self) -> Named:
        return self.factors["a"]

    @property
    def b(self) -> Named:
        return self.factors["b"]

    @property
    def rank(self) -> int:
        return self.a.sizes[RANK]

    @property
    def key(self) -> Named | None:
        return self.factors.get("key")

    @property
    def output_scale(self) -> Named | None:
        return self.factors.get("scale")

    def role(self, name: Name) -> str:
        """'stack', 'in' or 'out'; '' of a name that no factor holds."""
        if "b" not in self.factors:
            return ""
        in_b = name in self.b.names
        if name in self.a.names:
            return "stack" if in_b else "in"
        return "out" if in_b else ""

    def sole(self, axis: int) -> Axis:
        """The piece of an axis that consists of just one."""
        if len(self.axes[axis]) != 1:
            raise Unfactorable(f"axis {axis} joins several axes of the leaf")
        return self.axes[axis][0]

    def on_factors(self, fn: Callable[[Named], Named], **changes: Any) -> "Factored":
        """The weight after `fn` acted on each factor, and with other attributes."""
        factors = {k: fn(f) for k, f in self.factors.items()}
        by = None if self.base_scale is None else fn(self.base_scale)
        return dataclasses.replace(self, factors=factors, base_scale=by, **changes)

    def frozen(self, base: Any) -> "Factored":
        """W alone, or what stands for it, with no factors."""
        return dataclasses.replace(self, base=base, factors={}, base_scale=None)

    def without(self, *factors: str) -> "Factored":
        """The weight without some of its factors."""
        left = {k: f for k, f in self.factors.items() if k not in factors}
        return dataclasses.replace(self, factors=left)

    def resized(self, sizes: Mapping[Name, int]) -> Axes:
        """The axes, some pieces with other lengths."""
        return tuple(
            tuple(dataclasses.replace(x, size=sizes.get(x.name, x.size)) for x in axis)
            for axis in self.axes
        )


jax.tree_util.register_dataclass(
    Factored,
    data_fields=["base", "factors", "base_scale"],
    meta_fields=["axes", "settings", "indexed", "reduced"],
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


def axes_of_leaf(path: str, shape: Sequence[int]) -> Axes:
    """One piece an axis, named by its position."""
    return tuple((Axis(str(i), n, ((path, i),)),) for i, n in enumerate(shape))


def from_weight(weight: LoraWeight, path: str) -> Factored:
    """The interpreter's view of an adapted leaf."""
    product, layout = product_of(weight), weight.layout
    stack, in_, out = (
        tuple(map(str, group)) for group in (layout.stack, layout.in_, layout.out)
    )
    factors = {
        "a": Named(product.a, (*stack, *in_, RANK)),
        "b": Named(product.b, (*stack, RANK, *out)),
    }
    if weight.dropout and weight.key is not None:
        factors["key"] = Named(weight.key, stack)
    if product.columns is not None:
        factors["scale"] = Named(product.columns, (*stack, *out))
    settings = Settings(
        (path,),
        scale_of(weight),
        weight.dropout,
        weight.fallback,
        weight.form,
        product.between,
    )
    return _with_base(weight.base, path, factors, settings)


def undiscovered(base: Any, path: str, fallback: str = "error") -> Factored:
    """A weight whose layout is still to be found, or that has no factors."""
    return _with_base(base, path, {}, Settings((path,), fallback=fallback))


def _with_base(
    base: Any, path: str, factors: Mapping[str, Named], settings: Settings
) -> Factored:
    axes = axes_of_leaf(path, base.shape)
    base, scale = apart(base)
    if scale is None:
        return Factored(base, factors, axes, settings)
    held = [i for i, n in enumerate(scale.shape) if n > 1]
    by = Named(lax.reshape(scale, [scale.shape[i] for i in held]), (*map(str, held),))
    return Factored(base, factors, axes, settings, base_scale=by)


def regrouped(w: Factored, base: Any, axes: Sequence[Sequence[Axis]]) -> Factored:
    """The same weight with pieces in other axes; pieces of length 1 may be gone."""
    held = {x.name for axis in axes for x in axis}
    gone = {x.name: () for x in w.pieces if x.name not in held}
    new = dataclasses.replace(w, base=base, axes=tuple(map(tuple, axes)))
    return new.on_factors(lambda f: f.split(gone)) if gone else new


def reshaped(w: Factored, base: Any, shape: Sequence[int]) -> Factored:
    """The same weight with its pieces split so that they group, in row order, anew."""
    if 0 in shape:
        raise Unfactorable("a weight with no elements")
    todo = [x for x in w.pieces if x.size != 1][::-1]
    units = [x for x in w.pieces if x.size == 1]
    halves: dict[Name, tuple[Axis, Axis]] = {}
    axes = []
    for size in shape:
        group: list[Axis] = []
        while size > 1:
            piece = todo.pop()
            if size % piece.size and piece.size % size:
                raise Unfactorable("a reshape that regroups the weight's elements")
            if size % piece.size:
                piece, rest = _halved(piece, size)
                halves[piece.name.removesuffix(".0")] = piece, rest
                todo.append(rest)
            group.append(piece)
            size //= piece.size
        # Pieces of length 1 go to axes of length 1, in order; the others drop out.
        axes.append(tuple(group or ([units.pop(0)] if units else ())))
    if halves:
        pieces = {n: _leaves(halves, n) for n in w.names if n in halves}
        w = w.on_factors(lambda f: f.split(pieces), axes=(*axes, tuple(units)))
    return regrouped(w, base, axes)


def divided(sizes: Sizes, shape: Sequence[int]) -> dict[Name, Sizes]:
    """What a shape of as many elements, in row order, divides each axis into.

    Axes that it leaves whole or joins with others are not in it.
    """
    found: dict[Name, Sizes] = {}
    todo, group, size, rest = [n for n in shape if n != 1][::-1], [], 1, 1
    for name, length in sizes:
        group, size = ([*group, name], size * length) if length != 1 else (group, size)
        parts: list[int] = []
        while todo and rest < size:
            parts.append(todo.pop())
            rest *= parts[-1]
        if rest == size:
            if len(group) == 1 and len(parts) > 1:
                found[name] = [(f"{name}/{i}", n) for i, n in enumerate(parts)]
            group, size, rest = [], 1, 1
    return found


def _halved(piece: Axis, size: int) -> tuple[Axis, Axis]:
    rest = piece.size // size
    return (
        Axis(f"{piece.name}.0", size, piece.sources),
        Axis(f"{piece.name}.1", rest, piece.sources),
    )


def _leaves(halves: Mapping[Name, tuple[Axis, Axis]], name: Name) -> Sizes:
    """The pieces that a name ended in, in row order."""
    found: list[tuple[Name, int]] = []
    for x in halves[name]:
        found += _leaves(halves, x.name) if x.name in halves else [(x.name, x.size)]
    return found


def fused(w: Factored, at: Iterable[int] | None = None) -> Factored:
    """The same weight, neighboring pieces of an axis that share a role as one.

    Args:
      w: the weight.
      at: the axes concerned, of which each must be of one role; all of any roles by
        default.
    """
    mine = range(len(w.axes)) if at is None else {*at}
    if all(len(w.axes[i]) <= 1 for i in mine):
        return w
    few = [
        (tuple(x for x in axis if x.size > 1) or axis[:1]) if i in mine else axis
        for i, axis in enumerate(w.axes)
    ]
    w = regrouped(w, w.base, few)
    groups: dict[Name, tuple[Name, ...]] = {}
    axes = []
    for i, axis in enumerate(few):
        runs = [[x] for x in axis]
        if i in mine:
            grouped = itertools.groupby(axis, lambda x: w.role(x.name))
            runs = [[*run] for _, run in grouped]
        if i in mine and at is not None and len(runs) > 1:
            raise Unfactorable("an axis that joins axes of other roles")
        axes.append(tuple(_one(run, groups) for run in runs))
    sizes = {x.name: x.size for axis in few for x in axis}

    def merged(f: Named) -> Named:
        for names in groups.values():  # a scale may hold some pieces of a run
            missing = [n for n in names if n not in f.names]
            for name in missing if len(missing) < len(names) else ():
                f = f.repeated(name, sizes[name])
        return f.merged(groups)

    return w.on_factors(merged, axes=tuple(axes))


def _one(run: Sequence[Axis], groups: dict[Name, tuple[Name, ...]]) -> Axis:
    """A run of pieces as one; `groups` learns what its name stands for."""
    if len(run) == 1:
        return run[0]
    names = tuple(x.name for x in run)
    groups["+".join(names)] = names
    return Axis("+".join(names), math.prod(x.size for x in run), sources_of(run))


def sources_of(pieces: Iterable[Axis]) -> tuple[tuple[str, int], ...]:
    """The leaves' axes that pieces came from."""
    return tuple(dict.fromkeys(s for x in pieces for s in x.sources))


def by_position(w: Factored) -> Factored:
    """The same weight with at most one piece an axis, named by position.

    So the names of other leaves' weights compare.
    """
    w = fused(w, range(len(w.axes)))
    return renamed(w, {axis[0].name: str(i) for i, axis in enumerate(w.axes) if axis})


def renamed(w: Factored, new: Mapping[Name, Name]) -> Factored:
    """The same weight with other names for pieces."""
    axes = tuple(
        tuple(dataclasses.replace(x, name=new.get(x.name, x.name)) for x in axis)
        for axis in w.axes
    )
    return w.on_factors(lambda f: f.renamed(new), axes=axes)


def swapped(w: Factored) -> Factored:
    """The same weight with in and out, and so A and B, called the other way round."""
    require_no_output_scale(w, "in and out axes that change places")
    if not w.factors:
        return w
    return dataclasses.replace(w, factors={**w.factors, "a": w.b, "b": w.a})


def with_axis(w: Factored, axis: int, piece: Axis, role: str = "out") -> Factored:
    """The same weight along whose axis of length 1 there is a new piece.

    The factors of the role repeat along it: B as along an out axis.
    """
    axes = [*w.axes]
    axes[axis] = ()
    w = regrouped(w, w.base, axes)
    axes[axis] = (piece,)
    holders = {"stack": "a b key scale", "in": "a", "out": "b scale"}[role].split()
    factors = {
        k: f.repeated(piece.name, piece.size) if k in holders else f
        for k, f in w.factors.items()
    }
    return dataclasses.replace(w, axes=tuple(axes), factors=factors)


def new_name(w: Factored) -> Name:
    """A name that no piece of the weight has."""
    return next(n for k in itertools.count() if (n := f"new{k}") not in w.names)


def require_linear(w: Factored, what: str) -> None:
    """Raises where a rule cannot keep a variant's function of x A apart."""
    if w.settings.between is not None:
        raise Unfactorable(f"{what}, of a weight whose variant acts between A and B")


def require_no_output_scale(w: Factored, what: str) -> None:
    """Raises where a rule cannot keep the factors of the outputs apart."""
    if w.output_scale is not None:
        raise Unfactorable(f"{what}, of a weight whose outputs are scaled")
