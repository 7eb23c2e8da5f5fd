"""The keys of adapter_model.safetensors: the module and the role of each tensor."""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flora._peft.config import PeftConfig
from flora._peft.file import WEIGHTS, WRAPPERS
from flora._peft.kinds.twice import IN, OUT
from flora._tree.errors import LoraError, fail

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MAGNITUDE, _BIAS = ".lora_magnitude_vector", ".lora_B.bias"
# What each suffix is; PEFT wrote magnitudes both ways.
_PARTS = {
    _A: "a",
    _B: "b",
    _EMBEDDING_A: "a",
    _EMBEDDING_B: "b",
    _MAGNITUDE: "magnitude",
    f"{_MAGNITUDE}.weight": "magnitude",
    _BIAS: "bias",
    ".lora_diag": "diag",
}
_BASE = ".base_layer"
# The name of an adapter, which files do not have and states of a whole model do.
_NAMED = re.compile(
    r"\.(lora_[AB])\.(?!lora_[AB]\.|base_layer\.)([^.]+)\.(weight|bias)$"
    r"|\.(lora_embedding_[AB]|lora_magnitude_vector|lora_diag|trainable_tokens_delta)"
    r"\.(?!weight$|lora_[AB]\.)([^.]+)(?:\.weight)?$"
)
TOKENS = "trainable_tokens_delta"  # which are the new rows
_WRAPPER = ".token_adapter"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The tensors of one adapted module, as the file has them.

    Attributes:
      module: its path; for a raw parameter that of the module that owns it.
      a: A, `[r, in]`, `[r, in, *window]`, for experts `[r·E, in]`, for an embedding
        `[r, V]`.
      b: B, `[out, r]`, `[out, r/groups, 1, ...]`, `[out, r·E]` or `[D, r]`.
      magnitude: of DoRA, `[out]` or `[1, out, 1, ...]`.
      bias: added to B's output, `[out]`.
      depth: how many adapters of other parameters of the module lie outside of it.
      parameter: the parameter's name.
      raw: whether `target_parameters` selected it.
      inner: whether it lies in a module that is adapted itself, `out_proj` in an
        `nn.MultiheadAttention`.
      dtype: of A in the file.
      diag: of KaSA, between A and B, `[r]`.
      diagonal: of BD-LoRA, which factor has blocks on its diagonal, 'a' or 'b', and
        how many.
    """

    module: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    kind: str = "linear"
    depth: int = 0
    parameter: str = "weight"
    raw: bool = False
    inner: bool = False
    dtype: str = ""
    diag: np.ndarray | None = None
    diagonal: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """The name of the parameter that it adapts."""
        return f"{self.module}.{self.parameter}"

    @property
    def site(self) -> str:
        """The name that rank and alpha patterns are matched against."""
        if self.inner:  # it has the rank and alpha of what it lies in
            return self.module.rpartition(".")[0]
        return self.name if self.raw else self.module

    @property
    def words(self) -> list[str]:
        """The parameters that it may be of, as long as nothing decides."""
        return self.parameter.split("|")

    def key(self, part: str) -> str:
        """The tensor's key in the file."""
        ends = {v: k for k, v in reversed(_PARTS.items())}
        if self.kind == "embedding":
            ends |= {"a": _EMBEDDING_A, "b": _EMBEDDING_B}
        return f"{self._owner}{_BASE * self.depth}{ends[part]}"

    def key_of_base(self, parameter: str) -> str:
        """The key of a parameter of the module itself."""
        return f"{self._owner}{_BASE}.{parameter}"

    @property
    def _owner(self) -> str:
        outer, _, last = self.module.rpartition(".")
        return f"{PREFIX}{outer}{_BASE}.{last}" if self.inner else PREFIX + self.module


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds: adapters by module, and whole parameters by name.

    Attributes:
      loras: the adapters.
      whole: the parameters that train whole.
      of_base: those that the base has too.
      tokens: by module, the rows of its weight that train.
    """

    loras: tuple[Lora, ...]
    whole: Mapping[str, np.ndarray]
    of_base: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def plain_keys(tensors: Mapping[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """The tensors by the keys that PEFT's `save_pretrained` gives them.

    States of a model that is compiled, sharded or not taken out of its `PeftModel` have
    more in them, and those of a model that PEFT was injected into have no prefix.
    """
    bare = not any(PREFIX in key for key in tensors)
    found = [(key, _NAMED.search(key)) for key in tensors]
    names = {named[2] or named[5] for _, named in found if named}
    if len(names) > 1:
        raise LoraError(
            f"{file}: holds the adapters {', '.join(map(repr, sorted(names)))}; "
            "expected one. Write ignore= for those to leave out, such as "
            f"ignore='*.{max(names)}*', or save each with PEFT's save_pretrained."
        )
    name = max(names, default="")

    def plain(key: str, named: re.Match[str] | None) -> str:
        if named is not None:
            end = f"{named[1]}.{named[3]}" if named[1] else named[4]
            key = f"{key[: named.start()]}.{end}"
        elif name:
            key = key.replace(f".modules_to_save.{name}.", ".")
        key = WRAPPERS.sub("", key).removeprefix("module.")
        while key.startswith(2 * PREFIX):
            key = key.removeprefix(PREFIX)
        return PREFIX + key if bare else key

    keys = {key: plain(key, named) for key, named in found}
    counts = collections.Counter(keys.values())
    fail(
        f"{file}: '{key}' and another key are both '{plain}'. Save the adapter with "
        "PEFT's save_pretrained."
        for key, plain in keys.items()
        if counts[plain] > 1 and key != plain
    )
    return {keys[key]: x for key, x in tensors.items()}


def sort_out(
    tensors: Mapping[str, np.ndarray], config: PeftConfig, folder: Path
) -> Content:
    """The content of a file, checked against its config but for names."""
    file = folder / WEIGHTS
    tensors = plain_keys(tensors, file)
    fail(p for key, x in tensors.items() for p in _tensor_problems(file, key, x))
    groups: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    whole, of_base, tokens = {}, {}, {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(f".{TOKENS}"):
            if x.size:
                owner = name.removesuffix(f".{TOKENS}").removesuffix(_WRAPPER)
                tokens[owner] = x
            continue
        name = name.replace(f"{_WRAPPER}.", ".")
        suffix = next((s for s in sorted(_PARTS, key=len) if name.endswith(s)), None)
        if suffix is None:
            (of_base if f"{_BASE}." in name else whole)[name] = x
            continue
        # Of an embedding if its factors are, whatever its magnitude is called.
        owner, embedding = name.removesuffix(suffix), suffix.startswith(".lora_emb")
        embedding |= f"{PREFIX}{owner}{_EMBEDDING_A}" in tensors
        groups.setdefault((owner, embedding), {})[_PARTS[suffix]] = x
    if not groups and not tokens:
        raise LoraError(
            f"{file}: has {len(tensors)} tensors, such as '{min(tensors)}', and none "
            f"of an adapter; expected '….lora_A.weight' and '….lora_B.weight'. Save "
            "the adapter with PEFT's save_pretrained; weights of a whole model are for "
            "flora.hf.load."
        )
    fail(
        f"{file}: '{PREFIX}{owner}' has {', '.join(sorted(parts))} but no "
        f"{' and no '.join(sorted({'a', 'b'} - {*parts}))}; expected both "
        f"'{_EMBEDDING_A if emb else _A}' and '{_EMBEDDING_B if emb else _B}'. Save "
        "the adapter anew."
        for (owner, emb), parts in groups.items()
        if not {"a", "b"} <= {*parts}
    )
    loras = _with_attention([_lora(*owner, x) for owner, x in groups.items()], file)
    fail(p for lora in loras for p in _flag_problems(file, lora, config))
    for name in [n for n in of_base if n.endswith(f"{_BASE}.bias")]:
        whole[name] = of_base.pop(name)
    return Content(loras, _without_copies(whole), of_base, tokens)


def _with_attention(loras: Sequence[Lora], file: Path) -> tuple[Lora, ...]:
    """Those of an `nn.MultiheadAttention` by the name of its parameter."""
    outer = {x.site for x in loras if x.inner}
    fail(
        f"{file}: '{x.key('a')}' lies in '{x.site}', but {what}. PEFT has that in "
        f"nn.MultiheadAttention alone, of which it adapts all. Save the adapter anew."
        for x in loras
        if x.inner
        for what in (
            *([f"is no '{OUT}'"] if not x.module.endswith(f".{OUT}") else []),
            *(
                [f"'{PREFIX}{x.site}{_A}' is missing"]
                if not any(y.module == x.site for y in loras)
                else []
            ),
        )
    )
    return tuple(
        dataclasses.replace(x, parameter=IN) if x.module in outer else x for x in loras
    )


def _without_copies(whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters, but for the second and third copy of a bias that trains whole.

    With `bias='all'`, PEFT writes the biases of `modules_to_save` under three names.
    """
    kept = {}
    for name, x in whole.items():
        if (
            ".original_module." in name
            and name.replace(".original_module", "") in whole
        ):
            continue  # what it was before
        plain = name.replace(".modules_to_save.", ".")
        if plain == name or not np.array_equal(whole.get(plain, x), x):
            kept[name] = x
        else:
            kept[plain] = x
    return kept


