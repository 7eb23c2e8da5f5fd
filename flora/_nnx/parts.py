"""Factors beside the weights of an NNX module: put there, and taken out again.

Each `kernel` that is adapted has `kernel_lora_a` and `kernel_lora_b` beside it, and the
module that holds it says in one static attribute what they are.
"""

import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.placement import spec_of_part, specs
from flora._tree.weight import LoraWeight, Trained, is_node, parts_of, trained_parts

SLOTS = "_lora"  # the static attribute
PLAIN = "_lora_plain"  # of its class: the class that it was made of
DROPOUT = "lora_dropout"
SHARDING = ("out_sharding", "sharding_names", "sharding")  # as Flax has called it

Path = tuple[Any, ...]


class FrozenLoRA(nnx.Variable):
    """An array of an adapter that does not train, such as VeRA's A and B."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A weight of a module that is adapted.

    Attributes:
      path: where it lies in the module.
      weight: its `LoraWeight` without arrays, or `None` if it trains whole.
      type: the type that its variable had.
      parts: for each array of the adapter, its name and where it lies.
    """

    path: Path
    weight: LoraWeight | None
    type: type[nnx.Variable]
    parts: tuple[tuple[str, Path], ...] = ()


def plain_class(cls: type) -> type:
    """The class that an adapted module's class was made of; any other as it is."""
    return vars(cls).get(PLAIN, cls)


def copied(model: Any) -> Any:
    """Another module of the same arrays."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))  # other variables


def owners(model: Any) -> Iterator[Any]:
    """The modules within a module, itself included, each once."""
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Pytree) and not isinstance(x, nnx.List | nnx.Dict):
            yield x


def slots_of(module: Any) -> tuple[Slot, ...]:
    """The adapted weights that a module holds."""
    return vars(module).get(SLOTS, ())


def is_adapted(model: Any) -> bool:
    """Whether a module holds adapted weights, at any depth."""
    return any(map(slots_of, owners(model)))


def attach(model: Any) -> None:
    """Puts the arrays of nodes that variables of a module hold into ones beside them.

    Args:
      model: a module such as `detached` returns, changed in place.
    """
    beside: dict[int, tuple[Any, Any, dict[str, Any]]] = {}  # of tied ones the same
    for module in list(owners(model)):
        slots = []
        for path, variable in list(variables(module)):
            if not is_node(raw(variable)):
                continue
            if id(variable) not in beside:
                beside[id(variable)] = variable, *_split(variable)
            _, weight, parts = beside[id(variable)]
            put(module, path, weight)
            slots.append(_slot(module, path, variable, parts))
        if slots:
            setattr(module, SLOTS, nnx.static(tuple(slots)))


def _slot(module: Any, path: Path, variable: Any, parts: dict[str, Any]) -> Slot:
    node = raw(variable)
    if isinstance(node, Trained):
        return Slot(path, None, type(variable))
    places = {name: _beside(module, path, name) for name in parts}
    for name, place in places.items():
        if place[-1] in items(found(module, place[:-1])):
            raise LoraError(
                f"{type(module).__name__} has {'.'.join(map(str, place))!r} already, "
                "where an array of the adapter belongs. Rename that attribute."
            )
        put(module, place, parts[name])
    bare = dataclasses.replace(node, base=None, a=None, b=None, key=None, extra=None)
    return Slot(path, bare, type(variable), tuple(places.items()))


def _beside(module: Any, path: Path, part: str) -> Path:
    """Where an array of an adapter lies: `kernel_lora_a` beside `kernel`."""
    if isinstance(found(module, path[:-1]), nnx.List | list | tuple):  # has no names
        return (f"{'_'.join(map(str, path))}_lora_{part}",)
    return (*path[:-1], f"{path[-1]}_lora_{part}")


def _split(variable: Any) -> tuple[Any, dict[str, Any]]:
    """The variable of the weight, and those of the adapter's arrays."""
    node = raw(variable)
    if isinstance(node, Trained):
        told = variable.get_metadata()
        return nnx.LoRAParam.from_metadata(node.value, told), {}
    variable = _holding(variable, node.base)
    trained, told = trained_parts(node), _sharding_of_parts(variable, node)

    def made(name: str, x: Any) -> nnx.Variable:
        part = nnx.LoRAParam(x) if name in trained else FrozenLoRA(x)
        if not told:
            return part
        if _has_mesh(variable):  # lies where its metadata say, in a trace too
            return type(part)(x, **told[name])
        return type(part).from_metadata(x, part.get_metadata() | told[name])

    return variable, {name: made(name, x) for name, x in parts_of(node).items()}


def _has_mesh(variable: nnx.Variable) -> bool:
    mesh = variable.get_metadata().get("mesh")
    return mesh is not None or not jax.sharding.get_abstract_mesh().empty


