"""The fields of `LoraConfig` by the names that other libraries give them."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# PEFT's names, and others', of fields that differ in nothing else.
_SAME = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rank_stabilized",
    "lora_dtype": "dtype",
}
# Where to say what the config has no field for.
_ELSEWHERE = {
    "auto_mapping": "leave it out",
    "base_model_name_or_path": "pass it to flora.peft.save",
    "eva_config": "write flora.starts.eva(...)",
    "fan_in_fan_out": "leave it out: layouts are found",
    "inference_mode": "leave it out",
    "layers_pattern": "name the layers in target=, such as 'layers_[0-3]/*/kernel'",
    "layers_to_transform": "name them in target=, such as 'layers_[0-3]/*/kernel'",
    "loftq_config": "write flora.quantize.loftq(...)",
    "lora_ga_config": "write flora.starts.lora_ga(...)",
    "peft_type": "leave it out",
    "revision": "leave it out",
    "task_type": "pass it to flora.peft.save",
}
_STARTS = {
    "gaussian": "init=flora.initializers.by_rank()",
    "orthogonal": "init=flora.initializers.orthogonal()",
    "pissa": "flora.starts.pissa(adapted) after flora.init",
    "olora": "flora.starts.olora(adapted) after flora.init",
    "eva": "flora.starts.eva(...) after flora.init",
    "lora_ga": "flora.starts.lora_ga(...) after flora.init",
    "loftq": "flora.quantize.loftq(...) after flora.init",
}


def unknown_fields(given: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    """One line for each keyword that is no field, with what to write."""
    for name, value in given.items():
        if name not in known:
            remedy = _remedy(name, value, known)
            yield f"LoraConfig has no field {name!r}. {remedy[:1].upper()}{remedy[1:]}."


def _remedy(name: str, value: Any, known: Sequence[str]) -> str:
    if name in _SAME:
        return f"write {_SAME[name]}={_short(value)}"
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in ("target_modules", "target_parameters", "exclude_modules"):
        return _modules("exclude" if name[0] == "e" else "target", value)
    if name in ("modules_to_save", "bias", "lora_bias"):
        return _trained(name, value)
    if name == "use_dora":
        return "write variant=flora.variants.DoRA()" if value else "leave it out"
    if name == "init_lora_weights":
        default = "leave it out: A is Gaussian with PEFT's variance, B zero"
        start = _STARTS.get(value) if isinstance(value, str) else None
        return f"write {start}" if start else default
    near = difflib.get_close_matches(name, known, 1, 0.6)
    closest = f"write {near[0]}={_short(value)}, or " if near else ""
    return f"{closest}take one of {', '.join(known)}"


def _modules(field: str, value: Any) -> str:
    if isinstance(value, str) and value.lower() == "all-linear":
        return f"write {field}=flora.coverage(fn, tree, ...).all_linear"
    names = _names(value)
    if names is None:
        return (
            f"write {field}= with globs of paths, such as 'q_proj/kernel', or "
            "re.compile(...) of whole paths"
        )
    return f"write {field}={[f'{n}/kernel' for n in names]!r}: globs of paths"


def _trained(name: str, value: Any) -> str:
    if name != "modules_to_save":
        off = not value or value == "none"
        return "leave it out" if off else "write train='bias'"
    names = _names(value)
    return f"write train={[f'{n}/*' for n in names or ('head',)]!r}: globs of paths"


def _names(value: Any) -> list[str] | None:
    """A list of modules' names as the ends of paths."""
    several = isinstance(value, list | tuple | set | frozenset)
    names = list(value) if several else [value]
    if not names or not all(
        isinstance(n, str) and n and not {*r"\*+?|()[]^$"} & {*n} for n in names
    ):
        return None
    names = sorted(names) if isinstance(value, set | frozenset) else names
    return [n.replace(".", "/") for n in names]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else "..."
