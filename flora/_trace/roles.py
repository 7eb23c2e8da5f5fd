"""The role of each weight in a model, found by following activations through it.

Names are not read.  Attention is two products of activations with activations, one
after the other: scores, then values.  The head is a weight that no other comes after.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from flora._trace import compat
from flora._trace.compat import P


class Visit(NamedTuple):
    """A weight that activations came through, by a product or by a lookup."""

    path: str
    looked_up: bool


Visits = frozenset[Visit]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What a value came from.

    Attributes:
      weights: the weights that the value is made of, before any product.
      last: the weights that it came through, with no other weight since.
      scored: the weights before a product of two activations, with no other since.
      mixed: whether something else was added to such a product, as to the residual
        stream.  A bias added to scores counts too, until their softmax.
      attended: whether it is the result of two such products, one after the other.
    """

    weights: frozenset[str] = frozenset()
    last: Visits = frozenset()
    scored: Visits = frozenset()
    mixed: bool = False
    attended: bool = False


@dataclasses.dataclass
class Parts:
    """The weights of attention, of the head, and those that other weights follow."""

    attention: set[str] = dataclasses.field(default_factory=set)
    head: set[str] = dataclasses.field(default_factory=set)
    feeding: set[Visit] = dataclasses.field(default_factory=set)


_NOTHING = Flow()
_SUMS = {P.add, P.sub, P.add_any}
_WEIGHTINGS = {P.exp, P.exp2, P.logistic}


def parts_played(jaxpr: Any, inputs: Mapping[int, str]) -> Parts:
    """The parts of the weights that enter a jaxpr as inputs `{position: path}`."""
    parts = Parts()
    inner, _ = compat.open_jaxpr(jaxpr)
    args = [
        Flow(weights=frozenset({inputs[i]})) if i in inputs else _NOTHING
        for i in range(len(inner.invars))
    ]
    for out in _run(parts, inner, args):
        if out.last and not out.last & parts.feeding:
            parts.head |= {path for path, looked_up in out.last if not looked_up}
    return parts


def _run(parts: Parts, jaxpr: Any, args: Sequence[Flow]) -> list[Flow]:
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    env: dict[Any, Flow] = dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Flow:
        return _NOTHING if isinstance(v, compat.Literal) else env.get(v, _NOTHING)

    for eqn in jaxpr.eqns:
        outs = _step(parts, eqn, [read(v) for v in eqn.invars])
        for v, out in zip(eqn.outvars, outs, strict=True):
            # Integers and bools (indices, masks, tokens) carry no activations.
            floating = jnp.issubdtype(getattr(v.aval, "dtype", int), jnp.inexact)
            env[v] = out if floating else _NOTHING
    return [read(v) for v in jaxpr.outvars]


def _step(parts: Parts, eqn: Any, ins: list[Flow]) -> list[Flow]:
    inner = compat.inner_functions(eqn)
    if inner:
        return _through(inner, lambda jaxpr, args: _run(parts, jaxpr, args), ins)
    if eqn.primitive in compat.PRODUCTS:
        out = _product(parts, eqn, ins)
    elif eqn.primitive in _SUMS:
        reached = [x for x in ins if x.last]
        out = dataclasses.replace(
            _joined(ins),
            attended=bool(reached) and all(x.attended for x in reached),
            mixed=any(x.mixed or not x.scored for x in reached),
        )
    else:
        out = _joined(ins)
        if eqn.primitive in _WEIGHTINGS:
            out = dataclasses.replace(out, mixed=False)
    return [out] * len(eqn.outvars)


def _joined(flows: Sequence[Flow]) -> Flow:
    def union(name: str) -> frozenset[Any]:
        return frozenset().union(*(getattr(x, name) for x in flows))

    weights = frozenset() if any(x.last for x in flows) else union("weights")
    mixed, attended = any(x.mixed for x in flows), any(x.attended for x in flows)
    return Flow(weights, union("last"), union("scored"), mixed, attended)


def _product(parts: Parts, eqn: Any, ins: list[Flow]) -> Flow:
    x, y = ins[:2]
    weights = x.weights | y.weights
    if weights:
        if x.weights and y.weights:  # still a weight
            return Flow(weights=weights)
        activation = y if x.weights else x
        parts.feeding |= activation.last
        if activation.attended:
            parts.attention |= weights
        looked_up = eqn.primitive is P.gather
        return Flow(last=frozenset(Visit(path, looked_up) for path in weights))
    if eqn.primitive is P.gather:
        return _joined(ins)
    for scores, values in ((x, y), (y, x)):
        if scores.scored and not scores.mixed:
            behind = scores.scored | values.last
            parts.attention |= {path for path, looked_up in behind if not looked_up}
            parts.feeding |= scores.scored
            return Flow(last=values.last, attended=True)
    both = x.last | y.last
    return Flow(last=both, scored=both if x.last and y.last else frozenset())


def _through(
    inner: Sequence[compat.Inner], run: Callable[..., list[Flow]], ins: Sequence[Flow]
) -> list[Flow]:
    """Runs the functions inside an equation; a loop's twice, for what it carries."""
    every = []
    for function in inner:
        args = list(ins[function.first :])
        outs = run(function.jaxpr, args)
        if function.num_carry:
            at, n = function.num_consts, function.num_carry
            pairs = zip(args[at : at + n], outs[:n], strict=True)
            args[at : at + n] = [_joined(pair) for pair in pairs]
            outs = run(function.jaxpr, args)
        every.append(outs)
    return [_joined(outs) for outs in zip(*every, strict=True)]
