"""The rule for convolutions: y = conv(x, W) + scale conv(x, A) B."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._algebra.axes import RANK, Axis, Factored, Named, Sizes, fused
from flora._algebra.low_rank import compute_dtype_of, sum_dtype, with_cast
from flora._trace.compat import Eqn
from flora._trace.interpret import Context, Roles, sources_as
from flora._trace.rules.product import Operation, Scaling, multiplied
from flora._tree.errors import Unfactorable


def conv_general_dilated(ctx: Context, eqn: Eqn, x: Any, w: Any) -> list[Any]:
    """A convolves with W's window, strides, padding and dilations; B is 1×1.

    In G feature (or batch) groups W is `[*window, in/G, out]`.  Every group convolves
    with the same A, and each has its own out/G columns of B.  The gradient of the input
    meets B first, then A.
    """
    if isinstance(x, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as the input of a convolution")
    ctx.record(eqn, _roles(w, eqn.params))
    return [multiplied(ctx, Operation(eqn, _change, _scaling, 1), w, x)]


def _scaling(operation: Operation, w: Factored, x: Any) -> Scaling:
    eqn, own = operation.eqn, fused(w)
    dn, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    out, features = [(f"y{i}", n) for i, n in enumerate(shape)], dn.out_spec[1]
    channels = _sizes(own.axes[dn.rhs_spec[0]])
    sizes = [*out[:features], *channels, *out[features + 1 :]]
    return Scaling(own.factors["scale"], sizes)


def _sizes(axis: Sequence[Axis]) -> Sizes:
    return [(x.name, x.size) for x in axis]


def _roles(w: Factored, p: Any) -> Roles:
    """Axes that `vmap` joined to the output channels are a stack, if groups say so."""
    out, in_, *window = p["dimension_numbers"].rhs_spec
    # What both are parts of one axis is a group: it says nothing.
    ins = {source for x in w.axes[in_] for source in x.sources}
    axis = [x for x in w.axes[out] if not ins & {*x.sources}]
    last = {source for x in axis[-1:] for source in x.sources}
    count = p["feature_group_count"]
    stacked = [x for x in axis[:-1] if count % x.size == 0 and not last & {*x.sources}]
    return (
        sources_as("stack", stacked)
        | sources_as("out", [x for x in axis if x not in stacked])
        | sources_as("in", w.axes[in_])
        | sources_as("window", itertools.chain(*(w.axes[i] for i in window)))
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """W's axes: names and sizes of their pieces."""

    window: Sequence[Sizes]
    in_: Sizes
    groups: Sizes
    out: Sizes


def _change(operation: Operation, w: Factored, x: Any) -> Any:
    """Scale times x convolved with the factor that holds the inputs, then the other."""
    eqn, w = operation.eqn, fused(w)
    p, result = eqn.params, eqn.outvars[0].aval
    dtype = compute_dtype_of(x.dtype, result.dtype)
    out, in_, *window = p["dimension_numbers"].rhs_spec
    count = p["feature_group_count"] * p["batch_group_count"]
    groups, channels, cut = _cut(_sizes(w.axes[out]), count)
    first, second = (f.astype(dtype).split(cut) for f in (w.a, w.b))
    ins = {x.name for x in w.axes[in_]}
    if ins & {*second.names} or (not ins and _lead(channels, second) == channels):
        first, second = second, first
    # Stacked kernels over one image: the first step makes channels for each.
    both = _lead(channels, first)
    rest = channels[len(both) :]
    others = {n for n, _ in rest}
    if not ins <= {*first.names} - {*second.names} or not others <= {*second.names} - {
        *first.names
    }:
        raise Unfactorable("a convolution across the axes of the weight's layout")
    rank = [(RANK, w.rank)]
    windows = [_sizes(w.axes[i]) for i in window]
    start = _Kernel(windows, _sizes(w.axes[in_]), groups, [*both, *rank])
    convolved = functools.partial(_convolved, p, kernel=start, as_first=True)
    z = with_cast(convolved, x, first, dtype)
    z = _on_hidden(w, z, p["dimension_numbers"].out_spec[1])
    z = z * jnp.asarray(w.settings.scale, dtype)
    end = _Kernel(windows, rank, [*groups, *both], rest)
    y = _convolved(p, z, second, end, as_first=False)
    return y.reshape(result.shape).astype(sum_dtype(result.dtype))


