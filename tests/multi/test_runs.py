"""Training side by side, with variants too, and the examples of many adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import many
import numpy as np
import optax
import pytest
import serve_many

import flora
import flora.multi
from flora._trace.compat import P as Primitives
from flora.variants import DoRA, VeRA
from tests.support import contract
from tests.support.contract import adapt, array, close, equations
from tests.support.many_adapters import METHODS, node


def regression(adapted, x, y):
    out = flora.lora(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"])(
        adapted, x
    )
    return jnp.mean(jnp.square(out - y))


def sweep(settings, dtype=jnp.float32):
    params = {
        "up": array(5, 8, dtype=dtype),
        "down": array(8, 3, dtype=dtype),
        "bias": jnp.zeros(3, dtype),
    }
    x, y = array(16, 5, seed=3, dtype=dtype), array(16, 3, seed=4, dtype=dtype)
    made = [
        {
            k: node(flora.Layout(), params[k].shape, seed=i, dtype=dtype, **s)
            for k in ("up", "down")
        }
        | {"bias": flora.Trained(params["bias"])}
        for i, s in enumerate(settings)
    ]
    return params | {"bias": None}, made, x, y


def make_tx(rate):
    return optax.adamw(rate, weight_decay=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        [
            {"rank": 1, "alpha": 8.0},
            {"rank": 3, "alpha": 8.0},
            {"rank": 2, "alpha": 3.0, "rank_stabilized": True},
        ],
        [{"rank": 2, "alpha": 4.0}] * 2 + [{"rank": 3, "alpha": 6.0}],
    ],
    ids=["other scales", "one scale"],
)
def test_runs_side_by_side_are_the_runs_one_by_one(x64, settings):
    base, adapters, x, y = sweep(settings, jnp.float64)
    rates, traces = jnp.array([1e-2, 3e-2, 1e-1]), []

    def loss(adapted, x, y):
        traces.append(1)
        return regression(adapted, x, y)

    runs = flora.multi.start(adapters, make_tx, rates)
    step = jax.jit(flora.multi.train_step(loss, make_tx))
    many = []
    for _ in range(6):
        runs, losses = step(base, runs, x, y)
        many.append(losses)
    assert len(traces) == 1
    assert many[-1][0] < many[0][0]
    found = flora.multi.finish(runs)
    for k, (one, rate) in enumerate(zip(adapters, rates, strict=True)):
        tx = make_tx(float(rate))

        @jax.jit
        def alone(adapter, state, tx=tx):
            value, grads = jax.value_and_grad(
                lambda a: regression(flora.join(base, a), x, y)
            )(adapter)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        state = tx.init(one)
        for n in range(6):
            one, state, value = alone(one, state)
            np.testing.assert_allclose(many[n][k], value, rtol=1e-12)
        close(found[k], one, 1e-9)  # Adam divides by small numbers
        assert found[k]["up"].rank == settings[k]["rank"]
    assert not runs.adapter["up"].a[0, :, settings[0]["rank"] :].any()


def test_each_run_can_have_its_own_batch():
    base, adapters, x, y = sweep([{"rank": 2}] * 2)
    runs = flora.multi.start(adapters, optax.sgd, jnp.array([0.1, 0.1]))
    step = flora.multi.train_step(regression, optax.sgd, batch_axis=0)
    _, losses = jax.jit(step)(base, runs, jnp.stack([x, 2 * x]), jnp.stack([y, -y]))
    first = regression(flora.join(base, adapters[0]), x, y)
    second = regression(flora.join(base, adapters[1]), 2 * x, -y)
    close(losses, jnp.stack([first, second]))


def test_runs_share_the_product_with_w():
    base, adapters, x, y = sweep([{"rank": 2}] * 4)
    runs = flora.multi.start(adapters, optax.sgd, jnp.full(4, 0.1))
    step = flora.multi.train_step(regression, optax.sgd)
    made = jax.make_jaxpr(step)(base, runs, x, y)
    shapes = [
        [v.aval.shape for v in e.invars]
        for e in equations(made)
        if e.primitive is Primitives.dot_general
    ]
    # The first layer meets x once for all runs; the second the batch of all of them.
    assert shapes.count([(16, 5), (5, 8)]) == 1
    assert sorted(s[0] for s in shapes if s[1] == (8, 3)) == [(4, 16, 3), (4, 16, 8)]


def test_what_runs_refuse():
    _, adapters, _, _ = sweep([{"rank": 2}] * 2)
    with pytest.raises(flora.LoraError, match=r"shape \(3,\); there are 2 adapters"):
        flora.multi.start(adapters, optax.sgd, jnp.ones(3))
    with pytest.raises(flora.LoraError, match="expected what makes an optimizer"):
        flora.multi.start(adapters, optax.sgd(0.1), jnp.ones(2))
    dropped = jax.tree.map(
        lambda x: dataclasses.replace(x, dropout=0.1) if contract.is_weight(x) else x,
        adapters[1],
        is_leaf=contract.is_weight,
    )
    with pytest.raises(flora.LoraError, match=r"'up' has dropout rates \[0.0, 0.1\]"):
        flora.multi.start([adapters[0], dropped], optax.sgd, jnp.ones(2))
    with pytest.raises(flora.LoraError, match="expected what"):
        flora.multi.finish(adapters)
    with pytest.raises(flora.LoraError, match="expected what"):
        flora.multi.train_step(regression, optax.sgd)(None, adapters)


# --- Variants ------------------------------------------------------------------------


def of_variant(variant, count=2):
    """A base, adapters of a variant, x and y."""
    params = {"w": array(5, 3, dtype=jnp.float64)}
    x, y = array(16, 5, seed=3), array(16, 3, seed=4)
    made = [
        contract.randomized(
            adapt(product, params, x, key=k, variant=variant, dtype=jnp.float64), key=k
        )
        for k in range(count)
    ]
    return params, [flora.split(t)[1] for t in made], x, y


def product(p, x):
    return x @ p["w"]


def test_variants_are_stacked_and_selected(x64):
    params, adapters, x, _ = of_variant(DoRA())
    stacked = flora.multi.stack(adapters)
    assert stacked["w"].extra["magnitude"].shape == (2, 3)
    apply = flora.lora(product)
    for i, one in enumerate(adapters):
        for made in (
            flora.multi.select(stacked, i),
            jax.jit(flora.multi.select)(stacked, i),
        ):
            close(apply(flora.join(params, made), x), apply(flora.join(params, one), x))
    assert np.isnan(jax.jit(flora.multi.select)(stacked, -1)["w"].b).all()
    for match, call in (
        ("'w' is a DoRA.*stands for the base", lambda: flora.multi.select(stacked, -1)),
        (
            "'w' is a DoRA.*its weight W.*Pass base=",
            lambda: flora.multi.combine(adapters, [0.5, 0.5]),
        ),
        (
            "'w' is a DoRA in one.*Write method='svd' or rank=",
            lambda: flora.multi.combine(adapters, [0.5, 0.5], base=params),
        ),
    ):
        with pytest.raises(flora.LoraError, match=match):
            call()


@pytest.mark.parametrize("variant", [DoRA(), VeRA()], ids=["DoRA", "VeRA"])
def test_variants_train_side_by_side(x64, variant):
    """What a variant freezes stays bit for bit, with weight decay too."""
    base, adapters, x, y = of_variant(variant)

    def loss(adapted, x, y):
        return jnp.mean(jnp.square(flora.lora(product)(adapted, x) - y))

    rates = jnp.array([1e-2, 3e-2])
    runs = flora.multi.start(adapters, make_tx, rates)
    step = jax.jit(flora.multi.train_step(loss, make_tx))
    for _ in range(3):
        runs, _ = step(base, runs, x, y)
    for one, found, rate in zip(adapters, flora.multi.finish(runs), rates, strict=True):
        adapted = flora.join(base, one)
        tx = flora.optimizer(make_tx(float(rate)), adapted)
        state = tx.init(adapted)
        for _ in range(3):
            _, grads = flora.value_and_grad(loss)(adapted, x, y)
            updates, state = tx.update(grads, state, adapted)
            adapted = optax.apply_updates(adapted, updates)
        close(found, flora.split(adapted)[1], 1e-9)
        for name in variant.frozen:
            np.testing.assert_array_equal(
                getattr(found["w"], name), getattr(one["w"], name)
            )


# --- Examples ------------------------------------------------------------------------


@pytest.mark.slow
def test_serve_many():
    options = ["--requests", "9", "--rounds", "1", "--d", "64", "--layers", "1"]
    for method in METHODS:
        assert serve_many.main([*options, "--method", method])["error"] < 1e-4


@pytest.mark.slow
def test_many_runs_have_the_losses_of_single_ones():
    sizes = ["--tokens", "16", "--d", "32", "--layers", "1"]
    assert many.main(["--runs", "3", "--rounds", "2", *sizes])[3]["differ"] <= 1e-4
