import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
from flora import monitor
from tests.support import contract
from tests.support.adapters import f32


def numpy_alarm(x, window):
    start, end = min(x[0], x[:window].mean()), x[-window:].mean()
    rough = np.sqrt(np.mean((x[2:] - 2 * x[1:-1] + x[:-2]) ** 2) / 6)
    return (start - end) / abs(start), rough / abs(start - end)


@pytest.mark.parametrize("window", [1, 5])
def test_alarm_is_the_formula(window):
    x = np.random.default_rng(0).normal(size=60) * 0.1 + np.linspace(3, 1, 60)
    got = monitor.alarm(x.tolist(), window=window)
    np.testing.assert_allclose(
        (got.fall, got.oscillation), numpy_alarm(x, window), rtol=1e-4
    )


T = np.arange(100)
HISTORIES = {
    "a smooth fall": (2 * 0.97**T, ""),
    "a straight fall": (2 - 0.01 * T, ""),
    "a fall with some noise": (
        2 * 0.97**T + 0.1 * np.random.default_rng(0).normal(size=100), ""),
    "no change": (np.ones(100), "slow"),
    "a slow fall": (2 * 0.9997**T, "slow"),
    "every other step": (2 * 0.97**T + 0.9 * (-1.0) ** T, "oscillates"),
    "noise alone": (
        2 + 0.1 * np.random.default_rng(1).normal(size=100), "oscillates slow"),
    "a rise": (2 + 0.01 * T, "slow rises"),
    "a spike that comes back": (
        2 - 0.005 * T + 9 * (T == 30), "oscillates"),
    "not a number": (np.where(T > 50, np.nan, 2 - 0.01 * T), "infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_alarm(name):
    losses, wrong = HISTORIES[name]
    got = monitor.alarm(losses)
    for flag in ("oscillates", "slow", "rises"):
        assert bool(getattr(got, flag)) == (flag in wrong), flag
    assert bool(got.finite) == ("infinite" not in wrong)
    assert bool(got.any) == bool(wrong)
    said = {"": "No alarm", "slow": "falls slowly", "oscillates": "though it falls",
            "oscillates slow": "The loss oscillates (", "slow rises": "The loss rises",
            "infinite": "not finite"}[wrong]  # fmt: skip
    assert said in str(got)


def test_alarm_does_not_depend_on_units():
    x = HISTORIES["a fall with some noise"][0]
    one, two = monitor.alarm(x), monitor.alarm(1e4 * x)
    contract.close(jax.tree.map(jnp.float32, one), jax.tree.map(jnp.float32, two), 1e-4)


def test_the_thresholds_tell_learning_rates_apart():
    """A classifier with LoRA and Adam, whole batches, 11 learning rates in one program.

    Those within a factor of 100 of each other that end well raise no alarm in the first
    100 steps; smaller ones fall slowly, larger ones oscillate or rise.
    """
    x, noise = f32(512, 32), f32(512, 10, seed=5)
    params = {"up": f32(32, 64, seed=1) / 32**0.5, "out": f32(64, 10, seed=2) / 8}
    shift = 0.7 * f32(32, 64, seed=3) / 32**0.5
    logits = 4 * jnp.tanh(x @ (params["up"] + shift)) @ params["out"] + noise
    labels = jnp.argmax(logits, -1)

    def classify(p, x):
        z = jnp.tanh(x @ p["up"]) @ p["out"]
        return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    adapted = contract.adapt(classify, params, x, rank=4, alpha=8.0)
    base, adapter = flora.split(adapted)
    loss = flora.lora(classify)

    @jax.jit
    @jax.vmap
    def run(lr):
        tx = optax.adam(lr)

        def step(carry, _):
            a, state = carry
            value, g = jax.value_and_grad(lambda a: loss(flora.join(base, a), x))(a)
            updates, state = tx.update(g, state, a)
            return (optax.apply_updates(a, updates), state), value

        return jax.lax.scan(step, (adapter, tx.init(adapter)), None, length=500)[1]

    rates = 10.0 ** np.arange(-4, 1.01, 0.5)
    losses = np.asarray(run(jnp.asarray(rates, jnp.float32)))
    alarms = jax.device_get(jax.vmap(monitor.alarm)(losses[:, :100]))
    fine = [i for i in range(len(rates)) if not alarms.any[i]]
    print("fall:", alarms.fall, "oscillation:", alarms.oscillation)
    assert fine == list(range(fine[0], fine[-1] + 1))
    assert 1e-3 * 0.9 < rates[fine[0]] < 4e-3
    assert 3e-2 < rates[fine[-1]] < 4e-1
    ends = losses[:, -20:].mean(1)
    assert np.argmin(ends) in fine
    assert alarms.slow[: fine[0]].all()
    assert (alarms.oscillates | alarms.rises)[fine[-1] + 1 :].all()


ERRORS = {
    r"alarm: losses have shape \(3,\); expected \(steps,\) with at least 11": lambda: (
        monitor.alarm([1.0, 2.0, 3.0])
    ),
    "alarm: losses have shape \\(2, 30\\)": lambda: monitor.alarm(np.ones((2, 30))),
    "alarm: window=0": lambda: monitor.alarm(np.ones(30), window=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
