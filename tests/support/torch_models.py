"""Small PyTorch models, the same functions in JAX, and their parameters for Flax.

PyTorch is imported inside the functions: the default tests do without it.
"""

import copy
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np


def flax_tree(model):
    """The parameters by HF's Flax convention: transposed kernels, norms named scale."""
    import torch
    from transformers.pytorch_utils import Conv1D

    tree = {}

    def put(path, value):
        node = tree
        *parents, last = path
        for word in parents:
            node = node.setdefault(word, {})
        half = value.dtype == torch.bfloat16  # which NumPy lacks
        array = (value.float() if half else value).detach().numpy()
        node[last] = jnp.asarray(array, jnp.bfloat16 if half else None)

    for name, module in model.named_modules():
        for key, x in module.named_parameters(recurse=False):
            path = [*name.split("."), key] if name else [key]
            if isinstance(module, torch.nn.Embedding):
                path[-1] = "embedding"
            elif isinstance(module, torch.nn.Linear) and key == "weight":
                path[-1], x = "kernel", x.T
            elif isinstance(module, Conv1D) and key == "weight":
                path[-1] = "kernel"
            elif "Conv" in type(module).__name__ and key == "weight":
                path[-1], x = "kernel", x.movedim((0, 1), (-1, -2))
            elif "Norm" in type(module).__name__ and key == "weight":
                path[-1] = "scale"
            put(path, x)
        for key, x in module.named_buffers(recurse=False):
            if key.startswith("running_"):
                put([*name.split("."), key.removeprefix("running_")], x)
    return tree


def dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def norm(p, x, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p[
        "bias"
    ]


def conv(p, x, window, groups=1):
    """x `[batch, *space, in]`, padded so that sizes stay."""
    n = len(window)
    letters = "HW"[:n]
    spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    pad = [(k // 2, k // 2) for k in window]
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (1,) * n,
        pad,
        dimension_numbers=spec,
        feature_group_count=groups,
    )
    return y + p["bias"]


def build(kind, seed=0):
    """`(PyTorch model, JAX function of a tree and x, x)`."""
    import torch

    torch.manual_seed(seed)
    model, fn, x = MODELS[kind](torch)
    model = model.double().eval()
    for p in model.parameters():  # no zeros and ones, which would hide errors
        p.data += 0.1 * torch.randn_like(p)
    return model, fn, x


def _mlp(torch):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 10)
            self.gate = nn.Linear(6, 10, bias=False)
            self.down = nn.Linear(10, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(self.norm(x))) * self.gate(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block() for _ in range(3)])
            self.mix = nn.Linear(6, 6)  # square
            self.classifier = nn.Linear(6, 4)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.classifier(self.mix(x))

    def fn(p, x):
        for i in range(3):
            q = p["layers"][str(i)]
            h = jnp.tanh(dense(q["up"], norm(q["norm"], x))) * dense(q["gate"], x)
            x = x + dense(q["down"], h)
        return dense(p["classifier"], dense(p["mix"], x))

    return Net(), fn, np.random.default_rng(0).normal(size=(5, 6))


def _gpt2(torch):
    from transformers.pytorch_utils import Conv1D

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = Conv1D(18, 6)
            self.c_proj = Conv1D(6, 18)
            self.square = Conv1D(6, 6)

        def forward(self, x):
            return self.square(self.c_proj(torch.tanh(self.c_attn(x))))

    def fn(p, x):
        return dense(p["square"], dense(p["c_proj"], jnp.tanh(dense(p["c_attn"], x))))

    return Net(), fn, np.random.default_rng(0).normal(size=(5, 6))


def _conv(torch):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = nn.Conv2d(3, 8, 3, padding=1)
            self.one = nn.Conv1d(8, 6, 5, padding=2)

        def forward(self, x):  # [batch, height, width, channels]
            y = torch.tanh(self.two(x.movedim(-1, 1)))
            return self.one(y.mean(-1)).movedim(1, -1)

    def fn(p, x):
        y = jnp.tanh(conv(p["two"], x, (3, 3)))
        return conv(p["one"], y.mean(2), (5,))

    return Net(), fn, np.random.default_rng(0).normal(size=(2, 7, 6, 3))


def _grouped(torch):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = nn.Conv2d(4, 8, 3, padding=1, groups=2)
            self.one = nn.Conv1d(8, 8, 5, padding=2, groups=4)

        def forward(self, x):
            y = torch.tanh(self.two(x.movedim(-1, 1)))
            return self.one(y.mean(-1)).movedim(1, -1)

    def fn(p, x):
        y = jnp.tanh(conv(p["two"], x, (3, 3), 2))
        return conv(p["one"], y.mean(2), (5,), 4)

    return Net(), fn, np.random.default_rng(0).normal(size=(2, 7, 6, 4))


