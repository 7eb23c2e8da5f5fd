import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import flora
import flora.monitor
from flora import recipes
from flora._tree.quantized import Quantized
from tests.support import contract
from tests.support.adapters import (
    ADAPTED,
    GRADS,
    KINDS,
    PLACES,
    SCALE,
    WHOLE,
    bits,
    f32,
    loss_fn,
    on_mesh,
    sgd_restart,
    small,
    steps,
    tree,
    values,
)


@pytest.mark.parametrize("way", ["whole tree", "adapter"])
def test_restart(way):
    """W + scale A B, new factors, moments of A and B zero, the next step by hand."""
    lr = 1e-2
    tx = optax.adam(lr)
    if way == "whole tree":
        tx = flora.optimizer(tx, ADAPTED)
        trained, state = steps(optax.adam(lr), "in optimizer", GRADS)
    else:
        trained, state = steps(tx, "adapter", GRADS)
    renew = jax.jit(lambda k, s, t: recipes.restart(k, tx, s, t))
    got, new = renew(jax.random.key(5), state, trained)
    eager = recipes.restart(jax.random.key(5), tx, state, trained)
    contract.close((got, new), eager, 1e-6)

    w = trained["layers"]["kernel"]
    a, b, base = (np.asarray(x, np.float64) for x in (w.a, w.b, w.base))
    want = base + SCALE * np.einsum("sijr,sro->sijo", a, b)
    kernel = got["layers"]["kernel"]
    np.testing.assert_allclose(kernel.base, want, rtol=1e-5, atol=1e-5)
    assert kernel.base.dtype == w.base.dtype
    assert not kernel.b.any()
    assert not np.array_equal(kernel.a[0], kernel.a[1])  # layers differ
    assert np.array_equal(
        bits(got["head"]["kernel"].value), bits(trained["head"]["kernel"].value)
    )
    contract.close(flora.merge(got), flora.merge(trained), 1e-6)

    adams = [
        x
        for s in (state, new)
        for x in jax.tree.leaves(s, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    ]
    old, new_adam = adams
    assert int(new_adam.count) == int(old.count) == 2
    for moment in ("mu", "nu"):
        before, after = getattr(old, moment), getattr(new_adam, moment)
        for p, get in PLACES.items():
            wanted = get(before) if p[1] == "train" else 0 * get(before)
            assert get(before).any(), p
            assert np.array_equal(get(after), wanted), p

    # One more step: A and B with fresh moments under the old count.
    params = got if way == "whole tree" else flora.split(got)[1]
    g = tree(seed=300)
    grads = g if way == "whole tree" else flora.split(g)[1]
    updates, _ = tx.update(grads, new, params)
    for p in [("embedding", "a"), ("layers/kernel", "b")]:
        grad = values(g)[p]
        m = 0.1 * grad / (1 - 0.9**3)
        v = 0.001 * grad**2 / (1 - 0.999**3)
        np.testing.assert_allclose(
            PLACES[p](updates), -lr * m / (np.sqrt(v) + 1e-8), rtol=1e-4
        )


def test_restart_draws_as_asked():
    tx = optax.sgd(1e-2, momentum=0.9)
    wide = flora.LoraWeight(f32(400, 300), f32(400, 50), f32(50, 300), rank=50)
    adapted = {"w": wide}
    start = flora.initializers.a_zero(2.0)
    _, adapter = flora.split(adapted)
    state = tx.init(adapter)
    one, _ = recipes.restart(jax.random.key(0), tx, state, adapted)
    assert abs(float(jnp.var(one["w"].a)) * 400 - 1 / 3) < 0.02
    two, _ = recipes.restart(jax.random.key(1), tx, state, adapted)
    assert not np.array_equal(one["w"].a, two["w"].a)
    other, _ = recipes.restart(jax.random.key(0), tx, state, adapted, initializer=start)
    assert not other["w"].a.any()
    assert abs(float(jnp.var(other["w"].b)) * 50 - 2) < 0.1
    table, _ = recipes.restart(
        jax.random.key(0), tx, state, adapted, initializer=start,
        init_pattern={"w": flora.initializers.embedding()},
    )  # fmt: skip
    assert abs(float(jnp.var(table["w"].b)) - 1) < 0.05
    for wrong, message in (
        ({"initializer": flora.initializers.peft()}, "none is traced here"),
        ({"init_pattern": {"w": flora.initializers.peft()}}, "initializer=uniform"),
        ({"init_pattern": {"v": start}}, "init_pattern='v' selects none of the 1"),
        ({"init_pattern": {"w": start, "*": start}}, "all that '\\*' selects is taken"),
        ({"initializer": "peft"}, "init='peft'. Write one of"),
    ):
        with pytest.raises(flora.LoraError, match=message):
            recipes.restart(jax.random.key(0), tx, state, adapted, **wrong)


def test_restart_takes_states_that_do_not_start_at_zero():
    """Adagrad's accumulators start at 0.1, and A's and B's do so again."""
    tx = flora.optimizer(optax.adagrad(1e-2), ADAPTED)
    trained, state = steps(optax.adagrad(1e-2), "in optimizer")
    _, new = recipes.restart(jax.random.key(0), tx, state, trained)
    sums = [
        x
        for x in jax.tree.leaves(new, is_leaf=contract.is_weight)
        if contract.is_weight(x)
    ]
    assert len(sums) == 2
    assert all((x.a == 0.1).all() and (x.b == 0.1).all() for x in sums)


def test_restart_in_bfloat16_rounds_the_base():
    """Changes under half a unit in the last place are lost; the doc's numbers hold."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 256)), jnp.bfloat16)
    a, b = rng.normal(size=(256, 4)), rng.normal(size=(4, 256))
    for size, (low, high) in LOST.items():
        b_now = jnp.asarray(b * size / 2, jnp.float32)  # std of A B: 2 · size/2
        node = flora.LoraWeight(
            w, jnp.asarray(a, jnp.float32), b_now, rank=4, alpha=4.0
        )
        adapted = {"w": node}
        tx = optax.sgd(1.0)
        got, _ = recipes.restart(jax.random.key(0), tx, tx.init(adapted), adapted)
        assert got["w"].base.dtype == jnp.bfloat16
        base, change = np.asarray(w, np.float64), a @ np.asarray(b_now, np.float64)
        kept = np.asarray(got["w"].base, np.float64) - base
        lost = np.linalg.norm(kept - change) / np.linalg.norm(change)
        assert low < lost < high, (size, lost)
        error = float(flora.monitor.merge_error(adapted)["w"])
        np.testing.assert_allclose(error, lost, rtol=1e-3)


LOST = {1e-1: (0.015, 0.02), 1e-2: (0.15, 0.19), 1e-3: (0.74, 0.8)}


def test_restart_goes_on_where_the_model_was():
    p, adapted, x = small()
    loss = flora.lora(loss_fn)
    tx = flora.optimizer(optax.sgd(1e-3), adapted)
    adapted = contract.randomized(adapted)
    got, _ = recipes.restart(jax.random.key(2), tx, tx.init(adapted), adapted)
    contract.close(loss(got, x), loss(adapted, x), 1e-5)
    assert got["bias"] is adapted["bias"]
    assert not np.array_equal(got["kernel"].base, p["kernel"])


def test_jagged():
    rate = recipes.jagged(optax.linear_schedule(1.0, 0.0, 10), every=4, warmup=2)
    got = [float(jax.jit(rate)(t)) for t in range(10)]
    want = [1, 0.9, 0.8, 0.7, 0.6 / 2, 0.5, 0.4, 0.3, 0.2 / 2, 0.1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_restart_on_a_mesh(kind):
    tx = optax.adam(0.5)

    def renew(w):
        return recipes.restart(jax.random.key(0), tx, tx.init({"w": w}), {"w": w})

    want, state = renew(WHOLE)
    with on_mesh(kind) as placed:
        eager, compiled = renew(placed), jax.jit(renew)(placed)
    for got in (eager, compiled):
        contract.close(got, (want, state), 1e-6)
    places = jax.tree.map(lambda x: x.sharding, placed)
    assert jax.tree.map(lambda x: x.sharding, eager[0]["w"]) == places
    if kind == AxisType.Explicit:
        assert compiled[0]["w"].a.sharding.spec == PartitionSpec("in", None)


# What is refused.


def quantized():
    base = Quantized(ADAPTED["embedding"].base, dequantize=lambda x: x)
    w = flora.LoraWeight(base, jnp.ones((9, 2)), jnp.ones((2, 6)), rank=2)
    sgd_restart({"w": w})


ERRORS = {
    "restart: key is a int": lambda: sgd_restart(ADAPTED, key=3),
    "restart: none of the tree's": lambda: sgd_restart({"w": jnp.ones((2, 2))}),
    "restart: no leaf of the tree has factors":
        lambda: sgd_restart({"w": flora.Trained(jnp.ones(2))}),
    "restart: 'embedding' .*without its base":
        lambda: sgd_restart(flora.split(ADAPTED)[1]),
    "restart: 'w' is Quantized.*merging would round": quantized,
    "restart: the state is not one of tx": lambda: sgd_restart(
        ADAPTED, optax.adam(0.1).init(ADAPTED)),
    "Leave out optax.flatten": lambda: sgd_restart(
        ADAPTED, tx=optax.flatten(optax.adam(0.1))),
    "jagged: every=4, warmup=9": lambda: recipes.jagged(1.0, every=4, warmup=9),
    "jagged: every=0, warmup=0": lambda: recipes.jagged(1.0, every=0, warmup=0),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
