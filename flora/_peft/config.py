"""adapter_config.json: the fields that change the computation; ranks by pattern."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flora._peft.file import CONFIG, WRAPPERS, read_json
from flora._peft.ignored import Ignored
from flora._peft.regex import Invalid, Patterns, Regex, Steps, is_plain
from flora._tree.errors import LoraError, fail

Names = str | frozenset[str]

# Fields that say nothing about how the adapter computes.
_METADATA = {
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "use_qalora",  # PEFT obeys it in layers of GPTQ alone, where A is smaller
    "revision",
    "runtime_config",
    "task_type",
}
# Fields of which flora knows only the value that switches them off.
_OFF = {
    "arrow_config": "routing between adapters (Arrow). Load the experts one by one, "
    "and mix them with flora.multi",
    "megatron_config": "Megatron layers. Save the adapter from a model without them",
    "monteclora_config": "training with sampled factors (MonteCLoRA). To run or merge "
    "the adapter, which is then plain LoRA, write ignore=('monteclora_config', "
    "'*lora_monteclora_sampler*')",
    "velora_config": "gradients by compressed activations (VeLoRA). To run or merge "
    "the adapter, which is then plain LoRA, write ignore=('velora_config', "
    "'*lora_velora_embed*')",
}
# What saving writes again.
ABOUT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "layer_replication",
)
# Fields that are off without a value.
_KINDS = (
    "alora_invocation_tokens",
    "kasa_config",
    "layer_replication",
    "trainable_token_indices",
    "use_bdlora",
)
# How A and B started where that left the base as it was.
_PLAIN_STARTS = (True, False, "true", "gaussian", "eva", "orthogonal", "mica")
# Ways to start that took BA out of the base and can be repeated.
RESIDUAL_STARTS = ("pissa", "olora")
# Tasks of models that end in something else than words.
WORDLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says, by the names that PEFT gives it."""

    r: int
    lora_alpha: float
    target_modules: Names | None = None
    exclude_modules: Names = frozenset()
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    bias: str = "none"
    init_lora_weights: Any = True
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    alora_invocation_tokens: tuple[int, ...] = ()
    layer_replication: tuple[list[int], ...] = ()
    use_bdlora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kasa_config: Mapping[str, Any] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, list[int]] = ()
    task_type: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gives_words(self) -> bool:
        """Whether the base is known to end in a product with a vocabulary."""
        name = str((self.auto_mapping or {}).get("base_model_class"))
        ends = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM")
        return self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or name.endswith(ends)

    @property
    def gives_none(self) -> bool:
        """Whether the base is known to end in anything else."""
        name = str((self.auto_mapping or {}).get("base_model_class"))
        heads = ("Classification", "QuestionAnswering", "Regression", "Model")
        words = ("LMHead", "DoubleHeads", "EncoderDecoder")
        plain = name.endswith(heads) and not any(word in name for word in words)
        return not self.gives_words and (self.task_type in WORDLESS or plain)

    @functools.cached_property
    def _steps(self) -> Steps:
        return Steps()

    @functools.cached_property
    def _regexes(self) -> dict[tuple[str, str], Regex]:
        return {}

    def regex(self, field: str, entry: str) -> Regex:
        """An entry of a field, compiled with what PEFT writes around it."""
        if (field, entry) not in self._regexes:
            made = _regex(field, entry, self._steps)
            self._regexes[field, entry] = made
        return self._regexes[field, entry]

    @functools.cached_property
    def ranks(self) -> Patterns:
        """The keys of `rank_pattern`."""
        return Patterns("rank_pattern", self.rank_pattern, self._steps)

    @functools.cached_property
    def alphas(self) -> Patterns:
        """The keys of `alpha_pattern`."""
        return Patterns("alpha_pattern", self.alpha_pattern, self._steps)

    @functools.cached_property
    def _saved(self) -> Patterns:
        plain = filter(is_plain, self.modules_to_save)
        return Patterns("modules_to_save", plain, self._steps)

    def saves(self, module: str) -> bool:
        """Whether PEFT trains it whole, or a module that it lies in."""
        words = module.split(".")
        around = (".".join(words[: i + 1]) for i in range(len(words)))
        return any(map(self._saved.all, around)) or any(
            self.regex("modules_to_save", entry).match(module)
            for entry in self.modules_to_save
            if not is_plain(entry)
        )

    def rank(self, module: str) -> int:
        """The rank of one module."""
        key = self.ranks.first(module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """The alpha of one module."""
        key = self.alphas.first(module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def pattern_problems(self, modules: Iterable[str]) -> Iterator[str]:
        """Ranks and alphas of patterns that decide for a module and are none."""
        for module in modules:
            for field, wanted, found, key in (
                ("rank_pattern", "r", self.rank(module), self.ranks.first(module)),
                (
                    "alpha_pattern",
                    "lora_alpha",
                    self.alpha(module),
                    self.alphas.first(module),
                ),
            ):
                good, what = _CHECKS[wanted]
                if not good(found):
                    yield (
                        f"{field} has {found!r} at {key!r}, which decides for "
                        f"'{module}'; expected {what}. Correct it."
                    )

    def scale(self, module: str) -> float:
        """alpha/r or alpha/√r of one module."""
        r = self.rank(module)
        return self.alpha(module) / (math.sqrt(r) if self.use_rslora else r)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of a module's weight that train; `None` if it is not named."""
        given = self.trainable_token_indices
        if not isinstance(given, Mapping):
            return tuple(given) or None
        held = [rows for name, rows in given.items() if module.endswith(name)]
        return tuple(held[0]) if held else None

    def diagonal_of(self, module: str) -> tuple[str, int]:
        """Which factor has blocks on its diagonal: 'a', 'b', 'both' or ''; how many."""
        given = self.use_bdlora
        sides = [
            side
            for side in "ab"
            if any(
                part in module for part in given.get(f"target_modules_bd_{side}", ())
            )
        ]
        side = "both" if len(sides) > 1 else "".join(sides)
        return side, given.get("nblocks", 1)

    @property
    def residual(self) -> str:
        """How the base was changed as the adapter started, or ''."""
        start = self.init_lora_weights
        start = start.lower() if isinstance(start, str) else ""
        return start if start in RESIDUAL_STARTS else ""


_AROUND = {
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"({})\.",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}


def _regex(field: str, entry: str, steps: Steps | None = None) -> Regex:
    text = _AROUND.get(field, "{}").replace("{}", entry)
    return Regex(text, f"{field} {entry!r}", steps)


def read(folder: Path, ignored: Ignored, *, started: bool = False) -> PeftConfig:
    """The config of a directory, checked, without the entries that are ignored."""
    raw = read_json(folder)
    kept = {k: v for k, v in raw.items() if k == "peft_type" or not ignored(k, v)}
    plain = {k: _unwrapped(v) for k, v in kept.items() if k in _NAMED}
    return parse(kept | plain, folder / CONFIG, started=started)


_NAMED = (
    *_AROUND,
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
)


def _unwrapped(names: Any) -> Any:
    """Names as those of the keys, without what was put around modules."""
    if isinstance(names, str):
        return WRAPPERS.sub("", names)
    if isinstance(names, list):
        return [_unwrapped(x) for x in names]
    if isinstance(names, dict):
        return {_unwrapped(k): _unwrapped(v) for k, v in names.items()}
    return names


def parse(raw: Mapping[str, Any], path: Path, *, started: bool = False) -> PeftConfig:
    """A config from its JSON object, checked.

    Args:
      raw: the object.
      path: of the file.
      started: whether it is known what the start took out of the base.
    """
    kind = raw.get("peft_type")
    if kind == "TRAINABLE_TOKENS":
        raw, kind = _of_tokens(raw), "LORA"
    if kind != "LORA":
        raise LoraError(f"{path}: {_kind_problem(kind)}")
    raw = {k: None if v is False and k in _KINDS else v for k, v in raw.items()}
    fail(f"{path}: {problem}" for problem in _problems(raw, started))
    names = {field.name for field in dataclasses.fields(PeftConfig)}
    given = {k: v for k, v in raw.items() if k in names and v is not None}
    given |= {k: bool(v) for k, v in given.items() if _CHECKS.get(k) is _FLAG}
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(given.get(name), int | str):
            given[name] = [given[name]] if given[name] != "" else []
    sets = ("target_modules", "exclude_modules", "layers_to_transform")
    given |= {
        k: frozenset(v) for k, v in given.items() if k in sets and isinstance(v, list)
    }
    given |= {k: tuple(v) for k, v in given.items() if isinstance(v, list)}
    given["about"] = {k: raw[k] for k in ABOUT if raw.get(k) is not None}
    if "use_bdlora" in given:
        parts = {k: v for k, v in given["use_bdlora"].items() if v is not None}
        given["use_bdlora"] = {"nblocks": 1, "match_strict": True} | parts
    return PeftConfig(**given)


def _of_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    """As LoRA's config would say it: trained rows and no adapted module."""
    kept = {k: v for k, v in raw.items() if k not in _TOKENS_ALONE}
    return kept | {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "trainable_token_indices": raw.get("token_indices"),
    }


_TOKENS_ALONE = ("token_indices", "target_modules", "init_weights")


def _kind_problem(kind: Any) -> str:
    if isinstance(kind, str) and kind.upper() == "LORA":
        return f"peft_type is {kind!r}; expected 'LORA' in capitals. Correct it."
    if kind is None:
        return (
            "peft_type is missing; expected 'LORA'. Is this the config of an adapter? "
            "Write it in if the adapter is one of LoRA."
        )
    return (
        f"peft_type is {kind!r}; expected 'LORA': flora reads no other kind of "
        "adapter. Merge it in PEFT and load the merged weights."
    )


def _problems(raw: Mapping[str, Any], started: bool) -> Iterator[str]:
    for name, (good, wanted) in _CHECKS.items():
        if name not in raw:
            if name in ("r", "lora_alpha"):
                yield (
                    f"{name} is missing; expected {wanted}. PEFT would take 8. Write "
                    "the value that the adapter was trained with."
                )
        elif not good(raw[name]):
            yield f"{name} is {raw[name]!r}; expected {wanted}. Correct it."
    fields = ("target_modules", "target_parameters", "trainable_token_indices")
    if not any(map(raw.get, fields)):
        yield (
            "target_modules and target_parameters are both empty; expected the names "
            "of the adapted modules. Write them in."
        )
    yield from _kind_problems(raw)
    if raw.get("lora_bias") is True and raw.get("use_dora") is True:
        yield (
            "lora_bias and use_dora are both true, and PEFT has no such adapter. Write "
            "false for the one that the file has no tensors of."
        )
    yield from _regex_problems(raw)
    yield from _start_problems(raw.get("init_lora_weights", True), started)
    known = {field.name for field in dataclasses.fields(PeftConfig)} | _METADATA
    for name, value in raw.items():
        if name in _OFF and value:
            yield f"{name} is {value!r}; expected it off: flora has no {_OFF[name]}."
        elif name not in known and name not in _OFF and not _is_inert(value):
            yield (
                f"{name} is {value!r}, a field that flora does not know and that may "
                f"change the computation. If it does not, write ignore={name!r}."
            )


def _is_inert(value: Any) -> bool:
    """Whether a field of another version of PEFT's is off."""
    if isinstance(value, dict):
        return all(map(_is_inert, value.values()))
    return not value or (isinstance(value, str) and value.lower() in ("none", "false"))


def _kind_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Kinds of adapters of which PEFT has one at a time."""
    low = raw.get("init_lora_weights")
    kinds = ("use_dora", "use_bdlora", "alora_invocation_tokens", "kasa_config")
    some = [kind for kind in kinds if raw.get(kind)]
    some += ["init_lora_weights 'mica'"] * (low == "mica")
    if len(some) > 1:
        yield (
            f"{' and '.join(some)} are on together, and PEFT has no such adapter. "
            "Correct what is not so."
        )
    plain = low in _PLAIN_STARTS or low is None
    for kind in ("use_bdlora", "kasa_config"):
        if raw.get(kind) and not plain:
            yield (
                f"{kind} is on and init_lora_weights is {low!r}, which flora does not "
                "have together. Merge the adapter in PEFT, or train one without."
            )


def _regex_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    for field in ("target_modules", "exclude_modules", *_AROUND):
        given = raw.get(field)
        good = field not in _CHECKS or _CHECKS[field][0](given)
        alone = isinstance(given, str) and given != ""
        if not given or not good or (field.endswith("t_modules") and not alone):
            continue
        for entry in [given] if isinstance(given, str) else given:
            if is_plain(entry):
                continue
            try:
                _regex(field, entry)
            except Invalid as error:
                yield (
                    f"{field} has {entry!r}, which is no regular expression, or none "
                    f"that flora matches: {error}. Correct it, or write the names."
                )


def _start_problems(start: Any, started: bool) -> Iterator[str]:
    low = start.lower() if isinstance(start, str) else start
    if low in _PLAIN_STARTS or low in RESIDUAL_STARTS or low is None:
        return
    if low == "loftq":
        yield (
            "init_lora_weights is 'loftq': the base was quantized as the adapter "
            "started. Pass that base, dequantized, as the tree (in PEFT, what "
            "get_base_model() holds), and write init_lora_weights: true."
        )
        return
    changed = ("pissa_niter_", "corda", "lora_ga")
    if isinstance(low, str) and low.startswith(changed):
        if not started:
            yield (
                f"init_lora_weights is {start!r}: the base was changed as the adapter "
                "started, in a way that cannot be repeated from the base alone. Pass "
                "start=, the directory that PEFT saved before training, or save it as "
                "plain LoRA in PEFT: save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...). If the tree is the "
                "changed base, write init_lora_weights: true."
            )
        return
    yield (
        f"init_lora_weights is {start!r}; expected true, false, "
        f"{', '.join(repr(s) for s in (*_PLAIN_STARTS[3:], *RESIDUAL_STARTS))}. Write "
        "true if the base is as it was."
    )


def _is_number(x: Any) -> bool:
    """Whether float32 holds it."""
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and abs(x) <= 3.4e38


def _is_alpha(x: Any) -> bool:
    return _is_number(x) and (x == 0 or abs(x) > 1e-38)


def _is_rank(x: Any) -> bool:
    return _is_index(x) and x > 0


def _is_index(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**31


def _is_any_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_row(x: Any) -> bool:
    return _is_index(x) and x >= 0


def _are_rows(x: Any) -> bool:
    return _list_of(_is_row)(x) and len({*x}) == len(x)


def _is_span(x: Any) -> bool:
    return _list_of(_is_row)(x) and len(x) == 2 and x[0] < x[1]


def _is_bdlora(x: Any) -> bool:
    if x is None:
        return True
    names = ("target_modules_bd_a", "target_modules_bd_b")
    return (
        isinstance(x, dict)
        and {*x} <= {*names, "nblocks", "match_strict"}
        and all(_optional(_list_of(_is_name))(x.get(name)) for name in names)
        and _is_rank(x.get("nblocks", 1))
        and isinstance(x.get("match_strict", True), bool)
    )


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and len(x) <= _MOST and all(map(good, x))


def _dict_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: (
        x is None
        or (
            isinstance(x, dict)
            and len(x) <= _MOST
            and all(map(_is_name, x))
            and all(map(good, x.values()))
        )
    )


_MOST = 100_000  # entries of one field


def _is_name(x: Any) -> bool:
    return isinstance(x, str) and x != "" and x.isprintable()


def _is_flag(x: Any) -> bool:
    return x is None or x in (0, 1)  # `True == 1`


def _optional(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or any(good(x) for good in kinds)


_NAMES = _list_of(_is_name)
_FLAG = (_is_flag, "true or false")
_ALPHA = "a finite number"
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an int of at least 1"),
    "lora_alpha": (_is_alpha, _ALPHA),
    "target_modules": (_optional(_NAMES, _is_name), "a list of names or one regex"),
    "exclude_modules": (_optional(_NAMES, _is_name), "a list of names or one regex"),
    "target_parameters": (_optional(_NAMES), "a list of names"),
    "rank_pattern": (_dict_of(_is_index), "an object {regex: int of at least 1}"),
    "alpha_pattern": (_dict_of(_is_any_number), "an object {regex: finite number}"),
    "modules_to_save": (_optional(_NAMES), "a list of names"),
    "layers_to_transform": (
        _optional(_is_index, _list_of(_is_index)),
        "an index or a list of them",
    ),
    "layers_pattern": (
        _optional(_NAMES, _is_name, lambda x: isinstance(x, str) and x == ""),
        "a name or a list of names",
    ),
    "lora_dropout": (
        lambda x: _is_number(x) and 0 <= x < 1,
        "a number of at least 0 and below 1",
    ),
    "bias": (
        lambda x: x in ("none", "all", "lora_only"),
        "'none', 'all' or 'lora_only'",
    ),
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "layer_replication": (
        _optional(_list_of(_is_span)),
        "a list of pairs, the first layer of each range and the one behind its last",
    ),
    "use_bdlora": (_is_bdlora, "an object with nblocks of at least 1 and lists"),
    "kasa_config": (_optional(lambda x: isinstance(x, dict)), "an object"),
    "alora_invocation_tokens": (
        _optional(_list_of(_is_row)),
        "a list of indices from 0",
    ),
    "trainable_token_indices": (
        _optional(_are_rows, _dict_of(_are_rows)),
        "a list of different indices from 0, or an object {module: list}",
    ),
    "auto_mapping": (_optional(lambda x: isinstance(x, dict)), "an object"),
}