def _embedding(torch):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(11, 6)
            self.mix = nn.Linear(6, 6)
            self.lm_head = nn.Linear(6, 11, bias=False)

        def forward(self, x):
            return self.lm_head(torch.tanh(self.mix(self.embed_tokens(x))))

    def fn(p, x):
        h = jnp.take(p["embed_tokens"]["embedding"], x, axis=0)
        return dense(p["lm_head"], jnp.tanh(dense(p["mix"], h)))

    return Net(), fn, np.random.default_rng(0).integers(0, 11, (2, 5))


def _experts(torch):
    nn = torch.nn

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6) / 2)
            self.down_proj = nn.Parameter(torch.randn(3, 6, 5) / 2)

        def forward(self, x):
            h = torch.einsum("bd,efd->ebf", x, self.gate_up_proj)
            gate, up = h.chunk(2, -1)
            return torch.einsum("ebf,edf->bd", torch.tanh(gate) * up, self.down_proj)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)
            self.experts = Experts()

        def forward(self, x):
            return self.experts(self.proj(x))

    def fn(p, x):
        e = p["experts"]
        h = jnp.einsum("bd,edf->ebf", dense(p["proj"], x), e["gate_up_proj"])
        gate, up = jnp.split(h, 2, -1)
        return jnp.einsum("ebf,efd->bd", jnp.tanh(gate) * up, e["down_proj"])

    return Net(), fn, np.random.default_rng(0).normal(size=(5, 6))


def _attention(torch):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 6)
            self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            h = self.mix(x)
            return self.attn(h, h, h, need_weights=False)[0]

    def fn(p, x):
        q, h = p["attn"], dense(p["mix"], x)
        both = h @ q["in_proj_weight"].T + q["in_proj_bias"]
        return dense(q["out_proj"], mixed(*jnp.split(both, 3, -1)))

    return Net(), fn, np.random.default_rng(0).normal(size=(3, 5, 6))


def mixed(query, key, value, heads=2):
    """Attention over `[batch, length, features]`, all heads."""
    query, key, value = (
        x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value)
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return y.reshape(*y.shape[:2], -1)


def _llama(torch, *, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=tied, attn_implementation="eager", rms_norm_eps=1e-6,
    )  # fmt: skip

    class Net(LlamaForCausalLM):  # logits alone
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits

    return Net(config), llama, np.random.default_rng(0).integers(0, 13, (2, 6))


def _mixtral(torch):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=13, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        num_local_experts=3, num_experts_per_tok=2, attn_implementation="eager",
        rms_norm_eps=1e-6, tie_word_embeddings=False, experts_implementation="eager",
    )  # fmt: skip

    class Net(MixtralForCausalLM):  # logits alone
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits

    tokens = np.random.default_rng(0).integers(0, 13, (2, 6))
    return Net(config), functools.partial(llama, mlp=moe), tokens


def moe(q, x):
    """Two of the experts for each token, all of them computed; axes as in PyTorch."""
    chances = jax.nn.softmax(x @ q["gate"]["weight"].T)
    kept, _ = jax.lax.top_k(chances, 2)
    chances = jnp.where(chances < kept[..., -1:], 0, chances)
    chances = chances / chances.sum(-1, keepdims=True)
    both = jnp.einsum("bld,efd->blef", x, q["experts"]["gate_up_proj"])
    gate, up = jnp.split(both, 2, -1)
    h = jax.nn.silu(gate) * up * chances[..., None]
    return jnp.einsum("blef,edf->bld", h, q["experts"]["down_proj"])


def gated(q, x):
    h = jax.nn.silu(dense(q["gate_proj"], x)) * dense(q["up_proj"], x)
    return dense(q["down_proj"], h)


