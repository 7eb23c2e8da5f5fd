"""Adapters that PEFT made and saved: logits, merged weights, gradients, and back.

Needs the extra peft-test; float64 throughout, so that the tolerances are small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flora
import flora.peft
from flora.peft import Module
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("x64")]

UP = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# (model, LoraConfig)
CASES = {
    "linear": ("mlp", UP),
    "exact names": ("mlp", UP | {"target_modules": ["layers.0.up", "mix"]}),
    "regex": ("mlp", UP | {"target_modules": r".*\.(up|gate)"}),
    "all-linear": ("mlp", {"r": 2, "lora_alpha": 1, "target_modules": "all-linear"}),
    "rslora": ("mlp", UP | {"use_rslora": True}),
    "alpha is no int": ("mlp", UP | {"lora_alpha": 2.5}),
    "patterns": ("mlp", UP | {
        "target_modules": ["up", "down", "mix"],
        "rank_pattern": {r"layers\.1\.down": 1, "up": 5},
        "alpha_pattern": {"down": 3, "mix": 1}}),
    "patterns and rslora": ("mlp", UP | {
        "use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"0.up": 3}}),
    "exclude": ("mlp", UP | {"exclude_modules": ["layers.1.up"]}),
    "layers": ("mlp", UP | {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "modules_to_save": ("mlp", UP | {"modules_to_save": ["classifier", "norm"]}),
    "bias all": ("mlp", UP | {"bias": "all"}),
    "bias lora_only": ("mlp", UP | {
        "target_modules": ["up", "gate", "down"], "bias": "lora_only"}),
    "bias all, modules_to_save": ("mlp", UP | {
        "bias": "all", "modules_to_save": ["classifier"]}),
    "bias lora_only, modules_to_save": ("mlp", UP | {
        "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "lora_bias": ("mlp", UP | {"lora_bias": True}),
    "lora_bias, rslora, patterns": ("mlp", UP | {
        "lora_bias": True, "use_rslora": True, "rank_pattern": {"up": 5}}),
    "lora_bias, no bias": ("mlp", UP | {
        "lora_bias": True, "target_modules": ["up", "gate"]}),
    "lora_bias, biases": ("mlp", UP | {"lora_bias": True, "bias": "lora_only"}),
    "conv, lora_bias": ("conv", {
        "r": 2, "lora_alpha": 5, "target_modules": ["two", "one"], "lora_bias": True}),
    "dora": ("mlp", UP | {"target_modules": ["up", "mix"], "use_dora": True}),
    "dora, rslora, patterns": ("mlp", UP | {
        "use_dora": True, "use_rslora": True, "rank_pattern": {"up": 2}}),
    "dora, modules_to_save": ("mlp", UP | {
        "use_dora": True, "modules_to_save": ["classifier"]}),
    "conv1d": ("gpt2", UP | {
        "target_modules": ["c_attn", "c_proj", "square"], "fan_in_fan_out": True}),
    "conv1d, dora": ("gpt2", UP | {
        "target_modules": ["c_attn", "square"], "fan_in_fan_out": True,
        "use_dora": True}),
    "conv": ("conv", {"r": 2, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "conv, rslora, patterns": ("conv", {
        "r": 2, "lora_alpha": 5, "target_modules": ["two", "one"], "use_rslora": True,
        "rank_pattern": {"one": 4}}),
    "conv, dora": ("conv", {
        "r": 2, "lora_alpha": 5, "target_modules": ["two", "one"], "use_dora": True}),
    "conv in groups": ("grouped", {
        "r": 4, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "conv in groups, rslora": ("grouped", {
        "r": 8, "lora_alpha": 5, "target_modules": ["one"], "use_rslora": True}),
    "embedding": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "mix", "lm_head"]}),
    "embedding, dora": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "mix"],
        "use_dora": True}),
    "embedding whole": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["mix"],
        "modules_to_save": ["embed_tokens", "lm_head"]}),
    "experts": ("experts", {
        "r": 2, "lora_alpha": 5, "target_modules": ["proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts, one": ("experts", {
        "r": 2, "lora_alpha": 5, "target_modules": [],
        "target_parameters": ["experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3}}),
    "experts, patterns": ("experts", {
        "r": 2, "lora_alpha": 5, "target_modules": [], "use_rslora": True,
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {"gate_up_proj": 1}}),
    "attention": ("attention", {"r": 2, "lora_alpha": 5, "target_modules": ["attn"]}),
    "attention, patterns": ("attention", {
        "r": 2, "lora_alpha": 5, "target_modules": ["attn", "mix"], "use_rslora": True,
        "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 2}}),
    "attention, biases": ("attention", {
        "r": 2, "lora_alpha": 5, "target_modules": ["attn"], "bias": "all"}),
    "vit": ("vit", {
        "r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "fc2"],
        "bias": "lora_only"}),
    "vit, all-linear": ("vit", {
        "r": 2, "lora_alpha": 5, "target_modules": "all-linear",
        "modules_to_save": ["classifier"]}),
    "vit, norms of layers": ("vit", {
        "r": 2, "lora_alpha": 5, "target_modules": ["q_proj"],
        "modules_to_save": ["layernorm_before"]}),
    "mixtral": ("mixtral", {
        "r": 2, "lora_alpha": 5, "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 3}}),
    "llama": ("llama", {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION}),
    "llama, all-linear": ("llama", {
        "r": 2, "lora_alpha": 4, "target_modules": "all-linear",
        "task_type": "CAUSAL_LM"}),
    "llama, embeddings": ("llama", {
        "r": 2, "lora_alpha": 4,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, layers": ("llama", {
        "r": 2, "lora_alpha": 4, "target_modules": ATTENTION,
        "layers_to_transform": 1}),
    "tokens": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["mix"],
        "trainable_token_indices": [7, 2]}),
    "tokens of table and head": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["mix"],
        "trainable_token_indices": {"embed_tokens": [3], "lm_head": [2, 1, 10]}}),
    "tokens, head whole": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["mix"],
        "trainable_token_indices": {"embed_tokens": [3, 0]},
        "modules_to_save": ["lm_head"]}),
    "llama, tokens": ("llama", {
        "r": 2, "lora_alpha": 4, "target_modules": ATTENTION,
        "trainable_token_indices": [1, 5]}),
    "tied, tokens": ("tied", {
        "r": 2, "lora_alpha": 4, "target_modules": ATTENTION,
        "trainable_token_indices": [1, 5]}),
    "tied, tokens of both": ("tied", {
        "r": 2, "lora_alpha": 4, "target_modules": ATTENTION,
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}),
    "tied": ("tied", {
        "r": 2, "lora_alpha": 4,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "ensure_weight_tying": True}),
}  # fmt: skip
NAMES = {
    "conv": {"two": "two", "one": Module("one", kind="conv")},
    "tied": lambda path: (
        [Module("model.embed_tokens"), Module("lm_head", tied=True)]
        if "embed" in path
        else Module(".".join(path.split("/")[:-1]))
    ),
}
NAMES["grouped"] = NAMES["conv"]


def tolerance_of(kind):
    """HF's models compute softmax in float32, some norms too, whatever the weights."""
    return 1e-6 if kind in ("llama", "tied", "vit", "mixtral") else 1e-10


