"""The rule for `gather`: embeddings look rows up, stacks are indexed."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import RANK, Axis, Factored, Name, Named, fused, require_linear
from flora._algebra.codes import is_codes
from flora._algebra.low_rank import (
    contract,
    key_of,
    on_hidden,
    sum_dtype,
    widened,
    with_output_scale,
)
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.dequantize import on_codes, on_quantized
from flora._trace.interpret import Context
from flora._trace.rules.product import Operation, Scaling, plain
from flora._tree.errors import Unfactorable


def gather(ctx: Context, eqn: Eqn, w: Any, indices: Any) -> list[Any]:
    """Looks the same rows up in W, and in each factor that has the indexed axes.

    For an embedding `[vocab, dim]`: y = W[i] + scale A[i] B.  Rows looked up are
    activations.  Along stack axes the result is a weight still.
    """
    if isinstance(indices, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as an index")
    places = _places(eqn, w, indices.ndim - 1)
    if _is_lookup(w, places):
        roles = {
            i: "in" if i in places.looked_up else "out" for i in range(len(w.axes))
        }
        ctx.claim(w, eqn, roles)
        return [_rows(ctx, eqn, w, indices)]
    ctx.claim(w, eqn, dict.fromkeys(places.looked_up, "stack"), binding=False)

    def run(w: Factored, indices: Any) -> list[Factored]:
        return [_restacked(ctx, eqn, w, indices, places)]

    sole = _sole_index(w, places) and eqn.params["fill_value"] is None
    if is_codes(w) and (sole or not _fills(eqn)):
        return on_codes(run, w, indices)
    return on_quantized(run, [w, indices])


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where W's axes go.

    Attributes:
      looked_up: axes that the indices pick one element of.
      cut: axes of which a window stays.
      out: for each axis of the result the axis of W that it is, or the name of an axis
        of the indices.
      indices: the names of the indices' axes, which W does not have.
    """

    looked_up: tuple[int, ...]
    cut: tuple[int, ...]
    out: tuple[int | Name, ...]
    indices: tuple[Name, ...]


def _places(eqn: Eqn, w: Factored, index_ndim: int) -> _Places:
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    looked_up = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [i for i in range(len(shape)) if i not in looked_up]
    fresh = (n for k in itertools.count() if (n := f"index{k}") not in w.names)
    names = tuple(itertools.islice(fresh, index_ndim))
    offsets, batch = iter(kept), iter(names)
    out = tuple(
        next(offsets) if i in dn.offset_dims else next(batch)
        for i in range(len(kept) + index_ndim)
    )
    cut = tuple(i for i in kept if sizes[i] != shape[i])
    return _Places(tuple(sorted(looked_up)), cut, out, names)


def _is_lookup(w: Factored, places: _Places) -> bool:
    """Whether the result is rows of activations, not a smaller weight."""
    touched = (*places.looked_up, *places.cut)
    pieces = [x for i in touched for x in w.axes[i] if x.size > 1]
    if pieces and not w.factors:
        rest = [n for i, n in enumerate(w.shape) if i not in places.looked_up and n > 1]
        return bool(places.looked_up) and len(rest) <= 1
    return any(w.role(x.name) != "stack" for x in pieces)


def _rows(ctx: Context, eqn: Eqn, w: Factored, indices: Any) -> Any:
    """Rows of W and of the low-rank term, with scaled outputs."""
    operation = Operation(eqn, _change, _scaling, 0)
    y = plain(ctx, operation, w.without("scale", "key"), indices)
    if w.output_scale is None:
        return y
    by, sizes, _ = _scaling(operation, w, indices)
    return with_output_scale(y, by, sizes)


def _scaling(operation: Operation, w: Factored, indices: Any) -> Scaling:
    eqn, (w, at) = operation.eqn, _with_sole_axes(w)
    places, shape = _places(eqn, w, indices.ndim - 1), eqn.outvars[0].aval.shape
    by = w.factors["scale"]
    if {*w.factors} == {"scale"}:  # of codes
        by = _scale_of_rows(eqn, w, by, indices, places)
    else:
        by = _gathered(eqn, by, at, indices, places)
    return Scaling(by, [*zip(_result(at, places), shape, strict=True)])


def _scale_of_rows(
    eqn: Eqn, w: Factored, by: Named, indices: Any, places: _Places
) -> Named:
    """A scale where the rows are; NaN where an index is out of bounds and that fills.

    Codes that are integers cannot say so.
    """
    w, at = _with_sole_axes(w)
    if not _fills(eqn):
        return _gathered(eqn, by, at, indices, places)
    if not _sole_index(w, places) or eqn.params["fill_value"] is not None:
        raise Unfactorable("indices along several axes, some out of bounds")
    (name,) = (x.name for i in places.looked_up for x in w.axes[i])
    if name in by.names:
        return _gathered(eqn, by, at, indices, places, fill=None)
    (size,) = (x.size for i in places.looked_up for x in w.axes[i])
    ones = Named(jnp.ones([size], by.dtype), (name,))
    valid = _gathered(eqn, ones, at, indices, places, fill=None)
    spread = valid.array.reshape(*valid.array.shape, *(1 for _ in by.names))
    return Named(spread * by.array, (*valid.names, *by.names))


def _fills(eqn: Eqn) -> bool:
    """Whether rows that an index does not find are filled with a value."""
    return eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP


def _sole_index(w: Factored, places: _Places) -> bool:
    """Whether the indices pick elements along one axis, and no windows."""
    pieces = [x for i in places.looked_up for x in w.axes[i]]
    return len(pieces) == 1 and not places.cut


