"""The record of a leaf: what adapter files and checkpoints say of it, as JSON."""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from flora._algebra import variants
from flora._tree.blocks import Block
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.paths import Pattern, matches
from flora._tree.quantized import abstract
from flora._tree.version import __version__
from flora._tree.weight import LoraWeight, Trained

_APART = ("base", "a", "b", "key", "extra", "layout")  # all other fields are settings


def record_of(path: str, leaf: Any, also: Pattern) -> dict[str, Any]:
    """What files say of a leaf, as JSON holds it; the way back is `weight_of`.

    `{"kind": "lora", "shape", "extra", "layout", "settings"}`, in which `settings` are
    all fields of the node but these and its arrays, whatever fields nodes have; or kind
    "trained", "also" or "frozen", and the shape.
    """
    if not isinstance(leaf, LoraWeight):
        kind = "also" if matches(also, path, leaf) else "frozen"
        if isinstance(leaf, Trained):
            kind, leaf = "trained", leaf.value
        return {"kind": kind, "shape": [*np.shape(abstract(leaf))]}
    apart = _APART if leaf.blocks else (*_APART, "blocks")
    names = [f.name for f in dataclasses.fields(leaf) if f.name not in apart]
    settings = {name: _encoded(getattr(leaf, name)) for name in names}
    layout = leaf.layout
    return {
        "kind": "lora",
        "shape": [*np.shape(abstract(leaf.base))],
        "extra": sorted(leaf.extra or {}),
        "layout": {"stack": layout.stack, "in": layout.in_, "out": layout.out},
        "settings": settings,
    }


def weight_of(
    record: Mapping[str, Any], base: Any, a: Any, b: Any, extra: Any
) -> LoraWeight:
    """The node that a record tells of, with its arrays."""
    settings: dict[str, Any] = {k: decoded(x) for k, x in record["settings"].items()}
    return LoraWeight(base, a, b, extra=extra, layout=layout_of(record), **settings)


def unknown_settings(records: Mapping[str, Any]) -> list[str]:
    """The settings in the records that this version's nodes lack."""
    names = {name for x in records.values() for name in x.get("settings", {})}
    return sorted(names - {f.name for f in dataclasses.fields(LoraWeight)})


def foreign_settings(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(name, how it prints)` of the settings that no file can hold."""
    for name, value in record.get("settings", {}).items():
        yield from ((name, text) for text in _foreign(value))


def layout_of(record: Mapping[str, Any]) -> Layout:
    """The layout in a record of factors."""
    return Layout(*(record["layout"][k] for k in ("stack", "in", "out")))


def _encoded(value: Any) -> Any:
    """A setting as JSON: a number, text, or a dataclass of flora's.

    Of anything else, how it prints: enough to compare it, too little to make it again.
    """
    kind = type(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encoded(x) for x in value]}
    if dataclasses.is_dataclass(value) and kind.__module__.split(".")[0] == "flora":
        names = [f.name for f in dataclasses.fields(value)]
        public = hasattr(variants, kind.__name__)
        module = "flora.variants" if public else kind.__module__
        module = "flora" if isinstance(value, Block) else module
        return {
            "class": f"{module}:{kind.__qualname__}",
            "fields": {name: _encoded(getattr(value, name)) for name in names},
        }
    return {"repr": repr(value)}


def _foreign(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "repr" in value:
            yield value["repr"]
        for x in (*value.get("tuple", ()), *value.get("fields", {}).values()):
            yield from _foreign(x)


def decoded(value: Any) -> Any:
    """The setting that `_encoded` wrote."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(map(decoded, value["tuple"]))
    module, _, name = value.get("class", "").partition(":")
    found = None
    if module.split(".")[0] == "flora":
        with contextlib.suppress(ModuleNotFoundError):
            found = getattr(importlib.import_module(module), name, None)
    fields = {k: decoded(x) for k, x in value.get("fields", {}).items()}
    if not _is_dataclass(found) or not fields.keys() <= _names(found):
        raise LoraError(
            f"The file needs {value.get('class') or text_of(value)}, which flora "
            f"{__version__} lacks. Install the version that wrote it."
        )
    return found(**fields)


def _is_dataclass(x: Any) -> TypeGuard[type[Any]]:
    return isinstance(x, type) and dataclasses.is_dataclass(x)


def _names(kind: type[Any]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def text_of(value: Any) -> str:
    """How an encoded setting prints: 'DoRA()'."""
    if not isinstance(value, dict):
        return repr(value)
    if "repr" in value:
        return value["repr"]
    if "tuple" in value:
        items = [text_of(x) for x in value["tuple"]]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    fields = ", ".join(f"{k}={text_of(x)}" for k, x in value["fields"].items())
    return f"{value['class'].rpartition(':')[2]}({fields})"


def static_as_json(settings: Mapping[str, Any]) -> bytes:
    """What is static about a node, for `static_of_json`."""
    written = {name: _encoded(value) for name, value in settings.items()}
    for text in (t for x in written.values() for t in _foreign(x)):
        raise LoraError(
            f"export: {text} cannot be written, because it is not flora's. Export the "
            "function on flora.merge(tree), or on the arrays alone."
        )
    return json.dumps(written).encode()


def static_of_json(text: bytes) -> dict[str, Any]:
    """What `static_as_json` wrote; makes nothing but dataclasses of flora's."""
    try:
        return {name: decoded(x) for name, x in json.loads(bytes(text)).items()}
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(
            f"export: {bytes(text[:60])!r} does not describe a node of flora "
            f"{__version__}. Export the function anew."
        ) from error
