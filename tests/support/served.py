"""Small decoders for real servers: checkpoints, adapters, what JAX answers."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import lm_tiny
import numpy as np
from language_models import hf_llama
from language_models.llama import Llama
from language_models.llama_config import LlamaConfig, frequencies

import flora
import flora.hf
import flora.peft
from flora._tree.paths import named_leaves

CONFIG = lm_tiny.CONFIG | {
    "num_hidden_layers": 2,
    "vocab_size": 448,
    "bos_token_id": None,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
NEW, LENGTH = 12, 32  # tokens of an answer, and of prompt and answer with padding
ALL = ["self_attn/*/kernel", "mlp/*/kernel"]
# LoraConfig of each kind of adapter of the Llama; a number is a layer of the stack.
KINDS = {
    "all linear": {"target": ALL, "rank": 8},
    "q and v": {"target": ["q_proj/kernel", "v_proj/kernel"]},
    "k": {"target": "k_proj/kernel"},
    "v": {"target": "v_proj/kernel"},
    "o": {"target": "o_proj/kernel"},
    "gate": {"target": "gate_proj/kernel"},
    "up": {"target": "up_proj/kernel"},
    "up and down": {"target": ["up_proj/kernel", "down_proj/kernel"]},
    "down": {"target": "down_proj/kernel"},
    "patterns": {
        "target": ALL,
        "rank_pattern": {"down_proj/kernel": 8, "q_proj/kernel": 2},
        "alpha_pattern": {"o_proj/kernel": 3.0, "gate_proj/kernel": 5.5},
    },
    "rslora": {
        "target": ALL,
        "rank_stabilized": True,
        "rank_pattern": {"v_proj/kernel": 6},
        "alpha_pattern": {"up_proj/kernel": 2.5},
    },
    "embedding": {"target": "embed_tokens/embedding"},
    "embedding and linear": {"target": ["embed_tokens/embedding", *ALL]},
    "head": {"target": "lm_head/kernel"},
    "embedding and head": {"target": ["embed_tokens/embedding", "lm_head/kernel"]},
    "everything": {"target": ["embedding", "kernel"], "rank": 8},
    "some layers": {
        "target": ["layers/1/self_attn/[qk]_proj/*", "layers/0/mlp/up_proj/*"],
        "rank_pattern": {"layers/1/self_attn/q_proj/kernel": 3},
    },
    "layers with their own ranks": {
        "target": ALL,
        "rank_pattern": {"layers/0/*": 2, "layers/1/mlp/*": 7},
        "alpha_pattern": {"layers/1/*": 9.0},
    },
}


@dataclasses.dataclass(frozen=True)
class Served:
    """A decoder, `fn(params, ids)`, with its checkpoint and what its leaves are."""

    folder: object
    fn: object
    params: object
    names: object
    tensors: object


def randomized(tree, seed, size=0.6):
    """The adapter as if it were trained: all of A and B that is used is random."""
    base, adapter = flora.split(tree)
    draw = np.random.default_rng(seed)

    def one(x):
        drawn = draw.normal(size=x.shape).astype(np.float32) * size
        return jnp.asarray(drawn / np.sqrt(x.shape[-1]), x.dtype)

    found = flora.join(base, jax.tree.map(one, adapter))
    is_node = lambda x: isinstance(x, flora.LoraWeight)  # noqa: E731
    return jax.tree.map(_within_blocks, found, is_leaf=is_node)


def _within_blocks(node):
    """Zeros again in the ranks that a layer of a stack does not have."""
    if not isinstance(node, flora.LoraWeight) or not node.blocks:
        return node
    a, b = np.zeros(node.a.shape, np.float32), np.zeros(node.b.shape, np.float32)
    for x in node.blocks:
        ranks = slice(x.start, x.stop)
        a[x.index][..., ranks] = node.a[x.index][..., ranks]
        b[(*x.index, ranks)] = node.b[(*x.index, ranks)]
    return dataclasses.replace(node, a=jnp.asarray(a), b=jnp.asarray(b))


def moved(tree, seed):
    """The adapter as if it had been trained from where it is."""
    base, adapter = flora.split(tree)
    draw = np.random.default_rng(seed)

    def one(x):
        noise = draw.normal(size=x.shape) * 0.3 * jnp.abs(x).mean()
        return x + jnp.asarray(noise, x.dtype)

    return flora.join(base, jax.tree.map(one, adapter))


def adapted(served, seed, **settings):
    """An adapter of a decoder."""
    config = flora.LoraConfig(**{"rank": 4, "alpha": 8.0} | settings)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    start = flora.init(jax.random.key(seed), config, served.fn, served.params, ids)
    return randomized(start, seed)


def save(folder, served, tree, **options):
    """Writes the adapter for servers."""
    about = {"base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM"}
    flora.peft.save(folder, tree, names=served.names, serving=True, **about | options)


def merged_deltas(served, tree):
    """ΔW `[out, in]` of each of HF's parameters, in float64, by module."""
    plain, merged = (
        dict(named_leaves(x)[0]) for x in (served.params, flora.merge(tree))
    )
    found = {}
    for path, tensor in served.tensors.items():
        change = np.asarray(merged[path], np.float64) - np.asarray(
            plain[path], np.float64
        )
        for i, name in enumerate(tensor.names):
            one = change if isinstance(tensor.keys, str) else change[i]
            found[name.removesuffix(".weight")] = tensor.taken(one)
    return found


