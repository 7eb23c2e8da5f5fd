"""Adapters written by hand in PEFT's format, and the base they belong to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

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
