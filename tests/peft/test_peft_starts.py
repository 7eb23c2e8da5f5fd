"""Adapters that started in one of PEFT's other ways, read, trained on and written."""

import copy
import dataclasses
import sys
import types
import unittest.mock
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import torch_models as models

pytestmark = [pytest.mark.peft]

TARGETS = ["up", "down", "mix"]
STEPS, RATE, DECAY = 6, 1e-2, 0.1


def data():
    random = np.random.default_rng(7)
    for _ in range(STEPS):
        yield (
            random.normal(size=(5, 6)).astype(np.float32),
            random.normal(size=(5, 4)).astype(np.float32),
        )


def started(model, how):
    """A PEFT model as it starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _started(model, how)


def _started(model, how):
    import peft
    import torch

    own = copy.deepcopy(model)
    x, y = map(torch.as_tensor, next(data()))
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS}
    if how == "corda":
        attr = types.SimpleNamespace(dataclass=dataclasses.dataclass)
        with unittest.mock.patch.dict(sys.modules, {"attr": attr}):  # not installed
            from peft.tuners.lora.corda import preprocess_corda

        corda = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        config = peft.LoraConfig(
            **settings, init_lora_weights="corda", corda_config=corda
        )
        preprocess_corda(own, config, run_model=lambda: own(x))
    elif how == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        ga = peft.tuners.lora.LoraGAConfig()
        config = peft.LoraConfig(
            **settings, init_lora_weights="lora_ga", lora_ga_config=ga
        )
        own.train()
        preprocess_loraga(own, config, lambda: ((own(x) - y) ** 2).mean().backward())
        own.eval()
    else:
        config = peft.LoraConfig(**settings, init_lora_weights=how)
    return peft.get_peft_model(own, config)


def train(adapted):
    import torch

    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY), []
    for x, y in data():
        loss = ((adapted(torch.as_tensor(x)) - torch.as_tensor(y)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_here(tree, fn):
    tx = flora.optimizer(optax.adamw(RATE, weight_decay=DECAY), tree)
    apply, state, losses = flora.lora(fn), tx.init(tree), []

    @jax.jit
    def step(tree, state, x, y):
        loss, grads = flora.value_and_grad(lambda t: ((apply(t, x) - y) ** 2).mean())(
            tree
        )
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, loss

    for x, y in data():
        tree, state, loss = step(tree, state, x, y)
        losses.append(float(loss))
    return tree, losses


def case():
    model, fn, x = models.build("mlp")
    model = model.float()
    return model, fn, jnp.asarray(x, jnp.float32), models.params_of("mlp", model)


def close(x, y, tolerance=2e-5):
    x, y = np.asarray(x), np.asarray(y)
    assert np.abs(x - y).max() < tolerance * np.abs(y).max()


@pytest.mark.parametrize("how", ["pissa_niter_2", "corda", "lora_ga", "pissa"])
def test_bases_that_only_the_start_tells(tmp_path, how):
    model, fn, x, params = case()
    adapted = started(model, how)
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT's pages say
    start = models.saved(adapted, tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = how
    first = models.saved(adapted, tmp_path / "first")
    tree = flora.peft.load(first, params, start=start)
    want = train(adapted)
    after, losses = train_here(tree, fn)
    close(losses, want)
    close(flora.lora(fn)(after, x), models.run(adapted, x))

    trained = models.saved(adapted, tmp_path / "trained")
    loaded = flora.peft.load(trained, params, start=start)
    close(flora.lora(fn)(loaded, x), models.run(adapted, x))
    jax.tree.map(
        close,
        flora.merge(loaded),
        models.params_of("mlp", copy.deepcopy(adapted).merge_and_unload()),
    )
    flora.peft.save(tmp_path / "plain", loaded, base=params)
    again = models.reloaded(model, tmp_path / "plain")
    close(models.run(again, x), models.run(adapted, x))

    if how != "pissa":
        with pytest.raises(flora.LoraError, match="cannot be repeated"):
            flora.peft.load(trained, params)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "lora_ga"])
def test_what_peft_converted(tmp_path, how):
    """Of twice the rank, on the plain base."""
    model, fn, x, params = case()
    adapted = started(model, how)
    config = adapted.peft_config["default"]
    config.init_lora_weights = True
    models.saved(adapted, tmp_path / "start")
    config.init_lora_weights = how
    train(adapted)
    want = models.run(adapted, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "start"),
        )
    loaded = flora.peft.load(tmp_path / "converted", params)
    close(flora.lora(fn)(loaded, x), want)


@pytest.mark.parametrize("how", ["mica", "orthogonal", "gaussian", False])
def test_starts_that_leave_the_base(tmp_path, how):
    model, fn, x, params = case()
    adapted = started(model, how)
    tree = flora.peft.load(models.saved(adapted, tmp_path / "start"), params)
    want = train(adapted)
    after, losses = train_here(tree, fn)
    close(losses, want)
    flora.peft.save(tmp_path / "trained", after)
    again = models.reloaded(model, tmp_path / "trained")
    close(models.run(again, x), models.run(adapted, x))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    if how == "mica":
        assert not any("lora_B" in n for n in trained)
        assert again.peft_config["default"].init_lora_weights == "mica"


def test_mica_starts_as_in_peft(tmp_path):
    model, fn, x, params = case()
    theirs = flora.peft.load(
        models.saved(started(model, "mica"), tmp_path / "start"), params
    )
    config = flora.LoraConfig(
        rank=2, alpha=6, target="mix/kernel", variant=flora.variants.MiCA()
    )
    ours = flora.init(jax.random.key(0), config, fn, params, x)
    one, two = (t["mix"]["kernel"] for t in (theirs, ours))
    np.testing.assert_array_equal(one.a, two.a)
    signs = np.sign((one.b * two.b).sum(1, keepdims=True))
    close(two.b * signs, one.b, 1e-4)


def test_mica_of_an_embedding(tmp_path):
    import torch

    model, fn, x = models.build("embedding")
    model = model.float()
    config = {"r": 2, "target_modules": ["embed_tokens"], "init_lora_weights": "mica"}
    adapted = models.wrapped(model, config)
    torch.manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    params = models.params_of("embedding", model)
    loaded = flora.peft.load(models.saved(adapted, tmp_path / "a"), params)
    close(flora.lora(fn)(loaded, x), models.run(adapted, x))
    assert loaded["embed_tokens"]["embedding"].variant == flora.variants.MiCA()
    flora.peft.save(tmp_path / "b", loaded)
    again = models.reloaded(model, tmp_path / "b")
    close(models.run(again, x), models.run(adapted, x))
