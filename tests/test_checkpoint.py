"""Checkpoints come back bit for bit, wherever they are put."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
from flora._files.fingerprint import fingerprint
from flora.checkpoint import Checkpointer
from tests.support import contract
from tests.support.checkpoints import (
    DEVICES,
    adapt,
    files,
    mesh,
    optimizer,
    params,
    place,
    run,
    same,
    same_shardings,
    step_of,
    trained,
)
from tests.support.registry import normal


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        yield checkpointer


def test_what_was_saved_comes_back_bit_for_bit(saver):
    adapted, state = trained()
    assert saver.steps() == ()
    assert saver.latest() is None
    saver.save(3, adapted, state, metadata={"seed": 7, "shape": (1, 2)})
    fresh = adapt()
    got = saver.restore(fresh, optimizer(fresh).init(fresh))
    same(got.adapted, adapted)
    same(got.state, state)
    assert (got.step, saver.latest(), saver.steps()) == (3, 3, (3,))
    assert saver.metadata() == {"seed": 7, "shape": [1, 2]}
    assert jax.tree.structure(got.state) == jax.tree.structure(state)
    for w, old in zip(
        contract.weights(got.adapted), contract.weights(fresh), strict=True
    ):
        assert w.base is old.base
        assert w.a.dtype == jnp.bfloat16
    assert not files(saver._directory + "/deleted")


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    adapted = adapt()
    state = optimizer(adapted).init(adapted)
    *_, expected = run(adapted, state, 8)
    adapted, state, first = run(adapted, state, 5)
    with Checkpointer(tmp_path) as saver:
        saver.save(5, adapted, state)
    fresh = adapt()
    with Checkpointer(tmp_path) as saver:
        fresh, state, step = saver.restore(fresh, optimizer(fresh).init(fresh))
    assert step == 5
    compiled = step_of._cache_size()
    assert first + run(fresh, state, 3)[-1] == expected
    assert step_of._cache_size() == compiled, "what was restored recompiles"


@pytest.mark.parametrize("then", [pytest.param((2, 4), marks=pytest.mark.slow), (1, 1)])
def test_other_meshes(saver, then):
    adapted = place(adapt(), mesh(4, 2))
    state = optimizer(adapted).init(adapted)
    adapted, state, _ = run(adapted, state, 2)
    saver.save(2, adapted, state)
    fresh = place(adapt(params()), mesh(*then))
    start = optimizer(fresh).init(fresh)
    got = saver.restore(fresh, start)
    same(got.adapted, adapted)
    same(got.state, state)
    same_shardings(got.adapted, fresh)
    same_shardings(got.state, start)
    *_, losses = run(got.adapted, got.state, 2)
    np.testing.assert_allclose(losses, run(adapted, state, 2)[-1], rtol=1e-5)


def test_sharded_runs_resume_bit_for_bit(saver):
    adapted = place(adapt(), mesh(4, 2))
    state = optimizer(adapted).init(adapted)
    adapted, state, _ = run(adapted, state, 2)
    saver.save(2, adapted, state)
    fresh = place(adapt(), mesh(4, 2))
    got = saver.restore(fresh, optimizer(fresh).init(fresh))
    assert run(got.adapted, got.state, 3)[-1] == run(adapted, state, 3)[-1]


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def test_shape_dtype_structs_with_shardings_say_where(saver):
    adapted, state = trained()
    saver.save(1, adapted, state)
    fresh = place(adapt(), mesh(2, 4))
    base, adapter = flora.split(fresh)
    planned = flora.join(base, abstract(adapter))
    shapes = jax.eval_shape(optimizer(fresh).init, fresh)
    got = saver.restore(planned, shapes)
    same(got.adapted, adapted)
    same(got.state, state)
    same_shardings(flora.split(got.adapted)[1], adapter)
    assert not jax.tree.leaves(got.state)[0].committed


def test_the_base_is_not_written(saver):
    tree = {"kernel": normal(512, 512)}
    config = flora.LoraConfig(rank=1)
    adapted = flora.init(
        jax.random.key(0), config, lambda p, x: x @ p["kernel"], tree, normal(2, 512)
    )
    state = optax.adam(1e-3).init(flora.split(adapted)[1])
    saver.save(1, adapted, state)
    saver.wait()
    size = sum(f.stat().st_size for f in files(saver._directory))
    adapter = sum(x.nbytes for x in jax.tree.leaves((flora.split(adapted)[1], state)))
    assert size < adapter + 32 * 1024 < tree["kernel"].nbytes / 10


STATES = {
    "masked": optax.masked(optax.adam(1e-3), flora.mask),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
    "schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "every other step": optax.MultiSteps(optax.adam(1e-3), 2),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "no state": optax.sgd(1e-2),
    "bfloat16 moments": optax.adam(1e-3, mu_dtype=jnp.bfloat16),
}


def weak(x):
    return getattr(x, "weak_type", False)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("planned", [False, True])
def test_states_of_optax(saver, name, planned):
    adapted = adapt(dtype=jnp.float32)
    tx = flora.optimizer(STATES[name], adapted)
    _, state = jax.jit(tx.update)(adapted, tx.init(adapted), adapted)
    saver.save(1, adapted, state)
    given = jax.eval_shape(tx.init, adapted) if planned else tx.init(adapted)
    got = saver.restore(adapted, given).state
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)
    assert [weak(x) for x in jax.tree.leaves(got)] == [
        weak(x) for x in jax.tree.leaves(given)
    ]


def test_any_tree_of_arrays_and_numbers_is_a_state(saver):
    sharded = jax.device_put(jnp.arange(8.0), NamedSharding(mesh(4, 2), Spec("model")))
    state = {
        "step": 3, "rate": 0.5, "on": True, "numpy": np.arange(5, dtype=np.int16),
        "scalar": np.float32(2), "none": None, "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(5, impl="rbg"),
        "keys": jax.random.split(jax.random.key(1), 4),
        "int4": jnp.arange(4, dtype=jnp.int4), "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "complex": jnp.ones(2, jnp.complex64), "nan": jnp.array([jnp.nan, -0.0]),
        "sharded": sharded, "one": jax.device_put(jnp.ones(3), DEVICES[5]),
        "placed keys": jax.device_put(
            jax.random.split(jax.random.key(2), 8),
            NamedSharding(mesh(4, 2), Spec("data"))),
        "weak": jnp.asarray(1.5), "a/b": jnp.ones(1), "a.b": jnp.zeros(1)
    }  # fmt: skip
    saver.save(1, adapt(), state)
    got = saver.restore(adapt(), state).state
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(state), strict=True
    ):
        assert type(x) is type(y), path
        assert fingerprint([x]) == fingerprint([y]), path
        if isinstance(x, jax.Array):
            assert x.sharding == y.sharding, path
            assert (x.committed, weak(x)) == (y.committed, weak(y)), path


def test_dropout_keys_belong_to_one_step(saver):
    adapted = adapt(dropout=0.5)
    saver.save(1, flora.with_dropout(adapted, jax.random.key(0)))
    got = saver.restore(flora.with_dropout(adapted, jax.random.key(1)))
    same(got.adapted, adapted)
    assert got.state is None


def test_batch_statistics_are_saved_and_other_changed_leaves_if_named(tmp_path):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    x = normal(3, 5)
    variables = model.init(jax.random.key(0), x)
    config = flora.LoraConfig(rank=2)
    adapted = flora.init(jax.random.key(0), config, model.apply, variables, x)
    later = adapted | {
        "batch_stats": jax.tree.map(lambda s: s + 1, adapted["batch_stats"])
    }
    with Checkpointer(tmp_path / "also", also="batch_stats/*") as saver:
        saver.save(1, later)
        same(saver.restore(adapted).adapted, later)
    with Checkpointer(tmp_path / "unnamed") as saver:
        saver.save(1, later)
        same(saver.restore(adapted).adapted, later)
        dense = later["params"]["layers_0"]
        dense = dense | {"bias": dense["bias"] + 1}
        later = later | {"params": later["params"] | {"layers_0": dense}}
        with pytest.raises(flora.LoraError, match="is frozen and was float32"):
            saver.save(2, later)
        saver.save(2, later, check_base=False)
        remedy = "save with also='/params/layers_0/bias'"
        with pytest.raises(flora.LoraError, match=remedy):
            saver.restore(adapted)
    with Checkpointer(tmp_path / "named", also="/params/layers_0/bias") as saver:
        saver.save(1, later)
        same(saver.restore(adapted).adapted, later)
    saver = Checkpointer(tmp_path / "idle", also="bais")
    with pytest.raises(flora.LoraError, match="also='bais' selects none"):
        saver.save(1, later)


def test_nnx_states(saver):
    graph, state = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    config = flora.LoraConfig(rank=2, train="bias")
    adapted = flora.init(jax.random.key(0), config, fn, state, normal(2, 6))
    later = contract.randomized(adapted)
    saver.save(1, later)
    got = saver.restore(adapted).adapted
    same(got, later)
    contract.close(
        flora.lora(fn)(got, normal(2, 6)), flora.lora(fn)(later, normal(2, 6))
    )


def test_arrays_can_be_donated_and_changed_once_save_returns(saver):
    big = {"kernel": normal(64, 64)}
    config = flora.LoraConfig(rank=64, train="none")
    adapted = flora.init(
        jax.random.key(0),
        dataclasses.replace(config, train=()),
        lambda p, x: x @ p["kernel"],
        big,
        normal(2, 64),
    )
    change = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 7, t), donate_argnums=0)
    numpy = np.ones((1000, 1000), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all donated buffers were usable
        for step in range(1, 6):
            base, adapter = flora.split(adapted)
            adapter = jax.tree.map(lambda x, step=step: jnp.full_like(x, step), adapter)
            state = {"big": jnp.full((2000, 1000), float(step)), "numpy": numpy}
            numpy[:] = step
            saver.save(step, flora.join(base, adapter), state)
            kept = np.asarray(numpy[0, 0])
            numpy[:] = -1
            for _ in range(3):
                adapter, state["big"] = change(adapter), change(state["big"])
            got = saver.restore(adapted, state)
            assert kept == step
            assert np.unique(contract.weights(got.adapted)[0].a).tolist() == [step]
            assert np.unique(got.state["big"]).tolist() == [step]
            assert np.unique(got.state["numpy"]).tolist() == [step]


def test_the_latest_steps_stay(saver, tmp_path):
    adapted = adapt()
    for step in (1, 5, 6, 9):
        saver.save(step, adapted)
    assert saver.steps() == (5, 6, 9)
    assert saver.restore(adapted, step=6).step == 6
    saver.delete(9)
    assert saver.latest() == 6
    saver.save(7, adapted)
    assert saver.steps() == (5, 6, 7)
    with Checkpointer(tmp_path / "all", max_to_keep=None) as every:
        for step in range(5):
            every.save(step, adapted)
        assert every.steps() == tuple(range(5))


def test_a_reader_leaves_the_writer_alone(tmp_path):
    adapted = adapt()
    with Checkpointer(tmp_path / "a" / "b") as reader:
        assert reader.latest() is None
        assert not (tmp_path / "a").exists()
        with Checkpointer(tmp_path / "a" / "b") as writer:
            writer.save(1, adapted)
            writer.wait()
            assert reader.latest() == 1
            under_way = tmp_path / "a" / "b" / "2.orbax-checkpoint-tmp"
            under_way.mkdir()
            assert reader.latest() == 1
            same(reader.restore(adapted).adapted, adapted)
            assert under_way.exists()
