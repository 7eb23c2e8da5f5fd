"""Operations on weights that are stored in fewer bits.

An operation that multiplies opens the weight inside `jax.checkpoint`: its residuals are
what is stored, and the backward pass opens it anew.  One that only changes how the weight
looks is put off until then.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flora._algebra.axes import Factored, is_lazy
from flora._tree.quantized import Quantized, dequantized, is_quantized


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """Opens a weight and looks at it as operations since have done.

    Attributes:
      run: the last operation, on the values with the opened weight among them.
      output: which of its outputs is the weight.
      before: the opener of what it was done to.
    """

    run: Callable[[Any], Sequence[Any]]
    output: int
    before: Callable[[Any], Any]

    def __call__(self, quantized: Any) -> Any:
        return self.run(self.before(quantized))[self.output].base


def on_quantized(run: Callable[..., Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """The outputs of an operation, for which stored weights are opened.

    Args:
      run: the operation, on values without stored weights.
      values: its operands, arrays and weights, in any nesting.
    """

    def fn(values: Sequence[Any]) -> list[Any]:
        return list(run(*jax.tree.map(_dequantized, values, is_leaf=is_lazy)))

    flat = jax.tree.leaves(values, is_leaf=is_lazy)
    quantized = [x for x in flat if isinstance(x, Factored) and is_quantized(x.base)]
    if not quantized:
        return list(run(*values))
    outs = jax.eval_shape(fn, values)
    if not any(_is_whole(x) for x in outs):
        return jax.checkpoint(fn)(values)
    if len(quantized) > 1:  # such as a sum of two weights: no one of them is left
        return fn(values)
    return [_put_off(fn, values, k, x) for k, x in enumerate(fn(values))]


def in_slices(w: Factored, size: int) -> Factored:
    """A stack whose base can be sliced as it is, opened where what is stored cannot."""
    whole = all(x.shape[:1] == (size,) for x in jax.tree.leaves(w.base))
    if not is_quantized(w.base) or (whole and not isinstance(w.base.dequantize, View)):
        return w
    return _dequantized(w)


def _dequantized(x: Any) -> Any:
    if not isinstance(x, Factored):
        return x
    return dataclasses.replace(x, base=dequantized(x.base))


def _is_whole(x: Any) -> bool:
    """Whether an output is still a weight, not rows or sums of one."""
    return is_lazy(x) and not (isinstance(x, Factored) and (x.indexed or x.reduced))


def _put_off(fn: Callable, values: Sequence[Any], output: int, x: Any) -> Any:
    """The output, opened where it is used."""
    if not isinstance(x, Factored) or x.base is None:
        return x
    at, w = next(
        (i, v)
        for i, v in enumerate(values)
        if isinstance(v, Factored) and is_quantized(v.base)
    )

    def run(base: Any) -> Sequence[Any]:
        return fn([*values[:at], w.frozen(base), *values[at + 1 :]])

    view = View(run, output, w.base.dequantize)
    return dataclasses.replace(x, base=Quantized(w.base.values, view))
