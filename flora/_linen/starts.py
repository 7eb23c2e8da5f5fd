"""What a variant makes of the base's values, apart from what training added to it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._trace.compat import open_jaxpr
from flora._tree.weight import LoraWeight


def of_base(node: LoraWeight, base: Any) -> dict[str, Any]:
    """The arrays of `extra` that depend on W's values, as they start: DoRA's magnitude.

    Parameters hold what is added to these, so that a base that a checkpoint brings
    after `init` has a start of its own.

    Args:
      node: a `LoraWeight`; its arrays do not matter.
      base: the weight W: an array, quantized, or a `ShapeDtypeStruct`.
    """
    if node.variant is None:
        return {}
    dtype = jnp.promote_types(base.dtype, jnp.float32)
    a, b = node.layout.factor_shapes(tuple(base.shape), node.rank)

    def start(base: Any) -> dict[str, Any]:
        zeros = {"a": jnp.zeros(a, dtype), "b": jnp.zeros(b, dtype)}
        weight = dataclasses.replace(node, base=base, **zeros, key=None, extra=None)
        variant: Any = node.variant
        return variant.start(jax.random.key(0), weight).extra or {}

    names = _dependent(start, base)
    if not names:
        return {}
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base))
    found = jax.eval_shape(start, base) if abstract else start(base)
    return {
        name: x if abstract else lax.stop_gradient(x)
        for name, x in found.items()
        if name in names
    }


def _dependent(start: Any, base: Any) -> set[str]:
    """The outputs, by name, that are computed from the argument."""
    closed, out = jax.make_jaxpr(start, return_shape=True)(base)
    jaxpr, _ = open_jaxpr(closed)
    known = {id(v) for v in jaxpr.invars}
    for eqn in jaxpr.eqns:
        if any(id(v) in known for v in eqn.invars):
            known |= {id(v) for v in eqn.outvars}
    return {
        n for n, v in zip(sorted(out), jaxpr.outvars, strict=True) if id(v) in known
    }
