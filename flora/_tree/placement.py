"""The shardings of a weight's factors, from the sharding of the weight.

A takes the mesh axes of W's in axes, B those of its out axes, and both those of its
stack axes.  Every device has the full rank, unless a mesh axis is given for it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._tree.layout import Layout
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, on_parts


@dataclasses.dataclass(frozen=True)
class Specs:
    """The partition specs of a weight, of its factors and of its dropout keys."""

    base: Spec
    a: Spec
    b: Spec
    key: Spec


def specs(layout: Layout, base: Spec, ndim: int, rank: str | None = None) -> Specs:
    """The specs of the factors, from the spec of the weight.

    Args:
      layout: of the weight.
      base: the weight's spec, of at most `ndim` entries.
      ndim: how many axes the weight has.
      rank: a mesh axis over which to shard the rank, in each factor that does not use
        that axis already.
    """
    entries = (*base, *(None for _ in range(ndim - len(base))))
    stack, in_, out = (
        tuple(entries[i] for i in axes)
        for axes in (layout.stack, layout.in_, layout.out)
    )

    def free(others: Sequence[Any]) -> str | None:
        return None if rank in names(others) else rank

    return Specs(
        base,
        Spec(*stack, *in_, free((*stack, *in_))),
        Spec(*stack, free((*stack, *out)), *out),
        Spec(*stack),
    )


def spec_of_extra(found: Specs, w: LoraWeight, shape: Sequence[int]) -> Spec:
    """The spec of an array that a variant has besides A and B, by its shape.

    An array with one element for each output, `[*stack, *out]`, or for each input,
    `[*stack, *in]`, is sharded as B or A without the rank; any other that starts with
    the stack axes is sharded along these alone.
    """
    stack = len(w.layout.stack)
    a, b = tuple(w.a.shape), tuple(w.b.shape)
    if tuple(shape) == (*b[:stack], *b[stack + 1 :]):
        rest = tuple(found.b)[stack + 1 :]
        return Spec(*tuple(found.b)[:stack], *rest)
    if tuple(shape) == a[:-1]:
        return Spec(*tuple(found.a)[: len(a) - 1])
    return (
        Spec(*tuple(found.key)[:stack]) if tuple(shape[:stack]) == a[:stack] else Spec()
    )


def spec_of_part(found: Specs, w: LoraWeight, name: str, shape: Sequence[int]) -> Spec:
    """The spec of A, of B, or of an array that a variant has besides them."""
    own = {"a": found.a, "b": found.b}.get(name)
    return spec_of_extra(found, w, shape) if own is None else own


def names(entries: Any) -> list[str]:
    """The mesh axes in a spec's entries, in order."""
    parts = [x if isinstance(x, tuple) else (x,) for x in entries]
    return [name for part in parts for name in part if isinstance(name, str)]


def spec_of(x: Any) -> Spec | None:
    """The spec of an array or `ShapeDtypeStruct`; `None` if it has none.

    A tracer has one on a mesh with explicit axes only.
    """
    sharding = _sharding(x)
    return None if sharding is None else sharding.spec


def mesh_of(x: Any) -> Any:
    """The mesh of an array with a `NamedSharding`, or `None`."""
    sharding = _sharding(x)
    return None if sharding is None else sharding.mesh


def _sharding(x: Any) -> NamedSharding | None:
    if is_quantized(x):  # its largest array has the weight's axes
        x = max(jax.tree.leaves(x), key=lambda part: part.size)
    if isinstance(x, Tracer):
        found = jax.typeof(x).sharding
        return found if not found.mesh.empty and found.mesh.explicit_axes else None
    found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def places_of_parts(mesh: Any, quantized: Any, spec: Spec) -> Any:
    """The sharding of each array of a quantized weight.

    Scales of blocks are divided as the weight is, along each axis over as many of its
    mesh axes, from the first on, as leave every device as many.
    """

    def place(part: Any) -> NamedSharding:
        pairs = zip(part.shape, spec, strict=False)
        return NamedSharding(mesh, Spec(*(_that_divides(n, x, mesh) for n, x in pairs)))

    return jax.tree.map(place, quantized)


def _that_divides(size: int, entry: Any, mesh: Any) -> Any:
    """The entry, or as much of it as divides an axis of that size."""
    if not any(spec_problems("", [size], Spec(entry), mesh.shape)):
        return entry
    fewer = entry[:-1] if isinstance(entry, tuple) else ()
    if len(fewer) == 1:
        (fewer,) = fewer
    return _that_divides(size, fewer, mesh) if fewer else None


def placed_as_base(w: LoraWeight) -> LoraWeight:
    """The weight, A, B and `extra` lying as its base does, if that says how."""
    spec, mesh = spec_of(w.base), mesh_of(w.base)
    if spec is None:
        return w
    found = specs(w.layout, spec, len(w.base.shape))

    def place(name: str, x: Any) -> Any:
        sharding = NamedSharding(mesh, spec_of_part(found, w, name, x.shape))
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x if isinstance(x, Tracer) else jax.device_put(x, sharding)

    return on_parts(place, w)


def spec_problems(
    what: str, shape: Sequence[int], spec: Spec, sizes: Mapping[str, int]
) -> Iterator[str]:
    """What is wrong with a spec for an array of that shape on a mesh of those sizes."""
    if len(spec) > len(shape):
        yield (
            f"{what} has shape {tuple(shape)} and was given {spec}, {len(spec)} "
            f"entries. Write at most {len(shape)}."
        )
        return
    used = names(spec)
    if unknown := sorted({*used} - {*sizes}):
        yield (
            f"{what} was given {spec}, but the mesh has no axis {unknown[0]!r}, only "
            f"{', '.join(map(repr, sizes))}. Pass rules= for logical names."
        )
        return
    if len(used) != len({*used}):
        yield f"{what} was given {spec}: a mesh axis can divide one axis only."
        return
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        parts = 1
        for name in names([entry]):
            parts *= sizes[name]
        if size % parts:
            yield (
                f"{what} has shape {tuple(shape)}; axis {axis} of size {size} does not "
                f"divide into {parts} ({entry!r}). Leave it whole, or pad it."
            )
