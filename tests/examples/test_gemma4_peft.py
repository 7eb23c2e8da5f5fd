"""The names of examples/finetune_gemma4.py, in the hands of transformers and PEFT."""

import json
import types

import finetune_gemma4
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flora
import flora.hf
import flora.peft

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

# What Tunix's layers do with each kernel.
EINSUMS = {
    "q_einsum/w": "btd,ndh->btnh",
    "k_einsum/w": "bsd,kdh->bskh",
    "kv_einsum/w": "bsd,ckdh->cbskh",
    "attn_vec_einsum/w": "btnh,nhd->btd",
    "gate_proj/kernel": "btd,df->btf",
    "up_proj/kernel": "btd,df->btf",
    "down_proj/kernel": "btf,fd->btd",
}


def spec_of(path):
    found = [spec for end, spec in EINSUMS.items() if path.endswith(end)]
    return found[0] if found else None


def run(params, inputs):
    """Each kernel on an input of its own, as its layer reads it."""
    return {k: jnp.einsum(spec_of(k), x, params[k]) for k, x in inputs.items()}


def shape_of(path, tensor, files):
    """Of the leaf that Tunix has."""
    shape = files[tensor.names[0]].shape
    if tensor.split is not None:
        one = tuple(tensor.split[i] for i in tensor.axes)
        return one if isinstance(tensor.keys, str) else (len(tensor.keys), *one)
    if path.endswith("attn_vec_einsum/w"):
        heads = finetune_gemma4.TINY["num_heads"]
        return (heads, shape[1] // heads, shape[0])
    return shape if tensor.axes is None else shape[::-1]


def test_adapter_and_merged_weights_are_pefts(tmp_path):
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = types.SimpleNamespace(**finetune_gemma4.TINY)
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    about = json.dumps(finetune_gemma4.hf_config(config))
    (base / "config.json").write_text(about)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).float()
    model.save_pretrained(base)
    files = load_file(base / "model.safetensors")

    names = finetune_gemma4.tensors(config, "model.")
    like = {
        path: jax.ShapeDtypeStruct(shape_of(path, tensor, files), jnp.float32)
        for path, tensor in names.items()
    }
    params = flora.hf.load(base, like, names)
    inputs = {}
    for path, x in params.items():
        if (spec := spec_of(path)) is None:
            continue
        read, kernel = spec.split("->")[0].split(",")
        sizes = dict(zip(kernel, x.shape, strict=True)) | {"b": 1, "t": 2, "s": 2}
        inputs[path] = jnp.ones([sizes[c] for c in read])
    settings = flora.LoraConfig(rank=3, alpha=6, target=finetune_gemma4.TARGET)
    adapted = flora.init(jax.random.key(0), settings, run, params, inputs)
    rng = np.random.default_rng(0)
    frozen, adapter = flora.split(adapted)
    adapter = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), adapter)
    adapted = flora.join(frozen, adapter)

    flora.peft.save(out, adapted, names=finetune_gemma4.modules("model."), fn=run,
                    args=(inputs,))  # fmt: skip
    merged = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
    theirs = {k: v.numpy() for k, v in merged.state_dict().items()}
    flora.hf.save(tmp_path / "merged", flora.merge(adapted), names)
    ours = load_file(tmp_path / "merged/model.safetensors")
    assert {*ours} == {*files}
    changed = 0
    for key, x in ours.items():
        np.testing.assert_allclose(x, theirs[key], atol=1e-5, err_msg=key)
        changed += bool(abs(x - files[key]).max() > 0.1)
    assert changed == 6 * 7 - 1  # the global layer has no v
