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
    "conv": ("conv", {"r": 2, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "conv in groups": ("grouped", {
        "r": 4, "lora_alpha": 5, "target_modules": ["two", "one"]}),
    "embedding": ("embedding", {
        "r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "mix"]}),
    "experts": ("experts", {
        "r": 2, "lora_alpha": 5, "target_modules": ["proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
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
