"""The class of an adapted module: its methods run on base and factors."""

import copyreg
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flora._nnx.carry import become
from flora._nnx.parts import (
    DROPOUT,
    PLAIN,
    attach,
    detached,
    owners,
    plain_class,
    slots_of,
)
from flora._tree.errors import LoraError, fail
from flora._tree.weight import LoraWeight, is_leaf, is_node
from flora._verbs.dropout import with_dropout
from flora._verbs.lora import lora, undifferentiated

RECIPE = "_lora_recipe"  # of an adapted class: what `adapted_class` was given

FROZEN = (
    "a frozen weight was differentiated: only factors, and what LoraConfig.train names, "
    "have a gradient. Write nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)) and "
    "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)."
)


def adapt_in_place(model: Any, methods: tuple[str, ...]) -> Any:
    """Makes a module whose variables hold nodes an adapted one."""
    attach(model)
    held = {id(m): {str(s.path[-1]) for s in slots_of(m)} for m in owners(model)}
    for module in list(owners(model)):
        names = frozenset(n for m in owners(module) for n in held[id(m)])
        if names or module is model:
            own = methods if module is model else ()
            cls = adapted_class(plain_class(type(module)), own, names)
            object.__setattr__(module, "__class__", cls)
    return model


def methods_of(model: Any) -> tuple[str, ...]:
    """The methods that an adapted module was given."""
    return vars(type(model))[RECIPE][1]


@functools.cache
def adapted_class(cls: type, methods: tuple[str, ...], names: frozenset[str]) -> type:
    """The subclass of a module's class that runs on adapted weights.

    Args:
      cls: the module's class.
      methods: the methods that do.
      names: attributes that adapted weights within the module have; each method whose
        code reads one of these does, too, so that none runs on the base alone.
    """
    chosen = sorted({*methods, *_readers(cls, names)})
    about = {k: getattr(cls, k) for k in ("__module__", "__qualname__", "__doc__")}
    return _metaclass(type(cls))(
        cls.__name__,
        (cls,),
        {name: _method(cls, name) for name in chosen}
        | about
        | {PLAIN: cls, RECIPE: (cls, methods, names)},
        pytree=getattr(cls, "_pytree__is_pytree", True),
    )


@functools.cache
def _metaclass(meta: type) -> Any:
    """A metaclass whose classes are pickled as what they were made of."""

    def recipe(cls: Any) -> Any:
        return adapted_class, vars(cls)[RECIPE]

    own = type(meta.__name__, (meta,), {})
    copyreg.pickle(own, recipe)
    return own


def _method(cls: type, name: str) -> Any:
    def run_on_adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, name, args, kwargs)

    original = getattr(cls, name, None)  # some bridges look theirs up in an instance
    return functools.wraps(original)(run_on_adapted) if original else run_on_adapted


def _readers(cls: type, names: frozenset[str]) -> Iterator[str]:
    """The methods of a class whose code reads an attribute of one of these names."""
    for name in dir(cls):
        if name in {"__init__", *dir(nnx.Module)} - {"__call__"}:
            continue
        function = inspect.unwrap(inspect.getattr_static(cls, name))
        if isinstance(function, types.FunctionType) and names & {
            *_names_in(function.__code__)
        }:
            yield name


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)


def run(module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`module.name(*args, **kwargs)` on base and factors.

    What the method changes, in the module or in modules among its arguments, is changed
    there when it returns.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_graph)
    at = [i for i, x in enumerate(leaves) if _is_graph(x)]
    given = [leaves[i] for i in at]
    values = [None if _is_graph(x) else x for x in leaves]
    graphdef, weights, rest = nnx.split([detached(module), *given], _is_weight, ...)
    weights = _with_keys(module, nnx.map_state(_frozen, weights))

    def fn(weights: Any, rest: Any, values: list[Any]) -> Any:
        modules = nnx.merge(graphdef, weights, rest)
        filled = dict(zip(at, modules[1:], strict=True))
        args, kwargs = treedef.unflatten(
            [filled.get(i, x) for i, x in enumerate(values)]
        )
        out = getattr(modules[0], name)(*args, **kwargs)
        after, state = nnx.split(modules)
        before = dict(nnx.to_flat_state(weights)) | dict(nnx.to_flat_state(rest))
        changed = [
            (path, x)
            for path, x in nnx.to_flat_state(state)
            if path not in before or not _same(before[path], x)
        ]
        fail(_changed_problems(module, name, adapted & {path for path, _ in changed}))
        grown = after != graphdef  # then all of the state, to build the graph anew
        return out, after, nnx.from_flat_state(changed), state if grown else None

    adapted = {p for p, x in nnx.to_flat_state(weights) if is_node(x.get_raw_value())}
    fn.__qualname__ = fn.__name__ = f"{type(module).__name__}.{name}"
    out, after, changed, state = lora(fn)(weights, rest, values)
    if state is not None:
        grown = nnx.merge(after, state)
        become(module, adapt_in_place(grown[0], methods_of(module)))
        for old, new in zip(given, grown[1:], strict=True):
            become(old, new)
    for i, node in enumerate([module, *given]):
        if state is None and i in changed:
            nnx.update(node, changed[i])
    return out


def _is_graph(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _is_weight(path: Any, x: Any) -> bool:
    """Whether a variable is a weight of the module, not of one among the arguments."""
    return path[0] == 0 and (isinstance(x, nnx.Param) or is_node(x.get_raw_value()))


def _frozen(path: Any, variable: Any) -> Any:
    """The variable, an error where its frozen weight is differentiated."""

    def frozen(x: Any) -> Any:
        floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        return undifferentiated(why, x) if floating else x

    why = f"'{'/'.join(map(str, path[1:]))}', {FROZEN}"
    value = variable.get_raw_value()
    if isinstance(value, LoraWeight):
        base = jax.tree.map(frozen, value.base)
        return variable.replace(dataclasses.replace(value, base=base))
    return variable if is_leaf(value) else variable.replace(jax.tree.map(frozen, value))


def _with_keys(module: Any, weights: Any) -> Any:
    """The weights with dropout keys, as the module's mode asks for."""
    dropout = vars(module).get(DROPOUT)
    if dropout is None:
        return weights
    return with_dropout(weights, None if dropout.deterministic else dropout.rngs())


def _same(old: Any, new: Any) -> bool:
    xs, ys = (jax.tree.leaves(v.get_raw_value()) for v in (old, new))
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


def _changed_problems(module: Any, name: str, paths: set[Any]) -> Iterator[str]:
    for path in sorted(paths, key=str):
        yield (
            f"{type(module).__name__}.{name} changes '{'/'.join(map(str, path[1:]))}', "
            "which is adapted. Exclude it, or take that method out of methods=."
        )
