"""JSON out of files that may be anything: parsed, and of the form expected."""

import collections
import json
import re
from collections.abc import Mapping
from typing import Any

from flora._tree.version import __version__


def parsed(data: bytes | str) -> Any:
    """The value of JSON text in which no object has a name twice.

    Raises:
      ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(data, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, n in counts.items() if n > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def misfit(given: Any, form: Any, at: str = "") -> str:
    """What is not as expected in parsed JSON, such as "leaves.w.shape is 3"; or ''.

    Args:
      given: what was parsed.
      form: a type; a tuple of forms, of which one must fit; `[form]` for a list of
        these, `{str: form}` for an object with such values, and `{name: form}` for one
        that has at least these names.
      at: where the value lies in the whole.
    """
    value: Any = given
    if isinstance(form, tuple):
        tried = [misfit(value, one, at) for one in form]
        return "" if "" in tried else tried[-1]
    kind: Any = form if isinstance(form, type) else type(form)
    is_flag = type(given) is bool and kind not in (bool, object)
    if not isinstance(value, kind) or is_flag:
        return f"{at or 'it'} is {value!r}, not {_KINDS[kind]}"
    inside: list[tuple[str, Any, Any]] = []
    if isinstance(form, list):
        inside = [(f"{at}[{i}]", x, form[0]) for i, x in enumerate(value)]
    elif isinstance(form, dict) and str in form:
        inside = [(f"{at}.{k}", x, form[str]) for k, x in value.items()]
    elif isinstance(form, dict):
        if lacking := [k for k in form if k not in value]:
            return f"{at or 'it'} lacks {', '.join(map(repr, lacking))}"
        inside = [(f"{at}.{k}", value[k], x) for k, x in form.items()]
    return next((e for k, x, f in inside if (e := misfit(x, f, k.lstrip(".")))), "")


_KINDS = {
    dict: "an object", list: "a list", str: "text", int: "an int", float: "a float",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def of_later(record: Mapping[str, Any], format_: int) -> str:
    """What to install for a record of a later format than `format_`; or ''."""
    number, version = record.get("format"), record.get("flora")
    if not isinstance(number, int) or number is True or number <= format_:
        return ""
    known = f"format {format_}" if format_ == 1 else f"formats 1 to {format_}"
    return (
        f"was written by flora {version} in format {number}; flora {__version__} reads "
        f"{known}. {install(version)}"
    )


def install(version: Any) -> str:
    """How to get the version that a file names."""
    plain = r"\d{1,4}(\.\w{1,9}){0,4}"
    if not isinstance(version, str) or not re.fullmatch(plain, version):
        return "Install the latest: pip install -U flora-jax."
    return f"Install that version: pip install 'flora-jax>={version}'."
