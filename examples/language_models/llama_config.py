"""What config.json says of a decoder of the Llama family, and what of it is refused."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora import LoraError

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What the decoder is; names are those of config.json.

    `rope` holds the settings of `rope_scaling` as sorted pairs, so that it hashes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: tuple[tuple[str, Any], ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_hf(cls, given: Mapping[str, Any]) -> "LlamaConfig":
        """The config of a parsed config.json.

        Raises:
          LoraError: it asks for something that this decoder does not do.
        """
        kind = given.get("model_type")
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        rope = dict(rope) if isinstance(rope, dict) else {"rope_type": rope}
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", given.get("rope_theta", 10000.0))
        problems = [
            *_refused(given, kind, rope_type),
            *_size_problems(given),
            *_number_problems({**rope, "rope_theta": theta}, given, rope_type),
        ]
        if problems:
            raise LoraError("config.json: " + " ".join(problems))
        heads, bias = given["num_attention_heads"], given.get("attention_bias") or False
        window = given.get("sliding_window") if kind == "mistral" else None
        return cls(
            **{k: given[k] for k in _SIZES},
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope=tuple(sorted(rope.items())) if rope_type != "default" else (),
            tie_word_embeddings=given.get("tie_word_embeddings") or False,
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias and kind != "qwen2",
            mlp_bias=given.get("mlp_bias") or False,
            qk_norm=kind == "qwen3",
            sliding_window=window,
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


# No decoder of today comes near: a size of more is a mistake, or meant to fill memory.
_MOST = {"num_hidden_layers": 10_000, "num_attention_heads": 100_000}


def _size_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that are none, or that do not fit each other."""
    optional = ("num_key_value_heads", "head_dim", "sliding_window")
    sizes = {k: given[k] for k in _SIZES if k in given}
    sizes |= {k: x for k in optional if (x := given.get(k)) is not None}
    bad = {
        k: x
        for k, x in sizes.items()
        if type(x) is not int or not 0 < x <= _MOST.get(k, 2**31 - 1)
    }
    yield from (f"{k}={x!r}; expected an int of 1 or more." for k, x in bad.items())
    if bad or len(sizes) < len(_SIZES):
        return
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    groups, width = sizes.get("num_key_value_heads", heads), sizes.get("head_dim")
    if heads % groups:
        yield f"num_attention_heads={heads} is no multiple of {groups} key-value heads."
    if width is None and hidden % heads:
        yield f"hidden_size={hidden} is no multiple of num_attention_heads={heads}."
    elif (width or hidden // heads) % 2:
        yield f"head_dim={width or hidden // heads}; rotary positions need an even one."


def _number_problems(
    rope: Mapping[str, Any], given: Mapping[str, Any], rope_type: Any
) -> Iterator[str]:
    """Numbers of the norms and of the rotary positions."""
    numbers = {"rms_norm_eps": given.get("rms_norm_eps", 1e-6)}
    numbers |= {"rope_theta": rope["rope_theta"]}
    more = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if rope_type in ("linear", "llama3"):
        names = ("factor", *(more if rope_type == "llama3" else ()))
        numbers |= {name: rope.get(name) for name in names}
    for name, x in numbers.items():
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if not number or not 0 < x < 3.4e38:
            yield f"{name}={x!r}; expected a number above 0."
            return
    if rope_type == "llama3" and not rope[more[0]] < rope[more[1]]:
        yield f"low_freq_factor={rope[more[0]]} is not below high_freq_factor."
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(given.get(name, False), bool | None):
            yield f"{name}={given[name]!r}; expected true or false."


def _refused(given: Mapping[str, Any], kind: Any, rope_type: Any) -> Iterator[str]:
    if kind not in FAMILY:
        yield f"model_type={kind!r}; this decoder is one of {', '.join(FAMILY)}."
    if missing := [k for k in _SIZES if k not in given]:
        yield f"{', '.join(missing)} missing."
    if not isinstance(rope_type, str) or rope_type not in ROPES:
        yield f"rope type {rope_type!r}; this decoder has {', '.join(ROPES)}."
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act={given['hidden_act']!r}; this decoder has 'silu'."
    if given.get("partial_rotary_factor", 1) != 1:
        yield "partial_rotary_factor; this decoder turns whole heads."
    if kind in ("qwen2", "qwen3") and given.get("use_sliding_window"):
        yield "use_sliding_window; this decoder has windows for Mistral alone."
    if given.get("quantization_config"):
        yield "quantization_config; load the unquantized checkpoint."


def frequencies(config: LlamaConfig) -> jax.Array:
    """Of the rotary positions, in radians a token, `[head_dim/2]`."""
    half = jnp.arange(config.head_dim // 2, dtype=jnp.float32)
    plain = config.rope_theta ** (-2 * half / config.head_dim)
    rope = dict(config.rope)
    if not rope:
        return plain
    slow = plain / rope["factor"]
    if "low_freq_factor" not in rope:  # linear
        return slow
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * slow + share * plain
