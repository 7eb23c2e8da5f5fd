"""A Llama from HF's files, and back: names, placement, loading."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora.hf
from flora import LoraError
from flora.hf import Tensor
from flora.peft import Module
from language_models.llama import Llama
from language_models.llama_config import LlamaConfig

UNUSED = ("*.rotary_emb.inv_freq",)


def tensors(config: LlamaConfig, *, scan: bool = True) -> dict[str, Tensor]:
    """Where each parameter lies in HF's checkpoint: `{path in Flax: Tensor}`."""
    found = {
        "params/model/embed_tokens/embedding": Tensor("model.embed_tokens.weight"),
        "params/model/norm/weight": Tensor("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        found["params/lm_head/kernel"] = Tensor("lm_head.weight", (1, 0))
    for name, axes in _in_a_layer(config).items():
        flax = name.replace(".", "/")
        if axes:
            flax = flax.removesuffix("weight") + "kernel"
        keys = [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers)]
        if scan:
            found[f"params/model/layers/{flax}"] = Tensor(tuple(keys), axes)
            continue
        for i, key in enumerate(keys):
            found[f"params/model/layers/{i}/{flax}"] = Tensor(key, axes)
    return found


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of HF's checkpoint, by name."""
    like = planned(Llama(config))
    leaves = {
        "/".join(key.key for key in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(like)
    }
    return {
        name: tensor.source(leaves[path])
        for path, tensor in tensors(config).items()
        for name in tensor.names
    }


def _in_a_layer(config: LlamaConfig) -> dict[str, tuple[int, int] | None]:
    """`{name in a layer: order of axes}`: kernels are transposed."""
    found: dict[str, tuple[int, int] | None] = {
        "input_layernorm.weight": None,
        "post_attention_layernorm.weight": None,
    }
    biased = {
        **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v"), config.qkv_bias),
        "self_attn.o": config.o_bias,
        **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.down"), config.mlp_bias),
    }
    for name, bias in biased.items():
        found[f"{name}_proj.weight"] = (1, 0)
        if bias:
            found[f"{name}_proj.bias"] = None
    if config.qk_norm:
        found |= {"self_attn.q_norm.weight": None, "self_attn.k_norm.weight": None}
    return found


def peft_names(config: LlamaConfig, *, scan: bool = True) -> dict[str, Module]:
    """Which module of PyTorch lies in which leaf, for `flora.peft`."""
    found = {}
    for path, tensor in tensors(config, scan=scan).items():
        name, _, parameter = tensor.names[0].rpartition(".")
        if not isinstance(tensor.keys, str):  # stacked: one for each layer
            name = name.replace("model.layers.0.", "model.layers.{i}.", 1)
        found[path] = Module(name, parameter=parameter)
    return found


def planned(model: Llama, mesh: Mesh | None = None) -> Any:
    """The parameters as `ShapeDtypeStruct`s, divided over the mesh axis 'fsdp'."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)
    if mesh is None:
        return like

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, fsdp(x.shape, mesh.shape["fsdp"]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, like)


def fsdp(shape: tuple[int, ...], parts: int) -> Spec:
    """The longer of a matrix's two axes is divided, if it can be; vectors are whole."""
    axes = sorted(range(len(shape))[-2:], key=lambda i: -shape[i])
    for axis in axes if len(shape) > 1 else ():
        if shape[axis] % parts == 0 and min(shape[i] for i in axes) > 1:
            return Spec(*("fsdp" if i == axis else None for i in range(len(shape))))
    return Spec()


def read_config(folder: str | os.PathLike[str]) -> LlamaConfig:
    """The config of a checkpoint's folder."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise LoraError(f"{path} is not there. Pass the folder of an HF checkpoint.")
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path} is no JSON: {error}. Download it again.") from error
    if not isinstance(given, dict):
        raise LoraError(f"{path} holds {given!r}, no object. Download it again.")
    return LlamaConfig.from_hf(given)


def load(
    folder: str | os.PathLike[str], model: Llama, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameters of a checkpoint's folder, for the model, on the mesh."""
    unused = UNUSED
    if model.config.tie_word_embeddings:  # some files hold the same weight twice
        unused = (*UNUSED, "lm_head.weight")
    names = tensors(model.config, scan=model.scan)
    return flora.hf.load(folder, planned(model, mesh), names, unused=unused)
