"""A Llama's GGUF, such as llama.cpp runs, as a folder of Hugging Face's kind.

    from_gguf.convert("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")

Weights are dequantized, to float32.  llama.cpp keeps the two rotary halves of each head
interleaved in q and k, and Hugging Face one after the other: rows are put back.  All
that config.json says comes from the file; what this cannot read is refused by name.
"""

import importlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import flora.hf
from flora import LoraError
from flora.hf import Tensor
from language_models import hf_llama
from language_models.llama_config import LlamaConfig

# HF's names of a layer's parts, and GGUF's.
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_REST = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of tokens

Fields = Mapping[str, Any]


def convert(
    path: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> pathlib.Path:
    """Writes config.json, model.safetensors and the tokenizer; returns the folder.

    config.json comes last: a folder without it is not whole.

    Raises:
      LoraError: the file is no GGUF of a Llama with byte-level pairs, or holds
        something that would be lost; the message says what.
    """
    folder = pathlib.Path(folder)
    fields, tensors = _read(pathlib.Path(path))
    try:
        config = _config(fields, tensors)
        parsed = LlamaConfig.from_hf(config)
        tokenizer, settings = _tokenizer(fields, parsed.vocab_size)
        arrays = _arrays(tensors, parsed)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise LoraError(f"{path}: metadata of the wrong kind: {error!r}.") from error
    flora.hf.save(folder, arrays, {name: Tensor(name) for name in arrays})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, given in (("tokenizer_config", settings), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(given, indent=2))
    return folder


def _read(path: pathlib.Path) -> tuple[Fields, dict[str, Any]]:
    """The metadata, and the tensors as the package has them, by name."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise LoraError("Reading GGUF needs a package: pip install gguf") from error
    if not path.is_file():
        raise LoraError(f"{path} is not there. Pass a .gguf file.")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: x.contents() for name, x in reader.fields.items()}
    except Exception as error:  # of NumPy and others, for a file that is cut off
        raise LoraError(
            f"{path} cannot be read as GGUF: {error}. Download it again."
        ) from error
    return fields, {x.name: x for x in reader.tensors}


def _config(fields: Fields, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise LoraError(f"general.architecture={kind!r}; only 'llama' is read.")

    def of(name: str, *other: Any) -> Any:
        if f"llama.{name}" not in fields and not other:
            raise LoraError(f"llama.{name} is missing. Download the file again.")
        return fields.get(f"llama.{name}", *other)

    if problems := [*_unread(of)]:
        raise LoraError("; ".join(problems) + ". This reader has no such models.")
    heads, width = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", width // heads)
    if (turned := of("rope.dimension_count", head_dim)) != head_dim:
        raise LoraError(
            f"llama.rope.dimension_count={turned} of {head_dim}; whole heads are read."
        )
    eps = of("attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": of("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(str(np.float32(eps))),  # 1e-05, not 9.99999974e-06
        "rope_theta": float(of("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def _unread(of: Any) -> Iterator[str]:
    """What a Llama's metadata may ask for and config.json would not say."""
    kind = of("rope.scaling.type", "none")
    if kind not in ("none", ""):
        yield f"llama.rope.scaling.type={kind!r}"
    if of("rope.scale_linear", 1.0) != 1.0:
        yield f"llama.rope.scale_linear={of('rope.scale_linear')}"
    for name in ("expert_count", "attention.sliding_window", "logit_scale"):
        if of(name, 0):
            yield f"llama.{name}={of(name)}"


def _arrays(tensors: Mapping[str, Any], config: LlamaConfig) -> dict[str, np.ndarray]:
    """The weights by HF's names, in float32."""
    gguf: Any = importlib.import_module("gguf")
    like = hf_llama.shapes(config)
    places = {name: _place(name) for name in like}
    missing = [x for x in places.values() if x not in tensors]
    more = [x for x in tensors if x not in {*places.values()}]
    found = {k: tuple(int(n) for n in reversed(x.shape)) for k, x in tensors.items()}
    wrong = [
        f"{place} is {found[place]}, not {like[name]}"
        for name, place in places.items()
        if found.get(place, like[name]) != like[name]
    ]
    told = [("missing", missing), ("not read", more), ("of another shape", wrong)]
    if problems := [f"{what}: {', '.join(x[:5])}" for what, x in told if x]:
        raise LoraError(f"tensors {'; '.join(problems)}.")

    def dense(name: str) -> np.ndarray:
        tensor = tensors[places[name]]
        try:
            w = gguf.dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:
            raise LoraError(
                f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf "
                f"package does not dequantize: {error}. Take another quantization."
            ) from error
        w = np.asarray(w, np.float32).reshape(like[name])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(-1, config.head_dim // 2, 2, w.shape[1])
            w = w.swapaxes(1, 2).reshape(like[name])
        return np.ascontiguousarray(w)

    return {name: dense(name) for name in like}


def _place(name: str) -> str:
    """GGUF's name of HF's tensor."""
    parts = name.removesuffix(".weight").split(".")
    if "layers" not in parts:
        return f"{_REST[parts[-1]]}.weight"
    return f"blk.{parts[2]}.{_LAYER['.'.join(parts[3:])]}.weight"


def _tokenizer(fields: Fields, rows: int) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json: byte-level pairs, each digit alone.

    `rows` is how many tokens the embedding has.
    """
    own = {
        name.removeprefix("tokenizer.ggml."): x
        for name, x in fields.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind = own.get("model"), own.get("pre")
    if kind != ("gpt2", "smollm"):
        raise LoraError(
            f"tokenizer.ggml.model and pre are {kind}; only ('gpt2', 'smollm') is "
            "read. Take tokenizer.json from where the model comes from."
        )
    if missing := [x for x in ("tokens", "token_type", "merges") if x not in own]:
        raise LoraError(f"tokenizer.ggml.{missing[0]} is missing.")
    words, types = own["tokens"], own["token_type"]
    if len({*words}) != rows or len(types) != rows:
        raise LoraError(
            f"{len({*words})} different tokens of {len(types)} types; expected {rows}."
        )
    merges = [tuple(x.split(" ")) for x in own["merges"]]
    try:
        found = Tokenizer(models.BPE({x: i for i, x in enumerate(words)}, merges))
    except Exception as error:  # what the package raises has no class of its own
        raise LoraError(f"tokenizer.ggml.merges: {error}.") from error
    digits = pre_tokenizers.Digits(individual_digits=True)
    pairs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pre_tokenizer: Any = pre_tokenizers.Sequence([digits, pairs])
    found.pre_tokenizer = pre_tokenizer
    decoder: Any = decoders.ByteLevel()
    found.decoder = decoder
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        chosen = [x for x, y in zip(words, types, strict=True) if y == kind]
        add = found.add_special_tokens if special else found.add_tokens
        add([AddedToken(x, special=special, normalized=False) for x in chosen])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, long in {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "pad": "padding",
    }.items():
        if (at := own.get(f"{long}_token_id")) is not None:
            settings[f"{name}_token"] = words[at]
    if own.get("add_bos_token", False):
        bos = settings["bos_token"]
        first: Any = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words.index(bos))]
        )
        found.post_processor = first
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return found, settings