def close(got, want, tolerance=1e-10):
    want, got = np.asarray(want), np.asarray(got)
    assert got.shape == want.shape
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error < tolerance, error


@pytest.mark.parametrize("name", CASES)
def test_adapters_that_peft_saved(tmp_path, name):
    kind, config = CASES[name]
    model, fn, x = models.build(kind)
    tolerance = tolerance_of(kind)
    params, names = models.params_of(kind, model), NAMES.get(kind)
    close(fn(params, x), models.run(model, x), tolerance)
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    want = models.run(adapted, x)
    assert np.abs(want - models.run(model, x)).max() > 1e-2

    loaded = flora.peft.load(folder, params)
    close(flora.lora(fn)(loaded, x), want, tolerance)
    _check_gradients(adapted, loaded, fn, x, names, tmp_path, 10 * tolerance)
    _check_merged(kind, adapted, loaded, fn, x)

    flora.peft.save(tmp_path / "flora", loaded, names=names)
    close(models.run(models.reloaded(model, tmp_path / "flora"), x), want, tolerance)
    again = flora.peft.load(tmp_path / "flora", params, names=names)
    close(flora.lora(fn)(again, x), want, tolerance)


def _check_gradients(adapted, loaded, fn, x, names, scratch, tolerance):
    """Those of every tensor in the file, written by `save` in PEFT's layout."""
    import torch

    y = adapted(torch.as_tensor(x))
    weights = np.random.default_rng(5).normal(size=y.shape)
    adapted.zero_grad()
    (y * torch.as_tensor(weights)).sum().backward()
    _, grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, x) * weights).sum())(
        loaded
    )
    flora.peft.save(scratch / "grads", grads, names=names, tied={})
    got = load_file(scratch / "grads" / "adapter_model.safetensors")
    checked = set()
    ties = adapted.peft_config["default"].ensure_weight_tying
    twins = {
        k: p.grad.numpy().T
        for k, p in adapted.named_parameters()
        if ties and "lm_head.lora" in k
    }
    for path, p in adapted.named_parameters():
        key = path.replace(".default", "").replace(".modules_to_save", "")
        if "magnitude" in key:
            key = key.removesuffix(".weight")
        if not p.requires_grad:
            continue
        if key not in got and "lm_head" in key:
            continue  # of a tied weight
        want = p.grad.numpy()
        for twin, grad in twins.items():  # PyTorch has the two uses' gradients apart
            if "lora_embedding" in key and ("lora_A" in twin) == key.endswith("_B"):
                want = want + grad
        if "lm_head.lora" in key and twins:
            continue
        close(got[key], want, tolerance)
        checked.add(key)
    held = load_file(scratch / "peft" / "adapter_model.safetensors")
    factors = {k for k in held if "lora_A" in k or "lora_B.weight" in k}
    assert checked == {k for k in factors if not (ties and "lm_head" in k)} | {
        k for k in checked if k not in factors
    }


