"""Rules for `shard_map`: each device holds its part of W and of the factors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flora._algebra.axes import Factored, Name, Named
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import Context, densify, interpret
from flora._tree.errors import Unfactorable


def shard_map(ctx: Context, eqn: Eqn, *args: Any) -> Any:
    """A is split along W's in axes, B along its out axes, both along its stack axes."""
    p = eqn.params
    mesh = p["mesh"]

    def body(*parts: Any) -> list[Any]:
        local = [
            _of_one_device(x, spec, mesh)
            for x, spec in zip(parts, p["in_specs"], strict=True)
        ]
        outs = interpret(ctx, p["jaxpr"], local)
        return [densify(ctx, eqn, x, "a weight as a shard's result") for x in outs]

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(map(_specs, args, p["in_specs"])),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=p["newly_manual_axes"],
    )
    return mapped(*args)


def _specs(x: Any, spec: PartitionSpec) -> Any:
    """The specs of W and of its factors, from W's, in the place of their arrays."""
    if not isinstance(x, Factored):
        return spec
    entries = _entries(x, spec)
    base = None if x.base is None else spec
    return x.on_factors(lambda f: Named(_spec(f.names, entries), f.names), base=base)


def _spec(names: Sequence[Name], entries: dict[Name, Any]) -> PartitionSpec:
    return PartitionSpec(*map(entries.get, names))


def _entries(x: Factored, spec: PartitionSpec) -> dict[Name, Any]:
    return {
        x.sole(i).name: entry
        for i, entry in enumerate(spec)
        if entry is not None and x.axes[i]
    }


def _of_one_device(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """The weight with the sizes of one device's part."""
    if not isinstance(x, Factored):
        return x
    entries, sizes = _entries(x, spec), {y.name: y.size for y in x.pieces}
    parts = {n: sizes[n] // _count(entry, mesh) for n, entry in entries.items()}
    return dataclasses.replace(x, axes=x.resized(parts))


def _count(entry: str | tuple[str, ...], mesh: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def all_gather(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """Gathers along an axis of W what either factor holds of that axis."""
    p = eqn.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unfactorable("a gather of shards that adds an axis")
    part = w.sole(p["all_gather_dimension"])

    def gather(array: Any, at: int) -> Any:
        return lax.all_gather(array, p["axis_name"], axis=at, tiled=True)

    base = None if w.base is None else eval_eqn(eqn, [w.base])[0]
    axes = w.resized({part.name: part.size * p["axis_size"]})
    return [w.on_factors(lambda f: f.along(part.name, gather), base=base, axes=axes)]


def reshard(ctx: Context, eqn: Eqn, w: Factored) -> list[Factored]:
    """The factors go where W's axes of theirs go; the rank stays whole."""
    new = eqn.params["dst_sharding"]
    base = None if w.base is None else eval_eqn(eqn, [w.base])[0]
    # An axis that joins several is whole in the factors.
    entries = {
        axis[0].name: entry
        for axis, entry in zip(w.axes, new.spec, strict=False)
        if len(axis) == 1 and entry is not None
    }

    def place(f: Named) -> Named:
        to = NamedSharding(new.mesh, _spec(f.names, entries))
        return Named(jax.sharding.reshard(f.array, to), f.names)

    return [w.on_factors(place, base=base)]
