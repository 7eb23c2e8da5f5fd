"""Operations on quantized weights, which are dequantized where they multiply.

An operation that computes with the weight dequantizes it inside `jax.checkpoint`: its
residuals are the quantized values, and the backward pass dequantizes them again.  One
that only reshapes or slices the weight is deferred until then; where a weight is codes
with a scale apart, it acts on the codes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flora._algebra.axes import Factored, is_lazy
from flora._algebra.codes import with_scale
from flora._trace.stage import filled
from flora._tree.quantized import Quantized, dequantized, is_quantized, of_levels


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """Dequantizes a weight, then runs the operations deferred since.

    It is static, so it holds no array: JAX would keep it alive in its caches.

    Attributes:
      run: the last operation, as a function of the dequantized weight before it and of
        the arrays among its other operands.
      output: which of the operation's outputs is the weight.
      dequantize: makes the dense weight that it is run on.
    """

    run: Callable[[Any, Sequence[Any]], Sequence[Any]]
    output: int
    dequantize: Callable[[Any], Any]

    def __call__(self, values: "_Operands") -> Any:
        weight = self.dequantize(values.quantized)
        return self.run(weight, values.others)[self.output].base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
    """What a deferred operation reads.

    Attributes:
      quantized: the values of the quantized weight.
      others: the arrays among the other operands.
    """

    quantized: Any
    others: Sequence[Any]

    shape = property(lambda self: self.quantized.shape)
    dtype = property(lambda self: self.quantized.dtype)


def on_quantized(run: Callable[..., Sequence[Any]], values: Sequence[Any]) -> list[Any]:
    """The outputs of an operation that is given quantized weights dequantized.

    Args:
      run: the operation, on values without quantized weights.
      values: its operands, arrays and weights, in any nesting.
    """

    def fn(values: Sequence[Any]) -> list[Any]:
        return list(run(*jax.tree.map(_dequantized, values, is_leaf=is_lazy)))

    values = jax.tree.map(with_scale, values, is_leaf=is_lazy)
    flat = jax.tree.leaves(values, is_leaf=is_lazy)
    quantized = [x for x in flat if isinstance(x, Factored) and is_quantized(x.base)]
    if not quantized:
        return list(run(*values))
    outs = jax.eval_shape(fn, values)
    if not any(_is_weight(x) for x in outs):
        return jax.checkpoint(fn)(values)
    if len(quantized) > 1:  # such as a sum of two weights, which is dense
        return fn(values)
    return [_deferred(fn, values, k, x) for k, x in enumerate(fn(values))]


def on_codes(run: Callable[..., Sequence[Any]], w: Factored, *rest: Any) -> list[Any]:
    """The outputs of an operation that moves elements of a weight, W = C ⊙ s.

    It acts on the codes C as it would on W, and on s by name.

    Args:
      run: the operation, on values without quantized weights.
      w: the weight.
      *rest: the other operands.
    """
    levels = w.base.values

    def stored(x: Any) -> Any:
        codes = dataclasses.replace(levels, qvalue=x.base)
        return dataclasses.replace(x, base=Quantized(codes, of_levels))

    return [stored(x) for x in run(dataclasses.replace(w, base=levels.qvalue), *rest)]


def in_slices(w: Factored, size: int) -> Factored:
    """A stack whose base can be sliced; dequantized if its quantized values cannot."""
    every = all(x.shape[:1] == (size,) for x in jax.tree.leaves(w.base))
    if not is_quantized(w.base):
        return w
    if every and not isinstance(w.base.dequantize, Deferred):
        return w
    return _dequantized(w)


def _dequantized(x: Any) -> Any:
    if not isinstance(x, Factored):
        return x
    return dataclasses.replace(x, base=dequantized(x.base))


def _is_weight(x: Any) -> bool:
    """Whether an output is still a weight, not rows or sums of one."""
    return is_lazy(x) and not (isinstance(x, Factored) and (x.indexed or x.reduced))


def _deferred(fn: Callable, values: Sequence[Any], output: int, x: Any) -> Any:
    """The output, quantized as the weight is, with the operation deferred."""
    if not isinstance(x, Factored) or x.base is None:
        return x
    at, w = next(
        (i, v)
        for i, v in enumerate(values)
        if isinstance(v, Factored) and is_quantized(v.base)
    )
    kind = w.frozen(None)
    flat, treedef = jax.tree.flatten([*values[:at], *values[at + 1 :]])
    arrays = [i for i, v in enumerate(flat) if isinstance(v, jax.Array)]
    static = [None if isinstance(v, jax.Array) else v for v in flat]

    def run(base: Any, others: Sequence[Any]) -> Sequence[Any]:
        rest = treedef.unflatten(filled(static, arrays, others))
        return fn([*rest[:at], kind.frozen(base), *rest[at:]])

    deferred = Deferred(run, output, w.base.dequantize)
    operands = _Operands(w.base.values, [flat[i] for i in arrays])
    return dataclasses.replace(x, base=Quantized(operands, deferred))
