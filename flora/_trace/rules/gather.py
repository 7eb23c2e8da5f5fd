"""The rule for `gather`: embeddings look rows up, stacks are indexed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.factored import Dim, Factored
from flora._algebra.low_rank import (
    Labelled,
    between_factors,
    contract,
    on_columns,
    widened,
)
from flora._algebra.views import RANK, views
from flora._trace.compat import eval_eqn
from flora._tree.errors import Unfactorable


def gather(ctx: Any, eqn: Any, w: Any, indices: Any) -> list[Any]:
    """Looks the same rows up in W, and in each factor that has the indexed axes.

    For an embedding `[vocab, dim]`: y = W[i] + scale A[i] B.  Rows looked up are
    activations.  Along stack axes the result is a weight still.
    """
    if isinstance(indices, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as an index")
    base = None if w.base is None else eval_eqn(eqn, [w.base, indices])[0]
    plan = _plan(eqn, indices.ndim - 1)
    if _is_lookup(w, plan):
        roles = {i: "in" if i in plan.chosen else "out" for i in range(len(w.axes))}
        ctx.claim(w, eqn, roles)
        if w.a is None:
            return [base]
        return [_on_columns(eqn, w, _rows(eqn, w, base, indices, plan), indices, plan)]
    ctx.claim(w, eqn, {i: "stack" for i in plan.chosen}, firm=False)
    return [_restack(ctx, eqn, w, base, indices, plan)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where W's axes go.

    Attributes:
      chosen: axes that the indices pick one element of.
      cut: axes of which a window stays.
      out: for each axis of the result, `("i", n)` for axis n of the indices or
        `("w", axis, 0)` for an axis of W.
    """

    chosen: tuple[int, ...]
    cut: tuple[int, ...]
    out: tuple[Any, ...]


def _plan(eqn: Any, index_ndim: int) -> _Plan:
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    chosen = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [i for i in range(len(shape)) if i not in chosen]
    offsets, batch = iter(kept), iter(range(index_ndim))
    out = tuple(
        ("w", next(offsets), 0) if i in dn.offset_dims else ("i", next(batch))
        for i in range(len(kept) + index_ndim)
    )
    cut = tuple(i for i in kept if sizes[i] != shape[i])
    return _Plan(tuple(sorted(chosen)), cut, out)


def _is_lookup(w: Factored, plan: _Plan) -> bool:
    """Whether the result is rows of activations, not a smaller weight."""
    roles = {d.role for i in (*plan.chosen, *plan.cut) for d in w.axes[i] if d.size > 1}
    if "" in roles:
        rest = [n for i, n in enumerate(w.shape) if i not in plan.chosen and n > 1]
        return bool(plan.chosen) and len(rest) <= 1
    return bool(roles - {"stack"})


def _rows(eqn: Any, w: Factored, base: Any, indices: Any, plan: _Plan) -> Any:
    v = views(w, "w")
    if any(len(s) > 1 for s in v.segments):
        raise Unfactorable("a lookup in an axis that joins several of the weight's")
    a = _gather_factor(eqn, v.a, v.a_labels, indices)
    b = _gather_factor(eqn, v.b, v.b_labels, indices)
    a = dataclasses.replace(a, array=between_factors(w, a.array, a.labels))
    present = {*a.labels, *b.labels}
    out = [label for label in plan.out if label in present]
    aval = eqn.outvars[0].aval
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        b = dataclasses.replace(b, array=widened(b.array) * w.site.scale)
        a, b = (
            dataclasses.replace(f, array=f.array.astype(aval.dtype)) for f in (a, b)
        )
    if {("i", n) for n in range(indices.ndim - 1)} - present:
        raise Unfactorable("a lookup that repeats the weight")
    y = contract(a, b, out).array.reshape(aval.shape)
    return y if base is None else base + y


def _on_columns(eqn: Any, w: Factored, y: Any, indices: Any, plan: _Plan) -> Any:
    """Rows whose columns are scaled."""
    if w.columns is None:
        return y
    v, looked_up = views(w, "w"), {*plan.chosen, *plan.cut}
    if any(label[1] in looked_up for label in v.column_labels):
        got = _gather_factor(eqn, v.columns, v.column_labels, indices)
        v = dataclasses.replace(v, columns=got.array, b_labels=tuple(got.labels))
    return on_columns(y, v, list(zip(plan.out, y.shape, strict=True)))


