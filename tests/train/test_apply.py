"""`flora.apply_updates` moves what trains as optax does; the rest is the very same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flora
from flora.checkpoint import Checkpointer
from flora.quantize import quantize
from flora.variants import DoRA, VeRA
from tests.support import contract
from tests.support.adapters import ADAPTED, GRADS, bits, f32, on_mesh

BASE, ADAPTER = flora.split(ADAPTED)
ADAPTER_GRADS = flora.split(GRADS[0])[1]


def same_objects(got, tree):
    """Whether every frozen leaf is the very object that it was."""
    ours, theirs = (jax.tree.leaves(flora.split(t)[0]) for t in (got, tree))
    return len(ours) == len(theirs) and all(map(lambda x, y: x is y, ours, theirs))


WHOLE = {
    "of the tree": lambda g: g,
    "of the adapter": lambda g: flora.split(g)[1],
    "with optax's holes": lambda g: jax.tree.map(
        lambda x, trains: x if trains else optax.MaskedNode(), g, flora.mask(g)
    ),
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("tree", [ADAPTED, ADAPTER], ids=["tree", "adapter"])
def test_what_trains_moves_as_optax_moves_it_and_nothing_else(form, tree):
    got = flora.apply_updates(tree, WHOLE[form](GRADS[0]))
    want = flora.split(optax.apply_updates(ADAPTED, GRADS[0]))[1]
    if tree is ADAPTED:
        assert same_objects(got, ADAPTED)
        got = flora.split(got)[1]
    contract.close(got, want, 0)


def test_updates_of_frozen_leaves_are_ignored_whatever_they_hold():
    nans = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), BASE)
    got = flora.apply_updates(ADAPTED, flora.join(nans, ADAPTER_GRADS))
    assert same_objects(got, ADAPTED)
    assert np.isfinite(got["embedding"].b).all()


def test_compiled_frozen_leaves_are_handed_on():
    """In the jaxpr they are outputs that no equation makes."""
    jaxpr = jax.make_jaxpr(flora.apply_updates)(ADAPTED, GRADS[0]).jaxpr
    frozen = [not m for m in jax.tree.leaves(flora.mask(ADAPTED))]
    ins, outs = jaxpr.invars[: len(frozen)], jaxpr.outvars
    assert [x is y for x, y in zip(ins, outs, strict=True)] == frozen
    assert any(frozen)


@pytest.mark.parametrize("tx", [
    lambda own: optax.chain(own, optax.scale(-1.0)),
    lambda own: optax.chain(own, optax.add_decayed_weights(0.1)),
], ids=["scaled", "decay"])  # fmt: skip
def test_what_stands_after_the_optimizer_moves_no_base(tx):
    tx = tx(flora.optimizer(optax.adamw(1e-2), ADAPTED))
    tree, state = ADAPTED, tx.init(ADAPTED)
    for grads in GRADS:
        updates, state = tx.update(grads, state, tree)
        tree = flora.apply_updates(tree, updates)
    assert same_objects(tree, ADAPTED)
    assert not np.array_equal(tree["embedding"].b, ADAPTED["embedding"].b)


DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_leaves_of_every_dtype_keep_their_bits(dtype):
    odd = np.arange(256, dtype=np.uint32).astype(f"u{jnp.dtype(dtype).itemsize}")
    frozen = {"w": jnp.asarray(odd.view(jnp.dtype(dtype))), "key": jax.random.key(0)}
    tree = {**frozen, "x": flora.Trained(jnp.ones(3))}
    updates = {"w": frozen["w"], "key": None, "x": flora.Trained(jnp.ones(3))}

    @jax.jit
    def steps(tree):
        body = lambda t, _: (flora.apply_updates(t, updates), None)  # noqa: E731
        return jax.lax.scan(body, tree, length=3)[0]

    got = steps(tree)
    assert np.array_equal(bits(got["w"]), odd.view(np.uint8))
    assert got["key"] == frozen["key"]
    assert got["x"].value.tolist() == [4, 4, 4]


def test_quantized_bases_stay():
    fn = flora.lora(lambda p, x: jnp.sum(x @ p["first"] @ p["second"]))
    params, x = {"first": f32(64, 64), "second": f32(64, 64, seed=1)}, f32(3, 64)
    adapted = contract.adapt(fn, quantize(params, "nf4", target="*"), x, target="first")
    tx = flora.optimizer(optax.adam(1e-2), adapted)
    _, grads = flora.value_and_grad(fn)(adapted, x)
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    assert same_objects(flora.apply_updates(adapted, updates), adapted)


@pytest.mark.parametrize("variant", [DoRA(), VeRA()], ids=repr)
def test_variants_move_what_they_train(variant):
    fn = flora.lora(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2))
    params, x = {"kernel": f32(7, 5)}, f32(3, 7)
    adapted = contract.adapt(fn, params, x, variant=variant)
    ones = jax.tree.map(jnp.ones_like, adapted)
    old, new = adapted["kernel"], flora.apply_updates(adapted, ones)["kernel"]
    parts = {"a": "a", "b": "b"} | {k: k for k in old.extra}
    for name in parts:
        was, now = (x.extra.get(name, getattr(x, name, None)) for x in (old, new))
        if name in variant.frozen:
            assert now is was
        else:
            np.testing.assert_array_equal(now, was + 1)
    assert set(variant.frozen) < set(parts)


def test_dropout_keys_stay():
    fn = flora.lora(lambda p, x: jnp.sum(x @ p["kernel"]))
    params, x = {"kernel": f32(7, 5)}, f32(3, 7)
    adapted = contract.adapt(fn, params, x, dropout=0.1)
    keyed = flora.with_dropout(adapted, jax.random.key(1))
    tx = flora.optimizer(optax.adam(1e-2), keyed)
    _, grads = flora.value_and_grad(fn)(keyed, x)
    updates, _ = tx.update(grads, tx.init(keyed), keyed)
    moved = flora.apply_updates(keyed, updates)["kernel"]
    assert moved.key is keyed["kernel"].key
    assert moved.base is params["kernel"]


def test_plain_trees():
    """Floating leaves move, as by optax; integers, keys and holes stay."""
    tree = {"w": f32(3), "half": f32(2).astype(jnp.bfloat16), "n": jnp.int32(3),
            "key": jax.random.key(0), "name": "x", "none": None, "hole": f32(2),
            "number": 1.5}  # fmt: skip
    updates = {"w": f32(3, seed=1), "half": f32(2, seed=1), "n": jnp.int32(1),
               "key": np.zeros((), jax.dtypes.float0), "name": None, "none": None,
               "hole": optax.MaskedNode(), "number": 1.0}  # fmt: skip
    got = flora.apply_updates(tree, updates)
    floating = {k: tree[k] for k in ("w", "half", "number")}
    want = optax.apply_updates(floating, {k: updates[k] for k in floating})
    contract.close({k: got[k] for k in floating}, want, 0)
    assert all(got[k] is tree[k] for k in tree if k not in floating)


def test_lookahead_on_the_adapter():
    tx = optax.lookahead(flora.optimizer(optax.sgd(1.0), ADAPTER), 2, 0.5)
    params = optax.LookaheadParams.init_synced(ADAPTER)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(ADAPTER_GRADS, state, params)
        params = flora.apply_updates(params, updates)
    np.testing.assert_allclose(
        params.slow["embedding"].b,
        ADAPTED["embedding"].b - ADAPTER_GRADS["embedding"].b,
        rtol=1e-5,
    )
    assert same_objects(flora.join(BASE, params.slow), ADAPTED)


def test_a_whole_nnx_state_with_keys_and_counts():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.first(x)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    inputs = f32(4, 6)
    loss = flora.lora(lambda s, x: jnp.mean((nnx.merge(graphdef, s)(x) - 1) ** 2))
    adapted = contract.adapt(loss, state, inputs, target="kernel", train="norm/scale")
    tx = flora.optimizer(optax.adamw(1e-1, weight_decay=0.1), adapted)

    @jax.jit
    def step(tree, state):
        value, grads = flora.value_and_grad(loss)(tree, inputs)
        updates, state = tx.update(grads, state, tree)
        return flora.apply_updates(tree, updates), state, value

    tree, opt_state, losses = adapted, tx.init(adapted), []
    for _ in range(9):
        tree, opt_state, value = step(tree, opt_state)
        losses.append(value)
    assert losses[-1] < 0.9 * losses[0]
    now, was = (jax.tree.leaves(flora.split(t)[0]) for t in (tree, adapted))
    for x, y in zip(now, was, strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)
    # Gradients of the whole tree have none for keys: allow_int.
    _, grads = jax.value_and_grad(loss, allow_int=True)(adapted, inputs)
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    assert same_objects(flora.apply_updates(adapted, updates), adapted)


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_on_a_mesh_everything_stays_where_it_is(kind):
    with on_mesh(kind) as tree:
        got = jax.jit(flora.apply_updates)(tree, jax.tree.map(jnp.ones_like, tree))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert np.array_equal(got.base, tree.base)
        np.testing.assert_array_equal(got.b, tree.b + 1)


REFUSED = {
    "other structures": ({"embedding": GRADS[0]["embedding"]}, "have other structures"),
    "no update": (
        dict(ADAPTER_GRADS, embedding=None),
        r"'embedding/a', float32\[9,2\], trains and has no update\. Pass what update"),
    "a part": (
        dict(ADAPTER_GRADS,
             embedding=dataclasses.replace(ADAPTER_GRADS["embedding"], a=None)),
        "'embedding/a', "),
    "a whole leaf": (
        dict(ADAPTER_GRADS, head={"kernel": f32(5, 4), "bias": None}),
        "2 problems"),
    "a shape": (
        dict(ADAPTER_GRADS,
             embedding=dataclasses.replace(ADAPTER_GRADS["embedding"], b=f32(6))),
        r"'embedding/b', float32\[2,6\], trains and has an update float32\[6\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_updates_that_do_not_fit_are_named(name):
    updates, message = REFUSED[name]
    with pytest.raises(flora.LoraError, match=message):
        flora.apply_updates(ADAPTED, updates)


def test_functions_strings_and_numbers_stay(tmp_path):
    """What modules of Equinox hold beside arrays."""
    static = {"act": jax.nn.gelu, "name": "net", "kind": jnp.float32, "n": 3, "p": 0.1}

    def fn(tree, x):
        return jnp.sum(tree["act"](x @ tree["kernel"]) ** tree["n"])

    x, plain = jnp.ones((2, 4)), static | {"kernel": jnp.ones((4, 3))}
    config = flora.LoraConfig(rank=2)
    adapted = flora.init(jax.random.key(0), config, fn, plain, x)
    tx = flora.optimizer(optax.adamw(0.1), adapted)
    loss, grads = flora.value_and_grad(flora.lora(fn))(adapted, x)
    updates, state = tx.update(grads, tx.init(adapted), adapted)
    assert [updates[name] for name in ("act", "name", "kind")] == [None] * 3
    moved = flora.apply_updates(adapted, updates)
    flora.save(tmp_path / "adapter.safetensors", moved)
    loaded = flora.load(tmp_path / "adapter.safetensors", plain)
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, moved, state)
        restored, _, _ = checkpointer.restore(adapted, state)
    for tree in (moved, loaded, restored, flora.merge(moved)):
        assert all(tree[name] is value for name, value in static.items())
        assert flora.lora(fn)(tree, x) != loss
