"""Blocks: adapters with ranks and scales of their own in one leaf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import flora
import flora.budget
import flora.monitor
import flora.multi
import flora.recipes
import flora.starts
from flora._tree.blocks import Block, covered, gates, problem
from flora._tree.weight import product_of, scale_of, uniform, within_blocks
from tests.support.contract import array, properties

pytestmark = pytest.mark.usefixtures("x64")

L, D, R = 3, 4, 5
BLOCKS = (Block((0,), 0, 5, 2.0), Block((2,), 1, 3, 0.5))
FUSED = (
    Block((0,), 0, 2, 2.0, (0, 3)),
    Block((0,), 2, 5, 0.5, (3, 4)),
    Block((1,), 0, 4, 3.0, (3, 4)),
)


def node(blocks, seed=0, **changes):
    """A stacked node with values inside its blocks alone."""
    weight = flora.LoraWeight(
        array(L, D, D, seed=seed),
        array(L, D, R, seed=seed + 1),
        array(L, R, D, seed=seed + 2),
        layout=flora.Layout((0,), (1,), (2,)),
        rank=R,
        blocks=blocks,
        **changes,
    )
    return within_blocks(weight)


def by_hand(weight):
    """ΔW, block by block."""
    change = np.zeros((L, D, D))
    for x in weight.blocks:
        a = np.asarray(weight.a)[x.index][:, x.start : x.stop]
        first, end = x.columns or (0, D)
        b = np.asarray(weight.b)[x.index][x.start : x.stop, first:end]
        change[x.index][:, first:end] += x.scale * a @ b
    return change


def fn(params, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, x, params["w"])[0]


@pytest.mark.parametrize("blocks", [BLOCKS, FUSED])
def test_merged_is_the_sum_of_the_blocks(blocks):
    weight = node(blocks)
    want = np.asarray(weight.base) + by_hand(weight)
    got = flora.merge({"w": weight})["w"]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    x = array(2, D, seed=9)
    run = jax.jit(flora.lora(fn))({"w": weight}, x)
    np.testing.assert_allclose(run, fn({"w": want}, x), rtol=1e-12)


@pytest.mark.parametrize("blocks", [BLOCKS, FUSED])
def test_gradients_are_those_of_the_blocks_and_zero_elsewhere(blocks):
    weight, x = node(blocks), array(2, D, seed=9)

    def of_blocks(parts):
        change = jnp.zeros((L, D, D))
        for block, (a, b) in zip(blocks, parts, strict=True):
            at = (*block.index, slice(None), slice(*(block.columns or (None,))))
            change = change.at[at].add(block.scale * a @ b)
        return jnp.sum(fn({"w": weight.base + change}, x) ** 2)

    def part(block, a, b):
        ranks = slice(block.start, block.stop)
        columns = slice(*(block.columns or (None,)))
        return a[block.index][:, ranks], b[block.index][ranks, columns]

    parts = [part(block, weight.a, weight.b) for block in blocks]
    want = jax.grad(of_blocks)(parts)
    _, grads = flora.value_and_grad(lambda t: jnp.sum(flora.lora(fn)(t, x) ** 2))(
        {"w": weight}
    )
    got = grads["w"]
    left_a, left_b = np.array(got.a), np.array(got.b)
    for block, (a, b) in zip(blocks, want, strict=True):
        mine = part(block, got.a, got.b)
        np.testing.assert_allclose(mine[0], a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(mine[1], b, rtol=1e-9, atol=1e-12)
        ranks = slice(block.start, block.stop)
        left_a[block.index][:, ranks] = 0
        left_b[block.index][ranks, slice(*(block.columns or (None,)))] = 0
    assert not left_a.any()
    assert not left_b.any()


@pytest.mark.parametrize("variant", [None, flora.variants.DoRA()])
def test_what_is_outside_stays_as_it_is_for_any_number_of_steps(variant):
    config = flora.LoraConfig(rank=2, target="*", exclude="1/w", variant=variant)
    params, x = {"w": array(L, D, D, dtype=jnp.float32)}, jnp.ones((2, D))
    tree = flora.init(jax.random.key(0), config, fn, params, x)
    tx = flora.optimizer(optax.adamw(0.1, weight_decay=0.5), tree)

    @jax.jit
    def step(tree, state):
        loss = lambda t: jnp.sum(flora.lora(fn)(t, x) ** 2)  # noqa: E731
        grads = flora.value_and_grad(loss)(tree)[1]
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    new, state = tree, tx.init(tree)
    for _ in range(5):
        new, state = step(new, state)
    old = jax.tree.leaves((tree["w"].a, tree["w"].b, tree["w"].extra))
    for before, after in zip(
        old, jax.tree.leaves((new["w"].a, new["w"].b, new["w"].extra)), strict=True
    ):
        assert not before[1].any()
        np.testing.assert_array_equal(after[1], before[1])
        assert (after[0] != before[0]).any()
    merged = flora.merge(new)["w"]
    np.testing.assert_array_equal(merged[1], params["w"][1])
    assert (merged[0] != params["w"][0]).any()


@properties(20, seed=st.integers(0, 99), which=st.sampled_from([BLOCKS, FUSED]))
def test_uniform_means_the_same(seed, which):
    weight = node(which, seed=seed)
    plain = uniform(weight)
    assert plain.blocks == ()
    got = plain.scale * np.einsum("sir,sro->sio", plain.a, plain.b)
    np.testing.assert_allclose(got, by_hand(weight), rtol=1e-12, atol=1e-12)
    product = product_of(weight)
    got = scale_of(weight) * np.einsum("sir,sro->sio", product.a, product.b)
    np.testing.assert_allclose(got, by_hand(weight), rtol=1e-12, atol=1e-12)


def test_an_index_that_stops_early_holds_for_the_other_axes():
    found = gates((Block((1,), 0, 2, 3.0),), (2, 3), 2, (4,))
    assert found.shape == (2, 3, 2, 1)
    assert (np.asarray(found[1]) == 3).all()
    assert not np.asarray(found[0]).any()
    where = covered((Block((1,), 0, 2, 3.0, (1, 3)),), (2, 3), (4,))
    assert where[1, :, 1:3].all()
    assert where.sum() == 6


def test_no_one_scale():
    weight = node(BLOCKS)
    assert "2 blocks, scale=0.5…2" in repr(weight)
    with pytest.raises(flora.LoraError, match="several ranks or scales"):
        _ = weight.scale


@pytest.mark.parametrize(
    "block",
    [
        Block((3,), 0, 5, 1.0),
        Block((0, 0), 0, 5, 1.0),
        Block((0,), 0, 6, 1.0),
        Block((0,), 2, 2, 1.0),
        Block((0,), 0, 5, 1.0, (2, 5)),
        Block((0,), 0, 5, 1.0, (2, 2)),
    ],
)
def test_a_block_that_lies_outside(block):
    assert "does not lie in a stack of shape (3,)" in problem((block,), (L,), R, D)
    weight = node(BLOCKS)
    tree = {"w": dataclasses.replace(weight, blocks=(block,))}
    with pytest.raises(flora.LoraError, match="'w' of shape"):
        flora.merge(tree)


def test_blocks_that_fit():
    assert problem(BLOCKS, (L,), R, D) == problem(FUSED, (L,), R, D) == ""


def test_the_summary_counts_what_trains():
    row = flora.summary({"w": node(BLOCKS)}).rows[0]
    assert row.trained == 5 * (D + D) + 2 * (D + D)
    assert (row.adapters, row.alpha, row.rank) == ("2, 5", None, R)
    row = flora.summary({"w": node(FUSED)}).rows[0]
    assert row.trained == 2 * (D + 3) + 3 * (D + 1) + 4 * (D + 1)


def test_files_keep_blocks(tmp_path):
    tree = {"w": node(FUSED)}
    flora.save(tmp_path / "a", tree)
    again = flora.load(tmp_path / "a", {"w": tree["w"].base})
    assert again["w"].blocks == FUSED
    np.testing.assert_array_equal(again["w"].b, tree["w"].b)
    np.testing.assert_array_equal(flora.merge(again)["w"], flora.merge(tree)["w"])


REFUSED = {
    "eva": lambda t, x: flora.starts.eva(jax.random.key(0), t, fn, [(x,)]),
    "pissa": lambda t, x: flora.starts.pissa(t),
    "unseen": lambda t, x: flora.budget.unseen(t),
    "patterns": lambda t, x: flora.budget.patterns(t),
    "lora_fa": lambda t, x: flora.recipes.lora_fa(optax.sgd(1.0)).init(t),
    "extract": lambda t, x: flora.multi.extract(t, flora.merge(t)),
    "start": lambda t, x: flora.multi.start(
        [flora.split(t)[1]], optax.sgd, jnp.ones(1)
    ),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_verbs_that_need_one_rank(verb):
    with pytest.raises(flora.LoraError, match=f"{verb}: 'w' holds 2 adapters"):
        REFUSED[verb]({"w": node(BLOCKS)}, jnp.ones((2, D)))


def test_many_adapters_take_the_scales_into_b():
    tree = {"w": node(BLOCKS)}
    base, adapter = flora.split(tree)
    both = flora.multi.combine([adapter, adapter], [1.0, 1.0]).adapter
    got = flora.merge(flora.join(base, both))["w"] - base["w"]
    np.testing.assert_allclose(got, 2 * by_hand(tree["w"]), rtol=1e-12, atol=1e-12)
    one = flora.multi.select(flora.multi.stack([adapter, adapter]), 1)
    got = flora.merge(flora.join(base, one))["w"] - base["w"]
    np.testing.assert_allclose(got, by_hand(tree["w"]), rtol=1e-12, atol=1e-12)


def test_measures_are_those_of_the_blocks():
    tree, x = {"w": node(BLOCKS)}, array(2, D, seed=9)
    grads = flora.value_and_grad(lambda t: jnp.sum(flora.lora(fn)(t, x) ** 2))(tree)[1]
    found = flora.monitor.measure(tree, grads).leaves["w"]
    want = np.linalg.norm(by_hand(tree["w"]), axis=(1, 2))
    np.testing.assert_allclose(found.norm_delta, want, rtol=1e-9)
    g = grads["w"]
    moved = sum(
        by_hand(flora.LoraWeight(None, a, b, rank=R, blocks=BLOCKS))
        for a, b in ((g.a, tree["w"].b), (tree["w"].a, g.b))
    )
    want = np.linalg.norm(moved, axis=(1, 2))
    np.testing.assert_allclose(found.grad_delta, want, rtol=1e-9)
    assert found.effective_rank[1] == 0
