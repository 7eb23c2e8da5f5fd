"""How the weights of a Linen module are used: found out once, and remembered.

A plan is a function of the module, the config and the shapes of the parameters, so it
is kept by their values: modules that are made anew at each trace find it again.
"""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora._linen.parts import LORA, Settings, settings_of
from flora._tree.config import LoraConfig
from flora._tree.errors import LoraError, fail
from flora._tree.paths import named_leaves
from flora._verbs.coverage import coverage
from flora._verbs.init import init

Fn = Callable[[Any], Any]  # of the base's parameters
KEPT = 256


class _Known:
    """The plans found so far: those of the whole module, and those of single calls."""

    def __init__(self) -> None:
        self.plans: OrderedDict[Any, list[tuple[Any, Settings]]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Any, about: Any) -> Settings | None:
        with self.lock:
            found = self.plans.get(key, ())
        return next((plan for known, plan in found if _same(known, about)), None)

    def put(self, key: Any, about: Any, plan: Settings) -> None:
        with self.lock:
            kept = [x for x in self.plans.pop(key, ()) if not _same(x[0], about)]
            self.plans[key] = [*kept[-KEPT:], (about, plan)]
            while len(self.plans) > KEPT:
                self.plans.popitem(last=False)


_KNOWN = _Known()


def adapted(key: Any, model: nn.Module, config: LoraConfig, fn: Fn, base: Any) -> Any:
    """The adapted parameters of a call; its plan is that of the module from now on."""
    fail(_taken(model, base))
    made = init(key, config, fn, base)
    _KNOWN.put(_shapes(base), _about(model, config), settings_of(made))
    return made


def _taken(model: nn.Module, base: Any) -> Iterator[str]:
    """Parameters of the model's own by the name of the factors'."""
    named, _ = named_leaves(base)
    for path, _ in named:
        if LORA in path.split("/"):
            yield (
                f"'{path}' of {type(model).__name__} has the name {LORA!r}, where "
                "factors belong. Rename it; if it is a factor already, adapt the model "
                "without."
            )


def known(model: nn.Module, config: LoraConfig, base: Any) -> Settings | None:
    """The plan of the whole module, if one was found."""
    return _KNOWN.get(_shapes(base), _about(model, config))


def plan(
    model: nn.Module, config: LoraConfig, fn: Fn, base: Any, call: Any
) -> Settings:
    """The plan for a call: the module's, or one of what this call uses.

    Args:
      model: the module within.
      config: what to adapt and how.
      fn: the call, as a function of the parameters.
      base: the parameters.
      call: what tells this call from others of the same module.
    """
    shapes, about = _shapes(base), _about(model, config)
    found = _KNOWN.get(shapes, about) or _KNOWN.get(shapes, (about, call))
    if found is not None:
        return found
    try:
        return of_module(model, config, fn, base)
    except LoraError:
        found = _found_in_part(config, fn, base)
        _KNOWN.put(shapes, (about, call), found)
        return found


def of_module(model: nn.Module, config: LoraConfig, fn: Fn, base: Any) -> Settings:
    """The plan of a call that uses all of the module."""
    found = _found(config, fn, base)
    _KNOWN.put(_shapes(base), _about(model, config), found)
    return found


def _found(config: LoraConfig, fn: Fn, base: Any) -> Settings:
    def start(base: Any) -> Any:
        return init(jax.random.key(0), config, fn, base)

    return settings_of(jax.eval_shape(start, base))


def _found_in_part(config: LoraConfig, fn: Fn, base: Any) -> Settings:
    """The plan of a call that does not use all leaves that the config selects."""
    rows = coverage(fn, base).rows
    unused = {row.path for row in rows if row.status == "unused"}

    def all_used(base: Any) -> Any:
        named, _ = named_leaves(base)
        return fn(base), [_used(x) for path, x in named if path in unused]

    found = _found(config, all_used, base)
    return {path: None if path in unused else node for path, node in found.items()}


def _used(x: Any) -> Any:
    """A use of a leaf that no call has: of any layout."""
    return x @ jnp.ones((x.shape[-1], 1), x.dtype) if x.ndim > 1 else x


def _shapes(base: Any) -> Any:
    named, _ = named_leaves(base)
    return tuple((path, tuple(x.shape), str(x.dtype)) for path, x in named)


def _about(model: nn.Module, config: LoraConfig) -> Any:
    return _values(model), config


def _values(x: Any) -> Any:
    """A module as the values of its fields: it may be bound to arrays."""
    if isinstance(x, nn.Module):
        names = {f.name for f in dataclasses.fields(x) if f.init} - {"parent", "name"}
        return type(x), {n: _values(getattr(x, n, None)) for n in sorted(names)}
    if isinstance(x, Mapping):
        return {k: _values(v) for k, v in x.items()}
    return [_values(v) for v in x] if type(x) in (list, tuple) else x


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one == other)
    except Exception:  # arrays, and whatever does not compare
        return False
