"""What rules of products share: W's own product, the low-rank term, output scales."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora._algebra.axes import Factored, Named, Sizes
from flora._algebra.codes import is_codes, with_scale
from flora._algebra.low_rank import SCOPE, drop, with_output_scale
from flora._trace.compat import INLINE, Eqn, eval_eqn
from flora._trace.interpret import Context
from flora._tree.errors import Unfactorable
from flora._tree.quantized import dequantized, is_quantized


class Operation:
    """An equation and its low-rank term, compared by what they compute.

    Attributes:
      eqn: the equation.
      change: `(operation, weight, x, *rest)`: scale (x A) B, of the result's dtype or
        of `sum_dtype`; a module's function.
      scaling: of the same: where the weight's output scale is in the product, a
        `Scaling`; a module's function.
      at: the position of the weight among the equation's operands.
      static: what these need besides.
    """

    def __init__(
        self, eqn: Eqn, change: Callable, scaling: Callable, at: int, *static: Any
    ) -> None:
        self.eqn, self.change, self.scaling = eqn, change, scaling
        self.at, self.static = at, static
        avals = tuple((v.aval.shape, v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
        params = tuple(sorted(eqn.params.items()))
        self._means = (eqn.primitive, params, avals, change, scaling, at, static)
        self._hash = hash(self._means)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and self._means == other._means

    def base(self, w: Factored, *rest: Any) -> Any:
        """X W.  Of a quantized weight the quantized values are kept, nothing dense."""
        if not is_quantized(w.base):
            return self.of(w.base, *rest)
        return jax.checkpoint(self._of_stored)(
            dataclasses.replace(w, factors={}), *rest
        )

    def of(self, w: Any, *rest: Any) -> Any:
        """The operation itself, on arrays."""
        return eval_eqn(self.eqn, [*rest[: self.at], w, *rest[self.at :]])[0]

    def _of_stored(self, w: Factored, x: Any, *rest: Any) -> Any:
        """(x C) ⊙ s or (x ⊙ s) C of codes; s is first multiplied with C otherwise."""
        if found := self._scaling_of_codes(w, x, *rest):
            by, c = found.by, dequantized(w.base)
            if {*by.names} <= {*dict(found.y)}:
                return with_output_scale(self.of(c, x, *rest), by, found.y)
            inexact = jnp.issubdtype(x.dtype, jnp.inexact)
            if {*by.names} <= {*dict(found.x)} and inexact:
                return self.of(c, with_output_scale(x, by, found.x), *rest)
        return self.of(dequantized(with_scale(w).base), x, *rest)

    def _scaling_of_codes(self, w: Factored, *rest: Any) -> "Scaling | None":
        if not is_codes(w) or not scales_apart(self.eqn):
            return None
        by = dataclasses.replace(w, factors={"scale": w.base_scale}, base_scale=None)
        try:
            return self.scaling(self, by, *rest)
        except Unfactorable:
            return None


def scales_apart(eqn: Eqn) -> bool:
    """Whether a product can hold sums of codes: float16 and 8 bits end too soon."""
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    floating = [x for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
    return all(float(jnp.finfo(x).max) > 1e30 for x in floating)


class Scaling(NamedTuple):
    """An output scale, by the axes of a product.

    Attributes:
      by: the scale; it meets the result or, as with Wᵀ, x.
      y: name and length of each axis that the result's axes are made of.
      x: the same of x's axes, where these can be the weight's out axes.
    """

    by: Named
    y: Sizes
    x: Sizes = ()


@functools.partial(jax.jit, static_argnums=0, inline=INLINE)
def _once(operation: Operation, w: Factored, *rest: Any) -> Any:
    y = None if w.base is None else operation.base(w, *rest)
    with jax.named_scope(SCOPE):
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
            return operation.base(w, *rest)
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

    References: Liu et al. 2024 (DoRA), section 4.3 and its implementation in PEFT.
      https://arxiv.org/abs/2402.09353
    """
    bare, dropped = w.without("scale", "key"), drop(x, w, ctx.salt)
    if w.output_scale is None:
        if dropped is x or w.base is None:
            return plain(ctx, operation, bare, dropped, *rest)
        y = operation.base(w, x, *rest)
        change = dataclasses.replace(bare, base=None, base_scale=None)
        return y + plain(ctx, operation, change, dropped, *rest)
    by, y_sizes, x_sizes = operation.scaling(operation, w, x, *rest)
    if {*by.names} <= {*dict(x_sizes)}:
        scaled = with_output_scale(dropped, by, x_sizes).astype(x.dtype)
        y = plain(ctx, operation, bare, scaled, *rest)
    else:
        y = plain(ctx, operation, bare, dropped.astype(x.dtype), *rest)
        y = with_output_scale(y, by, y_sizes)
    if dropped is x or w.base is None:
        return y
    left = (x.astype(dropped.dtype) - dropped).astype(x.dtype)
    return y + operation.base(w, left, *rest).astype(y.dtype)
