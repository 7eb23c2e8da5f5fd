import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import flora
from flora import recipes
from tests.support import contract
from tests.support.adapters import (
    ADAPTED,
    ALPHA,
    GRADS,
    KINDS,
    PLACES,
    RANK,
    SCALE,
    WAYS,
    WHOLE,
    bits,
    close,
    expected,
    f32,
    loss_fn,
    numpy_adamw,
    on_mesh,
    small,
    steps,
    unchanged,
    values,
)


@pytest.mark.parametrize("way", WAYS)
def test_lora_plus(way):
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), recipes.lora_plus(16.0))
    got, _ = steps(tx, way)
    rates = {place: 1e-2 * (16 if place[1] == "b" else 1) for place in PLACES}
    close(got, expected(rates, dict.fromkeys(PLACES, 0.1)))
    assert unchanged(got)


def test_lora_plus_as_peft_groups_it():
    """A at η, embeddings at their own, B and 1-D arrays at 16 η; biases: no decay."""
    lr, ratio, lr_embedding = 1e-2, 16.0, 1e-4
    rates = {"embedding": lr_embedding / lr, "head/bias": ratio, "*": {"b": ratio}}
    tx = optax.chain(
        optax.adamw(lr, weight_decay=0.1, mask=recipes.decay_mask(ADAPTED)),
        recipes.scale_rates(rates, ADAPTED),
    )
    got, _ = steps(tx, "in optimizer")
    want = dict.fromkeys(PLACES, lr)
    want["embedding", "a"] = want["embedding", "b"] = lr_embedding
    want["layers/kernel", "b"] = want["head/bias", "train"] = lr * ratio
    decays = {place: 0.0 if place[0] == "head/bias" else 0.1 for place in PLACES}
    close(got, expected(want, decays))
    assert unchanged(got)


def test_lora_plus_in_injected_hyperparameters_and_sweeps():
    plus = optax.inject_hyperparams(recipes.lora_plus)(ratio=lambda t: 2.0 ** (t + 1))
    got, state = steps(optax.chain(optax.sgd(0.1), plus), "adapter")
    start, grads = values(ADAPTED), [values(g) for g in GRADS]
    b = ("embedding", "b")
    want = start[b] - 0.1 * 2 * grads[0][b] - 0.1 * 4 * grads[1][b]
    np.testing.assert_allclose(values(got)[b], want, rtol=1e-5)
    assert float(state[1].hyperparams["ratio"]) == 4.0

    @jax.jit
    @jax.vmap
    def sweep(lr, ratio):
        tx = optax.chain(optax.sgd(lr), recipes.lora_plus(ratio))
        return values_of(steps(tx, "adapter", GRADS[:1])[0])

    def values_of(t):
        return [get(t) for get in PLACES.values()]

    found = sweep(jnp.array([0.1, 0.2, 0.2]), jnp.array([1.0, 1.0, 5.0]))
    for i, (lr, ratio) in enumerate([(0.1, 1), (0.2, 1), (0.2, 5)]):
        for place, x in zip(PLACES, found, strict=True):
            eta = lr * (ratio if place[1] == "b" else 1)
            np.testing.assert_allclose(
                x[i], start[place] - eta * grads[0][place], rtol=1e-4, atol=1e-5
            )


def projected(g, t):
    """scale⁻² (Aᵀ A)⁻¹ g_B for each matrix, in NumPy."""
    a = np.asarray(t.a, np.float64)
    stack = a.shape[: len(t.layout.stack)]
    a = a.reshape(*stack, -1, RANK)
    g = np.asarray(g.b, np.float64)
    flat = g.reshape(*stack, RANK, -1)
    out = np.linalg.pinv(np.swapaxes(a, -1, -2) @ a) @ flat / SCALE**2
    return out.reshape(g.shape)


@pytest.mark.parametrize("way", [*WAYS, "bare whole tree"])
def test_lora_fa(way):
    tx = recipes.lora_fa(optax.adamw(1e-2, weight_decay=0.1))
    got, state = steps(tx, way)
    grads = [values(g) for g in GRADS]
    for each, g in zip(grads, GRADS, strict=True):
        each["layers/kernel", "b"] = projected(
            g["layers"]["kernel"], ADAPTED["layers"]["kernel"]
        )
        each["embedding", "b"] = projected(g["embedding"], ADAPTED["embedding"])
    rates = {place: 0.0 if place[1] == "a" else 1e-2 for place in PLACES}
    want = numpy_adamw(values(ADAPTED), grads, rates, dict.fromkeys(PLACES, 0.1))
    close(got, want)
    assert unchanged(got)
    for name in ("embedding", "layers"):
        x, y = (
            t[name] if name == "embedding" else t[name]["kernel"]
            for t in (got, ADAPTED)
        )
        assert np.array_equal(bits(x.a), bits(y.a))
    trained = sum(x.size for (_, part), x in values(ADAPTED).items() if part != "a")
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == 2 * trained + 1  # A has no moments


def test_lora_fa_moves_delta_by_the_projected_full_gradient():
    """ΔW ← ΔW - η A (AᵀA)⁻¹ Aᵀ G, with g_B = scale Aᵀ G; A's updates are -0.0."""
    w = ADAPTED["embedding"]
    full = np.asarray(f32(9, 6, seed=7), np.float64)
    a = np.asarray(w.a, np.float64)
    g = flora.LoraWeight(None, w.a, jnp.asarray(SCALE * a.T @ full, jnp.float32),
                         rank=RANK, alpha=ALPHA, rank_stabilized=True)  # fmt: skip
    params = {"w": flora.split({"w": w})[1]["w"]}
    tx = recipes.lora_fa(optax.sgd(0.5))
    updates, _ = tx.update({"w": g}, tx.init(params), params)
    moved = SCALE * a @ np.asarray(updates["w"].b, np.float64)
    want = -0.5 * a @ np.linalg.pinv(a) @ full
    np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-5)
    assert np.array_equal(bits(updates["w"].a), bits(jnp.full(w.a.shape, -0.0)))


