"""What the rules of products share: W's own product, the low-rank term, output scales."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from flora._algebra.axes import Factored, Named, Sizes
from flora._algebra.low_rank import drop, with_output_scale
from flora._trace.compat import Eqn
from flora._trace.interpret import Context


class Operation:
    """An equation, compared by what it computes, not by where it stands."""

    def __init__(self, eqn: Eqn, *static: Any) -> None:
        self.eqn, self.static = eqn, static
        avals = [(v.aval.shape, v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)]
        params = tuple(sorted(eqn.params.items()))
        self._means = (eqn.primitive, params, static, tuple(avals))
        self._hash = hash(self._means)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and self._means == other._means


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def once(change: Callable, operation: Operation, w: Factored, *rest: Any) -> Any:
    """Traced, differentiated and transposed once for all layers that are alike."""
    return change(operation, w, *rest)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a weight with activations, by whatever primitive.

    Attributes:
      base: `(W, x)`: x W for an array W.
      change: `(operation, weight, x, *rest)`: scale (x A) B; a module's function.
      y: name and length of each axis that the result's axes are made of.
      x: the same of x's axes, where these can be the weight's out axes.
      scale: what stands for the weight's own output scale, if that is another.
      static: what `change` needs besides the equation.
      rest: arrays that `change` needs besides x.
    """

    base: Callable[[Any, Any], Any]
    change: Callable[..., Any]
    y: Callable[[], Sizes]
    x: Callable[[], Sizes] = tuple
    scale: Callable[[], Named] | None = None
    static: tuple[Any, ...] = ()
    rest: tuple[Any, ...] = ()


def multiplied(ctx: Context, eqn: Eqn, product: Product, w: Factored, x: Any) -> Any:
    """(x (W + scale A B)) ⊙ output scale.

    Where x meets the out axes, as with Wᵀ, (x ⊙ output scale) (W + scale A B)ᵀ.
    Dropout acts on what adapting changes: x W keeps the x that was dropped.

    References: Liu et al. 2024 (DoRA), section 4.3 and its implementation in PEFT.
      https://arxiv.org/abs/2402.09353
    """
    if w.output_scale is None:
        return _plain(eqn, product, w, x, drop(x, w, ctx.salt))
    scale = product.scale() if product.scale else w.output_scale
    dropped = drop(x, w, ctx.salt)

    def run(w: Factored, x: Any) -> Any:
        x = x.astype(eqn_dtype)
        return _plain(eqn, product, w, x, x)

    eqn_dtype, bare = x.dtype, w.without("scale")
    if {*scale.names} <= {*dict(product.x())}:
        y = run(bare, with_output_scale(dropped, scale, product.x()))
    else:
        y = with_output_scale(run(bare, dropped), scale, product.y())
    if dropped is x or w.base is None:
        return y
    rest = run(w.frozen(w.base), x.astype(dropped.dtype) - dropped)
    return y + rest.astype(y.dtype)


def _plain(eqn: Eqn, product: Product, w: Factored, x: Any, dropped: Any) -> Any:
    """X W + scale (dropped A) B."""
    y = None if w.base is None else product.base(w.base, x)
    if not w.factors:
        return y
    own = dataclasses.replace(w.without("key", "scale"), base=None, axes=w.axes)
    operation = Operation(eqn, *product.static)
    change = once(product.change, operation, own, dropped, *product.rest)
    return change if y is None else y + change