def _tensor_problems(file: Path, key: str, x: np.ndarray) -> Iterator[str]:
    if not key.startswith(PREFIX):
        yield (
            f"{file}: '{key}' does not start with '{PREFIX}', as every key of PEFT's "
            "does. Save the adapter with PEFT's save_pretrained."
        )
    elif not x.size and not key.endswith(f".{TOKENS}"):
        yield f"{file}: '{key}' has shape {x.shape}, no elements. Save it anew."


def _lora(owner: str, embedding: bool, parts: Mapping[str, np.ndarray]) -> Lora:
    module = owner
    while module.endswith(_BASE):
        module = module.removesuffix(_BASE)
    depth = (len(owner) - len(module)) // len(_BASE)
    inner = f"{_BASE}." in module  # of nn.MultiheadAttention
    module = module.replace(f"{_BASE}.", ".")
    kind = "embedding" if embedding else "linear" if parts["a"].ndim == 2 else "conv"
    known = (parts["a"], parts["b"], parts.get("magnitude"), parts.get("bias"))
    dtype = str(parts["a"].dtype)
    lora = Lora(module, *known, kind=kind, depth=depth, inner=inner, dtype=dtype)
    return dataclasses.replace(lora, diag=parts.get("diag"))


def _flag_problems(file: Path, lora: Lora, config: PeftConfig) -> Iterator[str]:
    if not lora.a.ndim == lora.b.ndim >= 2:
        yield (
            f"{file}: '{lora.key('a')}' has shape {lora.a.shape} and '{lora.key('b')}' "
            f"{lora.b.shape}; expected as many axes each, at least 2. Save it anew."
        )
    if (lora.diag is not None) != (config.kasa_config is not None):
        there = "is there" if config.kasa_config is None else "is missing"
        yield (
            f"{file}: '{lora.key('diag')}' {there}, and the config has kasa_config "
            f"{config.kasa_config}; expected both or none. Save the adapter anew."
        )
    elif lora.diag is not None and lora.diag.shape != lora.a.shape[:1]:
        yield (
            f"{file}: '{lora.key('diag')}' has shape {lora.diag.shape}; expected "
            f"{lora.a.shape[:1]}, one value a rank. Save it anew."
        )
    bias, outs = lora.bias, lora.b.shape[:1]
    if bias is not None and bias.shape != outs:
        yield (
            f"{file}: '{lora.key('bias')}' has shape {bias.shape}; expected {outs}, "
            f"one value for each row of '{lora.key('b')}'. Save it anew."
        )
    for part, flag in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        has, wants = getattr(lora, part) is not None, getattr(config, flag)
        if has and not wants:
            yield (
                f"{file}: '{lora.key(part)}' is there, but the config has {flag} "
                f"false; expected none. PEFT would ignore it. Write {flag}: true if "
                "the adapter was trained so."
            )
        elif wants and not has:
            yield (
                f"{file}: '{lora.key(part)}' is missing; the config has {flag} true. "
                f"PEFT would make one up. Write {flag}: false if the adapter was "
                "trained so, or save it anew."
            )
