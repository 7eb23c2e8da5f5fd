"""Walks a jaxpr: hands untouched equations back to JAX, the others to the rules."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from flora._algebra.axes import Axis, Factored, Squared, is_lazy
from flora._algebra.choice import (
    is_large,
    makes_again,
    may_differ,
    may_make_again,
    target,
)
from flora._algebra.codes import is_codes
from flora._algebra.low_rank import densified
from flora._trace import compat
from flora._trace.again import Recipe, bytes_of, made, recipes
from flora._trace.compat import Eqn
from flora._trace.dequantize import on_codes, on_quantized
from flora._trace.reshapes import reshapes
from flora._trace.share import in_order, together
from flora._trace.source import source_line
from flora._tree.errors import LoraError, Unfactorable, human_bytes
from flora._tree.paths import exactly

Rule = Callable[..., Sequence[Any]]
Roles = set[tuple[str, int, str]]

# Of a sum and of a product with activations, which a bias and a norm's scale have.
REPEATS_SUM = "a sum that repeats the weight"
REPEATS_PRODUCT = "a product that repeats the weight"


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that reads a weight.

    Attributes:
      path: the leaf.
      primitive: what reads it, such as 'dot_general'.
      source: where the user wrote that.
      roles: `(axis of the stored weight, role)` pairs that the operation implies.
      binding: whether the roles bind; indexing only suggests 'stack'.
      tokens: how many vectors the weight multiplies there.
      dense: why there is no factored form; '' where there is one.
      bytes: what forming the dense weight there costs, in bytes, or the gradient.
      gradient: why its gradient there is an array of W's shape; '' where it is none.
    """

    path: str
    primitive: str
    source: str
    roles: tuple[tuple[int, str], ...] = ()
    binding: bool = True
    tokens: int = 0
    dense: str = ""
    bytes: int = 0
    gradient: str = ""

    @property
    def repeats(self) -> bool:
        """Whether activations met it element by element and are more than it."""
        return self.dense in (REPEATS_SUM, REPEATS_PRODUCT)

    def __str__(self) -> str:
        where = f"'{self.primitive}' at {self.source} reads '{self.path}'"
        return f"{where} and flora has no factored rule for it ({self.dense})"


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule needs besides its operands.

    Attributes:
      rules: the table.
      rules_for_squares: the table for operations that read squares of weights.
      takes_stored: the primitives whose rules take quantized weights as they are.
      moves: the primitives that only move elements of a weight, its first operand.
      together: computes several products of one x at once; `None` where none are.
      log: where uses are recorded, as keys, in order; `None` while computing.
      salt: tells apart the dropout masks of a weight that is used more than once.
      within: the equation at hand and those around it, as `(eqn, within)`.
      jitted: inner functions that are jitted already, so that JAX traces them once.
      claims: whether roles are recorded, not only what has no factored form.
      ragged_dot: what computes products with experts; where it is not JAX's own, those
        that no adapted weight is part of are handed to it, too.
      reshapes: the shape that the result of a product is given, and that an operand
        had, by variable.
      again: how the operands of a product can be made again, and of what values, by
        variable.
      keeps: whether what is computed now is kept for the backward pass.
      seen: while uses are recorded a value counts by its type alone: results by what
        computes them or by type, of this jaxpr, which stand for later ones.
    """

    rules: Mapping[Any, Rule]
    rules_for_squares: Mapping[Any, Rule]
    takes_stored: Collection[Any] = ()
    moves: Collection[Any] = ()
    together: Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]] | None = None
    log: dict[Use, None] | None = None
    salt: int = 0
    within: Any = None
    jitted: dict[Any, Callable] = dataclasses.field(default_factory=dict)
    claims: bool = True
    ragged_dot: Callable[..., Any] = lax.ragged_dot
    reshapes: Mapping[Any, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    again: Mapping[Any, tuple[Recipe, Sequence[Any]]] = dataclasses.field(
        default_factory=dict
    )
    keeps: bool = True
    seen: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def line(self, eqn: Eqn) -> str:
        """Where the user wrote an equation, or else what is around it."""
        within = self.within
        while within is not None and within[0] is not eqn:
            within = within[1]
        around = within[1] if within else None
        name = around[0].params.get("name", "") if around else ""
        found = source_line(eqn, name)
        if found or around is None:
            return found or "an unknown line"
        return dataclasses.replace(self, within=around).line(around[0])

    def claim(
        self, w: Factored, eqn: Eqn, roles: Mapping[int, str], **what: Any
    ) -> None:
        """Records what an operation says of the axes of a weight."""
        if self.log is not None and self.claims:
            found = (sources_as(role, w.axes[i]) for i, role in roles.items())
            self.record(eqn, set().union(*found), **what)

    def record(self, eqn: Eqn, roles: Roles, **what: Any) -> None:
        """Records `(path, axis, role)` of stored weights."""
        if self.log is None or not self.claims:
            return
        source = self.line(eqn)
        for path, known in by_path(roles).items():
            self.log.setdefault(Use(path, eqn.primitive.name, source, known, **what))

    def note(self, w: Factored, eqn: Eqn, **what: Any) -> None:
        """Records a use that says nothing of the axes."""
        if self.log is None:
            return
        source = self.line(eqn)
        for path in w.settings.paths:
            self.log.setdefault(Use(path, eqn.primitive.name, source, **what))

    def note_gradient(self, w: Factored, eqn: Eqn, reason: str) -> None:
        """Records a use whose gradient is formed, although the product is not."""
        if self.claims:
            size = _bytes_of(w)
            self.note(w, eqn, binding=False, gradient=reason, bytes=size)

    def dense(self, w: Factored, eqn: Eqn, reason: str) -> Any:
        """The dense weight, where that is allowed or only being recorded."""
        size = _bytes_of(w)
        if self.log is not None:
            self.note(w, eqn, dense=reason, bytes=size)
        elif w.settings.fallback != "materialize":
            what = {"dense": reason, "bytes": size}
            use = Use(w.settings.path, eqn.primitive.name, self.line(eqn), **what)
            raise LoraError(f"{use}. {remedy(use)}.")
        return densified(w)


def _bytes_of(w: Factored) -> int:
    """Bytes of an array of the weight's shape."""
    return math.prod(w.shape) * (4 if w.base is None else w.base.dtype.itemsize)


