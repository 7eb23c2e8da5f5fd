"""The class of an adapted module: its methods run on base and factors."""

import copyreg
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from flora._nnx.carry import become
from flora._nnx.parts import (
    DROPOUT,
    PLAIN,
    attach,
    detached,
    found,
    owners,
    plain_class,
    raw,
    slots_of,
)
from flora._nnx.readers import RECIPE, Guarded, is_property, readers
from flora._tree.errors import LoraError, fail
from flora._tree.weight import LoraWeight, Trained, is_leaf, is_node, on_parts
from flora._verbs.dropout import with_dropout
from flora._verbs.lora import lora, undifferentiated

FROZEN = (
    "a frozen weight, was differentiated: only factors, and what LoraConfig.train "
    "names, have a gradient. Write nnx.grad(loss, argnums=nnx.DiffState(0, "
    "nnx.LoRAParam)) and nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)."
)
KEYLESS = (
    "trains without its dropout: its keys are the adapted model's, and it has none or "
    "was not called itself. Call that model, give flora.nnx.module a key, or adapt "
    "with dropout=0."
)


def adapt_in_place(model: Any, methods: tuple[str, ...]) -> Any:
    """Makes a module whose variables hold nodes an adapted one."""
    attach(model)
    modules = list(owners(model))
    own = {id(m): _weights_of(m) for m in modules}
    read: dict[int, frozenset[str]] = {}  # with properties of theirs

    def names_in(module: Any) -> frozenset[str]:
        within = [m for m in owners(module) if m is not module]
        return own[id(module)].union(*(read[id(m)] for m in within))

    for module in modules:  # those within before those around
        read[id(module)] = readers(type(module), names_in(module))[1]
    for module in modules:
        names = names_in(module)
        if names or module is model:
            cls = adapted_class(
                plain_class(type(module)),
                methods if module is model else _called(module, own[id(module)]),
                names,
                own[id(module)],
            )
            object.__setattr__(module, "__class__", cls)
    return model


def _weights_of(module: Any) -> frozenset[str]:
    return frozenset(str(s.path[0]) for s in slots_of(module) if s.weight is not None)


def _called(module: Any, own: frozenset[str]) -> tuple[str, ...]:
    """`__call__` of a module that holds weights, which bridges read without a name."""
    return ("__call__",) if own and callable(module) else ()


def methods_of(model: Any) -> tuple[str, ...]:
    """The methods that an adapted module was given."""
    return vars(type(model))[RECIPE][1]


@functools.cache
def adapted_class(
    cls: type, methods: tuple[str, ...], names: frozenset[str], own: frozenset[str]
) -> type:
    """The subclass of a module's class that runs on adapted weights.

    Args:
      cls: the module's class.
      methods: the methods that do.
      names: attributes that adapted weights within the module have; each method whose
        code reads one of these does, too, so that none runs on the base alone.
      own: those that are the module's own.
    """
    chosen = sorted({*methods, *readers(cls, names)[0]})
    about = {k: getattr(cls, k) for k in ("__module__", "__qualname__", "__doc__")}
    return _metaclass(type(cls))(
        cls.__name__,
        (cls,),
        {name: Guarded(name) for name in own}
        | {name: _method(cls, name) for name in chosen}
        | about
        | {PLAIN: cls, RECIPE: (cls, methods, names, own)},
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
    if is_property(cls, name):
        return property(lambda self: run(self, name))

    def run_on_adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, name, args, kwargs)

    original = getattr(cls, name, None)  # some bridges look theirs up in an instance
    return functools.wraps(original)(run_on_adapted) if original else run_on_adapted


