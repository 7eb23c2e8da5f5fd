"""A small tree with every kind of leaf, and AdamW in NumPy, for tests of recipes."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flora
from flora import recipes
from tests.support import contract
from tests.support.contract import array

RANK, ALPHA = 2, 6.0
SCALE = ALPHA / math.sqrt(RANK)  # rank-stabilized
LAYOUTS = {"kernel": flora.Layout((0,), (1, 2), (3,)), "embedding": flora.Layout()}
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def f32(*shape, seed=0):
    return array(*shape, seed=seed, dtype=jnp.float32)


def tree(seed=0, dtype=jnp.float32):
    """A stack of three 2·3 × 5 matrices, embedding, head, bias; two frozen leaves."""
    shapes = {"kernel": (3, 2, 3, 5), "embedding": (9, 6)}
    nodes = {}
    for i, (name, shape) in enumerate(shapes.items()):
        a, b = LAYOUTS[name].factor_shapes(shape, RANK)
        nodes[name] = flora.LoraWeight(
            f32(*shape, seed=seed + 9 * i).astype(dtype),
            f32(*a, seed=seed + 9 * i + 1),
            f32(*b, seed=seed + 9 * i + 2),
            layout=LAYOUTS[name],
            rank=RANK,
            alpha=ALPHA,
            rank_stabilized=True,
        )
    head, bias = f32(5, 4, seed=seed + 20), f32(4, seed=seed + 21)
    norm = jnp.asarray([-0.0, 1.0])
    return {
        "layers": {"kernel": nodes["kernel"]},
        "embedding": nodes["embedding"],
        "head": {"kernel": flora.Trained(head), "bias": flora.Trained(bias)},
        "frozen": {"kernel": f32(3, 2), "scale": norm},
    }


ADAPTED = tree()
GRADS = [tree(seed=100), tree(seed=200)]
PLACES = {
    ("layers/kernel", "a"): lambda t: t["layers"]["kernel"].a,
    ("layers/kernel", "b"): lambda t: t["layers"]["kernel"].b,
    ("embedding", "a"): lambda t: t["embedding"].a,
    ("embedding", "b"): lambda t: t["embedding"].b,
    ("head/kernel", "train"): lambda t: t["head"]["kernel"].value,
    ("head/bias", "train"): lambda t: t["head"]["bias"].value,
}


def values(t):
    return {place: np.asarray(get(t), np.float64) for place, get in PLACES.items()}


def bits(x):
    return np.asarray(x).view(np.uint8)


def steps(tx, way, grads=GRADS, start=ADAPTED):
    """The tree after one step for each of the gradients, and the last state."""
    if way == "adapter":
        base, params = flora.split(start)
        grads = [flora.split(g)[1] for g in grads]
    else:
        params = start
        tx = flora.optimizer(tx, start) if way == "in optimizer" else tx
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return (flora.join(base, params) if way == "adapter" else params), state


def unchanged(got, start=ADAPTED):
    """Whether all that is frozen is as before, bit for bit."""
    ours, theirs = flora.split(got)[0], flora.split(start)[0]
    same = jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)), ours, theirs)
    return all(jax.tree.leaves(same))


def numpy_adamw(params, grads, rates, decays, corrected=None):
    """AdamW with a learning rate and a decay for each array, written out.

    p ← p - η (m̂/(√v̂ + ε) + λ p), m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ).
    """
    p, m, v = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t, each in enumerate(grads, 1):
        for k in p:
            g = each[k]
            m[k] = ADAM["b1"] * m[k] + (1 - ADAM["b1"]) * g
            v[k] = ADAM["b2"] * v[k] + (1 - ADAM["b2"]) * g * g
            mh, vh = m[k] / (1 - ADAM["b1"] ** t), v[k] / (1 - ADAM["b2"] ** t)
            step = mh / (np.sqrt(vh) + ADAM["eps"]) + decays.get(k, 0.0) * p[k]
            p[k] = p[k] - rates.get(k, 0.0) * step
    return p


def close(got, want):
    for place, x in values(got).items():
        np.testing.assert_allclose(x, want[place], rtol=2e-5, atol=2e-6, err_msg=place)


def expected(rates, decays=None, grads=GRADS):
    every = dict.fromkeys(PLACES, 0.0) if decays is None else decays
    return numpy_adamw(values(ADAPTED), [values(g) for g in grads], rates, every)


# Whole trees keep their frozen leaves, with and without flora.optimizer around.
WAYS = ["adapter", "in optimizer"]


def loss_fn(p, x):
    y = jnp.tanh(x @ p["kernel"] + p["bias"])
    return jnp.sum((y @ p["head"]) ** 2)


def small():
    p = {"kernel": f32(7, 11).at[0, 0].set(-0.0), "bias": 0.1 * f32(11),
         "head": f32(11, 5), "step": jnp.int32(3)}  # fmt: skip
    x = f32(3, 7, seed=3)
    return p, contract.adapt(loss_fn, p, x, target="kernel", train="head"), x


def sgd_restart(t, state=None, tx=None, key=None):
    tx = tx or optax.sgd(0.1)
    state = tx.init(t) if state is None else state
    return recipes.restart(jax.random.key(0) if key is None else key, tx, state, t)


WHOLE = flora.LoraWeight(f32(8, 6), f32(8, 2, seed=1), f32(2, 6, seed=2), rank=2)
KINDS = [AxisType.Auto, AxisType.Explicit]


@contextlib.contextmanager
def on_mesh(kind):
    """The weight WHOLE divided over a mesh of 2 × 2, which is set."""
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        specs = flora.LoraWeight(("in", "out"), ("in", None), (None, "out"), rank=2)
        places = jax.tree.map(
            lambda spec: NamedSharding(mesh, PartitionSpec(*spec)),
            specs,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        yield jax.device_put(WHOLE, places)
