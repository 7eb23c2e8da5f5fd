"""Finds reshapes beside products, before a jaxpr is interpreted.

A layer that makes heads writes a product and then a reshape, [tokens, 4096] to
[tokens, 32, 128], and the layer that joins them a reshape and then a product.  XLA
moves a reshape into a product, but not into the sum of two, x W + z Q: there the heads
would be laid out anew in memory.  So both are computed with heads as axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flora._trace.compat import Literal, P

# What a layer does with a product's result before it is reshaped: casts, biases.
_BETWEEN = (P.convert_element_type, P.add)


def reshapes(eqns: Sequence[Any]) -> Mapping[Any, tuple[int, ...]]:
    """The shape that the result of a product is given, and that an operand had.

    Args:
      eqns: of a jaxpr.

    Returns:
      `{variable: shape}`.
    """
    maker = {v: eqn for eqn in eqns for v in eqn.outvars}
    found: dict[Any, tuple[int, ...]] = {}
    for eqn in eqns:
        if eqn.primitive is P.reshape:
            if (v := _product(eqn.invars[0], maker)) is not None:
                found.setdefault(v, eqn.outvars[0].aval.shape)
        elif eqn.primitive is P.dot_general:
            for v in eqn.invars:
                made = _cast_of(v, maker)
                if made is not None and made.primitive is P.reshape:
                    found.setdefault(v, made.invars[0].aval.shape)
    return found


def _product(v: Any, maker: Mapping[Any, Any]) -> Any:
    """The product's result that v is, but for casts and a bias; or `None`."""
    todo, seen = [v], set()
    while todo:
        v = todo.pop()
        eqn: Any = None if isinstance(v, Literal) or v in seen else maker.get(v)
        if eqn is None or eqn.primitive not in (P.dot_general, *_BETWEEN):
            continue
        if eqn.primitive is P.dot_general:
            return v
        seen.add(v)
        shape = eqn.outvars[0].aval.shape
        todo += [u for u in reversed(eqn.invars) if u.aval.shape == shape]
    return None


def _cast_of(v: Any, maker: Mapping[Any, Any]) -> Any:
    """The equation that made v, before it was cast."""
    eqn = None if isinstance(v, Literal) else maker.get(v)
    if eqn is not None and eqn.primitive is P.convert_element_type:
        return _cast_of(eqn.invars[0], maker)
    return eqn