def rms(p, x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def llama(p, tokens, heads=4, groups=2, layers=2, mlp=gated):
    m = p["model"]
    x = jnp.take(m["embed_tokens"]["embedding"], tokens, axis=0)
    size = x.shape[-1] // heads
    steps = jnp.arange(tokens.shape[1])
    angles = steps[:, None] * 10000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = (jnp.tile(f(angles), 2)[:, None] for f in (jnp.cos, jnp.sin))

    def turned(x):
        one, two = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-two, one], -1) * sin

    for i in range(layers):
        q = m["layers"][str(i)]
        a, h = q["self_attn"], rms(q["input_layernorm"], x)
        split = [
            dense(a[f"{n}_proj"], h).reshape(*x.shape[:2], -1, size) for n in "qkv"
        ]
        query, key, value = turned(split[0]), turned(split[1]), split[2]
        key, value = (jnp.repeat(t, heads // groups, axis=2) for t in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
        scores = jnp.where(steps[:, None] >= steps, scores, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        x = x + dense(a["o_proj"], y.reshape(x.shape))
        x = x + mlp(q["mlp"], rms(q["post_attention_layernorm"], x))
    x = rms(m["norm"], x)
    if "lm_head" in p:
        return dense(p["lm_head"], x)
    return x @ m["embed_tokens"]["embedding"].T


def _vit(torch):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, attn_implementation="eager", num_labels=3,
    )  # fmt: skip

    class Net(ViTForImageClassification):  # logits alone
        def forward(self, pixel_values=None, **kwargs):
            return super().forward(pixel_values, **kwargs).logits

    return Net(config), vit, np.random.default_rng(0).normal(size=(2, 3, 8, 8))


def vit(p, x):
    """HF's Flax ViT, whose names are those of transformers 4."""
    m = p["vit"]
    e = m["embeddings"]
    q = e["patch_embeddings"]["projection"]
    x = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, 1, -1), q["kernel"], (4, 4), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = (x + q["bias"]).reshape(x.shape[0], -1, x.shape[-1])
    first = jnp.broadcast_to(e["cls_token"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([first, x], 1) + e["position_embeddings"]
    for i in range(2):
        q = m["encoder"]["layer"][str(i)]
        a, h = q["attention"], norm(q["layernorm_before"], x, 1e-12)
        split = (dense(a["attention"][n], h) for n in ("query", "key", "value"))
        x = x + dense(a["output"]["dense"], mixed(*split))
        h = dense(q["intermediate"]["dense"], norm(q["layernorm_after"], x, 1e-12))
        x = x + dense(q["output"]["dense"], jax.nn.gelu(h, approximate=False))
    return dense(p["classifier"], norm(m["layernorm"], x, 1e-12)[:, 0])


def _as_flax(tree):
    """The tree with the names of transformers 4, which Flax's models keep."""
    m = dict(tree["vit"])
    layers = {}
    for i, q in m.pop("layers").items():
        a = q["attention"]
        qkv = {n: a[f"{n[0]}_proj"] for n in ("query", "key", "value")}
        layers[i] = {
            "attention": {"attention": qkv, "output": {"dense": a["o_proj"]}},
            "intermediate": {"dense": q["mlp"]["fc1"]},
            "output": {"dense": q["mlp"]["fc2"]},
            **{n: q[n] for n in ("layernorm_before", "layernorm_after")},
        }
    return {**tree, "vit": m | {"encoder": {"layer": layers}}}


MODELS = {
    "llama": _llama,
    "tied": functools.partial(_llama, tied=True),
    "mlp": _mlp,
    "gpt2": _gpt2,
    "conv": _conv,
    "grouped": _grouped,
    "embedding": _embedding,
    "experts": _experts,
    "attention": _attention,
    "vit": _vit,
    "mixtral": _mixtral,
}


def params_of(kind, model):
    """The tree that the JAX function takes."""
    tree = flax_tree(model)
    if kind == "tied":
        tree.pop("lm_head", None)
    if kind == "vit":
        tree = _as_flax(tree)
    if kind == "experts":  # as Flax has them, [expert, in, out]
        tree["experts"] = {k: x.swapaxes(1, 2) for k, x in tree["experts"].items()}
    return tree


def run(model, x):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(x)).numpy()


def wrapped(model, config):
    """A PEFT model around a copy."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))


def adapt(model, config, *, seed=1, size=0.3):
    """A PEFT model with adapters that look trained."""
    import torch

    adapted = wrapped(model, config)
    torch.manual_seed(seed)
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)
            if "magnitude" in name:
                p.data.abs_()
    return adapted.eval()


def saved(adapted, folder):
    """The folder that `save_pretrained` wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder))
    return folder


def reloaded(model, folder):
    """PEFT's own reading of a folder, around a copy of the model."""
    import peft

    with warnings.catch_warnings():
        # A missing key, above all, is a warning to PEFT.
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers
        for text in NOISE:
            warnings.filterwarnings("ignore", message=text)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


# Warnings of PEFT that say nothing about what was read.
NOISE = (
    ".*groups > 1. Merging is not supported.*",
    ".*fan_in_fan_out.*",
    ".*tie.*",
    ".*lora_bias=True. was passed.*",  # and the layer has no bias
    ".*pattern keys did not match any.*",  # said of every key for target_parameters
)