def run(module: Any, name: str, args: Any = None, kwargs: Any = None) -> Any:
    """`module.name(*args, **kwargs)` on base and factors; without args, `module.name`.

    What the method changes, in the module or in modules among its arguments, is changed
    there when it returns, and what it returns of them is what they hold.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_graph)
    at = [i for i, x in enumerate(leaves) if _is_graph(x)]
    given = [leaves[i] for i in at]
    values = [None if _is_graph(x) else x for x in leaves]
    plain = detached(module)
    nodes = {(0, *p): x for p, x in _flat(nnx.state(plain)) if is_node(raw(x))}
    graphdef, weights, rest = nnx.split([plain, *given], _is_weight, ...)
    weights = _with_keys(module, nnx.map_state(_frozen, weights[0]))

    def fn(weights: Any, rest: Any, values: list[Any]) -> Any:
        state: Any = {(0, *p): x for p, x in _flat(weights)}
        state |= dict(_flat(rest))
        before = {path: jax.tree.leaves(raw(x)) for path, x in state.items()}
        modules = nnx.merge(graphdef, nnx.from_flat_state(state))
        filled = dict(zip(at, modules[1:], strict=True))
        args, kwargs = treedef.unflatten(
            [filled.get(i, x) for i, x in enumerate(values)]
        )
        out = getattr(modules[0], name)
        if args is not None:
            out = out(*args, **kwargs)
        after, state = nnx.split(modules)
        if after == graphdef:  # else all of the state, to build the graph anew
            flat = [(p, x) for p, x in _flat(state) if not _same(before.get(p), x)]
            state = nnx.from_flat_state(flat)
        return _with_places(out, modules), state, after if after != graphdef else None

    fn.__qualname__ = fn.__name__ = f"{type(module).__name__}.{name}"
    out, state, after = lora(fn)(weights, rest, values)
    flat = dict(_flat(state))
    fail(_changed_problems(module, name, nodes, flat))
    targets = [module, *given]
    if after is not None:
        state = {p: _as_before(x, nodes.get(p)) for p, x in flat.items()}
        grown, *others = nnx.merge(after, nnx.from_flat_state(state))
        if DROPOUT in vars(module):
            setattr(grown, DROPOUT, getattr(module, DROPOUT))
        become(module, adapt_in_place(grown, methods_of(module)))
        for old, new in zip(given, others, strict=True):
            become(old, new)
    else:
        changed = {p: x for p, x in flat.items() if not is_node(raw(x))}
        for i, new in nnx.from_flat_state(changed).items():
            nnx.update(targets[i], new)
    return jax.tree.map(
        lambda x: _at_place(module, name, nodes, targets, x), out, is_leaf=is_node
    )


def _as_before(new: Any, old: Any) -> Any:
    """A variable that a call returned, as a node if it was one."""
    if old is None or is_node(raw(new)) or isinstance(raw(old), LoraWeight):
        return new if old is None else old
    return new.replace(Trained(raw(new)))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the modules of a call something that it returned lies."""

    path: tuple[Any, ...]


def _with_places(out: Any, modules: list[Any]) -> Any:
    places = {id(x): path for path, x in nnx.iter_graph(modules) if _is_graph(x)}

    def place(x: Any) -> Any:
        return _Place(places[id(x)]) if id(x) in places else x

    return jax.tree.map(place, out, is_leaf=_is_graph)


def _at_place(module: Any, name: str, nodes: Any, targets: list[Any], x: Any) -> Any:
    if is_node(x) or (isinstance(x, _Place) and x.path in nodes):
        raise LoraError(
            f"{type(module).__name__}.{name} returns a weight that is adapted, and "
            "what uses it outside would use the base alone. Name the method that uses "
            "it in methods=(...,)."
        )
    return found(targets, x.path) if isinstance(x, _Place) else x


def _is_graph(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _flat(state: Any) -> Any:
    return nnx.to_flat_state(state)


def _is_weight(path: Any, x: Any) -> bool:
    """Whether a variable is a weight of the module, not of one among the arguments."""
    return path[0] == 0 and (isinstance(x, nnx.Param) or is_node(raw(x)))


def _frozen(path: Any, variable: Any) -> Any:
    """The variable, an error where its frozen weight is differentiated."""

    def frozen(x: Any) -> Any:
        floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        return undifferentiated(why, x) if floating else x

    why = f"'{'/'.join(map(str, path))}', {FROZEN}"
    value = raw(variable)
    if isinstance(value, LoraWeight):
        base = jax.tree.map(frozen, value.base)
        return variable.replace(dataclasses.replace(value, base=base))
    return variable if is_leaf(value) else variable.replace(jax.tree.map(frozen, value))


def _with_keys(module: Any, weights: Any) -> Any:
    """The weights with dropout keys, as the module's mode asks for."""
    dropped = [p for p, x in _flat(weights) if getattr(raw(x), "dropout", 0)]
    if not dropped:
        return weights
    dropout = vars(module).get(DROPOUT)
    if dropout is not None:
        key = None if dropout.deterministic else _drawn(module, dropout)
        return with_dropout(weights, key)

    def keyless(path: Any, variable: Any) -> Any:
        node = raw(variable)
        if not getattr(node, "dropout", 0):
            return variable
        why = f"'{'/'.join(map(str, path))}' of {type(module).__name__} {KEYLESS}"
        node = on_parts(lambda name, x: undifferentiated(why, x), node)
        return variable.replace(dataclasses.replace(node, dropout=0.0))

    return nnx.map_state(keyless, weights)


def _drawn(module: Any, dropout: Any) -> Any:
    try:
        return dropout.rngs()
    except TraceContextError as error:
        raise LoraError(
            f"{type(module).__name__} is in train mode and has dropout, and is called "
            "within a transformation that it is no argument of, where its keys cannot "
            "move on. Call model.eval() first, or give nnx.jit the model."
        ) from error


def _same(old: Any, new: Any) -> bool:
    news = jax.tree.leaves(raw(new))
    return (
        old is not None
        and len(old) == len(news)
        and all(x is y for x, y in zip(old, news, strict=True))
    )


def _changed_problems(module: Any, name: str, nodes: Any, state: Any) -> Iterator[str]:
    for path, old in nodes.items():
        whole = not isinstance(raw(old), LoraWeight)
        if not whole and path in state and not is_node(raw(state[path])):
            yield (
                f"{type(module).__name__}.{name} changes "
                f"'{'/'.join(map(str, path[1:]))}', which is adapted. Exclude it, or "
                "take that method out of methods=."
            )
