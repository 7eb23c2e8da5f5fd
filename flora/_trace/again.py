"""Finds activations that are cheap to make again, before a jaxpr is interpreted.

An adapted layer needs its input x for dA = xᵀ g; a frozen one does not.  But x is often
made, element by element, of values that the model keeps for its own derivatives: an
activation of the products before it, a norm of the residual stream.  Where that is so
the backward pass makes x again instead of keeping it.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from flora._trace import compat
from flora._trace.compat import Eqn, Literal, P, variables

# Operations of which XLA makes parts of others, by what their derivatives need: nothing
# but constants, or the operands (or the result).
_VIEWS = {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape",
          "slice", "split", "squeeze", "stop_gradient", "transpose"}  # fmt: skip
_SUMS = {"add", "add_any", "sub"}
_LINEAR = {*_VIEWS, *_SUMS, "concatenate", "neg", "pad", "reduce_sum",
           "select_n"}  # fmt: skip
_CHEAP = {*_LINEAR, "abs", "and", "ceil", "clamp", "cos", "div", "eq", "erf", "exp",
          "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite",
          "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "not",
          "or", "pow", "reduce_max", "round", "rsqrt", "sign", "sin", "sqrt", "square",
          "tanh", "xor"}  # fmt: skip
_FUNCTIONS = (P.jit, P.custom_jvp_call, P.custom_vjp_call)
_MOST = 8  # values that something is made of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a value is made of others.

    Two recipes are equal if they compute the same.

    Attributes:
      key: what is computed, whatever the variables are called.
      value: the variable.
      sources: the variables that it is made of.
      eqns: what makes it, in order.
    """

    key: Any
    value: Any = dataclasses.field(compare=False)
    sources: tuple[Any, ...] = dataclasses.field(compare=False)
    eqns: tuple[Eqn, ...] = dataclasses.field(compare=False)

    def __call__(self, *values: Any) -> Any:
        """The value, of the sources'."""
        env = dict(zip(self.sources, values, strict=True))
        return compat.eval_eqns(self.eqns, [self.value], env)[0]

    def read(self) -> Iterator[Any]:
        """The variables that its equations read."""
        return (v for eqn in self.eqns for v in variables(eqn.invars))

    def unnamed(self) -> "Recipe":
        """Named in profiles by what calls it."""
        return dataclasses.replace(self, eqns=tuple(map(compat.unnamed, self.eqns)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def made(recipe: Recipe, *sources: Any) -> Any:
    """What the recipe makes, of which only the sources are kept.  Reverse mode only."""
    return recipe(*sources)


def _forward(recipe: Recipe, *sources: Any) -> tuple[Any, Sequence[Any]]:
    return recipe(*sources), sources


def _backward(recipe: Recipe, sources: Sequence[Any], dx: Any) -> tuple[Any, ...]:
    sources = lax.optimization_barrier(sources)  # or XLA keeps what it made of them
    return jax.vjp(recipe, *sources)[1](dx)


made.defvjp(_forward, _backward)


def recipes(eqns: Sequence[Eqn]) -> Mapping[Any, Recipe]:
    """How to make operands of products again, of what is kept without them too.

    Args:
      eqns: of a jaxpr.

    Returns:
      `{variable: recipe}` of operands that are larger than what would have to be kept
      for them alone.
    """
    maker = {v: eqn for eqn in eqns for v in eqn.outvars}
    kept = _kept(eqns, maker)
    best: dict[Any, frozenset[Any]] = {}

    def cost(sources: frozenset[Any]) -> tuple[int, int]:
        """Bytes that are kept for these alone, and of all of them."""
        alone = {v for v in sources - kept if v in maker or _is_input(v, maker)}
        return sum(map(bytes_of, alone)), sum(map(bytes_of, sources))

    def of_operands(eqn: Eqn) -> frozenset[Any]:
        found = (best.get(v, frozenset([v])) for v in variables(eqn.invars))
        return frozenset().union(*found)

    for eqn in eqns:
        if not _is_cheap(eqn):
            continue
        made = of_operands(eqn)
        for v in eqn.outvars:
            # A sum that is kept stands for what it is a sum of: the residual stream.
            n = 2 if eqn.primitive.name in _SUMS else 1
            alone = frozenset([v])
            cheaper = len(made) <= _MOST and cost(made)[:n] <= cost(alone)[:n]
            best[v] = made if cheaper else alone
    wanted = {
        v for eqn in eqns if eqn.primitive is P.dot_general
        for v in variables(eqn.invars)
        if v in best and v not in kept and len(maker[v].outvars) == 1
    }  # fmt: skip
    found = {}
    for v in wanted:
        if cost(best[v])[0] * 4 <= bytes_of(v) and v not in best[v]:
            found[v] = _recipe(v, best[v], maker)
    return found


def _recipe(v: Any, sources: frozenset[Any], maker: Mapping[Any, Eqn]) -> Recipe:
    needed: dict[int, Eqn] = {}

    def visit(v: Any) -> None:
        if v in sources or id(maker[v]) in needed:
            return
        for u in variables(maker[v].invars):
            visit(u)
        needed[id(maker[v])] = maker[v]

    visit(v)
    eqns = tuple(needed.values())
    number: dict[Any, int] = {}

    def name(v: Any) -> Any:
        if isinstance(v, Literal):
            return np.asarray(v.val).tobytes(), v.aval
        return number.setdefault(v, len(number)), v.aval

    key = tuple(
        (
            eqn.primitive,
            tuple(map(name, eqn.invars)),
            tuple(map(name, eqn.outvars)),
            tuple((k, _hashable(x)) for k, x in sorted(eqn.params.items())),
        )
        for eqn in eqns
    )
    order = tuple(u for u in number if u in sources)
    return Recipe((key, number[v]), v, order, eqns)


def _hashable(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return id(x)
    return x


def _kept(eqns: Sequence[Eqn], maker: Mapping[Any, Eqn]) -> set[Any]:
    """What the derivatives of the operations need: operands of those not linear."""
    active: set[Any] = set()
    found: set[Any] = set()
    for eqn in eqns:
        read = [v for v in variables(eqn.invars) if v in active or _is_input(v, maker)]
        if not read:
            continue
        active.update(eqn.outvars)
        if not _is_cheap(eqn) or _is_cheap(eqn, _LINEAR):
            continue
        if eqn.primitive is P.mul and len(read) < 2:
            continue
        for v in read:
            found.add(v)
            while v in maker and maker[v].primitive.name in _VIEWS:
                v = maker[v].invars[0]
                found.add(v)
    return found


def _is_input(v: Any, maker: Mapping[Any, Eqn]) -> bool:
    """Whether it is an activation from outside; vectors are parameters."""
    return v not in maker and len(v.aval.shape) > 1


def _is_cheap(eqn: Eqn, among: Collection[str] = _CHEAP) -> bool:
    """Whether it is one of these operations, or a function of nothing else."""
    if eqn.effects or eqn.primitive not in _FUNCTIONS:
        return not eqn.effects and eqn.primitive.name in among
    return all(
        _is_cheap(inner, among)
        for function in compat.inner_functions(eqn)
        for inner in compat.open_jaxpr(function.jaxpr)[0].eqns
    )


def bytes_of(v: Any) -> int:
    """How large a variable's array is."""
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize
