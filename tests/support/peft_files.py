"""Adapters written by hand in PEFT's format, and the base they belong to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import flora
from flora._tree.origin import Origin
from flora._tree.weight import is_node

PREFIX = "base_model.model."
D, F = 4, 6


def values(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def params():
    """Two layers of two linear maps, a norm and a head, with HF's Flax names."""

    def linear(in_, out, seed):
        return {
            "kernel": jnp.asarray(values(in_, out, seed=seed)),
            "bias": jnp.asarray(values(out, seed=seed)),
        }

    return {
        "layers": {
            str(i): {"up": linear(D, F, i), "down": linear(F, D, i)} for i in range(2)
        },
        "norm": {
            "scale": jnp.asarray(values(D)),
            "bias": jnp.asarray(values(D, seed=1)),
        },
        "head": linear(D, 3, 5),
    }


def fn(p, x):
    for i in "01":
        q = p["layers"][i]
        h = jnp.tanh(x @ q["up"]["kernel"] + q["up"]["bias"])
        x = x + h @ q["down"]["kernel"] + q["down"]["bias"]
    x = x * p["norm"]["scale"] + p["norm"]["bias"]
    return x @ p["head"]["kernel"] + p["head"]["bias"]


X = jnp.asarray(values(5, D, seed=9))

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["up"],
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
}


def linear(module, in_, out, r=2, seed=0):
    """The two tensors of one linear module."""
    return {
        f"{PREFIX}{module}.lora_A.weight": values(r, in_, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": values(out, r, seed=seed + 1),
    }


def up_adapters(r=2):
    """Of `up` in both layers."""
    return {
        **linear("layers.0.up", D, F, r, seed=10),
        **linear("layers.1.up", D, F, r, seed=20),
    }


def write(folder, tensors, **config):
    """A directory as `save_pretrained` leaves it; a setting of `...` is left out."""
    folder.mkdir(exist_ok=True)
    merged = {k: v for k, v in (CONFIG | config).items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(merged))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder):
    """`(config, tensors)` of a directory."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def forgotten(tree):
    """An adapted tree whose leaves do not know where they came from."""

    def forget(x):
        return dataclasses.replace(x, origin=Origin()) if is_node(x) else x

    return jax.tree.map(forget, tree, is_leaf=is_node)


def delta(tensors, module, scale):
    """Scale B A as a Flax kernel `[in, out]`, in float64."""
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].astype(np.float64)
    b = tensors[f"{PREFIX}{module}.lora_B.weight"].astype(np.float64)
    return scale * (b @ a).T


# Modules that a server computes as one, with the sizes of their features.
TOGETHER = {
    "attention": {"q_proj": (D, 6), "k_proj": (D, 2), "v_proj": (D, 2)},
    "mlp": {"gate_proj": (D, F), "up_proj": (D, F)},
    "mamba": {"gate_proj": (D, F), "x_proj": (D, F)},
    "latent attention": {"q_a_proj": (D, 3), "kv_a_proj_with_mqa": (D, 5)},
    "delta net": {"in_proj_q": (D, 2), "in_proj_k": (D, 2), "in_proj_v": (D, 6),
                  "in_proj_z": (D, 6)},
    "delta net in two": {"in_proj_qkv": (D, 8), "in_proj_z": (D, 6)},
    "relative attention": {"wq_du": (D, 6), "wk_dv": (D, 2), "wv_dv": (D, 2),
                           "wr_du": (D, 4)},
    "experts": {f"experts.{i}.{w}": (F, D) if w == "w2" else (D, F)
                for i in (0, 1) for w in ("w1", "w2", "w3")},
    "named experts": {f"experts.{i}.{w}_proj": (F, D) if w == "down" else (D, F)
                      for i in (0, 1) for w in ("gate", "up", "down")},
}  # fmt: skip


def together(kind, one):
    """A layer with such modules, and an adapter of one of them alone, not zero."""
    sizes = TOGETHER[kind] | {"o_proj": (D, D)}
    own = {n: {"kernel": jnp.asarray(values(*s))} for n, s in sizes.items()}
    tree = {"layers": {"0": own}}

    def fn(p, d, f):
        kernels = [x["kernel"] for x in p["layers"]["0"].values()]
        return sum(((f if len(w) == F else d) @ w).sum() for w in kernels)

    config = flora.LoraConfig(rank=2, target=f"{one}/kernel")
    call = jnp.ones((2, D)), jnp.ones((2, F))
    made = flora.init(jax.random.key(0), config, fn, tree, *call)
    node = made["layers"]["0"][one]["kernel"]
    node = dataclasses.replace(node, b=jnp.asarray(values(*node.b.shape, seed=3)))
    made["layers"]["0"][one]["kernel"] = node
    return tree, made


def stacked_experts(*targets):
    """Three experts in two leaves, as transformers has them, and an adapter of some."""
    gate_up, down = values(3, D, 2 * F), values(3, F, D)
    own = {"gate_up_proj": jnp.asarray(gate_up), "down_proj": jnp.asarray(down)}
    tree, x = {"experts": own}, jnp.ones((1, 3, 2, D))

    def fn(p, x):
        y = jnp.einsum("betd,edf->betf", x, p["experts"]["gate_up_proj"])
        return jnp.einsum("betf,efd->betd", y[..., :F], p["experts"]["down_proj"])

    config = flora.LoraConfig(rank=2, target=[f"experts/{t}" for t in targets])
    made = flora.init(jax.random.key(0), config, fn, tree, x)
    for name in targets:
        node = made["experts"][name]
        b = jnp.asarray(values(*node.b.shape, seed=3))
        made["experts"][name] = dataclasses.replace(node, b=b)
    return tree, fn, x, made