def sources_as(role: str, pieces: Iterable[Axis]) -> Roles:
    """The leaves' axes that pieces came from, each in that role."""
    return {(path, axis, role) for x in pieces for path, axis in x.sources}


def by_path(roles: Roles) -> dict[str, tuple[tuple[int, str], ...]]:
    """`(path, axis, role)`s as each leaf's own `(axis, role)` pairs, sorted."""
    found: dict[str, list[tuple[int, str]]] = {}
    for path, axis, role in sorted(roles):
        found.setdefault(path, []).append((axis, role))
    return {path: tuple(pairs) for path, pairs in found.items()}


def remedy(use: Use) -> str:
    """What to write when a use has no factored form."""
    return (
        f"Write exclude={exactly(use.path)!r} in LoraConfig, or pass "
        f'fallback="materialize" (forms W + scale·A·B, {human_bytes(use.bytes)})'
    )


def interpret(ctx: Context, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr of whose inputs some are `Factored`.

    Outputs can be `Factored` too.  Runs of equations that touch no weight are
    evaluated by JAX itself.
    """
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    found = reshapes(jaxpr.eqns) if ctx.log is None else {}
    ctx = dataclasses.replace(ctx, seen={}, reshapes=found)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    lazy = {v: x for v, x in env.items() if is_lazy(x)}
    jointly, cheap = _chooses(ctx, jaxpr.eqns, lazy)
    schedule = together(jaxpr.eqns, lazy) if jointly else in_order(jaxpr.eqns)
    own = ctx.ragged_dot is not lax.ragged_dot
    last_use = schedule.last_uses(jaxpr, {v: x.sources for v, x in cheap.items()})
    touched = set(lazy)
    untouched: list[Any] = []
    sources: dict[Any, Sequence[Any]] = {}  # of what can be made again

    def read(v: Any) -> Any:
        return v.val if isinstance(v, compat.Literal) else env[schedule.same.get(v, v)]

    def flush(before: int) -> None:
        run = untouched if ctx.log is None else _unseen(untouched, ctx.seen, env)
        outs = [v for e in run for v in e.outvars if last_use.get(v, -1) >= before]
        env.update(zip(outs, compat.eval_eqns(run, outs, env), strict=True))
        if ctx.log is not None:
            ctx.seen.update((v.aval, env[v]) for v in outs)
        untouched.clear()

    for at, step in enumerate(schedule.steps):
        eqns = [jaxpr.eqns[i] for i in step]
        held = any(v in touched for e in eqns for v in compat.variables(e.invars))
        if not (held or (own and any(map(compat.has_experts, eqns)))):
            value, *_ = [*eqns[0].outvars, None]
            recipe = cheap.get(value)
            if recipe is None or any(v in touched for v in recipe.read()):
                untouched += eqns
                continue
            flush(at)
            sources[value] = [*map(read, recipe.sources)]
            env[value] = made(recipe, *sources[value])
            continue
        flush(at)
        again = {
            v: (cheap[v], sources[v])
            for e in eqns
            for v in compat.variables(e.invars)
            if v in sources
        }
        with_them = dataclasses.replace(ctx, again=again) if again else ctx
        values = [[*map(read, e.invars)] for e in eqns]
        results = _results(with_them, step, eqns, values)
        for eqn, outs in zip(eqns, results, strict=True):
            env.update(zip(eqn.outvars, outs, strict=True))
            touched.update(v for v in eqn.outvars if is_lazy(env[v]))
    flush(len(schedule.steps))
    return [read(v) for v in jaxpr.outvars]


def _unseen(
    eqns: Sequence[Eqn], seen: Mapping[Any, Any], env: dict[Any, Any]
) -> list[Any]:
    """The equations whose results are of types that no value seen before has."""
    left = []
    for eqn in eqns:
        if not eqn.effects and all(v.aval in seen for v in eqn.outvars):
            env.update((v, seen[v.aval]) for v in eqn.outvars)
        else:
            left.append(eqn)
    return left


def _chooses(
    ctx: Context, eqns: Sequence[Eqn], lazy: Mapping[Any, Any]
) -> tuple[bool, Mapping[Any, Recipe]]:
    """Whether a form may gain by products taken together, and what is made again."""
    if ctx.log is not None or not ctx.together:
        return False, {}
    forms = {x.settings.form for x in lazy.values() if isinstance(x, Factored)}
    named = any(map(may_differ, forms - {"auto"}))
    auto = "auto" in forms and may_differ("auto") and any(map(_is_large, eqns))
    plain = all(  # others keep x, whatever can be made again
        isinstance(x, Factored) and x.output_scale is None for x in lazy.values()
    )
    found = target()
    if not (ctx.keeps and plain and may_make_again(forms, found)):
        return named or auto, {}
    widens = {
        v: eqn.outvars[0].aval.size >= v.aval.size
        for eqn in eqns
        if eqn.primitive is compat.P.dot_general
        for v in compat.variables(eqn.invars)
    }
    return True, {
        v: recipe
        for v, recipe in recipes(eqns).items()
        if makes_again(found, bytes_of(v), widens[v])
    }


def _is_large(eqn: Eqn) -> bool:
    """Whether it is a product for which a form can be chosen."""
    if eqn.primitive is not compat.P.dot_general:
        return False
    return is_large(*(v.aval.shape for v in eqn.invars))


def _results(
    ctx: Context, step: Sequence[int], eqns: Sequence[Eqn], values: Sequence[list[Any]]
) -> list[Sequence[Any]]:
    """The outputs of equations that are taken together, of each its own."""
    joint: list[Any] = [None] * len(eqns)
    each = [_at(ctx, i, eqn) for i, eqn in zip(step, eqns, strict=True)]
    if ctx.together and len(eqns) > 1:
        with compat.common_scope(eqns):
            joint = ctx.together(each, eqns, values)
    return [
        _apply_rule(own, eqn, args) if y is None else [y]
        for own, eqn, args, y in zip(each, eqns, values, joint, strict=True)
    ]


def _at(ctx: Context, i: int, eqn: Eqn) -> Context:
    """The context of an equation's rule."""
    salt = zlib.crc32(f"{ctx.salt}/{i}".encode())
    return dataclasses.replace(ctx, salt=salt, within=(eqn, ctx.within))


def _apply_rule(ctx: Context, eqn: Eqn, values: list[Any]) -> Sequence[Any]:
    with compat.eqn_scope(eqn):
        squares = any(isinstance(x, Squared) for x in values)
        rule = (ctx.rules_for_squares if squares else ctx.rules).get(eqn.primitive)
        try:
            if rule is None:
                what = "squares of a weight that are not summed"
                raise Unfactorable(what if squares else "no rule for this primitive")
            if what := compat.unlike_known(eqn):
                raise _other_jax(ctx, eqn, values, what)
            if eqn.primitive in ctx.takes_stored:
                return rule(ctx, eqn, *values)
            run = functools.partial(rule, ctx, eqn)
            if eqn.primitive in ctx.moves and is_codes(values[0]):
                return on_codes(run, *values)
            return on_quantized(run, values)
        except Unfactorable as reason:
            why = str(reason)
            pairs = zip(values, eqn.invars, strict=True)
            dense = [densify(ctx, eqn, x, why, v.aval) for x, v in pairs]
            return compat.eval_eqn(eqn, dense)


def _other_jax(ctx: Context, eqn: Eqn, values: Sequence[Any], what: str) -> LoraError:
    """The error for an operation that another JAX has changed."""
    paths = [x.settings.path for x in values if isinstance(x, Factored)]
    return LoraError(
        f"'{eqn.primitive.name}' at {ctx.line(eqn)} reads '{paths[0]}', and "
        f"in JAX {jax.__version__} it has {what}, unlike in those that flora knows. "
        f"{compat.TESTED}"
    )


def densify(ctx: Context, eqn: Eqn, x: Any, reason: str, like: Any = None) -> Any:
    """A plain array for x; a change without its base in the dtype of `like`, if given.

    Rows that an index looked up are activations already, and sums over axes are small.
    """
    if like is not None and isinstance(x, Factored) and x.base is None:
        return densify(ctx, eqn, x, reason).astype(like.dtype)
    if isinstance(x, Squared):
        return lax.square(densify(ctx, eqn, x.root, reason)).astype(x.value.dtype)
    if not isinstance(x, Factored):
        return x
    if x.indexed and x.base is not None:
        ctx.record(eqn, lookup_roles(x))
    elif x.reduced:
        ctx.note(x, eqn)
    else:
        return ctx.dense(x, eqn, reason)
    return densified(x)


def lookup_roles(x: Factored) -> Roles:
    """What rows that pass for activations say of the axes of the stored weight."""
    looked_up = sources_as("in", x.indexed)
    gone = {(path, axis) for path, axis, _ in looked_up}
    rest = {u for u in sources_as("out", x.pieces) if u[:2] not in gone}
    return looked_up | rest
