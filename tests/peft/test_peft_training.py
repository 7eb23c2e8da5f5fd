"""Training runs of PEFT, matched loss by loss: AdamW in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("x64")]

STEPS, RATE, DECAY = 15, 3e-3, 0.1
UP = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down", "mix"]}
# (model, LoraConfig)
RUNS = {
    "plain": ("mlp", UP),
    "rslora": ("mlp", UP | {"use_rslora": True, "rank_pattern": {"up": 5}}),
    "dora": ("mlp", UP | {"use_dora": True}),
    "modules_to_save and biases": ("mlp", UP | {
        "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "lora_bias": ("mlp", UP | {"lora_bias": True, "use_rslora": True}),
    "lora_bias, no bias": ("mlp", UP | {
        "lora_bias": True, "target_modules": ["up", "gate"]}),
    "conv": ("conv", {"r": 2, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "conv in groups": ("grouped", {
        "r": 4, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "embedding": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "mix"]}),
    "attention": ("attention", {
        "r": 2, "lora_alpha": 5, "target_modules": ["attn", "mix"]}),
    "tokens": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["mix"],
        "trainable_token_indices": {"embed_tokens": [3, 8], "lm_head": [2, 1, 10]}}),
    "experts": ("experts", {
        "r": 2, "lora_alpha": 5, "target_modules": ["proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}  # fmt: skip


def stacked(p, x):
    """The MLP with its layers in one leaf each, run by a loop."""

    def layer(x, q):
        h = jnp.tanh(models.dense(q["up"], models.norm(q["norm"], x)))
        return x + models.dense(q["down"], h * models.dense(q["gate"], x)), None

    x, _ = jax.lax.scan(layer, x, p["layers"])
    return models.dense(p["classifier"], models.dense(p["mix"], x))


def fused(p, x):
    """The same, its up and gate projections in one leaf, behind each other."""
    q = dict(p["layers"])
    up, gate = jnp.split(q.pop("both")["kernel"], 2, -1)
    q |= {"up": {"kernel": up, "bias": q.pop("bias")}, "gate": {"kernel": gate}}
    return stacked({**p, "layers": q}, x)


def stack_of(params):
    layers = [params["layers"][str(i)] for i in range(3)]
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def fuse(params):
    tree = stack_of(params)
    q = dict(tree["layers"])
    up, gate = q.pop("up"), q.pop("gate")
    both = jnp.concatenate([up["kernel"], gate["kernel"]], -1)
    return {**tree, "layers": q | {"both": {"kernel": both}, "bias": up["bias"]}}


APART = {
    "alphas": {"alpha_pattern": {"layers.1.up": 56, "layers.2.down": 1}},
    "ranks": {"rank_pattern": {"layers.1.up": 5, "layers.0.down": 1}},
    "ranks, stabilized": {"rank_pattern": {"layers.1.up": 5}, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "rank_pattern": {"layers.1.up": 5}},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "some layers, DoRA": {
        "layers_to_transform": [1], "layers_pattern": "layers", "use_dora": True},
    "all of it, DoRA": {
        "alpha_pattern": {"layers.1.up": 56}, "rank_pattern": {"layers.0.up": 5},
        "use_dora": True, "exclude_modules": "layers.2.up"},
}  # fmt: skip


def batches(x, y):
    """One batch a step: inputs like x, targets like y."""
    random = np.random.default_rng(3)
    for _ in range(STEPS):
        if np.issubdtype(x.dtype, np.integer):
            inputs = random.integers(0, x.max() + 1, x.shape)
        else:
            inputs = random.normal(size=x.shape)
        yield inputs, random.normal(size=y.shape)


def of_peft(adapted, data, optimizer):
    """The losses of a run, one before each step."""
    import torch

    losses = []
    for x, y in data:
        loss = ((adapted(torch.as_tensor(x)) - torch.as_tensor(y)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def of_flora(tree, fn, data, tx):
    apply = flora.lora(fn)

    @jax.jit
    def step(tree, state, x, y):
        loss, grads = flora.value_and_grad(lambda t: ((apply(t, x) - y) ** 2).mean())(
            tree
        )
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, loss

    state, losses = tx.init(tree), []
    for x, y in data:
        tree, state, loss = step(tree, state, jnp.asarray(x), jnp.asarray(y))
        losses.append(float(loss))
    return np.array(losses), tree


def start(tmp_path, name):
    """A PEFT model as it starts, the same for flora, and the data."""
    import torch

    kind, config = RUNS[name]
    model, fn, x = models.build(kind)
    torch.manual_seed(2)
    adapted = models.wrapped(model, config)
    folder = models.saved(adapted, tmp_path / "start")
    tree = flora.peft.load(folder, models.params_of(kind, model))
    return adapted, tree, fn, list(batches(x, models.run(model, x)))


def check(losses, want):
    assert np.abs(np.diff(want)).max() > 1e-3 * want.max()
    np.testing.assert_allclose(losses, want, rtol=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_each_loss_is_that_of_peft(tmp_path, name):
    import torch

    adapted, tree, fn, data = start(tmp_path, name)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    tx = flora.optimizer(optax.adamw(RATE, weight_decay=DECAY), tree)
    losses, tree = of_flora(tree, fn, data, tx)
    check(losses, of_peft(adapted, data, optimizer))


def names_of(tree):
    """Which module each leaf of a stacked tree holds."""
    found = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        words = [k.key for k in path]
        leaf = "/".join(words)
        if words[0] != "layers":
            found[leaf] = flora.peft.Module(
                words[0], parameter="weight" if words[1] != "bias" else "bias"
            )
        elif words[1] == "both":
            found[leaf] = ["layers.{i}.up", "layers.{i}.gate"]
        elif words[1] == "bias":
            found[leaf] = flora.peft.Module("layers.{i}.up", parameter="bias")
        else:
            word = "bias" if words[-1] == "bias" else "weight"
            module = "layers.{i}." + words[1]
            found[leaf] = flora.peft.Module(module, parameter=word)
    return found


@pytest.mark.parametrize("how", [stacked, fused])
@pytest.mark.parametrize("name", APART)
def test_adapters_that_differ_within_one_leaf(tmp_path, name, how):
    import torch

    config = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "gate", "down"]}
    model, _, x = models.build("mlp")
    torch.manual_seed(2)
    adapted = models.wrapped(model, config | APART[name])
    for key, p in adapted.named_parameters():  # so that A too trains at once
        if "lora_B" in key:
            p.data += 0.1 * torch.randn_like(p)
    folder = models.saved(adapted, tmp_path / "start")
    params = models.params_of("mlp", model)
    tree = stack_of(params) if how is stacked else fuse(params)
    names = names_of(tree)
    tree = flora.peft.load(folder, tree, names=names)
    data = list(batches(x, models.run(model, x)))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    tx = flora.optimizer(optax.adamw(RATE, weight_decay=DECAY), tree)
    losses, tree = of_flora(tree, how, data, tx)
    check(losses, of_peft(adapted, data, optimizer))

    flora.peft.save(tmp_path / "trained", tree, names=names)
    again = models.reloaded(model, tmp_path / "trained")
    np.testing.assert_allclose(
        models.run(again, x), flora.lora(how)(tree, jnp.asarray(x)), rtol=1e-9
    )
    mine = {k: v.numpy() for k, v in again.state_dict().items() if "lora" in k}
    theirs = {k: v.detach().numpy() for k, v in adapted.state_dict().items()}
    for key, value in mine.items():
        np.testing.assert_allclose(value, theirs[key], atol=1e-9)
    assert {*mine} == {k for k in theirs if "lora" in k}


def test_lora_plus(tmp_path):
    import torch
    from peft.optimizers import create_loraplus_optimizer

    import flora.recipes

    adapted, tree, fn, data = start(tmp_path, "plain")
    optimizer = create_loraplus_optimizer(
        adapted, torch.optim.Adam, lr=RATE, loraplus_lr_ratio=8
    )
    tx = optax.chain(optax.adam(RATE), flora.recipes.lora_plus(8.0))
    losses, _ = of_flora(tree, fn, data, flora.optimizer(tx, tree))
    check(losses, of_peft(adapted, data, optimizer))


def adam_of_hf(rate, b1=0.9, b2=0.999, eps=1e-6):
    """Adam whose ε is added before the second moment's bias is corrected."""

    def update(grads, state, params=None):
        count, m, v = state
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
        size = rate * jnp.sqrt(1 - b2 ** (count + 1)) / (1 - b1 ** (count + 1))
        updates = jax.tree.map(lambda m, v: -size * m / (jnp.sqrt(v) + eps), m, v)
        return updates, (count + 1, m, v)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.float64), zeros, zeros

    return optax.GradientTransformation(init, update)


def test_lora_fa(tmp_path):
    from peft.optimizers import create_lorafa_optimizer

    import flora.recipes

    adapted, tree, fn, data = start(tmp_path, "plain")
    optimizer = create_lorafa_optimizer(adapted, r=3, lora_alpha=7, lr=RATE)
    tx = flora.recipes.lora_fa(adam_of_hf(RATE))
    losses, after = of_flora(tree, fn, data, flora.optimizer(tx, tree))
    check(losses, of_peft(adapted, data, optimizer))
    a, b = (t["mix"]["kernel"].a for t in (tree, after))
    np.testing.assert_array_equal(a, b)