def _sharding_of_parts(variable: nnx.Variable, node: LoraWeight) -> dict[str, Any]:
    """The metadata of the adapter's variables: sharded along the axes that W is."""
    told = variable.get_metadata()
    name = next((n for n in SHARDING if told.get(n) is not None), None)
    if name is None:
        return {}
    given = told[name]
    spec = given.spec if isinstance(given, NamedSharding) else Spec(*given)
    found = specs(node.layout, spec, len(node.base.shape))
    by_part = {
        part: spec_of_part(found, node, part, x.shape)
        for part, x in parts_of(node).items()
    }
    kept = ("mesh", "sharding_rules", "eager_sharding")
    also = {k: told[k] for k in kept if told.get(k) is not None}

    def like_given(spec: Spec) -> Any:
        if isinstance(given, NamedSharding):
            return NamedSharding(given.mesh, spec)
        return spec if isinstance(given, Spec) else tuple(spec)

    return {part: {name: like_given(s), **also} for part, s in by_part.items()}


def detached(model: Any) -> Any:
    """A plain module of the same arrays whose variables hold nodes where it is adapted.

    Its state is the adapted tree.
    """
    plain = copied(model)
    made: dict[int, tuple[Any, Any]] = {}  # of tied variables the same
    for module in list(owners(plain)):
        for slot in slots_of(module):
            variable = found(module, slot.path)
            if id(variable) not in made:
                made[id(variable)] = variable, _with_node(module, slot, variable)
            put(module, slot.path, made[id(variable)][1])
        for slot in slots_of(module):
            for _, place in slot.parts:
                remove(module, place)
        cls = plain_class(type(module))
        if cls is not type(module):
            for name in {SLOTS, DROPOUT} & set(vars(module)):
                delattr(module, name)
            object.__setattr__(module, "__class__", cls)
    return plain


def _with_node(module: Any, slot: Slot, variable: nnx.Variable) -> nnx.Variable:
    value = raw(variable)
    if slot.weight is None:
        return slot.type.from_metadata(Trained(value), variable.get_metadata())
    parts = {name: raw(found(module, at)) for name, at in slot.parts}
    a, b = parts.pop("a"), parts.pop("b")
    layout = _sliced(slot, len(value.shape), module)
    return _holding(
        variable,
        dataclasses.replace(
            slot.weight, base=value, a=a, b=b, extra=parts or None, layout=layout
        ),
    )


def _sliced(slot: Slot, ndim: int, module: Any) -> Layout:
    """The layout of a weight, which a scan or vmap over its module may have sliced."""
    layout: Layout = slot.weight.layout  # type: ignore[union-attr]
    if layout.fits(ndim):
        return layout
    kept = sorted({*layout.in_, *layout.out})
    if len(kept) != ndim or slot.weight.blocks:  # type: ignore[union-attr]
        raise LoraError(
            f"{type(module).__name__}: '{'/'.join(map(str, slot.path))}' has {ndim} "
            f"axes, but its layout is {layout}. Call the module that flora.nnx.adapt "
            "returned, or adapt within the transform."
        )
    at = {axis: i for i, axis in enumerate(kept)}
    return Layout(
        (), tuple(at[i] for i in layout.in_), tuple(at[i] for i in layout.out)
    )


def _holding(variable: nnx.Variable, value: Any) -> nnx.Variable:
    """Another variable of the same type and metadata."""
    return type(variable).from_metadata(value, variable.get_metadata())


def items(container: Any) -> dict[Any, Any]:
    """What a module or container holds, by name or index."""
    if isinstance(container, nnx.List | list | tuple):
        return dict(enumerate(container))
    if isinstance(container, MutableMapping):
        return dict(container.items())
    if isinstance(container, nnx.Pytree):
        return {k: x for k, x in vars(container).items() if not k.startswith("_pytree")}
    return {}


def variables(container: Any) -> Iterator[tuple[Path, nnx.Variable]]:
    """The variables of a module and of its lists and dicts, not of its modules."""
    for key, x in items(container).items():
        if isinstance(x, nnx.Variable):
            yield (key,), x
        elif isinstance(x, nnx.List | nnx.Dict) or not isinstance(x, nnx.Pytree):
            yield from (((key, *path), v) for path, v in variables(x))


def raw(x: Any) -> Any:
    """What a variable holds, or the array that stands in a module without one."""
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x


def found(module: Any, path: Path) -> Any:
    """What lies at a path in a module or container."""
    for key in path:
        module = items(module)[key]
    return module


def put(module: Any, path: Path, value: Any) -> None:
    """Puts a value where a path leads, within tuples too."""
    container = found(module, path[:-1])
    if isinstance(container, tuple):
        changed = (*container[: path[-1]], value, *container[path[-1] + 1 :])
        put(module, path[:-1], changed)
        return
    if isinstance(value, tuple) and isinstance(container, nnx.Pytree):
        value = nnx.data(value)
    if isinstance(container, nnx.List | list | MutableMapping):
        container[path[-1]] = value
    else:
        setattr(container, path[-1], value)


def remove(module: Any, path: Path) -> None:
    container = found(module, path[:-1])
    if path[-1] not in items(container):
        return  # tied weights share theirs
    if isinstance(container, MutableMapping):
        del container[path[-1]]
    else:
        delattr(container, path[-1])
