"""What `flora.optimizer` hands to the transformation inside, and what it returns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
from flora.quantize import quantize
from flora.variants import VeRA
from tests.support import contract
from tests.support.adapters import ADAPTED, GRADS, bits, f32, unchanged

ADAPTER_GRADS = [flora.split(g)[1] for g in GRADS]
GIVEN = {"whole tree": GRADS, "adapter": ADAPTER_GRADS}


def recorder():
    """Plain gradient descent that keeps what it was given."""
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return jax.tree.map(lambda g: -g, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update), seen


@pytest.mark.parametrize("given", GIVEN)
def test_no_weight_is_ever_a_gradient(given):
    """The inner transformation sees the arrays that train, the very ones, alone."""
    inner, seen = recorder()
    tx = flora.optimizer(inner, ADAPTED)
    tx.update(GIVEN[given][0], tx.init(ADAPTED), ADAPTED)
    grads, params = (jax.tree.leaves(x) for x in seen[0])
    wanted, trained = map(jax.tree.leaves, (ADAPTER_GRADS[0], flora.split(ADAPTED)[1]))
    assert len(grads) == len(params) == len(wanted) == 6
    assert all(x is y for x, y in zip(grads, wanted, strict=True))
    assert all(x is y for x, y in zip(params, trained, strict=True))


def test_what_a_variant_freezes_is_hidden_too():
    fn = flora.lora(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2))
    params, x = {"kernel": f32(7, 5)}, f32(3, 7)
    adapted = contract.adapt(fn, params, x, variant=VeRA())
    inner, seen = recorder()
    tx = flora.optimizer(inner, adapted)
    _, grads = flora.value_and_grad(fn)(adapted, x)
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    trained = set(adapted["kernel"].extra) - set(VeRA().frozen)
    assert len(jax.tree.leaves(seen[0][0])) == len(trained) == 2
    moved = optax.apply_updates(adapted, updates)["kernel"]
    assert np.array_equal(bits(moved.a), bits(adapted["kernel"].a))
    assert moved.a.shape == adapted["kernel"].a.shape


def test_both_kinds_of_gradients_make_the_same_steps():
    tx = flora.optimizer(optax.MultiSteps(optax.adamw(1e-2), 2), ADAPTED)
    ends = []
    for grads in GIVEN.values():
        tree, state = ADAPTED, tx.init(ADAPTED)
        for g in grads:
            updates, state = tx.update(g, state, tree)
            tree = optax.apply_updates(tree, updates)
        ends.append((tree, state))
        assert unchanged(tree)
    contract.close(*ends, 0)
    assert not np.array_equal(ends[0][0]["embedding"].b, ADAPTED["embedding"].b)


def test_no_array_of_a_weight_s_shape_is_made():
    tx = flora.optimizer(optax.adamw(1e-2), ADAPTED)
    state = tx.init(ADAPTED)
    shapes = {x.shape for x in jax.tree.leaves(flora.split(ADAPTED)[0])}
    made = contract.dense_arrays(tx.update, shapes, ADAPTER_GRADS[0], state, ADAPTED)
    assert made == []
    updates, _ = tx.update(ADAPTER_GRADS[0], state, ADAPTED)
    assert jax.tree.structure(updates) == jax.tree.structure(ADAPTED)
    frozen = jax.tree.leaves(flora.split(updates)[0])
    assert [x.shape for x in frozen] == [()] * len(shapes)
    assert all(float(x) == 0 and np.signbit(x) for x in frozen)


def test_updates_have_the_shapes_of_gradients_of_the_whole_tree():
    """Such as `optax.apply_if_finite`, around it, asks for."""
    tx = optax.apply_if_finite(flora.optimizer(optax.sgd(1e-2), ADAPTED), 3)
    updates, _ = tx.update(GRADS[0], tx.init(ADAPTED), ADAPTED)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(ADAPTED), strict=True):
        assert u.shape == p.shape
    assert unchanged(optax.apply_updates(ADAPTED, updates))


def test_the_state_is_that_of_multi_transform():
    """So that states that were saved can be restored."""
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
    labels = jax.tree.map(lambda m: "train" if m else "freeze", flora.mask(ADAPTED))
    plain = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)
    whole = flora.optimizer(tx, ADAPTED)
    state = whole.init(ADAPTED)
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(ADAPTED))
    for grads in (GRADS[0], ADAPTER_GRADS[0]):
        _, new = whole.update(grads, state, ADAPTED)
        assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.parametrize("target", ["first", ("first", "second")])
def test_a_stored_base(target):
    """Weights in fewer bits stay as they are, with factors and without."""
    fn = flora.lora(lambda p, x: jnp.sum(x @ p["first"] @ p["second"]))
    params, x = {"first": f32(64, 64), "second": f32(64, 64, seed=1)}, f32(3, 64)
    quantized = quantize(params, "int8", target="*")
    adapted = contract.adapt(fn, quantized, x, target=target)
    tx = flora.optimizer(optax.adam(1e-2), adapted)
    _, grads = flora.value_and_grad(fn)(adapted, x)
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    moved = optax.apply_updates(adapted, updates)
    ours, theirs = (jax.tree.leaves(flora.split(t)[0]) for t in (moved, adapted))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(bits(one), bits(other))
    assert not np.array_equal(moved["first"].b, adapted["first"].b)


def test_a_trained_leaf_without_a_gradient_is_named():
    tx = flora.optimizer(optax.sgd(1e-2), ADAPTED)
    grads = dict(ADAPTER_GRADS[0], embedding=None, head={"kernel": None, "bias": None})
    with pytest.raises(flora.LoraError) as error:
        tx.update(grads, tx.init(ADAPTED), ADAPTED)
    for path in ("embedding", "head/kernel", "head/bias"):
        wanted = f"optimizer: '{path}' trains, and None is given as its gradient. Pass "
        assert wanted in str(error.value)


class Steps(chex.TestCase):
    """Under jit, where the compiler sees the scalar updates, and without it."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_frozen_leaves_stay(self):
        tx = flora.optimizer(optax.adamw(1e-2), ADAPTED)

        def step(grads, state, tree):
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        step = self.variant(step)
        tree, state = ADAPTED, tx.init(ADAPTED)
        for g in ADAPTER_GRADS:
            tree, state = step(g, state, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, ADAPTED)
        assert unchanged(tree)
        assert not np.array_equal(tree["embedding"].b, ADAPTED["embedding"].b)
