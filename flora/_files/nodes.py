"""The nodes of adapted trees as Flax and JAX write them.

`flax.serialization` takes a node for a dict of its arrays, and `jax.export` writes what
is static about it as JSON, so that an exported function can take adapted trees.  What
is read back makes nothing but nodes and flora's own variants.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax import export

from flora._files.records import static_as_json, static_of_json
from flora._tree.errors import LoraError
from flora._tree.quantized import Codes, Quantized, of_codes
from flora._tree.weight import LoraWeight, Trained

State = dict[str, Any]

# --- flax.serialization ---------------------------------------------------------------


def _state_of_weight(w: LoraWeight) -> State:
    """Its arrays and the scale; dropout keys belong to one step and stay out."""
    parts = {k: serialization.to_state_dict(x) for k, x in _parts(w).items()}
    return {**parts, "scale": _scales(w)}


def _weight_of_state(w: LoraWeight, state: Any) -> LoraWeight:
    _require_names(w, state, [*_parts(w), "scale"])
    if not np.array_equal(state["scale"], _scales(w)):
        raise LoraError(
            f"{_here()} was written with scale {state['scale']}, and the target is "
            f"{w!r}. Restore into a tree of the same rank and alpha."
        )
    new = {
        k: serialization.from_state_dict(x, state[k], name=k)
        for k, x in _parts(w).items()
    }
    return _fitting(w, dataclasses.replace(w, **new))


def _scales(w: LoraWeight) -> np.ndarray:
    return np.asarray([x.scale for x in w.blocks] if w.blocks else w.scale)


def _parts(w: LoraWeight) -> State:
    held = {"base": w.base, "a": w.a, "b": w.b, "extra": w.extra}
    return {k: x for k, x in held.items() if x is not None}


def _state_of_trained(leaf: Trained) -> State:
    return {"value": serialization.to_state_dict(leaf.value)}


def _trained_of_state(leaf: Trained, state: Any) -> Trained:
    _require_names(leaf, state, ["value"])
    value = serialization.from_state_dict(leaf.value, state["value"], name="value")
    return _fitting(leaf, Trained(value, leaf.origin))


def _state_of_quantized(w: Quantized) -> State:
    named, _ = jax.tree_util.tree_flatten_with_path(w.values)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in named}


def _quantized_of_state(w: Quantized, state: Any) -> Quantized:
    names = _state_of_quantized(w)
    _require_names(w, state, names)
    values = jax.tree.unflatten(jax.tree.structure(w.values), [state[k] for k in names])
    return _fitting(w, dataclasses.replace(w, values=values))


def _here() -> str:
    return f"'{serialization.current_path().removeprefix('./')}'"


def _require_names(node: Any, state: Any, names: Iterable[str]) -> None:
    found = sorted(state) if isinstance(state, Mapping) else f"a {type(state).__name__}"
    if found != sorted(names):
        raise LoraError(
            f"{_here()} holds {found}, and the target, {node!r}, has {sorted(names)}. "
            "Restore into the kind of tree that was written."
        )


def _fitting(target: Any, found: Any) -> Any:
    """What was found, if its arrays have the target's shapes."""
    named, _ = jax.tree_util.tree_flatten_with_path(target)
    for (keys, x), y in zip(named, jax.tree.leaves(found), strict=True):
        wanted, shape = np.shape(x), np.shape(y)
        if shape != wanted:
            raise LoraError(
                f"{_here()}: {jax.tree_util.keystr(keys, simple=True)} has shape "
                f"{shape}, and the target's has {wanted}. Restore into a tree of the "
                "same flora.init."
            )
    return found


# --- jax.export -----------------------------------------------------------------------

_ARRAYS = ("base", "a", "b", "key", "extra")
_SETTINGS = [f.name for f in dataclasses.fields(LoraWeight) if f.name not in _ARRAYS]


def _static_of_weight(settings: Iterable[Any]) -> bytes:
    return static_as_json(dict(zip(_SETTINGS, settings, strict=True)))


def _static_of_quantized(settings: Iterable[Any]) -> bytes:
    if tuple(settings) != (of_codes,):
        raise LoraError(
            f"export: a weight is dequantized by {settings}, which cannot be written. "
            "Store it by flora.quantize.quantize, or export on flora.merge(tree)."
        )
    return b""


# Of each kind: what writes and reads what is static about it, and what makes a node.
_EXPORTED: Mapping[Any, tuple[Any, Any, Any]] = {
    LoraWeight: (
        _static_of_weight,
        static_of_json,
        lambda static, arrays: LoraWeight(*arrays, **static),
    ),
    Trained: (lambda _: b"", lambda _: None, lambda _, arrays: Trained(arrays[0])),
    Quantized: (
        _static_of_quantized,
        lambda _: of_codes,
        lambda dequantize, arrays: Quantized(arrays[0], dequantize),
    ),
    Codes: (
        lambda static: static[0].encode(),
        lambda text: bytes(text).decode(),
        lambda qtype, arrays: Codes(arrays[0], arrays[1], qtype),
    ),
}


def _register() -> None:
    for kind, state_of, of_state in (
        (LoraWeight, _state_of_weight, _weight_of_state),
        (Trained, _state_of_trained, _trained_of_state),
        (Quantized, _state_of_quantized, _quantized_of_state),
    ):
        serialization.register_serialization_state(
            kind, state_of, of_state, override=True
        )
    for kind, (write, read, make) in _EXPORTED.items():
        with contextlib.suppress(ValueError):  # flora was imported anew
            export.register_pytree_node_serialization(
                kind,
                serialized_name=f"flora.{kind.__name__}",
                serialize_auxdata=write,
                deserialize_auxdata=read,
                from_children=make,
            )


_register()
