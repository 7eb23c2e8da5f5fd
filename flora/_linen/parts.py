"""Between the variables of an adapted Linen module and adapted trees."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core, traverse_util
from jax import lax
from jax.sharding import PartitionSpec as Spec

from flora._linen.starts import of_base
from flora._tree.errors import LoraError, fail
from flora._tree.paths import named_leaves, path_of
from flora._tree.placement import spec_of_part, specs
from flora._tree.quantized import abstract, is_quantized
from flora._tree.weight import LoraWeight, Trained, is_node, parts_of, trained_parts

LORA = "lora"  # below it, in params, is what trains; in its collection what does not
FROZEN = "frozen"
DELTA = "delta"

# By path: a LoraWeight or Trained without arrays; None where a call does not use it.
Settings = dict[str, Any]


def parted(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base's parameters, and the other collections, without the adapter's."""
    plain = {k: x for k, x in core.unfreeze(variables).items() if k != LORA}
    return without(plain.pop("params", {})), plain


def without(params: Any) -> dict[str, Any]:
    """The parameters without the adapter's."""
    return {k: x for k, x in core.unfreeze(params).items() if k != LORA}


def joined(base: Any, other: Any, adapted: Any) -> dict[str, Any]:
    """The variables of an adapted tree of parameters, over its base."""
    trained, frozen = parts(adapted)
    made = {**other, "params": {**base, LORA: trained}}
    return {**made, LORA: {FROZEN: frozen}} if frozen else made


def settings_of(adapted: Any) -> Settings:
    """What an adapted tree says of each adapted leaf, without the arrays."""
    named, _ = named_leaves(adapted)
    return {path: _bare(x) for path, x in named if is_node(x)}


def _bare(node: Any) -> Any:
    if isinstance(node, Trained):
        return Trained(None, node.origin)
    extra = dict.fromkeys(node.extra) if node.extra else None
    return dataclasses.replace(node, base=None, a=None, b=None, key=None, extra=extra)


def parts(adapted: Any) -> tuple[Any, Any]:
    """What trains and what of variants does not, by path, in the boxes that W has."""
    trained: dict[tuple[str, ...], Any] = {}
    frozen: dict[tuple[str, ...], Any] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(adapted, is_leaf=_is_one)
    for keys, x in flat:
        path = tuple(path_of(keys).split("/"))
        node = x if is_node(x) else getattr(x, "value", x)
        if isinstance(node, Trained):
            trained[*path, DELTA] = _boxed(x, node, DELTA, _zeros(node.value))
        elif isinstance(node, LoraWeight):
            moving, starts = trained_parts(node), of_base(node, node.base)
            for name, part in parts_of(node).items():
                to = trained if name in moving else frozen
                held = _minus(part, starts[name]) if name in starts else part
                key = _key(name, starts)
                to[*path, key] = _boxed(x, node, name, held)
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def _is_one(x: Any) -> bool:
    return is_node(x) or is_quantized(x) or isinstance(x, nn.meta.AxisMetadata)


def _key(name: str, starts: Mapping[str, Any]) -> str:
    """What an array is called in the parameters: `magnitude_delta` from its start."""
    return f"{name}_{DELTA}" if name in starts else name


