"""What rules of products share: W's own product, the low-rank term, output scales."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from flora._algebra.axes import Factored, Named, Sizes
from flora._algebra.low_rank import drop, with_output_scale
from flora._trace.compat import INLINE, Eqn, eval_eqn
from flora._trace.interpret import Context


class Operation:
    """An equation and its low-rank term, compared by what they compute.

    Attributes:
      eqn: the equation.
      change: `(operation, weight, x, *rest)`: scale (x A) B, of the result's dtype or
        of `sum_dtype`; a module's function.
      at: the position of the weight among the equation's operands.
      static: what `change` needs besides.
    """

    def __init__(self, eqn: Eqn, change: Callable, at: int, *static: Any) -> None:
        self.eqn, self.change, self.at, self.static = eqn, change, at, static
        avals = tuple((v.aval.shape, v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
        params = tuple(sorted(eqn.params.items()))
        self._means = (eqn.primitive, params, avals, change, at, static)
        self._hash = hash(self._means)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and self._means == other._means

    def base(self, w: Any, *rest: Any) -> Any:
        """X W."""
        return eval_eqn(self.eqn, [*rest[: self.at], w, *rest[self.at :]])[0]


@functools.partial(jax.jit, static_argnums=0, inline=INLINE)
def _once(operation: Operation, w: Factored, *rest: Any) -> Any:
    y = None if w.base is None else operation.base(w.base, *rest)
    change = operation.change(operation, w, *rest)
    y = change if y is None else y + change
    return y.astype(operation.eqn.outvars[0].aval.dtype)


def plain(ctx: Context, operation: Operation, w: Factored, *rest: Any) -> Any:
    """X W + scale (x A) B, traced once for all layers that are alike.

    JAX keeps its derivative and transpose, too.  In the program there is no call: JAX
    puts the operations where they would be, under the names of the layer.

    Args:
      ctx: the context.
      operation: the product.
      w: the weight, without output scale and keys.
      *rest: the equation's other operands, x first.
    """

    def run() -> Any:
        if not w.factors:
            return operation.base(w.base, *rest)
        return _once(operation, w, *rest)

    if ctx.log is None:
        return run()
    key = operation, jax.tree.structure(w)
    if key not in ctx.seen:
        ctx.seen[key] = run()
    return ctx.seen[key]


def multiplied(
    ctx: Context,
    operation: Operation,
    w: Factored,
    x: Any,
    *rest: Any,
    scale: Callable[[], tuple[Named, Sizes]],
    x_sizes: Callable[[], Sizes] = tuple,
) -> Any:
    """(x (W + scale A B)) ⊙ output scale.

    Where x meets the out axes, as with Wᵀ, (x ⊙ output scale) (W + scale A B)ᵀ.
    Dropout acts on what adapting changes: x W keeps the x that was dropped.

    Args:
      ctx: the context.
      operation: the product.
      w: the weight.
      x: activations.
      *rest: the equation's other operands.
      scale: the output scale, and name and length of each axis that the result's axes
        are made of.
      x_sizes: the same of x's axes, where these can be the weight's out axes.

    References: Liu et al. 2024 (DoRA), section 4.3 and its implementation in PEFT.
      https://arxiv.org/abs/2402.09353
    """
    bare, dropped = w.without("scale", "key"), drop(x, w, ctx.salt)
    if w.output_scale is None:
        if dropped is x or w.base is None:
            return plain(ctx, operation, bare, dropped, *rest)
        y = operation.base(w.base, x, *rest)
        change = dataclasses.replace(bare, base=None)
        return y + plain(ctx, operation, change, dropped, *rest)
    by, y_sizes = scale()
    if {*by.names} <= {*dict(x_sizes())}:
        scaled = with_output_scale(dropped, by, x_sizes()).astype(x.dtype)
        y = plain(ctx, operation, bare, scaled, *rest)
    else:
        y = plain(ctx, operation, bare, dropped.astype(x.dtype), *rest)
        y = with_output_scale(y, by, y_sizes)
    if dropped is x or w.base is None:
        return y
    left = (x.astype(dropped.dtype) - dropped).astype(x.dtype)
    return y + operation.base(w.base, left, *rest).astype(y.dtype)
