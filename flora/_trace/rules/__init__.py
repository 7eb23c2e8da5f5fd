"""The table of rules: one function a primitive.

A rule takes `(ctx, eqn, *values)`, at least one value being a `Factored`, and returns
the equation's outputs.  It calls public transforms only.  Where it has no factored form
it raises `Unfactorable`.  Structural rules act on W as the equation does and on each
factor by name; they need not know what a name's role is.

A new rule is a function in one of these modules, a row in `RULES` below, the primitive
in `P` and its parameters in `_PARAMS` (both in `compat`), a test of the contract in
`tests/trace/rules`, and the primitive's name in `examples/howto/primitives.md`.
"""

from collections.abc import Callable
from typing import Any

from jax import lax

from flora._trace.compat import P
from flora._trace.interpret import Context, Use
from flora._trace.rules import (
    control,
    conv,
    derivatives,
    dot,
    gather,
    joined,
    ragged,
    sharded,
    squares,
    structure,
)

RULES = {
    # products: W meets activations
    P.dot_general: dot.dot_general,
    P.conv_general_dilated: conv.conv_general_dilated,
    P.gather: gather.gather,
    P.ragged_dot_general: ragged.ragged_dot_general,
    # structure: W is reshaped, sliced or cast
    P.transpose: structure.transpose,
    P.reshape: structure.reshape,
    P.broadcast_in_dim: structure.broadcast_in_dim,
    P.squeeze: structure.squeeze,
    P.reduce_sum: structure.reduce_sum,
    P.slice: structure.slice_,
    P.dynamic_slice: structure.dynamic_slice,
    P.split: structure.split,
    P.rev: structure.rev,
    P.pad: structure.pad,
    P.tile: structure.tile,
    P.concatenate: joined.concatenate,
    P.stack: joined.stack,
    P.add: joined.add,
    P.add_any: joined.add,
    P.sub: joined.sub,
    P.complex: joined.complex_,
    P.all_gather: sharded.all_gather,
    P.reshard: sharded.reshard,
    P.mul: structure.mul,
    P.div: structure.div,
    P.neg: structure.neg,
    P.convert_element_type: structure.convert_element_type,
    P.reduce_precision: structure.on_base,
    P.copy: structure.on_base,
    P.device_put: structure.device_put,
    P.sharding_constraint: structure.on_base,
    P.checkpoint_name: structure.on_base,
    P.pvary: structure.on_base,
    P.stop_gradient: structure.stop_gradient,
    P.optimization_barrier: structure.optimization_barrier,
    # norms: W is squared and summed
    P.square: squares.square,
    P.integer_pow: squares.integer_pow,
    # control: W enters a function
    P.jit: control.jit,
    P.remat: control.remat,
    P.scan: control.scan,
    P.while_: control.while_,
    P.cond: control.cond,
    P.custom_jvp_call: derivatives.custom_jvp_call,
    P.custom_vjp_call: derivatives.custom_vjp_call,
    P.shard_map: sharded.shard_map,
}

# What takes the squares of a weight; all else needs them formed.
RULES_FOR_SQUARES = {
    P.convert_element_type: squares.cast_squares,
    P.reduce_sum: squares.sum_squares,
    P.jit: control.jit,
}

# What takes quantized weights as they are: products, casts, functions inside.
_TAKES_STORED = frozenset({
    P.dot_general, P.conv_general_dilated, P.gather, P.ragged_dot_general,
    P.convert_element_type, P.optimization_barrier,
    P.jit, P.remat, P.scan, P.while_, P.cond,
})  # fmt: skip

# What moves the elements of a weight, whatever they are: codes as they are.
_MOVES = frozenset({
    P.transpose, P.reshape, P.broadcast_in_dim, P.squeeze, P.slice, P.dynamic_slice,
    P.split, P.rev, P.copy, P.sharding_constraint, P.checkpoint_name, P.stop_gradient,
})  # fmt: skip


def context(
    log: dict[Use, None] | None = None,
    *,
    together: bool = True,
    claims: bool = True,
    ragged_dot: Callable[..., Any] = lax.ragged_dot,
) -> Context:
    """A context with all rules.

    Args:
      log: where uses are recorded, if they are.
      claims: whether roles are recorded, not only what has no factored form.
      together: whether products of the same activations may be computed at once.
      ragged_dot: what computes products with experts.
    """
    joint = dot.together if together and log is None else None
    return Context(
        RULES,
        RULES_FOR_SQUARES,
        _TAKES_STORED,
        _MOVES,
        joint,
        log,
        claims=claims,
        ragged_dot=ragged_dot,
    )
