"""Sharded training of whole models, and a function that shard_map maps over a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
from tests.support import contract
from tests.support.registry import Decoder, linen, normal

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"))


def batch():
    return jax.random.randint(jax.random.key(5), (8, 6), 0, 31)


def train(adapted, ids, apply, steps=6):
    """Losses of a few whole-tree steps, and the last tree."""
    tx = flora.optimizer(optax.adamw(1e-2, weight_decay=0.1), adapted)

    def loss(tree):
        logits = apply(tree, ids)
        labels = jnp.roll(ids, 1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(tree, state):
        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, losses = tx.init(adapted), []
    for _ in range(steps):
        adapted, state, value = step(adapted, state)
        losses.append(float(value))
    return losses, adapted


def spec_of(weight):
    """FSDP on in axes over 'data', tensor parallel on out axes over 'model'."""
    layout, shape = weight.layout, weight.base.shape
    axes = [None] * len(shape)
    for name, size, chosen in (("data", 4, layout.in_), ("model", 2, layout.out)):
        for i in chosen:
            if shape[i] % size == 0 and name not in axes:
                axes[i] = name
    return Spec(*axes)


@pytest.fixture(scope="module")
def one_device():
    """An adapted decoder, the function, and what training gives on one device."""
    model = linen(Decoder(), batch())
    adapted = contract.adapt(
        model.fn, model.params, batch(), target=model.target, alpha=4.0
    )
    apply = flora.lora(model.fn)
    return adapted, apply, *train(adapted, batch(), apply)


@pytest.mark.parametrize("where", ["base", "base and factors"])
def test_sharded_training_has_the_losses_of_one_device(where, one_device):
    adapted, apply, expected, trained = one_device
    assert expected[-1] < expected[0] - 0.1

    def place(x):
        if not contract.is_weight(x):
            return jax.device_put(x, NamedSharding(MESH, Spec()))
        spec = spec_of(x)
        base = jax.device_put(x.base, NamedSharding(MESH, spec))
        a, b = Spec(), Spec()
        if where == "base and factors":
            roles = x.layout
            a = Spec(*(spec[i] for i in (*roles.stack, *roles.in_)), None)
            b = Spec(
                *(spec[i] for i in roles.stack), None, *(spec[i] for i in roles.out)
            )
        a, b = (
            jax.device_put(f, NamedSharding(MESH, s)) for f, s in ((x.a, a), (x.b, b))
        )
        return flora.LoraWeight(base, a, b, layout=x.layout, rank=x.rank, alpha=x.alpha)

    sharded = jax.tree.map(place, adapted, is_leaf=contract.is_weight)
    specs = {w.base.sharding.spec for w in contract.weights(sharded)}
    assert len(specs - {Spec()}) >= 3, "nothing is sharded"
    ids = jax.device_put(batch(), NamedSharding(MESH, Spec("data")))
    losses, after = train(sharded, ids, apply)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for w, old in zip(contract.weights(after), contract.weights(sharded), strict=True):
        assert w.base.sharding.is_equivalent_to(old.base.sharding, w.base.ndim)
        assert np.array_equal(w.base, old.base)
    for w, one in zip(contract.weights(after), contract.weights(trained), strict=True):
        contract.close((w.a, w.b), (one.a, one.b), 2e-3)


def test_init_under_jit_with_shardings_of_the_base():
    rows = NamedSharding(MESH, Spec("data", "model"))
    params = {"kernel": jax.device_put(normal(8, 6), rows)}

    def fn(p, x):
        return x @ p["kernel"]

    def init(params):
        config = flora.LoraConfig(rank=2)
        return flora.init(jax.random.key(0), config, fn, params, normal(4, 8))

    adapted = jax.jit(init)(params)
    assert adapted["kernel"].base.sharding.is_equivalent_to(rows, 2)
    contract.close(adapted["kernel"].a, init(params)["kernel"].a)


def test_shard_map_over_the_batch():
    def fn(p, x):
        return jnp.tanh(x @ p["kernel"])

    params, x = {"kernel": normal(7, 5)}, normal(8, 7)
    adapted = contract.randomized(contract.adapt(fn, params, x))
    sharded = jax.shard_map(
        flora.lora(fn),
        mesh=MESH,
        in_specs=(Spec(), Spec("data")),
        out_specs=Spec("data"),
    )
    contract.close(jax.jit(sharded)(adapted, x), fn(flora.merge(adapted), x))