def _on_hidden(w: Factored, z: Any, features: int) -> Any:
    """What the variant makes of x A; the rank is the innermost part of the channels."""
    if w.settings.between is None:
        return z
    z = jnp.moveaxis(z, features, -1)
    made = w.settings.between(z.reshape(*z.shape[:-1], -1, w.rank))
    return jnp.moveaxis(made.reshape(z.shape), -1, features)


def _lead(axis: Sizes, factor: Named) -> Sizes:
    """The pieces that lead an axis and that a factor has."""
    return [*itertools.takewhile(lambda piece: piece[0] in factor.names, axis)]


def _cut(axis: Sizes, count: int) -> tuple[Sizes, Sizes, dict[str, Sizes]]:
    """The groups that lead an axis of output channels, and the channels of one.

    Also what becomes of a piece that is cut in two.
    """
    groups: list[tuple[str, int]] = []
    for k, (name, size) in enumerate(axis):
        if count == 1:
            return groups, axis[k:], {}
        if count % size == 0:
            groups.append((name, size))
            count //= size
        elif size % count == 0:
            two = [(f"{name} groups", count), (f"{name} channels", size // count)]
            return [*groups, two[0]], [two[1], *axis[k + 1 :]], {name: two}
        else:
            raise Unfactorable("a convolution with groups across stacked kernels")
    return groups, [], {}


def _convolved(
    p: Any, x: Any, factor: Named, kernel: _Kernel, *, as_first: bool
) -> Any:
    """An input convolved with a factor, 1×1 along window axes that the factor lacks."""
    dn, mine = p["dimension_numbers"], []
    for axis in kernel.window:
        held = [n in factor.names for n, _ in axis]
        if any(held) and not all(held):
            raise Unfactorable("a convolution across the axes of the weight's layout")
        mine.append(any(held) or (as_first and not axis))
    groups = math.prod(n for _, n in kernel.groups)
    batches = p["batch_group_count"] if as_first else 1

    def of_window(values: Sequence[Any], neutral: Any) -> list[Any]:
        return [v if ok else neutral for v, ok in zip(values, mine, strict=True)]

    spec = dn.rhs_spec
    order = sorted(range(len(spec)), key=[*spec[2:], spec[1], spec[0]].__getitem__)
    return lax.conv_general_dilated(
        x,
        lax.transpose(_arranged(factor, kernel), order),
        of_window(p["window_strides"], 1),
        of_window(p["padding"], (0, 0)),
        of_window(p["lhs_dilation"], 1),
        of_window(p["rhs_dilation"], 1),
        lax.ConvDimensionNumbers(
            dn.lhs_spec if as_first else dn.out_spec, spec, dn.out_spec
        ),
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


def _arranged(factor: Named, kernel: _Kernel) -> Any:
    """The factor, `[*window, in, groups · out]`, repeated for groups that it lacks."""
    window = [piece for axis in kernel.window for piece in axis]
    pieces = [*window, *kernel.in_, *kernel.groups, *kernel.out]
    array = factor.aligned([n for n, _ in pieces])
    full = [*array.shape[: len(window)], *(n for _, n in pieces[len(window) :])]
    array = jnp.broadcast_to(array, full)
    sizes = [math.prod(size if n in factor.names else 1 for n, size in axis)
             for axis in kernel.window]  # fmt: skip
    return array.reshape(*sizes, math.prod(n for _, n in kernel.in_), -1)
