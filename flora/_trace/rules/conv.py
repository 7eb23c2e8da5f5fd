"""The rule for convolutions: y = conv(x, W) + scale conv(x, A) B."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._algebra.factored import Factored
from flora._algebra.low_rank import Labelled, compute_dtype_of, drop, with_columns
from flora._algebra.views import RANK, views
from flora._trace.compat import eval_eqn
from flora._tree.errors import Unfactorable

Named = Sequence[tuple[Hashable, int]]


def conv_general_dilated(ctx: Any, eqn: Any, x: Any, w: Any) -> list[Any]:
    """A convolves with W's window, strides, padding and dilations; B is 1×1.

    In G feature (or batch) groups W is `[*window, in/G, out]`.  Every group convolves
    with the same A, and each has its own out/G columns of B.  The gradient of the input
    meets B first, then A.
    """
    if isinstance(x, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as the input of a convolution")
    p, out = eqn.params, eqn.outvars[0].aval
    ctx.record(w, eqn, _roles(w, p))
    if w.columns is not None:
        return [_on_columns(ctx, eqn, x, w)]
    base = None if w.base is None else eval_eqn(eqn, [x, w.base])[0]
    if w.a is None:
        return [base]
    change = _change(eqn, drop(x, w, ctx.salt), w, out)
    return [change if base is None else base + change]


def _on_columns(ctx: Any, eqn: Any, x: Any, w: Factored) -> Any:
    """A convolution whose output channels are scaled."""
    dn, result = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    out: list[Any] = [(("y", i), n) for i, n in enumerate(result.shape)]
    features = dn.out_spec[1]
    out[features : features + 1] = views(w, "w").segments[dn.rhs_spec[0]]

    def run(w: Factored, x: Any) -> Any:
        x = x.astype(eqn.invars[0].aval.dtype)
        return conv_general_dilated(ctx, eqn, x, w)[0]

    return with_columns(w, x, ctx.salt, run, out)


def _roles(w: Factored, p: Any) -> set[tuple[int, str]]:
    """Axes that `vmap` joined to the output channels are a stack, if groups say so."""
    out, in_, *window = p["dimension_numbers"].rhs_spec
    # What both are parts of one axis is a group: it says nothing.
    axis = [d for d in w.axes[out] if d.at[0] not in {i.at[0] for i in w.axes[in_]}]
    stacked = {d.at[0] for d in axis[:-1] if p["feature_group_count"] % d.size == 0}
    stacked -= {d.at[0] for d in axis[-1:]}
    return (
        {(d.at[0], "stack" if d.at[0] in stacked else "out") for d in axis}
        | {(d.at[0], "in") for d in w.axes[in_]}
        | {(d.at[0], "window") for i in window for d in w.axes[i]}
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """W's axes by name: `(label, size)` pairs."""

    window: Sequence[Named]
    in_: Named
    groups: Named
    out: Named


def _change(eqn: Any, x: Any, w: Factored, result: Any) -> Any:
    """Scale times x convolved with the factor that holds the inputs, then the other."""
    p, dtype = eqn.params, compute_dtype_of(x.dtype, result.dtype)
    v = views(w, "w")
    first = Labelled(v.a.astype(dtype), v.a_labels)
    second = Labelled(v.b.astype(dtype), v.b_labels)
    out, in_, *window = p["dimension_numbers"].rhs_spec
    count = p["feature_group_count"] * p["batch_group_count"]
    groups, channels = _cut(v.segments[out], count)
    first, second = (_with_cut_axis(f, groups, channels) for f in (first, second))
    kernel = _Kernel([v.segments[i] for i in window], v.segments[in_], groups, channels)
    ins = {label for label, _ in kernel.in_}
    if ins & {*second.labels} or (not ins and _lead(channels, second) == channels):
        first, second = second, first
    # Stacked kernels over one image: the first step makes channels for each.
    both = _lead(channels, first)
    rest = channels[len(both) :]
    known = ins <= {*first.labels}, {label for label, _ in rest} <= {*second.labels}
    if (
        not all(known)
        or ins & {*second.labels}
        or any(n in first.labels for n, _ in rest)
    ):
        raise Unfactorable("a convolution across the axes of the weight's layout")
    rank = [(RANK, w.a.shape[-1])]
    start = dataclasses.replace(kernel, out=[*both, *rank])
    z = _convolved(p, x.astype(dtype), first, start, as_first=True)
    z = _between(w, z, p["dimension_numbers"].out_spec[1])
    z = z * jnp.asarray(w.site.scale, dtype)
    end = _Kernel(kernel.window, rank, [*groups, *both], rest)
    y = _convolved(p, z, second, end, as_first=False)
    return y.reshape(result.shape).astype(result.dtype)


