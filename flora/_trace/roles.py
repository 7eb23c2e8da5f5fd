"""The role of each weight in a model, found by following activations through it.

Names are not read.  Attention is two products of activations with activations, one
after the other: scores, then values.  The head is a weight that no other comes after.
A product with zeros and ones that tell which index is meant (one-hot) is a lookup.
Depthwise convolutions mix no features: they play no part, and what passes them stays.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flora._trace import compat
from flora._trace.compat import P
from flora._trace.discover import Finding
from flora._trace.stage import Staged
from flora._tree.layout import Layout


class Kind(enum.IntEnum):
    """What the elements of a value are; of several, the value made of them is the last.

    CONSTANT: numbers in the code.  FIXED: positions and tables in the code.  MASK: what
    is true of data.  PICK: zeros and ones that tell which index is meant.  DATA: all
    else.
    """

    CONSTANT = 0
    FIXED = 1
    MASK = 2
    PICK = 3
    DATA = 4


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
      kind: what its elements are.
      spread: whether a weight was repeated, as learned tokens are for each example.
      number: of an integer value, the same for all that are computed alike.
    """

    weights: frozenset[str] = frozenset()
    last: Visits = frozenset()
    scored: Visits = frozenset()
    mixed: bool = False
    attended: bool = False
    kind: Kind = Kind.DATA
    spread: bool = False
    number: int | None = None


@dataclasses.dataclass
class Parts:
    """What the weights do.

    Attributes:
      attention: those of attention.
      head: those of the head.
      feeding: those that other weights follow.
      multiplied: those that activations are multiplied by.
      looked_up: those of which rows are looked up, one-hot products too, or that are
        learned tokens.
      rows: how many rows each table has that is looked up.
      picked: the numbers of the indices by which rows of each table are looked up.
      picking: those of the indices that choose among stacked weights.
      stacks: the stack axes of the weights.
      numbers: of integer values, by what computes them.
    """

    stacks: Mapping[str, Sequence[int]]

    attention: set[str] = dataclasses.field(default_factory=set)
    head: set[str] = dataclasses.field(default_factory=set)
    feeding: set[Visit] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    looked_up: set[str] = dataclasses.field(default_factory=set)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    picked: dict[str, set[int | None]] = dataclasses.field(default_factory=dict)
    picking: set[int | None] = dataclasses.field(default_factory=set)
    numbers: dict[Any, int] = dataclasses.field(default_factory=dict)

    def number(self, *what: Any) -> int:
        """The number of what computes an integer value."""
        return self.numbers.setdefault(what, len(self.numbers))

    def are_vectors(self, path: str) -> bool:
        """Whether a table holds one row for each of a stack of other weights."""
        return path in self.picked and self.picked[path] <= self.picking


_NOTHING = Flow()
_SUMS = {P.add, P.sub, P.add_any}
_WEIGHTINGS = {P.exp, P.exp2, P.logistic}
_REPEATS = {P.broadcast_in_dim, P.tile}


def parts_in(
    staged: Staged, paths: Mapping[int, str], found: Mapping[str, Finding]
) -> Parts:
    """The parts of the leaves `{position: path}` of which discovery found a layout."""
    inputs = {
        k: paths[i]
        for i, k in enumerate(staged.tree_inputs)
        if k is not None and i in paths and found[paths[i]].status == "factored"
    }
    layouts = {path: found[path].layout or Layout() for path in inputs.values()}
    stacks = {path: layout.stack for path, layout in layouts.items()}
    return parts_played(staged.jaxpr, inputs, stacks)


def vocabulary(
    parts: Parts, path: str, finding: Finding, layout: Layout, shape: tuple[int, ...]
) -> str:
    """The side of a table's layout along which rows are looked up: 'in' or 'out'.

    '' for what is no table.  A tied one has the layout of its product.
    """
    if path not in parts.rows or parts.are_vectors(path):
        return ""
    gathers = [x for x in finding.uses if x.binding and x.primitive == "gather"]
    if axes := {i for use in gathers for i, role in use.roles if role == "in"}:
        return "in" if axes <= {*layout.in_} else "out"
    _, in_, out = layout.matrix(shape)
    return "out" if parts.rows[path] == out != in_ else "in"


def parts_played(
    jaxpr: Any,
    inputs: Mapping[int, str],
    stacks: Mapping[str, Sequence[int]] | None = None,
) -> Parts:
    """The parts of the weights that enter a jaxpr.

    Args:
      jaxpr: of the whole call.
      inputs: `{position: path}` of the weights.
      stacks: `{path: stack axes}` of those that are stacked.
    """
    parts = Parts(stacks or {})
    args = [
        Flow(weights=frozenset({inputs[i]})) if i in inputs else _NOTHING
        for i in range(len(compat.open_jaxpr(jaxpr)[0].invars))
    ]
    for out in _run(parts, jaxpr, args):
        if out.last and not out.last & parts.feeding:
            parts.head |= {path for path, looked_up in out.last if not looked_up}
    return parts