def _gather_factor(eqn: Any, array: Any, labels: Any, indices: Any) -> Labelled:
    """The same gather on a factor: index axes first, then the factor's own."""
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    at = {label[1]: i for i, label in enumerate(labels) if label != RANK}
    components = [k for k, i in enumerate(dn.start_index_map) if i in at]
    pairs = zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True)
    batching = sorted(((i, j) for i, j in pairs if i in at), key=lambda p: at[p[0]])
    if not components and not batching:
        return Labelled(array, labels)
    gone = {*dn.collapsed_slice_dims, *(i for i, _ in batching)}
    own = [x for x in labels if x == RANK or x[1] not in gone]
    n = indices.ndim - 1
    y = lax.gather(
        array,
        _select_last(indices, components),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(n, n + len(own))),
            collapsed_slice_dims=tuple(
                sorted(at[i] for i in dn.collapsed_slice_dims if i in at)
            ),
            start_index_map=tuple(at[dn.start_index_map[k]] for k in components),
            operand_batching_dims=tuple(at[i] for i, _ in batching),
            start_indices_batching_dims=tuple(j for _, j in batching),
        ),
        slice_sizes=[
            array.shape[i] if x == RANK else p["slice_sizes"][x[1]]
            for i, x in enumerate(labels)
        ],
        mode=p["mode"],
        fill_value=0 if p["mode"] == lax.GatherScatterMode.FILL_OR_DROP else None,
    )
    return Labelled(y, (*(("i", k) for k in range(n)), *own))


def _select_last(indices: Any, components: list[int]) -> Any:
    """The components of each index vector that a factor has axes for."""
    if components == list(range(indices.shape[-1])):
        return indices
    chosen = [lax.slice_in_dim(indices, k, k + 1, axis=-1) for k in components]
    return lax.concatenate(chosen, indices.ndim - 1) if chosen else indices[..., :0]


def _restack(
    ctx: Any, eqn: Any, w: Factored, base: Any, indices: Any, plan: _Plan
) -> Factored:
    """The weight that the indices choose from a stack."""
    if len(plan.chosen) > 1 and indices.ndim > 1:
        raise Unfactorable("a stack indexed along several axes at once")
    old = [d for i in plan.chosen or plan.cut for d in w.axes[i]]
    out_shape = eqn.outvars[0].aval.shape
    axes: list[tuple[Dim, ...]] = []
    for label, size in zip(plan.out, out_shape, strict=True):
        if label[0] == "i":
            dim = old[0] if old else Dim((0,), 1)
            at = (*dim.at, label[1])
            axes.append((Dim(at, size, dim.role),))
        else:
            axis = w.axes[label[1]]
            if label[1] in plan.cut:
                if len(axis) != 1:
                    raise Unfactorable("a window of several joined axes")
                axis = (dataclasses.replace(axis[0], size=size),)
            axes.append(axis)
    rows = {d.at[0] for d in old if d.role != "stack"}
    chosen = tuple(sorted({*w.chosen, *rows}))
    new = dataclasses.replace(w, base=base, axes=tuple(axes), chosen=chosen)
    if w.a is None:
        return new
    v = views(w, "w")
    if any(len(s) > 1 for s in v.segments):
        raise Unfactorable("an index into several joined axes")
    rank = Dim((), w.a.shape[-1], "rank")
    dims_of = dict(zip(plan.out, axes, strict=True)) | {RANK: (rank,)}
    found = []
    for array, labels, before, after in (
        (v.a, v.a_labels, ("stack", "in"), ()),
        (v.b, v.b_labels, ("stack",), ("out",)),
    ):
        got = _gather_factor(eqn, array, labels, indices)
        if any(label not in got.labels for label in plan.out if label[0] == "i"):
            raise Unfactorable("an index that repeats the weight")
        found.append(
            _in_dims(got, dims_of, [*new.dims(*before), rank, *new.dims(*after)])
        )
    key = w.key
    if key is not None:
        key = jax.random.fold_in(key.reshape(-1)[0], ctx.salt)
        key = jnp.broadcast_to(key, [d.size for d in new.dims("stack")])
    columns = w.columns
    if columns is not None:
        got = _gather_factor(eqn, v.columns, v.column_labels, indices)
        columns = _in_dims(got, dims_of, new.dims("stack", "out"))
    return dataclasses.replace(new, a=found[0], b=found[1], key=key, columns=columns)


def _in_dims(got: Labelled, dims_of: Any, wanted: list[Dim]) -> Any:
    """The factor with one axis a dim, in the order in which a factor holds them."""
    held = [d for label in got.labels for d in dims_of[label]]
    array = lax.reshape(got.array, [d.size for d in held])
    return lax.transpose(array, [held.index(d) for d in wanted])