def _check_merged(kind, adapted, loaded, fn, x):
    config = adapted.peft_config["default"]
    alone = config.lora_bias and (
        "gate" in config.target_modules or config.bias != "none"
    )
    if kind == "grouped" or alone:  # PEFT neither, or not if a bias is missing
        with pytest.raises(flora.LoraError, match="puts a function between"):
            flora.merge(loaded)
        return
    if kind == "tied":  # PEFT 0.21.2 adds its change twice to a tied weight
        close(fn(flora.merge(loaded), x), flora.lora(fn)(loaded, x), 1e-6)
        return
    merged = models.params_of(kind, adapted.merge_and_unload())
    jax.tree.map(close, flora.merge(loaded), merged)


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_bases_that_the_start_changed(tmp_path, how, rslora):
    """PEFT has these in float32 alone."""
    model, fn, x = models.build("mlp")
    model, x = model.float(), x.astype(np.float32)
    params = models.params_of("mlp", model)
    config = UP | {"init_lora_weights": how, "use_rslora": rslora}
    adapted = models.adapt(model, config)
    want = models.run(adapted, x)
    loaded = flora.peft.load(models.saved(adapted, tmp_path / "peft"), params)
    close(flora.lora(fn)(loaded, x), want, 5e-6)
    flora.peft.save(tmp_path / "plain", loaded, base=params)
    close(models.run(models.reloaded(model, tmp_path / "plain"), x), want, 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_in_half_precision(tmp_path, dtype):
    import torch

    model, fn, x = models.build("mlp")
    params = models.params_of("mlp", model)
    adapted = models.adapt(model, UP)
    for name, p in adapted.named_parameters():
        if "lora" in name:
            p.data = p.data.to(getattr(torch, dtype))
    folder = models.saved(adapted, tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {str(v.dtype) for v in tensors.values()} == {dtype}
    want = models.run(adapted.double(), x)
    close(flora.lora(fn)(flora.peft.load(folder, params), x), want)


@pytest.mark.parametrize("name", ["patterns and rslora", "llama", "rslora", "experts"])
def test_serving_files(tmp_path, name):
    """One rank, alpha/r for all modules, and PEFT computes the same with them."""
    kind, config = CASES[name]
    model, _, x = models.build(kind)
    adapted = models.adapt(model, config)
    folder = models.saved(adapted, tmp_path / "peft")
    loaded = flora.peft.load(folder, models.params_of(kind, model))
    flora.peft.save(tmp_path / "serving", loaded, serving=True)
    back = models.reloaded(model, tmp_path / "serving")
    close(models.run(back, x), models.run(adapted, x), tolerance_of(kind))
    written = back.peft_config["default"]
    assert written.rank_pattern == written.alpha_pattern == {}
    assert not written.use_rslora


def test_adapters_of_flora_run_in_peft(tmp_path):
    """Made by `init`, trained a little, and read by PEFT with no key left over."""
    import optax

    model, fn, x = models.build("llama")
    params = models.params_of("llama", model)
    config = flora.LoraConfig(
        rank=2, target="*_proj/kernel", train="lm_head/kernel", dtype=jnp.float64
    )
    tree = flora.init(jax.random.key(0), config, fn, params, x)
    tx = flora.optimizer(optax.adam(1e-2), tree)
    state = tx.init(tree)
    step = jax.jit(flora.value_and_grad(lambda t: (flora.lora(fn)(t, x) ** 2).mean()))
    for _ in range(3):
        _, grads = step(tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    flora.peft.save(tmp_path / "a", tree)
    back = models.reloaded(model, tmp_path / "a")
    close(models.run(back, x), flora.lora(fn)(tree, x), tolerance_of("llama"))


@pytest.mark.parametrize("how", [True, "gaussian", False])
def test_factors_start_as_pefts_do(how):
    """Standard deviation and largest value of each factor, of each kind of module."""
    import peft
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(300, 120)
            self.linear = torch.nn.Linear(120, 90)
            self.conv = torch.nn.Conv2d(40, 80, 3)

    def fn(p, ids, image):
        conv = jax.lax.conv_general_dilated(
            image, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return p["table"][ids] @ p["linear"], conv

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16, target_modules=["table", "linear", "conv"], init_lora_weights=how
    )
    theirs = peft.get_peft_model(Net(), config).base_model.model
    shapes = {"table": (300, 120), "linear": (120, 90), "conv": (3, 3, 40, 80)}
    params = {k: jnp.zeros(s, jnp.float32) for k, s in shapes.items()}
    ours = flora.init(
        jax.random.key(0),
        flora.LoraConfig(rank=16, target="*", init=flora.initializers.peft(how)),
        fn, params, jnp.arange(3), jnp.ones((1, 4, 4, 40), jnp.float32),
    )  # fmt: skip
    for name, node in ours.items():
        module = getattr(theirs, name)
        if name == "table":
            factors = module.lora_embedding_A, module.lora_embedding_B
            factors = [x["default"] for x in factors]
        else:
            factors = [x["default"].weight for x in (module.lora_A, module.lora_B)]
        for x, y in zip((node.a, node.b), factors, strict=True):
            assert x.size == y.numel(), name
            std, wanted = float(jnp.std(x)), float(y.detach().std())
            assert abs(std - wanted) <= 0.06 * wanted, name
            top, largest = float(abs(x).max()), float(y.detach().abs().max())
            assert abs(top - largest) <= 0.25 * largest, name


HALF = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TIED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "embedding, whole": {"modules_to_save": ["embed_tokens"]},
    "head, whole": {"modules_to_save": ["lm_head"]},
    "both, whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_uses_of_a_tied_weight_are_right_or_refused(tmp_path, name, ensured):
    model, fn, x = models.build("tied")
    params, table = models.params_of("tied", model), "model/embed_tokens/embedding"
    config = HALF | TIED[name] | {"ensure_weight_tying": ensured}
    adapted = models.adapt(model, config)
    want = models.run(adapted, x)
    folder = models.saved(adapted, tmp_path / "peft")

    def only_head(path):
        return Module("lm_head") if path == table else NAMES["tied"](path)

    followed = {"fn": fn, "args": (x,)}
    given = {
        "plain": {}, "followed": followed, "named": {"names": NAMES["tied"]},
        "as a head": {"names": only_head}, "as a head, followed": {
            "names": only_head, **followed},
    }  # fmt: skip
    loads, saves = 0, 0
    for settings in given.values():
        try:
            loaded = flora.peft.load(folder, params, **settings)
        except flora.LoraError:
            continue
        loads += 1
        close(flora.lora(fn)(loaded, x), want, 1e-6)
        for more in ({}, followed, {"tied": {table: "lm_head"}}, given["named"]):
            try:
                flora.peft.save(tmp_path / "flora", loaded, **more)
            except flora.LoraError:
                continue
            saves += 1
            again = models.run(models.reloaded(model, tmp_path / "flora"), x)
            close(again, want, 1e-6)
    assert (loads, saves) == ((3, 12) if ensured else (0, 0))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"rank_pattern": {"embed_tokens": 3}}, "scales 0.666667 and 1 by"),
        ({"alpha_pattern": {"lm_head": 3}}, "scales 1 and 1.5 by"),
        ({"use_dora": True}, "tied, and DoRA"),
    ],
)
def test_uses_of_a_tied_weight_that_peft_changes_apart(tmp_path, more, match):
    """With the same factors, but by other scales or magnitudes."""
    model, _, _ = models.build("tied")
    config = HALF | {"r": 2, "lora_alpha": 2, "ensure_weight_tying": True}
    adapted = models.adapt(model, config | TIED["embedding"] | more)
    folder = models.saved(adapted, tmp_path)
    with pytest.raises(flora.LoraError, match=match):
        flora.peft.load(folder, models.params_of("tied", model))
