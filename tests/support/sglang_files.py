"""SGLang's own reading of adapters: its classes, and stand-ins for all it imports.

The package is installed without what it needs (`pip install --no-deps sglang`), since
its kernels are for GPUs; what reads adapters is Python and torch alone.
"""

import importlib
import importlib.util
import pathlib
import re
import sys
import types
from unittest import mock

import numpy as np

LORA = "sglang.srt.lora"
# What the files of adapters import from elsewhere in SGLang, and do not call here.
_UNUSED = {
    "sglang.srt.configs.load_config": ["LoadConfig"],
    "sglang.srt.lora.backend.base_backend": ["BaseLoRABackend"],
    "sglang.srt.model_loader.loader": ["DefaultModelLoader"],
    "sglang.srt.utils.hf_transformers_utils": ["AutoConfig"],
    "sglang.srt.model_executor.forward_batch_info": ["ForwardBatch"],
}


def classes():
    """SGLang's `utils`, `lora_config` and `lora`, under mocks of the rest."""
    # What is first imported under a patch of sys.modules would be imported again.
    for name in ("torch", "safetensors.torch", "huggingface_hub"):
        importlib.import_module(name)
    found = importlib.util.find_spec("sglang")
    root = pathlib.Path(found.submodule_search_locations[0])
    names = {k: types.ModuleType(k) for k in _packages()}
    for name, words in _UNUSED.items():
        names[name] = types.ModuleType(name)
        names[name].__dict__.update({word: object for word in words})
    with mock.patch.dict(sys.modules, names):
        names["sglang.srt.layers.utils"].get_layer_id = _source(
            root / "srt/layers/utils", "get_layer_id"
        )
        return [_real(root, name) for name in ("utils", "lora_config", "lora")]


def _packages():
    names = ["sglang.srt.layers.utils", LORA, *_UNUSED]
    return {n.rsplit(".", i)[0] for n in names for i in range(n.count(".") + 1)}


def _real(root, name):
    path = root / "srt/lora" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{LORA}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _source(folder, name):
    """A function of a package whose other parts cannot be imported."""
    for path in [folder.with_suffix(".py"), *folder.glob("*.py")]:
        text = path.read_text() if path.is_file() else ""
        if found := re.search(rf"^def {name}\(.*?(?=^\S|\Z)", text, re.M | re.S):
            scope = {"re": re}
            exec(found[0], scope)
            return scope[name]
    raise LookupError(f"{folder} has no {name}")


def deltas(parts, folder, hf_config):
    """`(scale, A, B, number of slices)` of each module as SGLang stacks them.

    hf_config: the base's config.json, of which the files of adapters read the layers.
    """
    utils, configs, lora = parts
    from safetensors.torch import load_file

    modules = {f"{LORA}.utils": utils, "sglang": types.ModuleType("sglang")}
    with mock.patch.dict(sys.modules, modules):
        config = configs.LoRAConfig(str(folder))
        base = types.SimpleNamespace(**hf_config)
        adapter = lora.LoRAAdapter("x", config, base, None, None)
        tensors = load_file(folder / "adapter_model.safetensors")
        adapter.initialize_weights_from_tensors(tensors)
    targets = utils.get_normalized_target_modules(config.target_modules)
    targets |= utils._KNOWN_LORA_TARGET_MODULES  # those that its models have
    held = {k: x for layer in adapter.layers for k, x in layer.weights.items()}
    found, used = {}, 0
    for key, a in [*held.items(), *adapter.embedding_layers.items()]:
        if "lora_A" not in key and "lora_embedding_A" not in key:
            continue
        b = (held | adapter.embedding_layers)[key.replace("_A", "_B")]
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        target = utils.get_target_module_name(name, targets)
        if name.rpartition(".")[2] != target:
            raise LookupError(f"SGLang has no buffer for {name} among {targets}.")
        # A model may say it itself; the one with qkvr does.
        count = 4 if target == "qkvr" else utils.get_stacked_multiply(target)
        used += 2
        assert (a.shape[0], b.shape[1]) == (count * config.r, config.r), key
        a, b = (np.asarray(x.double()) for x in (a, b))
        found[name] = adapter.scaling, a, b, count
    assert used == len(held) + len(adapter.embedding_layers)
    return found