def _run(parts: Parts, jaxpr: Any, args: Sequence[Flow]) -> list[Flow]:
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    pairs = [
        *zip(jaxpr.invars, args, strict=True),
        *zip(jaxpr.constvars, map(_of_constant, consts), strict=True),
    ]
    env: dict[Any, Flow] = {v: _flow_of(parts, v.aval, x) for v, x in pairs}

    def read(v: Any) -> Flow:
        if isinstance(v, compat.Literal):
            return Flow(kind=Kind.CONSTANT, number=parts.number("literal", str(v.val)))
        return env.get(v, _NOTHING)

    for eqn in jaxpr.eqns:
        outs = _step(parts, eqn, [read(v) for v in eqn.invars])
        for v, out in zip(eqn.outvars, outs, strict=True):
            env[v] = _flow_of(parts, v.aval, out)
    return [read(v) for v in jaxpr.outvars]


def _flow_of(parts: Parts, aval: Any, flow: Flow) -> Flow:
    """Integers and bools (indices, masks, tokens) carry no activations."""
    if jnp.issubdtype(getattr(aval, "dtype", int), jnp.inexact):
        return dataclasses.replace(flow, number=None)
    kind, number = flow.kind, flow.number
    if kind is Kind.DATA and getattr(aval, "dtype", None) == jnp.bool_:
        kind = Kind.MASK
    if number is None:
        number = parts.number(len(parts.numbers))
    return Flow(weights=flow.weights, kind=kind, number=number)


def _of_constant(x: Any) -> Flow:
    """An array in the code: a table, or the rows of a unit matrix to pick from."""
    if np.size(x) < 2 or not hasattr(x, "dtype"):
        return Flow(kind=Kind.CONSTANT)
    shape, numeric = np.shape(x), jnp.issubdtype(x.dtype, jnp.number)
    unit = len(shape) == 2 and shape[0] == shape[1] and numeric
    picks = unit and np.array_equal(np.asarray(x), np.eye(shape[0]))
    return Flow(kind=Kind.PICK if picks else Kind.FIXED)


def _step(parts: Parts, eqn: Any, ins: list[Flow]) -> list[Flow]:
    inner = compat.inner_functions(eqn)
    if inner:
        return _through(inner, lambda jaxpr, args: _run(parts, jaxpr, args), ins)
    sizes = [math.prod(v.aval.shape) for v in eqn.invars]
    if eqn.primitive in compat.PRODUCTS:
        out = _product(parts, eqn, ins)
    elif eqn.primitive is P.dynamic_slice:
        out = _sliced(parts, eqn, ins)
    elif eqn.primitive in _SUMS:
        reached = [x for x in ins if x.last]
        out = dataclasses.replace(
            _joined(ins, sizes),
            attended=bool(reached) and all(x.attended for x in reached),
            mixed=any(x.mixed or not x.scored for x in reached),
        )
    else:
        out = _joined(ins, sizes)
        if eqn.primitive in _WEIGHTINGS:
            out = dataclasses.replace(out, mixed=False)
        elif eqn.primitive in _REPEATS:
            longer = math.prod(eqn.outvars[0].aval.shape) > sizes[0]
            out = dataclasses.replace(out, spread=out.spread or longer)
    out = dataclasses.replace(out, kind=_kind(eqn, ins))
    return [
        dataclasses.replace(out, number=_number(parts, eqn, ins, i))
        for i in range(len(eqn.outvars))
    ]


def _kind(eqn: Any, ins: Sequence[Flow]) -> Kind:
    kinds = [x.kind for x in ins]
    if eqn.primitive is P.iota:
        return Kind.FIXED
    if eqn.primitive is P.eq:
        return Kind.PICK if Kind.FIXED in kinds else Kind.MASK
    if eqn.primitive in (P.gather, P.dynamic_slice) and kinds[0] is Kind.PICK:
        return Kind.PICK
    if eqn.primitive in (P.scatter, P.scatter_add):
        left = max(kinds[0], kinds[2])
        return left if left > Kind.PICK else Kind.PICK
    return max(kinds, default=Kind.DATA)


def _number(parts: Parts, eqn: Any, ins: Sequence[Flow], i: int) -> int | None:
    """The same for integers that are computed alike of the same ones."""
    numbers = [x.number for x in ins]
    if None in numbers or not ins:
        return None
    return parts.number(eqn.primitive.name, str(eqn.params), i, *numbers)


