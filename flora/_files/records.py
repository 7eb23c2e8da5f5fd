"""The record of a leaf: what adapter files and checkpoints say of it, as JSON."""

import contextlib
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from flora._algebra import variants
from flora._files.parsed import misfit
from flora._tree.blocks import Block
from flora._tree.config import form_problems, is_fallback
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.origin import Origin
from flora._tree.paths import Pattern, matches
from flora._tree.quantized import abstract
from flora._tree.version import __version__
from flora._tree.weight import LoraWeight, Trained

# All other fields are settings.
_APART = ("base", "a", "b", "key", "extra", "layout", "origin")


def record_of(path: str, leaf: Any, also: Pattern) -> dict[str, Any]:
    """What files say of a leaf, as JSON holds it; the way back is `weight_of`.

    `{"kind": "lora", "shape", "extra", "layout", "settings"}`, in which `settings` are
    all fields of the node but these and its arrays, whatever fields nodes have; or kind
    "trained", "also" or "frozen", and the shape.  And "origin", where there is one.
    """
    origin = leaf.origin.text if isinstance(leaf, LoraWeight | Trained) else ""
    beside = {"origin": origin} if origin else {}
    if not isinstance(leaf, LoraWeight):
        kind = "also" if matches(also, path, leaf) else "frozen"
        if isinstance(leaf, Trained):
            kind, leaf = "trained", leaf.value
        return {"kind": kind, "shape": [*np.shape(abstract(leaf))], **beside}
    apart = _APART if leaf.blocks else (*_APART, "blocks")
    apart = apart if leaf.start else (*apart, "start")
    names = [f.name for f in dataclasses.fields(leaf) if f.name not in apart]
    settings = {name: _encoded(getattr(leaf, name)) for name in names}
    layout = leaf.layout
    return {
        "kind": "lora",
        "shape": [*np.shape(abstract(leaf.base))],
        "extra": sorted(leaf.extra or {}),
        "layout": {"stack": layout.stack, "in": layout.in_, "out": layout.out},
        "settings": settings,
        **beside,
    }


def origin_of(record: Mapping[str, Any]) -> Origin:
    """The origin in the record of a leaf."""
    return Origin(record.get("origin", ""))


def weight_of(
    record: Mapping[str, Any], base: Any, a: Any, b: Any, extra: Any
) -> LoraWeight:
    """The node that a record tells of, with its arrays."""
    settings: dict[str, Any] = {k: decoded(x) for k, x in record["settings"].items()}
    if settings["variant"] is not None and not hasattr(settings["variant"], "product"):
        raise LoraError(
            f"The file has {settings['variant']!r} in the place of a variant."
        )
    layout, origin = layout_of(record), origin_of(record)
    return LoraWeight(base, a, b, extra=extra, layout=layout, origin=origin, **settings)


_LORA = {
    "shape": [int],
    "extra": [str],
    "layout": {"stack": [int], "in": [int], "out": [int]},
    "settings": {
        "rank": int,
        "alpha": object,
        "rank_stabilized": bool,
        "dropout": (int, float),
        "fallback": str,
        "form": str,
        "variant": (dict, type(None)),
    },
}


def record_problem(path: str, record: Mapping[str, Any]) -> str:
    """What is wrong with the record of a leaf, whoever wrote it; or ''."""
    at, kind = f"leaves.{path}", record.get("kind")
    if wrong := misfit(record, {"origin": str} if "origin" in record else {}, at):
        return wrong
    if kind in ("trained", "also", "frozen"):
        return misfit(record, {"shape": [int]}, at)
    if kind != "lora":
        return f"{at} is of kind {kind!r}"
    if wrong := misfit(record, _LORA, at):
        return wrong
    own = record["settings"].items()
    settings = {k: decoded(x) for k, x in own if k != "variant"}
    good = {
        "rank": 0 < settings["rank"] < 2**31,
        "alpha": _is_finite(settings["alpha"]),
        "dropout": 0 <= settings["dropout"] < 1,
        "fallback": is_fallback(settings["fallback"]),
        "form": not form_problems("form", settings["form"]),
    }
    if "blocks" in settings:
        given = settings["blocks"]
        good["blocks"] = isinstance(given, tuple) and all(map(_is_block, given))
    good["start"] = isinstance(settings.get("start", ""), str)
    bad = next((k for k, fits in good.items() if not fits), "")
    return bad and f"{at}.settings.{bad} is {record['settings'][bad]!r}"


def _is_block(x: Any) -> bool:
    if not isinstance(x, Block):
        return False
    columns = (0, 0) if x.columns is None else x.columns
    tuples = isinstance(x.index, tuple) and isinstance(columns, tuple)
    numbers = (*x.index, x.start, x.stop, *columns) if tuples else (None,)
    ints = all(type(n) is int and 0 <= n < 2**31 for n in numbers)
    return ints and len(columns) == 2 and _is_finite(x.scale)


def _is_finite(x: Any) -> bool:
    if isinstance(x, tuple):
        return all(map(_is_finite, x))
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and abs(x) <= 3.4e38


def unknown_settings(record: Any) -> list[str]:
    """The settings in a file's record that this version's nodes lack."""
    if misfit(record, {"flora": str, "leaves": {str: dict}}):
        return []
    found = [x.get("settings") for x in record["leaves"].values()]
    names = {name for x in found if isinstance(x, dict) for name in x}
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
        public = kind.__module__ == variants.__name__
        module = "flora.variants" if public else kind.__module__
        module = "flora" if isinstance(value, Block) else module
        module = "flora.peft" if module.startswith("flora._peft") else module
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
    if isinstance(value, dict) and isinstance(value.get("tuple"), list):
        return tuple(map(decoded, value["tuple"]))
    if not isinstance(value, dict | list):
        return value
    name = value.get("class") if isinstance(value, dict) else None
    fields = value.get("fields", {}) if isinstance(value, dict) else {}
    found = None
    if isinstance(name, str) and (at := _CLASS.fullmatch(name)):
        module = "flora.peft" if at[1].startswith("flora._peft") else at[1]
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), at[2], None)
    if _is_dataclass(found) and isinstance(fields, dict) and {*fields} <= _names(found):
        with contextlib.suppress(TypeError, ValueError):  # it refuses the fields
            return found(**{k: decoded(x) for k, x in fields.items()})
    raise LoraError(
        f"The file needs {name or text_of(value)}, which flora {__version__} lacks. "
        "Install the version that wrote it."
    )


_CLASS = re.compile(r"(flora(?:\.\w+)*):(\w+)", re.ASCII)


def _is_dataclass(x: Any) -> TypeGuard[type[Any]]:
    return isinstance(x, type) and dataclasses.is_dataclass(x)


def _names(kind: type[Any]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def text_of(value: Any) -> str:
    """How an encoded setting prints: 'DoRA()'."""
    if not isinstance(value, dict):
        return repr(value)
    if isinstance(value.get("repr"), str):
        return value["repr"]
    if isinstance(value.get("tuple"), list):
        items = [text_of(x) for x in value["tuple"]]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    name, fields = value.get("class"), value.get("fields")
    if not isinstance(name, str) or not isinstance(fields, dict):
        return repr(value)
    shown = ", ".join(f"{k}={text_of(x)}" for k, x in fields.items())
    return f"{name.rpartition(':')[2]}({shown})"


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
