"""What the tests of the example decoder share: small ones, and the formula in NumPy."""

import math

import jax.numpy as jnp
import numpy as np
from language_models import hf_llama
from language_models.llama import Llama
from language_models.llama_config import LlamaConfig, frequencies

from flora._files import safetensors
from flora._tree.paths import named_leaves

SMALL = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def drawn(shapes, dtype=np.float32, seed=0):
    draw = np.random.default_rng(seed)
    return {k: draw.normal(size=s).astype(dtype) for k, s in shapes.items()}


def decoder(config=(), **options):
    parsed = LlamaConfig.from_hf(SMALL | dict(config))
    return Llama(
        parsed, **({"dtype": jnp.float32, "param_dtype": jnp.float32} | options)
    )


def weights(config, folder, seed=0):
    """A checkpoint of random weights, as HF lays it out; the arrays by name."""
    parsed = LlamaConfig.from_hf(SMALL | dict(config))
    model = Llama(parsed, dtype=jnp.float32, param_dtype=jnp.float32)
    names, shapes = hf_llama.tensors(parsed), {}
    for path, leaf in named_leaves(hf_llama.planned(model))[0]:
        for key in names[path].names:
            shapes[key] = names[path].source(leaf.shape)
    arrays = {k: 0.3 * x for k, x in drawn(shapes, seed=seed).items()}
    safetensors.write(folder / "model.safetensors", arrays, {})
    return arrays


def oracle(x, config, ids, positions=None, mask=None):
    """The decoder in NumPy, in float64, from HF's arrays: logits of one sequence."""
    x = {k: v.astype(np.float64) for k, v in x.items()}
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    dim, n = config.head_dim, len(ids)
    positions = np.arange(n) if positions is None else positions
    mask = np.tril(np.ones((n, n), bool)) if mask is None else mask
    freq = np.asarray(frequencies(config), np.float64)
    angle = positions[:, None] * np.concatenate([freq, freq])

    def norm(h, name):
        return (
            h / np.sqrt((h * h).mean(-1, keepdims=True) + config.rms_norm_eps) * x[name]
        )

    def linear(h, name):
        return h @ x[f"{name}.weight"].T + x.get(f"{name}.bias", 0)

    def turned(h):
        half = np.concatenate([-h[..., dim // 2 :], h[..., : dim // 2]], -1)
        return h * np.cos(angle)[:, None] + half * np.sin(angle)[:, None]

    h = x["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        y = norm(h, f"{at}.input_layernorm.weight")
        q, k, v = (
            linear(y, f"{at}.self_attn.{c}_proj").reshape(n, -1, dim) for c in "qkv"
        )
        if config.qk_norm:
            q = norm(q, f"{at}.self_attn.q_norm.weight")
            k = norm(k, f"{at}.self_attn.k_norm.weight")
        k, v = (np.repeat(z, heads // kv, axis=1) for z in (turned(k), v))
        scores = np.einsum("qhd,khd->hqk", turned(q), k) / math.sqrt(dim)
        scores = np.where(mask, scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        y = np.einsum("hqk,khd->qhd", share, v).reshape(n, -1)
        h = h + linear(y, f"{at}.self_attn.o_proj")
        y = norm(h, f"{at}.post_attention_layernorm.weight")
        gate = linear(y, f"{at}.mlp.gate_proj")
        y = gate / (1 + np.exp(-gate)) * linear(y, f"{at}.mlp.up_proj")
        h = h + linear(y, f"{at}.mlp.down_proj")
    h = norm(h, "model.norm.weight")
    return h @ x.get("lm_head.weight", x["model.embed_tokens.weight"]).T


def close(actual, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual, np.float64) - expected).max() <= tolerance * scale
