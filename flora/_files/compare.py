"""What a checkpoint says of a tree and a state, and where two of them differ."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flora._algebra import variants
from flora._files.fingerprint import fingerprint
from flora._files.items import described
from flora._files.parsed import misfit
from flora._files.records import (
    decoded,
    layout_of,
    record_of,
    record_problem,
    text_of,
)
from flora._tree.errors import LoraTypeError
from flora._tree.layout import Layout
from flora._tree.paths import Pattern, exactly, named_leaves
from flora._tree.version import __version__

FORMAT = 2
FORMATS = (1, FORMAT)


def description(
    adapted: Any, items: Mapping[str, Any], also: Pattern
) -> dict[str, Any]:
    """What is said of a tree and of an optimizer's state, their values apart."""
    arrays = {item: described(leaves) for item, leaves in items.items()}
    leaves = {p: record_of(p, x, also) for p, x in named_leaves(adapted)[0]}
    return {
        "format": FORMAT,
        "flora": __version__,
        "leaves": {p: x for p, x in leaves.items() if x["kind"] != "frozen"},
        "state": arrays.pop("state", None),
        "arrays": arrays,
    }


def json_of(metadata: Any) -> Any:
    """The metadata as JSON gives it back."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise LoraTypeError(
            f"save: metadata={metadata!r} is not for JSON: {error}. Write dicts, "
            "lists, strings, numbers, bools and None."
        ) from error


def record_problems(record: Any) -> str:
    """What keeps a checkpoint's record from being read, whoever wrote it; or ''."""
    if wrong := misfit(record, _RECORD):
        return wrong
    if record["format"] not in FORMATS:
        return f"its format is {record['format']}"
    if record["format"] == 1:
        return _problem_of_format_1(record["leaves"])
    values = {"values": {str: {str: str}}} if "values" in record else {}
    if wrong := misfit(record, _RECORD_2 | values):
        return wrong
    arrays, leaves = record["arrays"], record["leaves"]
    if wrong := next((e for p, x in leaves.items() if (e := record_problem(p, x))), ""):
        return wrong
    for path, x in leaves.items():
        lora = x["kind"] == "lora"
        wanted = [("a", path), ("b", path)] if lora else [("whole", path)]
        wanted += [("extra", f"{path}/{name}") for name in x.get("extra", ())]
        if any(path not in arrays[item] for item, path in wanted):
            return f"it does not say what the arrays of '{path}' are"
    return ""


_RECORD = {
    "format": int, "flora": str, "leaves": {str: dict}, "base": {str: str},
    "state": ({str: str}, type(None)), "metadata": object,
}  # fmt: skip
_RECORD_2 = {"arrays": {k: {str: str} for k in ("a", "b", "extra", "whole")}}


def _problem_of_format_1(leaves: Mapping[str, Any]) -> str:
    for path, x in leaves.items():
        try:
            _of_format_1({path: x})
        except (TypeError, ValueError, AttributeError):
            return f"leaves.{path}.layout is {x['layout']!r}"
        if "rank" in x and misfit(x, {"a": str, "b": str, "alpha": (int, float)}):
            return f"leaves.{path} is {x!r}"
    return ""