def _joined(flows: Sequence[Flow], sizes: Sequence[int] = ()) -> Flow:
    """What is made of several values, of so many elements each."""

    def union(name: str) -> frozenset[Any]:
        return frozenset().union(*(getattr(x, name) for x in flows))

    active = any(x.last for x in flows)
    if not active and sizes:  # what is added to or multiplied with more is no weight
        pairs = [*zip(flows, sizes, strict=True)]
        most = max((n for x, n in pairs if x.weights), default=0)
        active = any(n > most for x, n in pairs if x.kind is Kind.DATA)
    return Flow(
        frozenset() if active else union("weights"),
        union("last"),
        union("scored"),
        any(x.mixed for x in flows),
        any(x.attended for x in flows),
        max((x.kind for x in flows), default=Kind.DATA),
        any(x.spread for x in flows),
    )


def _sliced(parts: Parts, eqn: Any, ins: Sequence[Flow]) -> Flow:
    """A slice of a weight: one of a stack, or the row of a table."""
    w, *starts = ins
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    one = {i: starts[i] for i, n in enumerate(shape) if sizes[i] == 1 != n}
    if not w.weights:
        return _joined(ins[:1])
    is_row = bool(one) and sum(n > 1 for n in sizes) <= 1
    chosen = is_row or _along_stack(parts, w, one)
    return _indexed(parts, w, one, shape) if chosen else w


def _indexed(
    parts: Parts, w: Flow, indices: Mapping[int, Flow], shape: Sequence[int]
) -> Flow:
    """What some indices choose: among stacked weights a weight, else rows."""
    numbers = {x.number for x in indices.values()}
    if _along_stack(parts, w, indices):
        parts.picking |= numbers
        return w
    for path in w.weights:
        parts.picked.setdefault(path, set()).update(numbers)
    return _looked_up(parts, w.weights, math.prod(shape[i] for i in indices))


def _along_stack(parts: Parts, w: Flow, axes: Iterable[int]) -> bool:
    return all({*axes} <= {*parts.stacks.get(path, ())} for path in w.weights)


def _looked_up(parts: Parts, weights: frozenset[str], rows: int) -> Flow:
    parts.looked_up |= weights
    parts.rows |= dict.fromkeys(weights, rows)
    return Flow(last=frozenset(Visit(path, looked_up=True) for path in weights))


def _product(parts: Parts, eqn: Any, ins: list[Flow]) -> Flow:
    x, y = ins[:2]
    if eqn.primitive is P.gather:
        if not x.weights:
            return _joined([x])
        indices = dict.fromkeys(eqn.params["dimension_numbers"].start_index_map, y)
        return _indexed(parts, x, indices, eqn.invars[0].aval.shape)
    if x.weights and y.weights and x.spread != y.spread:  # learned tokens
        x, y = (_token(parts, v) if v.spread else v for v in (x, y))
    weights = x.weights | y.weights
    if weights:
        if x.weights and y.weights:  # still a weight
            return Flow(weights=weights)
        activation = y if x.weights else x
        if _is_depthwise(eqn):
            return activation
        parts.feeding |= activation.last
        if activation.attended:
            parts.attention |= weights
        if activation.kind is Kind.PICK:
            return _looked_up(parts, weights, _contracted(eqn))
        parts.multiplied |= weights
        return Flow(last=frozenset(Visit(path, looked_up=False) for path in weights))
    for scores, values in ((x, y), (y, x)):
        if scores.scored and not scores.mixed:
            behind = scores.scored | values.last
            parts.attention |= {path for path, looked_up in behind if not looked_up}
            parts.feeding |= scores.scored
            return Flow(last=values.last, attended=True)
    both = x.last | y.last
    return Flow(last=both, scored=both if x.last and y.last else frozenset())


def _token(parts: Parts, x: Flow) -> Flow:
    parts.looked_up |= x.weights
    return _NOTHING


def _contracted(eqn: Any) -> int:
    """Over how many numbers each element of a product sums; 0 if it is no dot."""
    if eqn.primitive is not P.dot_general:
        return 0
    (lhs, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[i] for i in lhs)


def _is_depthwise(eqn: Any) -> bool:
    """Whether each output feature is made of one input feature alone."""
    if eqn.primitive is not P.conv_general_dilated:
        return False
    of_kernel = eqn.params["dimension_numbers"].rhs_spec
    alone = eqn.invars[1].aval.shape[of_kernel[1]] == 1
    return alone and eqn.params["feature_group_count"] > 1


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
