"""What the tests of checkpoints share: a small model, trained, sharded, saved."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
from flora._tree.weight import is_node
from tests.support.process_worker import mlp
from tests.support.registry import normal

DEVICES = jax.devices("cpu")


def mesh(*shape):
    devices = np.array(DEVICES[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "model"))


def params(seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    sizes = {"first": (8, 16), "second": (16, 8)}
    return {
        k: {"kernel": jnp.asarray(draw.normal(size=s), dtype), "bias": jnp.zeros(s[1])}
        for k, s in sizes.items()
    }


def adapt(tree=None, **config):
    settings = {
        "rank": 2,
        "alpha": 4.0,
        "train": "bias",
        "dtype": jnp.bfloat16,
    } | config
    config = flora.LoraConfig(**settings)
    tree = params() if tree is None else tree
    return flora.init(jax.random.key(3), config, mlp, tree, normal(4, 8))


def optimizer(adapted):
    return flora.optimizer(optax.adamw(1e-2, weight_decay=0.1), adapted)


@jax.jit
def step_of(adapted, state, x):
    def loss(tree):
        return jnp.mean((flora.lora(mlp)(tree, x) - 1) ** 2)

    value, grads = flora.value_and_grad(loss)(adapted)
    updates, state = optimizer(adapted).update(grads, state, adapted)
    return optax.apply_updates(adapted, updates), state, value


def run(adapted, state, steps, x=None):
    losses, x = [], normal(4, 8) if x is None else x
    for _ in range(steps):
        adapted, state, value = step_of(adapted, state, x)
        losses.append(float(value))
    return adapted, state, losses


def trained(steps=3, **config):
    adapted = adapt(**config)
    return run(adapted, optimizer(adapted).init(adapted), steps)[:2]


def place(adapted, mesh):
    """FSDP x TP, biases over 'model'."""

    def leaf(x):
        if isinstance(x, flora.Trained):
            return flora.Trained(put(x.value, Spec("model")))
        parts = {
            "base": Spec("data", "model"),
            "a": Spec("data"),
            "b": Spec(None, "model"),
        }
        return dataclasses.replace(
            x, **{k: put(getattr(x, k), spec) for k, spec in parts.items()}
        )

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(leaf, adapted, is_leaf=is_node)


def same(actual, expected):
    """Bit for bit, and dtype for dtype."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def same_shardings(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert x.committed == y.committed


def files(directory):
    return [p for p in pathlib.Path(directory).rglob("*") if p.is_file()]