def test_lora_fa_with_more_ranks_than_inputs_moves_by_the_whole_gradient():
    a, full = f32(4, 11, seed=8), np.asarray(f32(4, 6, seed=7), np.float64)
    b = np.asarray(a, np.float64).T @ full
    g = flora.LoraWeight(None, a, jnp.asarray(b, jnp.float32), rank=11, alpha=11.0)
    tx = recipes.lora_fa(optax.sgd(0.5))
    updates, _ = tx.update({"w": g}, tx.init({"w": g}), {"w": g})
    moved = np.asarray(a, np.float64) @ np.asarray(updates["w"].b, np.float64)
    np.testing.assert_allclose(moved, -0.5 * full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_fa_on_a_mesh(kind):
    tx = recipes.lora_fa(optax.sgd(0.5))

    def update(w):
        return tx.update({"w": w}, tx.init({"w": w}), {"w": w})[0]["w"].b

    with on_mesh(kind) as placed:
        got = jax.jit(update)(placed)
    assert got.sharding.spec == PartitionSpec(None, "out")
    contract.close(got, update(WHOLE), 1e-6)


def test_lora_fa_computes_no_gradient_of_a():
    """Under jit: 2 · tokens · in · rank FLOPs fewer than training both."""
    _, adapted, _ = small()
    x = f32(64, 7)

    def flops(tx):
        tx = flora.optimizer(tx, adapted)

        def step(t, state):
            _, grads = flora.value_and_grad(flora.lora(loss_fn))(t, x)
            return tx.update(grads, state, t)

        compiled = jax.jit(step).lower(adapted, tx.init(adapted)).compile()
        return compiled.cost_analysis()["flops"]

    tx = optax.sgd(0.1)
    both, b_alone = flops(tx), flops(recipes.lora_fa(tx))
    assert both - b_alone > 0.8 * 2 * 64 * 7 * 2


RECIPES = {
    "lora_plus": lambda tx, t: optax.chain(tx, recipes.lora_plus(4.0)),
    "scale_rates": lambda tx, t: optax.chain(
        tx, recipes.scale_rates({"head": 0.1, "*": {"b": 2.0}}, t)
    ),
    "lora_fa": lambda tx, t: recipes.lora_fa(tx),
    "partition": lambda tx, t: recipes.partition(
        {"head": optax.sgd(1e-3), "rest": tx}, {"head": "head", "*": "rest"}, t
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_composes_with_optax(name):
    """Clipping, MultiSteps, injected schedules, masked decay and EMA, under jit."""
    p, adapted, x = small()
    schedule = optax.warmup_cosine_decay_schedule(0.1, 1.0, 2, 20)
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(
            adamw(
                learning_rate=lambda t: 2e-2 * schedule(t),
                weight_decay=0.1,
                mask=recipes.decay_mask(adapted),
            ),
            2,
        ),
        optax.ema(0.5),
    )
    tx = flora.optimizer(RECIPES[name](inner, adapted), adapted)
    loss = flora.lora(loss_fn)

    @jax.jit
    def step(t, average, state):
        _, grads = flora.value_and_grad(loss)(t, x)
        updates, state = tx.update(grads, state, t)
        t = optax.apply_updates(t, updates)
        adapter = flora.split(t)[1]
        return t, optax.incremental_update(adapter, average, 0.1), state

    start, average = adapted, flora.split(adapted)[1]
    state, before = tx.init(adapted), loss(adapted, x)
    for _ in range(8):
        adapted, average, state = step(adapted, average, state)
    assert loss(adapted, x) < before
    assert np.array_equal(bits(adapted["kernel"].base), bits(p["kernel"]))
    assert np.array_equal(bits(adapted["bias"]), bits(p["bias"]))
    assert int(adapted["step"]) == 3
    frozen = np.array_equal(bits(adapted["kernel"].a), bits(start["kernel"].a))
    assert frozen == (name == "lora_fa")
    assert jax.tree.structure(average) == jax.tree.structure(flora.split(adapted)[1])
    assert not np.array_equal(average["kernel"].b, adapted["kernel"].b)


# What is refused.


def update_without_params():
    tx = recipes.lora_fa(optax.sgd(0.1))
    tx.update(ADAPTED, tx.init(ADAPTED))


def b_without_a():
    fa = recipes.lora_fa(optax.sgd(0.1))
    tx = recipes.partition(
        {"b": fa, "rest": optax.sgd(0.1)},
        {"*": {"b": "b", "a": "rest", "train": "rest"}},
        ADAPTED,
    )
    adapter = flora.split(ADAPTED)[1]
    tx.update(adapter, tx.init(adapter), adapter)


ERRORS = {
    "lora_plus: ratio is nan": lambda: recipes.lora_plus(float("nan")),
    "lora_plus: ratio is Array": lambda: recipes.lora_plus(jnp.ones(2)),
    "lora_fa: tx is a float": lambda: recipes.lora_fa(0.1),
    "lora_fa: damping=-1": lambda: recipes.lora_fa(optax.sgd(0.1), damping=-1),
    "lora_fa: the step needs A": update_without_params,
    "lora_fa: B of '.*' is to train and its A is not in params": b_without_a,
}


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
