"""Adapters of many architectures and options: ΔW against PEFT's merge, both ways.

Needs the extra peft-test.
"""

import copy

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import flora
import flora.peft
from tests.support import torch_models as models
from tests.support import torch_zoo as zoo

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("x64")]

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
R = {"r": 2, "lora_alpha": 5}
# (architecture, LoraConfig)
CASES = {
    "llama": ("llama", R | {"target_modules": QKVO + MLP}),
    "llama, all-linear": ("llama", R | {
        "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama, regex": ("llama", R | {
        "target_modules": r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)"}),
    "llama, layers": ("llama", R | {
        "target_modules": QKVO, "layers_to_transform": [1], "use_rslora": True}),
    "llama, layers and their name": ("llama", R | {
        "target_modules": QKVO, "layers_to_transform": [0],
        "layers_pattern": "layers"}),
    "llama, patterns": ("llama", R | {
        "target_modules": QKVO, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 1, "k_proj": 3}}),
    "llama, dora": ("llama", R | {"target_modules": QKVO + MLP, "use_dora": True}),
    "llama, excluded": ("llama", R | {
        "target_modules": QKVO, "exclude_modules": r".*layers\.0\..*"}),
    "llama, head whole": ("llama", R | {
        "target_modules": QKVO, "modules_to_save": ["lm_head", "norm"]}),
    "llama, embeddings": ("llama", R | {
        "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "llama, norms whole": ("llama", R | {
        "target_modules": QKVO, "modules_to_save": ["input_layernorm"]}),
    "qwen2, biases": ("qwen2", R | {"target_modules": QKVO, "bias": "lora_only"}),
    "qwen2, all biases": ("qwen2", R | {"target_modules": MLP, "bias": "all"}),
    "gemma": ("gemma", R | {"target_modules": QKVO + MLP, "task_type": "CAUSAL_LM"}),
    "phi3, fused": ("phi3", R | {
        "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "opt": ("opt", R | {"target_modules": ["q_proj", "out_proj", "fc1", "fc2"]}),
    "neox": ("neox", R | {
        "target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
    "bloom": ("bloom", R | {"target_modules": ["query_key_value", "dense"]}),
    "gpt2": ("gpt2", R | {
        "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, dora": ("gpt2", R | {
        "target_modules": ["attn.c_attn", "attn.c_proj"], "use_dora": True,
        "fan_in_fan_out": True}),
    "gpt2, without the flag": ("gpt2", R | {"target_modules": ["c_attn"]}),
    "gpt2, all-linear": ("gpt2", R | {
        "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "mixtral": ("mixtral", R | {"target_modules": QKVO}),
    "mixtral, all-linear": ("mixtral", R | {
        "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "mixtral, experts": ("mixtral", R | {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "mixtral, one parameter": ("mixtral", R | {
        "target_modules": [], "target_parameters": ["mlp.experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3}, "use_rslora": True}),
    "qwen2 moe": ("qwen2 moe", R | {
        "target_modules": [*QKVO, "shared_expert.up_proj"],
        "target_parameters": ["experts.gate_up_proj"]}),
    "t5": ("t5", R | {"target_modules": ["q", "v", "wi", "wo"]}),
    "t5 v1.1": ("t5 v1.1", R | {"target_modules": ["q", "k", "wi_0", "wi_1", "wo"]}),
    "t5 v1.1, dora": ("t5 v1.1", R | {
        "target_modules": "all-linear", "use_dora": True,
        "task_type": "SEQ_2_SEQ_LM"}),
    "bert": ("bert", R | {
        "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert, all-linear": ("bert", R | {
        "target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}),
    "bert, embeddings": ("bert", R | {
        "target_modules": ["word_embeddings", "dense"], "task_type": "SEQ_CLS"}),
    "roberta": ("roberta", R | {
        "target_modules": ["query", "key"], "task_type": "TOKEN_CLS",
        "use_dora": True}),
    "distilbert": ("distilbert", R | {
        "target_modules": ["q_lin", "v_lin"],
        "modules_to_save": ["pre_classifier", "classifier"]}),
    "vit": ("vit", R | {
        "target_modules": ["q_proj", "v_proj", "query", "value", "dense"],
        "modules_to_save": ["classifier"]}),
    "vit, patches": ("vit", R | {"target_modules": ["projection"]}),
    "clip": ("clip", R | {"target_modules": ["q_proj", "out_proj", "fc1"]}),
    "clip, patches and positions": ("clip", R | {
        "target_modules": ["patch_embedding", "position_embedding"]}),
    "dinov2": ("dinov2", R | {"target_modules": "all-linear"}),
    "resnet": ("resnet", R | {
        "target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "resnet, dora": ("resnet", R | {
        "target_modules": ["convolution"], "use_dora": True}),
    "whisper": ("whisper", R | {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "whisper, convolutions": ("whisper", R | {
        "target_modules": ["conv1", "conv2", "k_proj"]}),
    "plain": ("plain", R | {
        "target_modules": ["table", "conv", "wide", "blocks.0", "blocks.2"],
        "task_type": "FEATURE_EXTRACTION"}),
    "plain, exact names": ("plain", R | {
        "target_modules": ["blocks.2", "head.0"], "bias": "all"}),
    "plain, modules of modules whole": ("plain", R | {
        "target_modules": ["blocks.0"], "modules_to_save": ["head", "norm"]}),
    "plain, gaussian": ("plain", R | {
        "target_modules": r"blocks\.[02]|wide", "init_lora_weights": "gaussian"}),
    "plain, orthogonal": ("plain", R | {
        "target_modules": ["0", "2"], "init_lora_weights": "orthogonal"}),
}  # fmt: skip


def close(path, got, want, tolerance=1e-9):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, path
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error < tolerance, (jax.tree_util.keystr(path), error)


def check(got, want, tolerance=1e-9):
    jax.tree_util.tree_map_with_path(
        lambda path, x, y: close(path, x, y, tolerance), got, want
    )


@pytest.mark.parametrize("name", CASES)
def test_merged_weights(tmp_path, name):
    kind, config = CASES[name]
    model = zoo.build(kind)
    params = models.flax_tree(model)
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    want = models.flax_tree(copy.deepcopy(adapted).merge_and_unload())
    changed = jax.tree.leaves(jax.tree.map(lambda x, y: (x != y).any(), params, want))
    assert any(changed)

    loaded = flora.peft.load(folder, params)
    check(flora.merge(loaded), want)

    flora.peft.save(tmp_path / "flora", loaded, tied={})
    again = models.reloaded(model, tmp_path / "flora").merge_and_unload()
    check(models.flax_tree(again), want)
    held, written = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "flora")
    )
    assert {k for k in written if "lora_" in k} == {k for k in held if "lora_" in k}


# Of base and residual in float32, which PEFT needs for these.
STARTS = {
    "pissa": ("llama", R | {"target_modules": QKVO, "init_lora_weights": "pissa"}),
    "pissa, dora": ("llama", R | {
        "target_modules": MLP, "init_lora_weights": "pissa", "use_dora": True}),
    "pissa, patterns": ("qwen2", R | {
        "target_modules": QKVO, "init_lora_weights": "pissa",
        "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1}}),
    "pissa, Conv1D": ("gpt2", R | {
        "target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa",
        "fan_in_fan_out": True}),
    "pissa, embeddings": ("plain", R | {
        "target_modules": ["table", "blocks.0", "head.1"],
        "init_lora_weights": "pissa", "task_type": "FEATURE_EXTRACTION"}),
    "olora": ("llama", R | {
        "target_modules": QKVO, "init_lora_weights": "olora", "use_rslora": True}),
    "olora, patterns": ("bert", R | {
        "target_modules": ["query", "dense"], "init_lora_weights": "OLoRA",
        "task_type": "SEQ_CLS", "rank_pattern": {"query": 3},
        "alpha_pattern": {"dense": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_starts_that_change_the_base(tmp_path, name):
    kind, config = STARTS[name]
    model = zoo.build(kind).float()
    params = models.flax_tree(model)
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    want = models.flax_tree(copy.deepcopy(adapted).merge_and_unload())
    loaded = flora.peft.load(folder, params)
    check(flora.merge(loaded), want, 1e-5)
    for folder, base in (("as it came", None), ("plain", params)):
        task = config.get("task_type")
        flora.peft.save(tmp_path / folder, loaded, base=base, tied={}, task_type=task)
        again = models.reloaded(model, tmp_path / folder).merge_and_unload()
        check(models.flax_tree(again), want, 1e-5)
        check(flora.merge(flora.peft.load(tmp_path / folder, params)), want, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bases_in_half_precision(tmp_path, dtype, kind):
    """PEFT keeps the factors in float32, and merges in the base's dtype."""
    import torch

    model = zoo.build(kind).to(getattr(torch, dtype))
    params = models.flax_tree(model)
    config = R | {
        "target_modules": ["q_proj", "c_attn"],
        "fan_in_fan_out": kind == "gpt2",
    }
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    want = models.flax_tree(copy.deepcopy(adapted).merge_and_unload())
    loaded = flora.peft.load(folder, params)
    check(flora.merge(loaded), want, 2.0**-7)
    flora.peft.save(tmp_path / "flora", loaded, tied={})
    held, written = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "flora")
    )
    assert {*held} == {*written}
    for key, x in held.items():
        np.testing.assert_array_equal(written[key], x)
