"""A method of a Linen module, run on base and factors.

Flax lifts the call as it does for its own transforms: scopes, rngs, counters and
collections are those that the plain module would have.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import core
from flax.core import lift
from flax.linen.transforms import lift_direct_transform

from flora._linen import plans
from flora._linen.parts import FROZEN, LORA, filled, parts, require_factors, without
from flora._tree.errors import LoraError
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, on_parts, trained_parts
from flora._verbs.dropout import with_dropout
from flora._verbs.lora import lora, undifferentiated

Path = tuple[Any, ...]  # attributes and, in tuples, keys: from the model within
CALLS = "_calls"  # of a module that is initialized: what was called so far
PUT_OFF = "_put_off"  # and what a later call may mend, if there is one


def at(model: Any, path: Path) -> Any:
    """What lies there in a module."""
    for key in path:
        model = getattr(model, key) if isinstance(key, str) else model[key[0]]
    return model


def run(module: Any, path: Path, args: Sequence[Any], kwargs: Any) -> Any:
    """The method at that path in `module.model`, on base and factors."""

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return at(module.model, path)(*args, **kwargs)

    call.__qualname__ = f"{type(module.model).__name__}.{path[-1]}"

    lifted = functools.partial(_lifted, module, path)
    lifted.__name__ = LORA  # type: ignore[attr-defined]
    return lift_direct_transform(lifted, (call,), module, *args, **kwargs)


def _lifted(
    module: Any, path: Path, call: Any, scopes: Any, *args: Any, **kwargs: Any
) -> Any:
    """The call on scopes, with what it leaves in them."""
    own = _index(scopes, module.scope)
    starts = module.is_initializing() and module.is_mutable_collection("params")
    ins = ("params", LORA, True)
    outs = ins if starts else (core.DenyList(("params", LORA)),)

    def inner(scope_fn: Any, repack: Any, groups: Any, rngs: Any) -> Any:
        params, frozen, other = groups
        rest = (other, rngs, args, kwargs)
        packed = _Packed(call, scope_fn, repack, own, params, frozen, rest)
        return (_start if starts else _run)(module, path, packed)

    return lift.pack(inner, ins, outs, (True,))(scopes)


def _index(scopes: Sequence[Any], scope: Any) -> int:
    """Which of the scopes is the module's, as `lift.pack` orders them."""
    roots = [
        s for s in dict.fromkeys(scopes) if not any(x in scopes for x in _above(s))
    ]
    return roots.index(scope)


def _above(scope: Any) -> Iterator[Any]:
    while scope.parent is not None:
        scope = scope.parent
        yield scope


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A call as a function of its parameters, of the module's own scope.

    Attributes:
      call: the function of scopes.
      scope_fn: makes the scopes of collections and rngs.
      repack: takes the collections out of them.
      own: which scope is the module's.
      params: of each scope.
      frozen: of each scope, the collection of factors that do not train.
      rest: the other arguments of `fn`.
    """

    call: Callable[..., Any]
    scope_fn: Callable[..., Any]
    repack: Callable[..., Any]
    own: int
    params: Sequence[Any]
    frozen: Sequence[Any]
    rest: tuple[Any, ...]

    def fn(
        self, base: Any, other: Any, rngs: Any, args: Any, kwargs: Any, *, starts=False
    ) -> Any:
        """What the call returns, and what it leaves in the collections.

        Parameters are made only where it `starts`; else it is a call as after init.
        """
        params = self.with_own(self.params, {"params": base} if base else {})
        plain = [{} for _ in self.frozen]
        mutable = starts or core.DenyList(("params", LORA))
        scopes = self.scope_fn((params, plain, other), rngs, mutable)
        for scope in scopes:
            scope.flags = core.freeze({**scope.flags, "initializing": starts})
        out = self.call(scopes, *args, **kwargs)
        return out, self.repack(scopes)

    def with_own(self, groups: Sequence[Any], group: Any) -> tuple[Any, ...]:
        """The groups of all scopes, with another one of the module's."""
        return (*groups[: self.own], group, *groups[self.own + 1 :])

    def of_own(self, groups: Sequence[Any], collection: str) -> Any:
        return groups[self.own].get(collection, {})


