"""Wrappers of optax inside and around `flora.optimizer`; trees of float16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flora
import flora.multi
import flora.optim
import flora.recipes
from flora.variants import VeRA
from tests.support import contract
from tests.support.adapters import ADAPTED, GRADS, f32, unchanged

BASE, ADAPTER = flora.split(ADAPTED)
ADAPTER_GRADS = [flora.split(g)[1] for g in GRADS]
SHAPES = {tuple(sorted(x.shape)) for x in jax.tree.leaves(BASE)}

ADAMW = optax.adamw(1e-2, weight_decay=0.1)


def everything(tree):
    return jax.tree.map(lambda _: True, tree)


INSIDE = {
    "MultiSteps": optax.MultiSteps(ADAMW, 2),
    "ema": optax.chain(ADAMW, optax.ema(0.9)),
    "schedule_free": contrib.schedule_free(ADAMW, 1e-2),
    "prodigy": contrib.prodigy(1e-2),
    "dadapt": contrib.dadapt_adamw(1e-2),
    "mechanize": contrib.mechanize(ADAMW),
    "sam": contrib.sam(ADAMW, optax.chain(contrib.normalize(), optax.sgd(0.1))),
    "apply_if_finite": optax.apply_if_finite(ADAMW, 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 0, 9)
    ),
    "masked": optax.masked(ADAMW, everything),
    "flatten": optax.flatten(ADAMW),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), ADAMW),
    "plateau": optax.chain(ADAMW, contrib.reduce_on_plateau()),
    "another optimizer": flora.optimizer(ADAMW, ADAPTED),
}
VALUE = {"plateau": {"value": 1.0}}


def steps(tx, params, grads, apply, **extra):
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params, **extra)
        params = apply(params, updates)
    return params, state


@pytest.mark.parametrize("name", INSIDE)
def test_inside_they_take_the_steps_that_they_take_on_the_adapter(name):
    tx, extra = INSIDE[name], VALUE.get(name, {})
    own = flora.optimizer(tx, ADAPTED)
    run = jax.jit(lambda p, g, tx, apply: steps(tx, p, g, apply, **extra),
                  static_argnums=(2, 3))  # fmt: skip
    got, state = run(ADAPTED, ADAPTER_GRADS, own, flora.apply_updates)
    want, _ = run(ADAPTER, ADAPTER_GRADS, tx, optax.apply_updates)
    assert unchanged(got)
    contract.close(flora.split(got)[1], want, 1e-6)
    assert not np.array_equal(got["embedding"].b, ADAPTED["embedding"].b)
    assert not SHAPES & {tuple(sorted(x.shape)) for x in jax.tree.leaves(state)}

    def update(g, state, tree):
        return own.update(g, state, tree, **extra)

    assert contract.dense_arrays(update, SHAPES, ADAPTER_GRADS[0], state, ADAPTED) == []


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.ema(0.9)),
    "named_chain": lambda tx: optax.named_chain(("one", tx), ("two", optax.trace(0.9))),
    "schedule_free": lambda tx: contrib.schedule_free(tx, 1e-2),
    "mechanize": contrib.mechanize,
    "sam": lambda tx: contrib.sam(tx, optax.sgd(0.1)),
    "masked": lambda tx: optax.masked(tx, everything),
    "partition": lambda tx: optax.partition(
        {"x": tx}, lambda t: jax.tree.map(lambda _: "x", t)
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: step >= 0
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_around_it_they_are_refused_on_the_tree_and_run_on_the_adapter(name):
    tx = AROUND[name](flora.optimizer(ADAMW, ADAPTED))
    with pytest.raises(flora.LoraError) as error:
        tx.update(ADAPTER_GRADS[0], tx.init(ADAPTED), ADAPTED)
    assert f"flora.optimizer({name}(...), adapted), or give" in str(error.value)
    assert "\n" not in str(error.value)
    got, state = steps(tx, ADAPTER, ADAPTER_GRADS, flora.apply_updates)
    assert not SHAPES & {tuple(sorted(x.shape)) for x in jax.tree.leaves(state)}
    want, _ = steps(AROUND[name](ADAMW), ADAPTER, ADAPTER_GRADS, optax.apply_updates)
    contract.close(got, want, 1e-6)


def test_states_can_be_mapped_over():
    own = flora.optimizer(ADAMW, ADAPTED)
    state = optax.tree_map_params(own, jnp.zeros_like, own.init(ADAPTED))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(ADAPTER))


def test_what_keeps_no_copy_of_the_base_stands_around_it():
    tx = optax.chain(optax.zero_nans(), flora.optimizer(ADAMW, ADAPTED))
    got, _ = steps(tx, ADAPTED, ADAPTER_GRADS, flora.apply_updates)
    want, _ = steps(ADAMW, ADAPTER, ADAPTER_GRADS, optax.apply_updates)
    contract.close(flora.split(got)[1], want, 1e-6)


def test_an_adapter_with_frozen_parts_is_no_tree_with_a_base():
    fn = flora.lora(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2))
    params, x = {"kernel": f32(7, 5)}, f32(3, 7)
    adapted = contract.adapt(fn, params, x, variant=VeRA())
    adapter = flora.split(adapted)[1]
    grads = [flora.value_and_grad(fn)(adapted, x)[1]] * 2
    tx = optax.apply_if_finite(flora.optimizer(optax.sgd(0.1), adapter), 2)
    got, _ = steps(optax.MultiSteps(tx, 2), adapter, grads, flora.apply_updates)
    assert got["kernel"].a is adapter["kernel"].a
    assert any(
        not np.array_equal(got["kernel"].extra[k], adapter["kernel"].extra[k])
        for k in got["kernel"].extra
    )


def test_lookahead_and_flattened_trees_are_refused():
    inside = flora.optimizer(optax.lookahead(optax.sgd(0.1), 2, 0.5), ADAPTED)
    with pytest.raises(flora.LoraError, match=r"LookaheadParams\.init_synced"):
        inside.init(ADAPTED)
    around = optax.flatten(flora.optimizer(ADAMW, ADAPTED))
    with pytest.raises(flora.LoraError, match="none of the tree's 1 leaves is adapted"):
        around.init(ADAPTER)


def test_functions_of_parameters_are_refused():
    tx = flora.optimizer(optax.lbfgs(), ADAPTED)
    state, g = tx.init(ADAPTED), ADAPTER_GRADS[0]
    with pytest.raises(flora.LoraError, match="value_fn= is a function of parameters"):
        tx.update(g, state, ADAPTED, value=1.0, grad=g, value_fn=lambda t: 0.0)


@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 1)])
def test_eval_params_of_schedule_free(around):
    free = contrib.schedule_free(ADAMW, 1e-2)
    own = flora.optimizer(around(free), ADAPTED)
    tree, state = steps(own, ADAPTED, ADAPTER_GRADS, flora.apply_updates)
    adapter, plain = steps(free, ADAPTER, ADAPTER_GRADS, optax.apply_updates)

    def averaged(state, params):
        state = getattr(state, "inner_opt_state", state)
        return contrib.schedule_free_eval_params(state, params)

    got = flora.optim.eval_params(averaged, state, tree)
    want = contrib.schedule_free_eval_params(plain, adapter)
    contract.close(flora.split(got)[1], want, 1e-6)
    assert got["embedding"].base is tree["embedding"].base
    assert got["frozen"]["kernel"] is tree["frozen"]["kernel"]
    with pytest.raises(flora.LoraError, match="state is a ScheduleFreeState"):
        flora.optim.eval_params(averaged, plain, tree)


def test_an_average_of_the_parameters():
    """Of the adapter, by either function of optax; the base has no copy."""
    ema = optax.ema(0.5, debias=False)
    average, kept = ADAPTER, ema.init(ADAPTER)
    for seed in range(3):
        now = contract.randomized(ADAPTER, key=seed)
        average = optax.incremental_update(now, average, 0.5)
        mean, kept = ema.update(now, kept)
    values = [contract.randomized(ADAPTER, key=i)["embedding"].b for i in range(3)]
    want = 0.5 * values[2] + 0.25 * values[1] + 0.125 * values[0]
    np.testing.assert_allclose(mean["embedding"].b, want, rtol=1e-5)
    want = want + 0.125 * ADAPTER["embedding"].b
    tree = flora.join(BASE, average)
    np.testing.assert_allclose(tree["embedding"].b, want, rtol=1e-5)
    assert tree["embedding"].base is ADAPTED["embedding"].base


def half(dtype):
    def fn(p, x):
        return jnp.sum((x @ p["kernel"] @ p["head"]).astype(jnp.float32) ** 2)

    params = {"kernel": f32(8, 6).astype(dtype), "head": f32(6, 3).astype(dtype)}
    x = f32(4, 8).astype(dtype)
    loss = flora.lora(fn)
    adapted = contract.adapt(loss, params, x, target="kernel", train="head",
                             dtype=dtype)  # fmt: skip
    return adapted, lambda t: loss(t, x)


@pytest.mark.parametrize("tx", [ADAMW, optax.MultiSteps(optax.adam(1e-2), 2)])
def test_float16_trains_as_float32_does(tx):
    """A has no gradient at the start: 0/(√0 + 1e-8), which is 0/0 in float16."""
    adapted, loss = half(jnp.float16)
    own = flora.optimizer(tx, adapted)
    state, tree, losses = own.init(adapted), adapted, []
    step = jax.jit(lambda t, s, g: own.update(g, s, t))
    for _ in range(8):
        value, grads = flora.value_and_grad(loss)(tree)
        updates, state = step(tree, state, grads)
        tree = flora.apply_updates(tree, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    kinds = {x.dtype.name for x in jax.tree.leaves(state)} - {"int32"}
    assert kinds == {"float32"}
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(adapted), strict=True):
        assert x.dtype == y.dtype == jnp.float16
        assert np.isfinite(x).all()


def test_float16_in_groups_and_in_runs_at_once():
    adapted, loss = half(jnp.float16)
    grads, (base, adapter) = (
        flora.value_and_grad(loss)(adapted)[1],
        flora.split(adapted),
    )
    groups = {"*": "all"}
    for tx in (
        flora.recipes.partition({"all": optax.adam(1e-2)}, groups, adapter),
        flora.recipes.lora_fa(optax.adam(1e-2)),
    ):
        got, state = steps(tx, adapter, [grads] * 2, flora.apply_updates)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((got, state)))
    runs = flora.multi.start([adapter] * 2, optax.adam, jnp.array([1e-2, 1e-3]))
    runs, losses = flora.multi.train_step(loss, optax.adam)(base, runs)
    runs, again = flora.multi.train_step(loss, optax.adam)(base, runs)
    assert (again < losses).all()
    for each in flora.multi.finish(runs):
        assert {x.dtype.name for x in jax.tree.leaves(each)} == {"float16"}
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(each))


def test_what_the_transformation_sees_of_float16_and_of_bfloat16():
    for dtype, inside in [("float16", "float32"), ("bfloat16", "bfloat16")]:
        adapted, loss = half(dtype)
        grads = flora.value_and_grad(loss)(adapted)[1]
        own = flora.optimizer(optax.trace(0.9), adapted)
        updates, state = own.update(grads, own.init(adapted), adapted)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {inside}
        contract.close(flora.split(updates)[1], grads, 0)