def _minus(x: Any, start: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else x - start.astype(x.dtype)


def _zeros(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jnp.zeros_like(x)


def _boxed(box: Any, node: Any, name: str, part: Any) -> Any:
    """The array in a box with the names of the axes that it shares with W."""
    if not isinstance(box, nn.Partitioned):
        return part
    if name == DELTA:
        return box.replace(value=part)
    found = specs(node.layout, Spec(*box.names), len(node.base.shape))
    spec = spec_of_part(found, node, name, part.shape)
    names = (*spec, *(None for _ in range(len(part.shape) - len(spec))))
    return box.replace(value=part, names=names)


def filled(base: Any, settings: Settings, trained: Any, frozen: Any) -> Any:
    """The adapted parameters: nodes of the settings, with the arrays that are there."""
    have = arrays(trained, frozen)
    named, treedef = named_leaves(base)
    fail(_problems(settings, have, dict(named)))

    def fill(path: str, value: Any) -> Any:
        node, own = settings.get(path), have.get(path, {})
        if isinstance(node, Trained):
            return Trained(lax.stop_gradient(value) + own[DELTA], node.origin)
        if node is None:
            return value
        starts = of_base(node, value)
        extra = {name: own[_key(name, starts)] for name in node.extra or ()}
        for name, start in starts.items():
            extra[name] = _plus(extra[name], start)
        extra = extra or None
        return dataclasses.replace(
            node, base=value, a=own["a"], b=own["b"], extra=extra
        )

    return treedef.unflatten([fill(path, x) for path, x in named])


def _plus(x: Any, start: Any) -> Any:
    return x if isinstance(start, jax.ShapeDtypeStruct) else x + start.astype(x.dtype)


def arrays(trained: Any, frozen: Any) -> dict[str, dict[str, Any]]:
    """The arrays beside each leaf, by the leaf's path and their own names."""
    found: dict[str, dict[str, Any]] = {}
    for tree in (trained, frozen):
        flat = traverse_util.flatten_dict(nn.meta.unbox(core.unfreeze(tree)))
        for (*path, name), x in flat.items():
            found.setdefault("/".join(map(str, path)), {})[name] = x
    return found


def _problems(
    settings: Settings, have: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]
) -> Iterator[str]:
    for path, node in settings.items():
        for name, shape in _shapes(node, base[path]).items():
            where, part = _where(path, node, name), have.get(path, {}).get(name)
            if part is None:
                yield (
                    f"flora.linen.LoRA: {where} is not there, and the config adapts "
                    "that leaf. Pass variables of this config."
                )
            elif shape is not None and tuple(part.shape) != shape:
                yield (
                    f"flora.linen.LoRA: {where} has shape {tuple(part.shape)}, and the "
                    f"config asks for {shape}. Pass variables of this config."
                )
    for path in sorted(have.keys() - settings.keys()):
        yield (
            f"flora.linen.LoRA: there is 'params/lora/{path}', and the config does not "
            "adapt that leaf. Pass variables of this config."
        )


def _where(path: str, node: Any, name: str) -> str:
    fixed = getattr(node, "variant", None) and name in node.variant.frozen
    return f"'{f'{LORA}/{FROZEN}' if fixed else f'params/{LORA}'}/{path}/{name}'"


def _shapes(node: Any, base: Any) -> dict[str, Any]:
    """The shapes that the parts of a leaf must have; `None` for any."""
    shape = tuple(base.shape)
    if node is None:
        return {}
    if isinstance(node, Trained):
        return {DELTA: shape}
    a, b = node.layout.factor_shapes(shape, node.rank)
    starts = of_base(node, abstract(base))
    return {"a": a, "b": b} | {_key(name, starts): None for name in node.extra or ()}


def differences(has: Settings, wants: Settings) -> Iterator[str]:
    """Where the settings of a tree are not those of a module's config."""
    has = {path: _whatever_start(node) for path, node in has.items()}
    for path in sorted(has.keys() | wants.keys()):
        if has.get(path) != wants.get(path):
            yield (
                f"flora.linen.variables: '{path}' is {has.get(path, 'not adapted')!r} "
                f"in the tree and {wants.get(path, 'not adapted')!r} by the module's "
                "config. Write a config with the tree's settings."
            )


def _whatever_start(node: Any) -> Any:
    """The node without what its base went through, which variables do not tell."""
    return dataclasses.replace(node, start="") if isinstance(node, LoraWeight) else node


def require_factors(params: Any, verb: str) -> Any:
    """The factors among the parameters."""
    if LORA not in params:
        raise LoraError(
            f"{verb}: the variables have no 'params/lora', so nothing is adapted. "
            "Write variables = flora.linen.adapt(key, model, variables, *args), or "
            "take those of model.init."
        )
    return params[LORA]
