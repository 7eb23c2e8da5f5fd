"""Kinds of adapters that PEFT has beside LoRA: read, trained step by step, written."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import flora
import flora.peft
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft]

STEPS, RATE, DECAY = 6, 1e-2, 0.1


def close(x, y, tolerance=2e-5):
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    assert np.abs(x - y).max() < tolerance * np.abs(y).max()


def build(kind, dtype="float32"):
    import torch

    model, fn, x = models.build(kind)
    model = model.to(getattr(torch, dtype))
    if x.dtype.kind == "f":
        x = x.astype(dtype)
    return model, fn, x, models.params_of(kind, model)


def run(model, x):
    """The logits, of a model that must see its tokens by name."""
    import torch

    with torch.no_grad():
        x = torch.as_tensor(x)
        return (model(x) if x.is_floating_point() else model(input_ids=x)).numpy()


def train(adapted, x, y):
    import torch

    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY), []
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    for _ in range(STEPS):
        got = adapted(x) if x.is_floating_point() else adapted(input_ids=x)
        loss = ((got - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_here(tree, apply, x, y):
    tx = flora.optimizer(optax.adamw(RATE, weight_decay=DECAY), tree)
    state, losses = tx.init(tree), []

    @jax.jit
    def step(tree, state):
        loss, grads = flora.value_and_grad(lambda t: ((apply(t, x) - y) ** 2).mean())(
            tree
        )
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, loss

    for _ in range(STEPS):
        tree, state, loss = step(tree, state)
        losses.append(float(loss))
    return tree, losses


def cases():
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig

    mlp = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down", "mix"]}
    diagonal = {
        "target_modules_bd_a": ["down"],
        "target_modules_bd_b": ["up"],
        "nblocks": 2,
        "match_strict": False,
    }
    return {
        "bd-lora": ("mlp", mlp | {"use_bdlora": BdLoraConfig(**diagonal)}),
        "bd-lora, rslora": ("mlp", mlp | {
            "use_bdlora": BdLoraConfig(**diagonal), "use_rslora": True,
            "rank_pattern": {"layers.1.down": 2}}),
        "kasa": ("mlp", mlp | {"r": 2, "kasa_config": KasaConfig(beta=1e-3)}),
        "alora": ("llama", {
            "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"],
            "task_type": "CAUSAL_LM", "alora_invocation_tokens": [6, 3]}),
        "alora, everywhere": ("llama", {
            "r": 2, "lora_alpha": 4, "target_modules": "all-linear",
            "task_type": "CAUSAL_LM", "alora_invocation_tokens": [0]}),
        "tokens alone": ("llama", {
            "peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"],
            "token_indices": [3, 9]}),
        "qalora": ("mlp", mlp | {"use_qalora": True, "qalora_group_size": 2}),
    }  # fmt: skip


NAMES = (
    "bd-lora", "bd-lora, rslora", "kasa", "alora", "alora, everywhere", "tokens alone",
    "qalora",
)  # fmt: skip


def adapted_from(model, config):
    """A PEFT model whose adapter looks trained."""
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.get("peft_type"):
            own = {k: v for k, v in config.items() if k != "peft_type"}
            own = peft.TrainableTokensConfig(**own)
        else:
            own = peft.LoraConfig(**config)
        adapted = peft.get_peft_model(copy.deepcopy(model), own)
    torch.manual_seed(3)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return adapted.eval()


@pytest.mark.parametrize("name", NAMES)
def test_read_trained_and_written_as_in_peft(tmp_path, name):
    kind, config = cases()[name]
    model, fn, x, params = build(kind)
    adapted = adapted_from(model, config)
    tokens = "alora_invocation_tokens" in config

    def apply(tree, x):
        tree = flora.peft.activate(tree, x) if tokens else tree
        return flora.lora(fn)(tree, x)

    loaded = flora.peft.load(models.saved(adapted, tmp_path / "start"), params)
    want = run(adapted, x)
    assert np.abs(want - run(model, x)).max() > 1e-2
    close(apply(loaded, jnp.asarray(x)), want)
    y = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
    losses = train(adapted, x, y)
    after, ours = train_here(loaded, apply, jnp.asarray(x), y)
    close(ours, losses, 1e-4)
    assert losses[0] - losses[-1] > 1e-3 * losses[0]

    flora.peft.save(tmp_path / "trained", after)
    again = models.reloaded(model, tmp_path / "trained")
    close(run(again, x), run(adapted, x), 1e-4)
    theirs = load_file(
        models.saved(adapted, tmp_path / "a") / "adapter_model.safetensors"
    )
    held = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert {*held} == {*theirs}
    for key, value in held.items():
        close(value, theirs[key], 1e-3)
    if tokens:
        with pytest.raises(flora.LoraError, match="No merged weight is that"):
            flora.merge(after)
        return
    merged = models.params_of(kind, adapted.merge_and_unload())
    jax.tree.map(lambda x, y: close(x, y, 1e-4), flora.merge(after), merged)


@pytest.mark.parametrize("name", ["bd-lora, rslora"])
def test_servers_get_them_in_full(tmp_path, name):
    kind, config = cases()[name]
    model, _, x, params = build(kind)
    adapted = adapted_from(model, config)
    loaded = flora.peft.load(models.saved(adapted, tmp_path / "start"), params)
    flora.peft.save(tmp_path / "served", loaded, serving=True)
    again = models.reloaded(model, tmp_path / "served")
    assert again.peft_config["default"].use_bdlora is None
    close(run(again, x), run(adapted, x))


def test_layers_that_are_repeated(tmp_path):
    """Each copy has factors of its own over the base's one layer."""
    spans = [[0, 2], [1, 2], [0, 1]]
    model, _, x, params = build("llama")
    config = {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
        "layer_replication": spans,
    }  # fmt: skip
    adapted = adapted_from(model, config)
    layers = params["model"]["layers"]
    params["model"]["layers"] = {str(i): layers[j] for i, j in enumerate("0110")}

    def fn(p, x):
        return models.llama(p, x, layers=4)

    loaded = flora.peft.load(models.saved(adapted, tmp_path / "start"), params)
    close(flora.lora(fn)(loaded, jnp.asarray(x)), run(adapted, x))
    y = np.random.default_rng(1).normal(size=(*x.shape, 13)).astype(np.float32)
    losses = train(adapted, x, y)
    after, ours = train_here(loaded, flora.lora(fn), jnp.asarray(x), y)
    close(ours, losses, 1e-4)
    flora.peft.save(tmp_path / "trained", after, layer_replication=spans)
    again = models.reloaded(model, tmp_path / "trained")
    close(run(again, x), run(adapted, x), 1e-4)