def prompts(vocab, count=2, seed=0):
    """Prompts of several lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(3, vocab, 5 + 4 * i).tolist() for i in range(count)]


def answers(fn, tree, given):
    """Greedy tokens `[prompts, NEW]` and log-probabilities `[prompts, NEW, vocab]`."""

    @jax.jit
    def of_all(tree, ids):
        logits = flora.lora(fn)(tree, ids)
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    ids, rows = np.zeros((len(given), LENGTH), np.int32), np.arange(len(given))
    for row, prompt in zip(ids, given, strict=True):
        row[: len(prompt)] = prompt
    at, found = np.array([len(p) for p in given]), []
    for n in range(NEW):
        found.append(np.asarray(of_all(tree, ids))[rows, at + n - 1])
        ids[rows, at + n] = found[-1].argmax(-1)
    logprobs = np.stack(found, 1)
    return logprobs.argmax(-1), logprobs


def llama(folder, *, scan=True, dtype=jnp.float32, **changes):
    """The examples' decoder and a checkpoint of HF's, with changes of its config."""
    if not folder.exists():
        config = LlamaConfig.from_hf(CONFIG | changes)
        params = _drawn(Llama(config, dtype=jnp.float32, param_dtype=jnp.float32))
        write(folder, params, hf_llama.tensors(config), CONFIG | changes)
    config = hf_llama.read_config(folder)
    model = Llama(config, scan=scan, dtype=dtype, param_dtype=dtype)
    params = hf_llama.load(folder, model)
    names = hf_llama.peft_names(config, scan=scan)
    return Served(
        folder, model.apply, params, names, hf_llama.tensors(config, scan=scan)
    )


def _drawn(model):
    """Random weights, biases too, so that answers differ much from one another."""
    ids, draw = jnp.zeros((1, 8), jnp.int32), np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)

    def one(path, x):
        if path[-1].key == "weight":  # of a norm
            return jnp.ones(x.shape)
        fan = x.shape[-1 if path[-1].key == "embedding" else -2]
        size = 0.3 if path[-1].key == "bias" else fan**-0.5
        return jnp.asarray(size * draw.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def write(folder, params, tensors, config):
    """A checkpoint, without a tokenizer."""
    flora.hf.save(folder, params, tensors)
    (folder / "config.json").write_text(json.dumps(config))


def merged(folder, served, tree):
    """A checkpoint of the merged model."""
    config = json.loads((served.folder / "config.json").read_text())
    write(folder, flora.merge(tree), served.tensors, config)
    return folder


def of_parts(folder, kind):
    """A decoder whose leaves are HF's parameters, one by one, and its checkpoint.

    kind: 'phi3' (fused qkv_proj and gate_up_proj) or 'mixtral' (experts).
    """
    config = LlamaConfig.from_hf(CONFIG)
    given = CONFIG | {"phi3": _PHI3, "mixtral": _MIXTRAL}[kind]
    shapes = _shapes(config, kind)
    draw = np.random.default_rng(2)
    flat = {k: draw.normal(size=s) / np.sqrt(s[-2]) for k, s in shapes.items()}
    flat = {k: jnp.asarray(x, jnp.float32) for k, x in flat.items()}
    ones = {k: jnp.ones(s[-1]) for k, s in shapes.items() if k.endswith("norm/weight")}
    params = flax.traverse_util.unflatten_dict(flat | ones, sep="/")
    tensors = {path: _tensor(path, x.shape) for path, x in (flat | ones).items()}
    write(folder, params, tensors, given)

    def fn(params, ids):
        return _decoder(params, ids, config)

    return Served(folder, fn, params, _module, tensors)


def _module(path):
    """HF's module of a leaf; a leaf of experts holds one module for each."""
    head, _, last = path.replace("/", ".").rpartition(".")
    if last in ("w1", "w2", "w3"):
        return flora.peft.Module(f"{head}.{{j}}.{last}", kind="linear")
    return head


