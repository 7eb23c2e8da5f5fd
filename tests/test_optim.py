import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
from tests.support import contract
from tests.support.contract import array
from tests.support.registry import MODELS


def fn(p, x):
    y = jnp.tanh(x @ p["kernel"] + p["bias"])
    return jnp.sum((y @ p["head"]) ** 2)


def tree(subnormal=1e-45, **config):
    special = jnp.array([-0.0, 0, subnormal, 1])
    signed = array(7, 11, dtype=jnp.float32).at[0, :4].set(special)
    p = {"kernel": signed, "bias": array(11, dtype=jnp.float32) * 0.1,
         "head": array(11, 5, dtype=jnp.float32), "step": jnp.int32(3)}  # fmt: skip
    config = {"target": "kernel", "train": "head"} | config
    return p, contract.adapt(fn, p, X, **config)


X = np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)
LOSS = flora.lora(fn)


def bits(x):
    return np.asarray(x).view(np.uint8)


def test_mask():
    _, adapted = tree()
    m = flora.mask(adapted)
    assert jax.tree.structure(m) == jax.tree.structure(adapted)
    assert (m["kernel"].base, m["kernel"].a, m["kernel"].b) == (False, True, True)
    assert (m["bias"], m["head"].value, m["step"]) == (False, True, False)
    assert sum(jax.tree.leaves(m)) == 3


@pytest.mark.parametrize("way", ["whole tree", "adapter", "masked by hand"])
def test_training_moves_the_adapter_and_nothing_else(way):
    p, adapted = tree()
    if way == "masked by hand":  # optax adds updates to integers too
        adapted = {k: x for k, x in adapted.items() if k != "step"}
    tx = optax.adamw(1e-2, weight_decay=0.1)
    start = LOSS(adapted, X)
    if way == "adapter":
        base, state_of = flora.split(adapted)
        state = tx.init(state_of)
        for _ in range(5):
            grads = jax.jit(jax.grad(lambda a: LOSS(flora.join(base, a), X)))(state_of)
            updates, state = tx.update(grads, state, state_of)
            state_of = optax.apply_updates(state_of, updates)
        trained = flora.join(base, state_of)
    else:
        if way == "whole tree":
            whole = flora.optimizer(tx, adapted)
        else:
            whole = optax.masked(tx, flora.mask)
        state, trained = whole.init(adapted), adapted

        @jax.jit
        def step(t, state):
            grads = jax.grad(LOSS, allow_int=True)(t, X)
            updates, state = whole.update(grads, state, t)
            return optax.apply_updates(t, updates), state

        for _ in range(5):
            trained, state = step(trained, state)
    assert LOSS(trained, X) < 0.9 * start
    assert np.array_equal(bits(trained["kernel"].base), bits(p["kernel"]))
    assert np.array_equal(bits(trained["bias"]), bits(p["bias"]))
    assert trained.get("step", 3) == 3
    assert not jnp.array_equal(trained["head"].value, p["head"])
    assert trained["kernel"].a.any()
    assert trained["kernel"].b.any()


def test_frozen_leaves_stay_bit_for_bit_without_the_compiler_s_help():
    p, adapted = tree(subnormal=0)
    tx = flora.optimizer(optax.sgd(1.0), adapted)
    grads = jax.tree.map(jnp.ones_like, adapted)  # even where gradients are not zero
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    moved = optax.apply_updates(adapted, updates)
    assert np.array_equal(bits(moved["kernel"].base), bits(p["kernel"]))
    assert np.array_equal(bits(moved["bias"]), bits(p["bias"]))
    assert not np.array_equal(moved["kernel"].a, adapted["kernel"].a)


def test_the_optimizer_keeps_no_state_for_the_base():
    _, adapted = tree()
    state = flora.optimizer(optax.adam(1e-3), adapted).init(adapted)
    sizes = [x.size for x in jax.tree.leaves(state)]
    _, adapter = flora.split(adapted)
    trained = sum(x.size for x in jax.tree.leaves(adapter))
    assert sum(sizes) == 2 * trained + 1


