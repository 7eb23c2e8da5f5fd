"""GGUF files of tiny Llamas, as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
REST = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def place(name):
    front, _, _ = name.rpartition(".")
    if front in REST:
        return f"{REST[front]}.weight"
    _, _, i, kind = front.split(".", 3)
    return f"blk.{i}.{NAMES[kind]}.weight"


def interleaved(w, heads):
    """Rows of a head as llama.cpp has them: 0, d/2, 1, d/2 + 1, ..."""
    per = w.shape[0] // heads
    order = [h * per + x for h in range(heads) for i in range(per // 2)
             for x in (i, per // 2 + i)]  # fmt: skip
    return w[order]


def write(path, folder, arrays, *, types=None, change=None, arch="llama"):
    """The GGUF of a checkpoint's folder; `arrays` by HF's names.

    types: `{part of a tensor's name: how it is stored}`; others are float32.
    change: what is done to the writer before the file is written.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda x: x[1])
    special = {x["content"] for x in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([x for x, _ in vocab])
    writer.add_token_types([3 if x in special else 1 for x, _ in vocab])
    writer.add_token_merges([" ".join(x) for x in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["eos_token_id"] - 1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(settings["chat_template"])
    for name, w in arrays.items():
        kind = next((t for k, t in (types or {}).items() if k in name), TYPES.F32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = interleaved(w, heads if "q_proj" in name else groups)
        data = gguf.quantize(np.ascontiguousarray(w, np.float32), kind)
        writer.add_tensor(place(name), data, raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
