"""The rule for convolutions: y = conv(x, W) + scale conv(x, A) B."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._compat import eval_eqn
from flora._errors import Unfactorable
from flora._factored import RANK, Factored, views
from flora._forms import Labelled, compute_dtype_of, contract, drop


def conv_general_dilated(ctx: Any, eqn: Any, x: Any, w: Any) -> list[Any]:
    """A convolves with W's window, strides, padding and dilations; B is 1×1.

    In G feature (or batch) groups W is `[*window, in/G, out]`.  Every group convolves
    with the same A, and each has its own out/G columns of B.
    """
    if isinstance(x, Factored) or not isinstance(w, Factored):
        raise Unfactorable("a weight as the input of a convolution")
    p, out = eqn.params, eqn.outvars[0].aval
    spec = p["dimension_numbers"].rhs_spec
    ctx.record(w, eqn, _roles(w, spec[0], p["feature_group_count"]))
    base = None if w.base is None else eval_eqn(eqn, [x, w.base])[0]
    if w.a is None:
        return [base]
    change = _change(eqn, drop(x, w, ctx.salt), w, out)
    return [change if base is None else base + change]


def _roles(w: Factored, channels: int, groups: int) -> set[tuple[int, str]]:
    """Axes that `vmap` joined to the output channels are a stack, if groups say so."""
    axis = w.axes[channels]
    stacked = {d.at[0] for d in axis[:-1] if groups % d.size == 0}
    stacked -= {d.at[0] for d in axis[-1:]}
    found = {(d.at[0], "stack" if d.at[0] in stacked else "out") for d in axis}
    rest = (axis for i, axis in enumerate(w.axes) if i != channels)
    return found | {(d.at[0], "in") for axis in rest for d in axis}


def _stack_size(w: Factored, out_axis: int) -> int:
    """How many stacked kernels the axis of output channels joins; 1 for a plain one."""
    for i, axis in enumerate(w.axes):
        if i != out_axis and {d.role for d in axis if d.size > 1} - {"in"}:
            raise Unfactorable("a convolution across the axes of the weight's layout")
    roles = [d.role for d in w.axes[out_axis] if d.size > 1]
    if "in" in roles or roles != sorted(roles, reverse=True):
        raise Unfactorable("a convolution across the axes of the weight's layout")
    return math.prod(d.size for d in w.axes[out_axis] if d.role == "stack")


def _change(eqn: Any, x: Any, w: Factored, out: Any) -> Any:
    p = eqn.params
    spec, out_spec = p["dimension_numbers"].rhs_spec, p["dimension_numbers"].out_spec
    stack, rank = _stack_size(w, spec[0]), w.a.shape[-1]
    groups = p["feature_group_count"] * p["batch_group_count"]
    if groups > 1 and groups % stack:
        raise Unfactorable("a convolution with groups across stacked kernels")
    groups = max(groups // stack, 1)
    dtype = compute_dtype_of(x.dtype, out.dtype)
    v = views(w, "w")

    window = [n for i, n in enumerate(w.shape) if i != spec[0]]
    kernel = jnp.moveaxis(v.a.astype(dtype).reshape(stack, *window, rank), 0, -2)
    kernel = jnp.broadcast_to(
        kernel[..., None, :], (*window, stack, groups, rank)
    ).reshape(*window, stack * groups * rank)
    z = lax.conv_general_dilated(
        x.astype(dtype),
        jnp.moveaxis(kernel, -1, spec[0]),
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        p["dimension_numbers"],
        p["feature_group_count"],
        p["batch_group_count"],
        p["precision"],
    ) * jnp.asarray(w.site.scale, dtype)

    c = out_spec[1]
    before = [("y", i) for i in range(c)]
    after = [("y", i) for i in range(c + 1, z.ndim)]
    split = (*z.shape[:c], stack, groups, rank, *z.shape[c + 1 :])
    y = contract(
        Labelled(z.reshape(split), [*before, "stack", "group", RANK, *after]),
        Labelled(
            v.b.reshape(stack, rank, groups, -1).astype(dtype),
            ["stack", RANK, "group", "channel"],
        ),
        [*before, "stack", "group", "channel", *after],
        precision=p["precision"],
        dtype=out.dtype,
    )
    return y.array.reshape(out.shape)