def _between(w: Factored, z: Any, features: int) -> Any:
    """What the variant makes of x A, whose rank is the innermost part of the channels."""
    if w.site.between is None:
        return z
    z = jnp.moveaxis(z, features, -1)
    made = w.site.between(z.reshape(*z.shape[:-1], -1, w.a.shape[-1]))
    return jnp.moveaxis(made.reshape(z.shape), -1, features)


def _lead(axis: Named, factor: Labelled) -> Named:
    """The labels that lead an axis and that a factor has."""
    n = 0
    while n < len(axis) and axis[n][0] in factor.labels:
        n += 1
    return axis[:n]


def _cut(axis: Named, count: int) -> tuple[Named, Named]:
    """The groups that lead an axis of output channels, and the channels of one."""
    groups: list[tuple[Hashable, int]] = []
    for k, (label, size) in enumerate(axis):
        if count == 1:
            return groups, axis[k:]
        if count % size == 0:
            groups.append((label, size))
            count //= size
        elif size % count == 0:
            groups.append(((label, "groups"), count))
            return groups, [((label, "channels"), size // count), *axis[k + 1 :]]
        else:
            raise Unfactorable("a convolution with groups across stacked kernels")
    return groups, []


def _with_cut_axis(factor: Labelled, groups: Named, channels: Named) -> Labelled:
    """The factor with the axis that `_cut` cut in two."""
    if not groups or not channels:
        return factor
    (last, n), (next_, m) = groups[-1], channels[0]
    whole = last[0] if isinstance(last, tuple) and last[1] == "groups" else None
    if whole is None or whole not in factor.labels:
        return factor
    at = list(factor.labels).index(whole)
    shape, labels = factor.array.shape, list(factor.labels)
    array = factor.array.reshape(*shape[:at], n, m, *shape[at + 1 :])
    return Labelled(array, [*labels[:at], last, next_, *labels[at + 1 :]])


def _convolved(
    p: Any, x: Any, factor: Labelled, kernel: _Kernel, *, as_first: bool
) -> Any:
    """An input convolved with a factor, 1×1 along the window axes that it does not have."""
    dn = p["dimension_numbers"]
    held = [all(n in factor.labels for n, _ in axis) and axis for axis in kernel.window]
    if any(axis and not ok and {n for n, _ in axis} & {*factor.labels}
           for axis, ok in zip(kernel.window, held, strict=True)):  # fmt: skip
        raise Unfactorable("a convolution across the axes of the weight's layout")
    mine = [bool(axis) or (as_first and not whole)
            for axis, whole in zip(held, kernel.window, strict=True)]  # fmt: skip
    array = _arranged(factor, kernel)
    lhs_spec = dn.lhs_spec if as_first else dn.out_spec
    groups = math.prod(n for _, n in kernel.groups)
    batches = p["batch_group_count"] if as_first else 1

    def of_window(values: Sequence[Any], neutral: Any) -> list[Any]:
        return [v if ok else neutral for v, ok in zip(values, mine, strict=True)]

    spec = dn.rhs_spec
    order = sorted(range(len(spec)), key=[*spec[2:], spec[1], spec[0]].__getitem__)
    return lax.conv_general_dilated(
        x,
        lax.transpose(array, order),
        of_window(p["window_strides"], 1),
        of_window(p["padding"], (0, 0)),
        of_window(p["lhs_dilation"], 1),
        of_window(p["rhs_dilation"], 1),
        lax.ConvDimensionNumbers(lhs_spec, spec, dn.out_spec),
        groups // batches,
        batches,
        p["precision"],
        out_sharding=_divided(p, whole_features=as_first),
    )


def _divided(p: Any, *, whole_features: bool) -> Any:
    """The `out_sharding` of the convolution, for a result that has its axes."""
    sharding = p["out_sharding"]
    if sharding is None or not whole_features:
        return sharding
    features = p["dimension_numbers"].out_spec[1]
    entries = [None if i == features else x for i, x in enumerate(sharding.spec)]
    return NamedSharding(sharding.mesh, Spec(*entries))


def _arranged(factor: Labelled, kernel: _Kernel) -> Any:
    """The factor as `[*window, in, groups · out]`, repeated for groups that it lacks."""
    labels = list(factor.labels)
    parts = [*kernel.window, kernel.in_, kernel.groups, kernel.out]
    named = [pair for part in parts for pair in part]
    perm = [labels.index(label) for label, _ in named if label in labels]
    array = lax.transpose(factor.array, perm)
    array = array.reshape([n if label in labels else 1 for label, n in named])
    window = len([pair for part in kernel.window for pair in part])
    full = [*array.shape[:window], *(n for _, n in named[window:])]
    array = jnp.broadcast_to(array, full)
    sizes = [math.prod(n if label in labels else 1 for label, n in axis)
             for axis in kernel.window]  # fmt: skip
    ins = math.prod(n for _, n in kernel.in_)
    return array.reshape(*sizes, ins, -1)
