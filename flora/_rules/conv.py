"""The rule for convolutions: y = conv(x, W) + scale conv(x, A) B."""

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
    ctx.claim(w, eqn, {i: "out" if i == spec[0] else "in" for i in range(len(w.axes))})
    base = None if w.base is None else eval_eqn(eqn, [x, w.base])[0]
    if w.a is None:
        return [base]
    _check_roles(w, spec)
    change = _change(eqn, drop(x, w, ctx.salt), w, out)
    return [change if base is None else base + change]


def _check_roles(w: Factored, spec: Any) -> None:
    for i, axis in enumerate(w.axes):
        wanted = {"out"} if i == spec[0] else {"in"}
        if {d.role for d in axis if d.size > 1} - wanted:
            raise Unfactorable("a convolution across the axes of the weight's layout")


def _change(eqn: Any, x: Any, w: Factored, out: Any) -> Any:
    p = eqn.params
    spec, out_spec = p["dimension_numbers"].rhs_spec, p["dimension_numbers"].out_spec
    groups = p["feature_group_count"] * p["batch_group_count"]
    v, rank = views(w, "w"), w.a.shape[-1]
    dtype = compute_dtype_of(x.dtype, out.dtype)

    kernel = v.a.astype(dtype)
    window = [n if i != spec[0] else rank for i, n in enumerate(w.shape)]
    kernel = jnp.moveaxis(
        kernel.reshape([*_without(w.shape, spec[0]), rank]), -1, spec[0]
    )
    kernel = kernel.reshape(window)
    kernel = jnp.tile(
        kernel, [groups if i == spec[0] else 1 for i in range(len(window))]
    )
    z = lax.conv_general_dilated(
        x.astype(dtype),
        kernel,
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
    names = [("y", i) for i in range(z.ndim)]
    z = Labelled(
        z.reshape((*z.shape[:c], groups, rank, *z.shape[c + 1 :])),
        (*names[:c], "group", RANK, *names[c + 1 :]),
    )
    b = v.b.reshape(rank, groups, -1).astype(dtype)
    y = contract(
        z,
        Labelled(b, (RANK, "group", "channel")),
        (*names[:c], "group", "channel", *names[c + 1 :]),
        precision=p["precision"],
        dtype=out.dtype,
    )
    return y.array.reshape(out.shape)


def _without(shape: tuple[int, ...], axis: int) -> list[int]:
    return [n for i, n in enumerate(shape) if i != axis]