def test_the_optimizer_takes_what_value_and_grad_returns():
    p, adapted = tree()
    tx = flora.optimizer(optax.adamw(1e-2), adapted)
    state, start = tx.init(adapted), LOSS(adapted, X)
    trained = adapted
    for _ in range(3):
        _, grads = jax.jit(flora.value_and_grad(LOSS))(trained, X)
        updates, state = tx.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    assert LOSS(trained, X) < start
    whole = jax.grad(LOSS, allow_int=True)(trained, X)
    one, _ = tx.update(whole, state, trained)
    _, grads = flora.value_and_grad(LOSS)(trained, X)
    two, _ = tx.update(grads, state, trained)
    contract.close(optax.apply_updates(trained, one), optax.apply_updates(trained, two))
    assert np.array_equal(trained["bias"], p["bias"])
    with pytest.raises(flora.LoraError, match="other structures"):
        tx.update({"kernel": grads["kernel"]}, state, trained)


def test_a_linear_probe():
    p, _ = tree()
    adapted = contract.adapt(fn, p, X, target=(), train="head")
    assert contract.weights(adapted) == []
    _, grads = flora.value_and_grad(LOSS)(adapted, X)
    assert len(jax.tree.leaves(grads)) == 1
    assert flora.merge(adapted)["head"] is p["head"]


def test_composes_with_optax():
    _, adapted = tree()
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, 2, 10)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(optax.inject_hyperparams(optax.adamw)(schedule), 2),
    )
    tx = flora.optimizer(tx, adapted)
    state, start = tx.init(adapted), LOSS(adapted, X)

    @jax.jit
    def step(t, state):
        updates, state = tx.update(jax.grad(LOSS, allow_int=True)(t, X), state, t)
        return optax.apply_updates(t, updates), state

    for _ in range(6):
        adapted, state = step(adapted, state)
    assert LOSS(adapted, X) < start


def test_value_and_grad():
    _, adapted = tree()
    adapted = contract.randomized(adapted)
    base, adapter = flora.split(adapted)
    want = jax.value_and_grad(lambda a: LOSS(flora.join(base, a), X))(adapter)
    got = flora.value_and_grad(LOSS)(adapted, X)
    chex.assert_trees_all_equal(got, want)
    (value, aux), grads = flora.value_and_grad(
        lambda t, x, *, k: (k * LOSS(t, x), "aux"), has_aux=True
    )(adapted, X, k=2.0)
    assert aux == "aux"
    contract.close((value / 2, jax.tree.map(lambda g: g / 2, grads)), want, 1e-6)


def test_gradient_steps_do_not_recompile():
    _, adapted = tree()
    traced = []

    @jax.jit
    def step(t, x):
        traced.append(1)
        _, grads = flora.value_and_grad(LOSS)(t, x)
        base, adapter = flora.split(t)
        return flora.join(base, jax.tree.map(lambda w, g: w - g, adapter, grads))

    for _ in range(3):
        adapted = step(adapted, X)
    assert len(traced) == 1


def test_an_integer_base():
    def quantized(p, x):
        return jnp.sum((x @ (p["q"].astype(jnp.float32) * p["s"]) @ p["kernel"]) ** 2)

    p = {
        "q": jnp.arange(49, dtype=jnp.int8).reshape(7, 7),
        "s": jnp.float32(0.01),
        "kernel": array(7, 5, dtype=jnp.float32),
    }
    adapted = contract.adapt(quantized, p, X, target="kernel")
    _, grads = jax.jit(flora.value_and_grad(flora.lora(quantized)))(adapted, X)
    assert grads["q"] is None
    assert grads["kernel"].b.any()


@pytest.mark.parametrize("name", ["scanned decoder", "nnx decoder", "partitioned"])
def test_a_jitted_step_trains_flax_trees(name):
    model = MODELS[name]()
    adapted = contract.adapt(model.fn, model.params, *model.args, target=model.target)
    apply = flora.lora(model.fn)
    tx = flora.optimizer(optax.adam(1e-2), adapted)

    def loss(t):
        return jnp.mean((apply(t, *model.args) - 1) ** 2)

    @jax.jit
    def step(t, state):
        value, grads = jax.value_and_grad(loss, allow_int=True)(t)
        updates, state = tx.update(grads, state, t)
        return optax.apply_updates(t, updates), state, value

    state, losses = tx.init(adapted), []
    for _ in range(11):
        adapted, state, value = step(adapted, state)
        losses.append(value)
    assert losses[-1] < 0.9 * losses[0]
    base, _ = flora.split(adapted)
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(model.params), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert np.array_equal(bits(x), bits(y))