def _run(module: Any, path: Path, packed: _Packed) -> Any:
    params = packed.of_own(packed.params, "params")
    trained = require_factors(params, "flora.linen.LoRA")
    frozen = packed.of_own(packed.frozen, LORA).get(FROZEN, {})
    base, fn = without(params), packed.fn

    def call(base: Any) -> Any:
        return fn(base, *packed.rest)

    with _same_draws(module.scope):
        about = (path, _described(packed.rest[2:]))
        plan = plans.plan(module.model, module.config, call, base, about)
    weights = _with_keys(module, filled(base, plan, trained, frozen))
    return lora(_named(fn, packed.call))(weights, *packed.rest)


def _start(module: Any, path: Path, packed: _Packed) -> Any:
    """The call as the module's `init` makes it, then the factors of what is there."""
    plain = without(packed.of_own(packed.params, "params"))
    out, (params, frozen, other) = packed.fn(plain, *packed.rest, starts=True)
    base = packed.of_own(params, "params")
    after = dataclasses.replace(packed, params=params)

    def call(base: Any) -> Any:
        return after.fn(base, *after.rest)

    made = _factors(module, call, base)
    if made is None:
        return out, (params, frozen, other)
    trained, fixed = parts(made)
    params = packed.with_own(params, {"params": {**base, LORA: trained}})
    if fixed:
        frozen = packed.with_own(frozen, {LORA: {FROZEN: fixed}})
    return out, (params, frozen, other)


def _factors(module: Any, call: plans.Fn, base: Any) -> Any:
    """The adapted parameters of all calls so far; `None` if put off."""
    calls = (*vars(module).get(CALLS, ()), call)
    object.__setattr__(module, CALLS, calls)
    put_off = vars(module).get(PUT_OFF)
    with _same_draws(module.scope):
        key = module.scope.push(LORA, reuse=True).make_rng("params")
        try:
            made = plans.adapted(
                key,
                module.model,
                module.config,
                lambda base: [f(base) for f in calls],
                base,
            )
        except LoraError as error:
            if put_off is None and base:
                raise
            if put_off is None:  # a call that needs no parameters
                return None
            put_off[:] = [error]
            return None
    if put_off:
        put_off.clear()
    return made


def whole_init(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose calls are judged together: the first may use some weights only."""

    def run_all(module: Any, *args: Any, **kwargs: Any) -> Any:
        put_off: list[LoraError] = []
        object.__setattr__(module, PUT_OFF, put_off)
        out = method(module, *args, **kwargs)
        if put_off:
            raise put_off[0]
        return out

    return run_all


def _with_keys(module: Any, weights: Any) -> Any:
    """The weights with dropout keys, from draws that are none of the model's."""
    named, treedef = named_leaves(weights)
    if not any(isinstance(x, LoraWeight) and x.dropout for _, x in named):
        return weights
    if not module.has_rng("dropout"):
        return treedef.unflatten([_evaluated(path, x) for path, x in named])
    key = module.scope.push(LORA, reuse=True).make_rng("dropout")
    return with_dropout(weights, key)


def _evaluated(path: str, weight: Any) -> Any:
    """The weight without dropout, an error where that is differentiated."""
    if not isinstance(weight, LoraWeight) or not weight.dropout:
        return weight
    why = (
        f"'{path}' trains without its dropout of {weight.dropout:g}: there is no rng "
        "named 'dropout'. Write model.apply(variables, *args, rngs={'dropout': key}), "
        "or a config with dropout=0.0 to train without."
    )
    weight = dataclasses.replace(weight, dropout=0.0)
    moving = trained_parts(weight)
    return on_parts(
        lambda name, x: undifferentiated(why, x) if name in moving else x, weight
    )


@contextlib.contextmanager
def _same_draws(scope: Any) -> Iterator[None]:
    """Within, draws are not counted."""
    before = _copied(scope.rng_counters)
    try:
        yield
    finally:
        _restore(scope.rng_counters, before)


def _copied(counters: dict[Any, Any]) -> dict[Any, Any]:
    return {k: _copied(x) if isinstance(x, dict) else x for k, x in counters.items()}


def _restore(counters: dict[Any, Any], before: dict[Any, Any]) -> None:
    for name in list(counters):
        if name not in before:
            del counters[name]
        elif isinstance(before[name], dict):
            _restore(counters[name], before[name])
        else:
            counters[name] = before[name]


def _described(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves]
    return treedef, shapes


def _named(fn: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any) -> Any:
        return fn(*args)

    named.__qualname__ = named.__name__ = getattr(like, "__qualname__", "call")
    return named