_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 256,
    "pad_token_id": 0,
    "sliding_window": None,
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def _shapes(config, kind):
    d, ff, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    found = {
        "model/embed_tokens/embedding": (config.vocab_size, d),
        "model/norm/weight": (1, d),
        "lm_head/kernel": (d, config.vocab_size),
    }
    inside = {
        "input_layernorm/weight": (1, d),
        "post_attention_layernorm/weight": (1, d),
        "self_attn/o_proj/kernel": (q, d),
    }
    if kind == "phi3":
        inside |= {
            "self_attn/qkv_proj/kernel": (d, q + 2 * kv),
            "mlp/gate_up_proj/kernel": (d, 2 * ff),
            "mlp/down_proj/kernel": (ff, d),
        }
    else:
        sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        inside |= {f"self_attn/{k}/kernel": (d, n) for k, n in sizes.items()}
        inside |= {
            "block_sparse_moe/gate/kernel": (d, 4),
            "block_sparse_moe/experts/w1": (4, d, ff),
            "block_sparse_moe/experts/w3": (4, d, ff),
            "block_sparse_moe/experts/w2": (4, ff, d),
        }
    layers = range(config.num_hidden_layers)
    return found | {
        f"model/layers/{i}/{k}": s for i in layers for k, s in inside.items()
    }


def _tensor(path, shape):
    name = path.replace("/", ".")
    if path[-3:] in ("/w1", "/w2", "/w3"):
        front, _, last = name.rpartition(".")
        keys = tuple(f"{front}.{j}.{last}.weight" for j in range(shape[0]))
        return flora.hf.Tensor(keys, (1, 0))
    for word in ("kernel", "embedding"):
        name = name.replace(f".{word}", ".weight")
    return flora.hf.Tensor(name, (1, 0) if path.endswith("kernel") else None)


def _decoder(params, ids, config):
    """Llama, Phi-3 or Mixtral of the leaves that are there."""
    model, dim = params["model"], config.head_dim
    n, heads = ids.shape[1], config.num_attention_heads
    kv = config.num_key_value_heads
    angles = jnp.arange(n)[:, None, None] * jnp.tile(frequencies(config), 2)
    seen = jnp.tril(jnp.ones((n, n), bool))

    def norm(x, scale):
        size = jnp.mean(x * x, -1, keepdims=True)
        return x / jnp.sqrt(size + config.rms_norm_eps) * scale

    def turned(x):
        one, two = jnp.split(x, 2, -1)
        return x * jnp.cos(angles) + jnp.concatenate([-two, one], -1) * jnp.sin(angles)

    def attention(p, x):
        if "qkv_proj" in p:
            cuts = heads * dim, (heads + kv) * dim
            q, k, v = jnp.split(x @ p["qkv_proj"]["kernel"], cuts, -1)
        else:
            q, k, v = (x @ p[f"{c}_proj"]["kernel"] for c in "qkv")
        q, k, v = (y.reshape(*x.shape[:2], -1, dim) for y in (q, k, v))
        y = jax.nn.dot_product_attention(turned(q), turned(k), v, mask=seen)
        return y.reshape(*x.shape[:2], -1) @ p["o_proj"]["kernel"]

    def mlp(p, x):
        gate, up = jnp.split(x @ p["gate_up_proj"]["kernel"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["down_proj"]["kernel"]

    def experts(p, x):
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["gate"]["kernel"]), 2)
        weights /= weights.sum(-1, keepdims=True)
        share = jnp.sum(jax.nn.one_hot(chosen, 4) * weights[..., None], -2)
        each = jnp.repeat(x[:, None], 4, 1)
        gate, up = (
            jnp.einsum("betd,edf->betf", each, p["experts"][w]) for w in ("w1", "w3")
        )
        y = jnp.einsum("betf,efd->betd", jax.nn.silu(gate) * up, p["experts"]["w2"])
        return jnp.einsum("bte,betd->btd", share, y)

    x = model["embed_tokens"]["embedding"][ids]
    for i in range(config.num_hidden_layers):
        p = model["layers"][str(i)]
        x = x + attention(p["self_attn"], norm(x, p["input_layernorm"]["weight"]))
        y = norm(x, p["post_attention_layernorm"]["weight"])
        x = x + (mlp(p["mlp"], y) if "mlp" in p else experts(p["block_sparse_moe"], y))
    return norm(x, model["norm"]["weight"]) @ params["lm_head"]["kernel"]