def checksum(record: Mapping[str, Any]) -> str:
    """Of all that a record says but this."""
    said = {k: x for k, x in record.items() if k != "sha256"}
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def compared(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{path: {name: value}}` of what has to agree in two trees of one adapter."""
    leaves = description["leaves"]
    if description["format"] == 1:
        return _of_format_1(leaves)
    arrays = description["arrays"]
    return {path: _compared(path, x, arrays) for path, x in leaves.items()}


def _compared(path: str, record: Mapping[str, Any], arrays: Any) -> dict[str, Any]:
    if record["kind"] != "lora":
        return {record["kind"]: arrays["whole"][path]}
    settings = record["settings"]
    found = {
        "layout": layout_of(record),
        "rank": decoded(settings["rank"]),
        "alpha": float(settings["alpha"]),
        "rank_stabilized": settings["rank_stabilized"],
        "a": arrays["a"][path],
        "b": arrays["b"][path],
    }
    if "blocks" in settings:
        found["blocks"] = text_of(settings["blocks"])
    if settings["variant"] is not None:
        extra = {name: arrays["extra"][f"{path}/{name}"] for name in record["extra"]}
        found |= {"variant": text_of(settings["variant"]), "extra": extra}
    return found


def _of_format_1(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same of the first format, which had this itself with layouts as text."""
    return {
        path: x | {"layout": _layout_of_text(x["layout"])} if "layout" in x else x
        for path, x in leaves.items()
    }


def _layout_of_text(text: str) -> Layout:
    """The layout that prints as 'stack=0 in=1,2 out=3'."""
    named = dict(part.split("=") for part in text.split())
    axes = (named.get(name, "") for name in ("stack", "in", "out"))
    return Layout(*(tuple(int(i) for i in x.split(",") if i) for x in axes))


def leaf_problems(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One line for each leaf that the two adapt otherwise, see `compared`."""
    return [
        _leaf_problem(path, saved.get(path, {}), given.get(path, {}))
        for path in _both(saved, given)
        if saved.get(path) != given.get(path)
    ]


def _leaf_problem(path: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old or not new:
        where = "the checkpoint" if old else "the given tree"
        return (
            f"'{path}' is trained in {where} alone ({_fields(old or new)}). Write the "
            "target=, exclude= and train= of LoraConfig, and the also= of "
            "Checkpointer, that it was saved with."
        )
    differ = [k for k in _both(old, new) if old.get(k) != new.get(k)]
    return (
        f"'{path}': the checkpoint has {_fields(old, differ)}; the given tree has "
        f"{_fields(new, differ)}. {_remedy(path, old, new, differ)}"
    )


def _fields(record: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    shown = {k: record[k] for k in names or record if k in record}
    return ", ".join(f"{k}={v}" for k, v in shown.items()) or "none of that"


def _remedy(path: str, old: dict, new: dict, differ: list[str]) -> str:
    """What to write in the config."""
    if "rank" not in old or "rank" not in new:
        return "Write the target= and train= of LoraConfig that it was saved with."
    leaf, settings = exactly(path), []
    if "rank" in differ:
        settings.append(f"rank_pattern={{{leaf!r}: {old['rank']}}}")
    if "alpha" in differ:
        alpha = old["alpha"]
        short = f"{alpha:g}"
        alpha = short if float(short) == alpha else repr(alpha)
        settings.append(f"alpha_pattern={{{leaf!r}: {alpha}}}")
    if "rank_stabilized" in differ:
        settings.append(f"rank_stabilized={old['rank_stabilized']}")
    if "layout" in differ:
        settings.append(
            f"layouts={{{leaf!r}: flora.Layout({_arguments(old['layout'])})}}"
        )
    if "variant" in differ:
        settings.append(f"variant={_variant(old.get('variant'))}")
    dtype, other = (r["a"].partition("[")[0] for r in (old, new))
    if dtype != other:
        settings.append(f"dtype='{dtype}'")
    if settings:
        return f"Write LoraConfig({', '.join(settings)})."
    return "Pass the model that it was trained with."


def _variant(text: str | None) -> str:
    """'DoRA()' as it is written, 'flora.variants.DoRA()'."""
    public = text is not None and hasattr(variants, text.partition("(")[0])
    return f"flora.variants.{text}" if public else str(text)


def _arguments(layout: Layout) -> str:
    """'stack=(0,), in_=(1,2,), out=(3,)'."""
    named = (("stack", layout.stack), ("in_", layout.in_), ("out", layout.out))
    return ", ".join(f"{k}=({','.join(map(str, axes))},)" for k, axes in named if axes)


def base_problems(
    saved: dict[str, str], base: Mapping[str, Any], free: Collection[str]
) -> list[str]:
    """One line for each leaf of a base whose fingerprint is not the saved one.

    Args:
      saved: the fingerprints when it was saved.
      base: the given base.
      free: the leaves without factors, which training may have changed by other means.
    """
    given = fingerprint(base)
    return [
        f"'{path}': the checkpoint was trained on a base of "
        f"{saved.get(path, 'no such leaf')}; the given base has "
        f"{given.get(path, 'no such leaf')}. Load the weights that it was trained on, "
        "or write check_base=False to put it on others."
        + (
            f" If training changed it, save with also={exactly(path)!r}."
            if path in free
            else " If these are the ones, an optimizer without flora.optimizer moved "
            "them while it trained."
        )
        for path in differing(saved, given, base)
    ]


def moved_problems(
    saved: dict[str, str], given: dict[str, str], base: Mapping[str, Any]
) -> list[str]:
    """One line for each leaf of a base that changed since it was saved last."""
    return [
        f"'{path}' is frozen and was {saved.get(path, 'no such leaf')} at the step "
        f"saved before; now it is {given.get(path, 'no such leaf')}, and the adapter "
        "fits that alone. Wrap the optimizer, flora.optimizer(tx, adapted), and apply "
        "its updates with flora.apply_updates; name what training changes without a "
        "gradient in also=; or write check_base=False, after flora.recipes.restart too."
        for path in differing(saved, given, base)
    ]


def differing(
    saved: dict[str, str], given: dict[str, str], base: Mapping[str, Any]
) -> list[str]:
    """The leaves of a base, whose fingerprints are given, that are not the saved ones.

    Older files tell -0.0 from 0.0: there the same bits are the same base, too.
    """
    paths = [p for p in _both(saved, given) if saved.get(p) != given.get(p)]
    exact = fingerprint(base, signed_zeros=True) if paths else {}
    return [p for p in paths if p not in saved or saved[p] != exact.get(p)]


def state_problems(saved: Any, given: Any, step: int) -> list[str]:
    """One line for each leaf of the optimizer's state that is another or not there."""
    if given is None:
        return []
    if saved is None:
        return [
            f"state: step {step} was saved without one. Write restore(adapted), and "
            "tx.init of what it returns."
        ]
    return [
        f"state '{path}': the checkpoint has {saved.get(path, 'no such leaf')}; the "
        f"given state has {given.get(path, 'no such leaf')}. "
        "Pass tx.init(adapted) of the optimizer that it was saved with, or no state."
        for path in _both(saved, given)
        if saved.get(path) != given.get(path)
    ]


def _both(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*one, *other)))


def some(names: Iterable[Any]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(str, names[-10:])) + more