def _change(operation: Operation, w: Factored, indices: Any) -> Any:
    """Scale A[i] B for rows of A, or A B[i]."""
    eqn, (w, at) = operation.eqn, _with_sole_axes(w)
    places, aval = _places(eqn, w, indices.ndim - 1), eqn.outvars[0].aval
    touched = [x for i in (*places.looked_up, *places.cut) for x in w.axes[i]]
    if any(w.role(x.name) == "out" for x in touched):
        require_linear(w, "a lookup along out axes")
    a, b = (_gathered(eqn, f, at, indices, places) for f in (w.a, w.b))
    a, present = on_hidden(w, a), {*a.names, *b.names}
    if {*places.indices} - present:
        raise Unfactorable("a lookup that repeats the weight")
    b = Named(widened(b.array) * w.settings.scale, b.names)
    dtype = sum_dtype(aval.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    y = contract(a, b, [n for n in _result(at, places) if n in present])
    return y.array.reshape(aval.shape)


def _result(at: Mapping[Name, int], places: _Places) -> list[Name]:
    """The names of the result's axes."""
    names = {i: n for n, i in at.items()}
    return [p if isinstance(p, str) else names.get(p, "") for p in places.out]


def _with_sole_axes(w: Factored) -> tuple[Factored, dict[Name, int]]:
    """The weight with at most one piece an axis, and the axis of each name."""
    w = fused(w)
    if any(len(axis) > 1 for axis in w.axes):
        raise Unfactorable("an index in an axis that joins several of the weight's")
    return w, {axis[0].name: i for i, axis in enumerate(w.axes) if axis}


def _gathered(
    eqn: Eqn,
    f: Named,
    axes: Mapping[Name, int],
    indices: Any,
    places: _Places,
    fill: Any = 0,
) -> Named:
    """The same gather on a factor: index axes first, then the factor's own."""
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    at = {axes[n]: i for i, n in enumerate(f.names) if n != RANK}
    components = [k for k, i in enumerate(dn.start_index_map) if i in at]
    pairs = zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True)
    batching = sorted(((i, j) for i, j in pairs if i in at), key=lambda p: at[p[0]])
    if not components and not batching:
        return f
    gone = {*dn.collapsed_slice_dims, *(i for i, _ in batching)}
    own = [n for n in f.names if n == RANK or axes[n] not in gone]
    ndim = len(places.indices)
    y = lax.gather(
        f.array,
        _select_last(indices, components),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(ndim, ndim + len(own))),
            collapsed_slice_dims=tuple(
                sorted(at[i] for i in dn.collapsed_slice_dims if i in at)
            ),
            start_index_map=tuple(at[dn.start_index_map[k]] for k in components),
            operand_batching_dims=tuple(at[i] for i, _ in batching),
            start_indices_batching_dims=tuple(j for _, j in batching),
        ),
        slice_sizes=[
            size if n == RANK else p["slice_sizes"][axes[n]]
            for n, size in f.sizes.items()
        ],
        mode=p["mode"],
        fill_value=fill if _fills(eqn) else None,
    )
    return Named(y, (*places.indices, *own))


def _select_last(indices: Any, components: list[int]) -> Any:
    """The components of each index vector that a factor has axes for."""
    if components == list(range(indices.shape[-1])):
        return indices
    found = [lax.slice_in_dim(indices, k, k + 1, axis=-1) for k in components]
    return lax.concatenate(found, indices.ndim - 1) if found else indices[..., :0]


def _restacked(
    ctx: Context, eqn: Eqn, w: Factored, indices: Any, places: _Places
) -> Factored:
    """The weight that the indices choose from a stack."""
    base = None if w.base is None else eval_eqn(eqn, [w.base, indices])[0]
    if len(places.looked_up) > 1 and places.indices:
        raise Unfactorable("a stack indexed along several axes at once")
    at: dict[Name, int] = {}
    if w.factors or w.base_scale is not None:
        w, at = _with_sole_axes(w)
    old = [x for i in places.looked_up or places.cut for x in w.axes[i]]
    source = old[0].sources if old else ()
    axes = []
    for place, size in zip(places.out, eqn.outvars[0].aval.shape, strict=True):
        if isinstance(place, str):
            axes.append((Axis(place, size, source),))
        elif place in places.cut:
            axes.append((dataclasses.replace(w.sole(place), size=size),))
        else:
            axes.append(w.axes[place])
    rows = [x for x in old if w.role(x.name) != "stack"]
    new = dataclasses.replace(
        w, base=base, axes=tuple(axes), indexed=(*w.indexed, *rows)
    )
    if w.base_scale is not None:
        by = _scale_of_rows(eqn, w, w.base_scale, indices, places)
        new = dataclasses.replace(new, base_scale=by)
    if not w.factors:
        return new
    factors = {k: _gathered(eqn, f, at, indices, places) for k, f in w.factors.items()
               if k != "key"}  # fmt: skip
    if {*places.indices} - ({*factors["a"].names} & {*factors["b"].names}):
        raise Unfactorable("an index that repeats the weight")
    new = dataclasses.replace(new, factors=factors)
    if w.key is not None:
        key = key_of(w.key, ctx.salt)
        sizes = {x.name: x.size for x in new.pieces if new.role(x.name) == "stack"}
        key = Named(jnp.broadcast_to(key, [*sizes.values()]), tuple(sizes))
        new = dataclasses.replace(new, factors={**new.factors, "key": key})
    return new
