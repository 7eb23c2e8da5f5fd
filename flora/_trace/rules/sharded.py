"""Rules for `shard_map`: each device holds its part of W and of the factors."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flora._algebra.factored import Dim, Factored, per_dim, sole_dim
from flora._trace.compat import eval_eqn
from flora._trace.interpret import Context, interpret, settle
from flora._tree.errors import Unfactorable


def shard_map(ctx: Context, eqn: Any, *args: Any) -> Any:
    """A is split along W's in axes, B along its out axes, both along its stack axes."""
    p = eqn.params
    specs = [_specs(x, spec) for x, spec in zip(args, p["in_specs"], strict=True)]
    mesh = p["mesh"]

    def body(*parts: Any) -> list[Any]:
        local = [
            _local(x, part, spec, mesh)
            for x, part, spec in zip(args, parts, p["in_specs"], strict=True)
        ]
        outs = interpret(ctx, p["jaxpr"], local)
        return [settle(ctx, eqn, x, "a weight as a shard's result") for x in outs]

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=p["newly_manual_axes"],
    )
    return mapped(*(_arrays(x) for x in args))


def _arrays(x: Any) -> Any:
    return [x.base, x.a, x.b, x.key, x.columns] if isinstance(x, Factored) else x


def _specs(x: Any, spec: PartitionSpec) -> Any:
    """The specs of W, A, B, the keys and the scaled columns, from W's."""
    if not isinstance(x, Factored):
        return spec
    entries = _entries(x, spec)
    stack, in_, out = (
        [entries.get(d) for d in x.dims(role)] for role in ("stack", "in", "out")
    )
    rest = [spec, PartitionSpec(*stack, *in_), PartitionSpec(*stack, None, *out)]
    return [*rest, PartitionSpec(*stack), PartitionSpec(*stack, *out)]


def _entries(x: Factored, spec: PartitionSpec) -> dict[Dim, Any]:
    return {
        sole_dim(x, i): entry
        for i, entry in enumerate(spec)
        if entry is not None and x.axes[i]
    }


def _local(x: Any, part: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """The weight of one device."""
    if not isinstance(x, Factored):
        return part
    split = {dim: _parts(entry, mesh) for dim, entry in _entries(x, spec).items()}
    axes = tuple(
        tuple(dataclasses.replace(d, size=d.size // split.get(d, 1)) for d in axis)
        for axis in x.axes
    )
    base, a, b, key, columns = part
    return dataclasses.replace(
        x, base=base, a=a, b=b, key=key, axes=axes, columns=columns
    )


def _parts(entry: str | tuple[str, ...], mesh: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def all_gather(ctx: Context, eqn: Any, w: Factored) -> list[Factored]:
    """Gathers along an axis of W what either factor holds of that axis."""
    p = eqn.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unfactorable("a gather of shards that adds an axis")
    axis = p["all_gather_dimension"]
    dim = sole_dim(w, axis)
    whole = dataclasses.replace(dim, size=dim.size * p["axis_size"])

    def gather(array: Any, at: dict[int, Dim]) -> Any:
        for i in (i for i, d in at.items() if d == dim):
            array = lax.all_gather(array, p["axis_name"], axis=i, tiled=True)
        return array

    base = None if w.base is None else eval_eqn(eqn, [w.base])[0]
    return [per_dim(w, base, (*w.axes[:axis], (whole,), *w.axes[axis + 1 :]), gather)]


def reshard(ctx: Context, eqn: Any, w: Factored) -> list[Factored]:
    """The factors go where W's axes of theirs go; the rank stays whole."""
    new = eqn.params["dst_sharding"]
    base = None if w.base is None else eval_eqn(eqn, [w.base])[0]
    # An axis that joins several is whole in the factors.
    entries = {
        axis[0]: entry
        for axis, entry in zip(w.axes, new.spec, strict=False)
        if len(axis) == 1 and entry is not None
    }

    def place(array: Any, at: dict[int, Dim]) -> Any:
        spec = [entries.get(at[i]) if i in at else None for i in range(array.ndim)]
        to = NamedSharding(new.mesh, PartitionSpec(*spec))
        return jax.sharding.reshard(array, to)

    return [per_dim(w, base, w.axes, place)]
