"""What PEFT writes, and what it reloads to the same logits, loads to the same logits.

Needs the extra peft-test.
"""

import copy
import json
import re
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flora
import flora.peft
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("x64")]

UP = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]}
# Of Unsloth, for all of a family of models.
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch_embed|embeddings|layers|layer|blocks).*?"
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense|layers).*?(?:up|down))"
    r"|(?:\blayers\.[\d]{1,}\.(?:up|down))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)
# Changes of the config that PEFT saved; `...` takes an entry away.
SETTINGS = {
    "nothing": {},
    "idle ranks": {"rank_pattern": {"q_proj": 4, "experts": 0}},
    "idle alphas": {"alpha_pattern": {"q_proj": 4, "k_proj": float("nan")}},
    "all architectures": {"target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up", "up_proj", "down",
        "c_attn", "query_key_value", "in_proj"]},
    "Unsloth's regex": {"target_modules": UNSLOTH},
    "idle modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "idle exclude_modules": {"exclude_modules": ["vision_tower", "lm_head"]},
    "idle regex of exclude_modules": {"exclude_modules": r".*vision.*"},
    "empty lists": {"exclude_modules": [], "modules_to_save": [],
        "target_parameters": [], "layers_to_transform": [], "layers_pattern": []},
    "empty values": {"alora_invocation_tokens": [], "layer_replication": [],
        "trainable_token_indices": {}, "layers_pattern": ""},
    "more layers": {"layers_to_transform": [0, 1, 2, 30], "layers_pattern": "layers"},
    "negative layers": {"layers_to_transform": [-1, 0, 1, 2],
        "layers_pattern": ["layers"]},
    "fields of 0.2": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": 0},
    "fields of a later version": {"use_magic": False, "magic_size": 0, "magic": "none",
        "magic_config": {"rank": None, "on": False}, "magic_names": []},
    "sub-configs": {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0},
        "corda_config": {"cache_file": None}},
    "runtime": {"runtime_config": {"ephemeral_gpu_offload": False}},
    "null flags": {"use_dora": None, "use_rslora": None, "lora_bias": None,
        "ensure_weight_tying": None, "inference_mode": None},
    "numbers for flags": {"use_rslora": 0, "use_dora": 0},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "alpha 0": {"lora_alpha": 0},
    "alpha below 0": {"lora_alpha": -7},
    "alpha of a float": {"lora_alpha": 7.5, "alpha_pattern": {"up": 0.0}},
    "no version": {"peft_version": ...},
    "auto_mapping": {"auto_mapping": {"base_model_class": "X", "parent_library": "y"}},
    "a revision": {"revision": "main", "base_model_name_or_path": ""},
    "random factors": {"init_lora_weights": False},
    "null start": {"init_lora_weights": None},
    "Gaussian": {"init_lora_weights": "Gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "twice": {"target_modules": ["up", "down", "up"]},
    "full names": {"target_modules": [
        f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")]},
    "what is needed alone": dict.fromkeys((
        "peft_version", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
        "use_dora", "use_rslora", "lora_dropout", "inference_mode", "task_type",
        "fan_in_fan_out", "modules_to_save", "target_parameters"), ...),
}  # fmt: skip


def adapter(tmp_path, model, config=UP):
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    return adapted, folder, tensors


def rewrite(folder, tensors, changes=()):
    config = json.loads((folder / "adapter_config.json").read_text()) | dict(changes)
    config = {k: v for k, v in config.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def as_peft_reads(model, folder):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def check(model, fn, x, folder, want, **given):
    loaded = flora.peft.load(folder, models.params_of("mlp", model), **given)
    got = flora.lora(fn)(loaded, x)
    np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())
    return loaded


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tmp_path, name):
    model, fn, x = models.build("mlp")
    _, folder, tensors = adapter(tmp_path, model)
    rewrite(folder, tensors, SETTINGS[name])
    want = models.run(as_peft_reads(model, folder), x)
    loaded = check(model, fn, x, folder, want)
    flora.peft.save(tmp_path / "flora", loaded)
    got = models.run(as_peft_reads(model, tmp_path / "flora"), x)
    np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())


# Keys of states that were not taken out of what is around the model.
KEYS = {
    "the adapter's name": (r"(lora_[AB])", r"\1.default"),
    "another name": (r"(lora_[AB])", r"\1.my-adapter"),
    "injected": (r"^base_model\.model\.", ""),
    "compiled": ("^", "_orig_mod."),
    "compiled inside": (r"^base_model\.model\.", r"base_model.model._orig_mod."),
    "compiled layers": (r"layers\.(\d)", r"layers.\1._orig_mod"),
    "sharded": (r"layers\.(\d)", r"_fsdp_wrapped_module.layers.\1"),
    "checkpointed": (r"\.(up|down)\.", r"._checkpoint_wrapped_module.\1."),
    "distributed": ("^", "module."),
    "distributed inside": (r"^base_model\.model\.", "base_model.model.module."),
    "twice": ("^", "base_model.model."),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_whole_models(tmp_path, name):
    model, fn, x = models.build("mlp")
    adapted, folder, tensors = adapter(tmp_path, model)
    rewrite(folder, {re.sub(*KEYS[name], k): v for k, v in tensors.items()})
    check(model, fn, x, folder, models.run(adapted, x))


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["mix"]}])
def test_the_state_of_a_whole_model(tmp_path, more):
    """With the base's own weights, and those from before a module trained whole."""
    model, fn, x = models.build("mlp")
    config = UP | more
    adapted, folder, _ = adapter(tmp_path, model, config)
    state = {k: v.numpy() for k, v in adapted.state_dict().items()}
    rewrite(folder, state)
    want = models.run(adapted, x)
    if "modules_to_save" not in more:  # which PEFT looks for by another key
        np.testing.assert_array_equal(models.run(as_peft_reads(model, folder), x), want)
    check(model, fn, x, folder, want)
    key = "base_model.model.layers.0.norm.weight"
    rewrite(folder, state | {key: state[key] + 1})
    with pytest.raises(flora.LoraError, match=r"layers\.0\.norm\.weight' differs from"):
        check(model, fn, x, folder, want)
    check(model, fn, x, folder, want, ignore="norm.weight")


def test_a_compiled_model(tmp_path):
    import torch

    model, fn, x = models.build("mlp")
    config = UP | {
        "target_modules": r".*\.(up|down)",
        "rank_pattern": {r"_orig_mod\.layers\.0\.up": 2},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)
        adapted, folder, tensors = adapter(tmp_path, compiled, config)
    assert any("_orig_mod" in key for key in tensors)
    inner = adapted.base_model.model._orig_mod
    check(model, fn, x, folder, models.run(inner, x))


def test_an_adapter_in_a_subfolder(tmp_path):
    model, fn, x = models.build("mlp")
    adapted = models.adapt(model, UP)
    adapted.add_adapter("second", adapted.peft_config["default"])
    folder = models.saved(adapted, tmp_path / "peft")
    check(model, fn, x, folder, models.run(adapted, x))
    adapted.set_adapter("second")
    check(model, fn, x, folder / "second", models.run(adapted.eval(), x))
