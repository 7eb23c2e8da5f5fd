"""Ranks by budget and AdaLoRA's reallocation, against plain Python and NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

import flora
import flora.sharding
from flora import budget
from flora.variants import AdaLoRA, VeRA
from tests.support.contract import adapt, array, close, is_weight, randomized

SHAPES = {"stack": (3, 8, 8), "q": (8, 2, 4), "out": (8, 5)}


def fn(p, x):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
    q = jnp.einsum("bi,ihd->bhd", x, p["q"]).reshape(x.shape)
    return q @ p["out"]


@functools.cache
def tree(rank=4, **config):
    params = {k: array(*s, seed=i, dtype=jnp.float32) for i, (k, s) in
              enumerate(SHAPES.items())}  # fmt: skip
    x = array(6, 8, dtype=jnp.float32)
    return adapt(fn, params, x, rank=rank, **config), x


COST = {"stack": 3 * 16, "q": 16, "out": 13}


def spent(ranks):
    return sum(COST[p] * r for p, r in ranks.items())


@pytest.mark.parametrize("parameters", [77, 78, 160, 400, 10**6])
def test_the_same_rank_everywhere(parameters):
    ranks = budget.rank_pattern(tree()[0], parameters)
    most = {"stack": 8, "q": 8, "out": 5}
    cost = {r: sum(COST[p] * min(r, m) for p, m in most.items()) for r in range(1, 9)}
    wanted = max(r for r, n in cost.items() if n <= parameters)
    assert ranks == {p: min(wanted, m) for p, m in most.items()}


@pytest.mark.parametrize("parameters", [100, 200, 333])
def test_ranks_follow_importance_within_the_budget(parameters):
    weight = {"stack": 1.0, "q": 3.0, "out": 0.0}
    ranks = budget.rank_pattern(tree()[0], parameters, importance=weight)
    assert ranks["out"] == 1
    assert parameters - COST["stack"] < spent(ranks) <= parameters
    assert ranks["q"] >= min(8, 2 * ranks["stack"])
    few = budget.rank_pattern(tree()[0], parameters, importance=weight, largest=2)
    assert max(few.values()) <= 2
    planned = jax.eval_shape(lambda t: t, tree()[0])
    assert budget.rank_pattern(planned, parameters, importance=weight) == ranks
    share = budget.rank_pattern(tree()[0], 300, importance="parameters")
    # in·out/(in + out) is 4, 4 and 3.08.
    assert share == {"stack": 4, "q": 4, "out": 3}


def test_patterns_hit_their_own_leaf_only():
    w = jnp.ones((8, 8))
    params = {"k": w, "a": {"k": w, "b*[0]": w}, "b0": {"k": w}}

    def fn(p, x):
        return sum(x @ w for w in jax.tree.leaves(p))

    adapted = adapt(fn, params, jnp.ones((2, 8)))
    weight = {"k": 1, "a/k": 2, "a/b*[0]": 3, "b0/k": 4}
    ranks = budget.rank_pattern(adapted, 16 * 10, importance=weight)
    new = adapt(fn, params, jnp.ones((2, 8)), rank=7, rank_pattern=ranks)
    assert new["k"].rank == 1
    assert [new["a"][k].rank for k in ("k", "b*[0]")] == [2, 3]
    assert new["b0"]["k"].rank == 4
    again = adapt(fn, params, jnp.ones((2, 8)), **budget.patterns(new))
    assert jax.tree.structure(again) == jax.tree.structure(new)


def peft_budget(step, first, last, warmup, final, total):
    if step <= warmup:
        return first
    if step > total - final:
        return last
    left = 1 - (step - warmup) / (total - final - warmup)
    return int((first - last) * left**3 + last)


def test_the_schedule_is_the_published_one():
    options = {"warmup": 10, "final": 20, "total": 100}
    steps = range(0, 110)
    wanted = [peft_budget(i, 60, 17, *options.values()) for i in steps]
    assert [budget.components_at(i, 60, 17, **options) for i in steps] == wanted
    under_jit = jax.jit(lambda i: budget.components_at(i, 60, 17, **options))
    got = np.array([under_jit(jnp.int32(i)) for i in steps])
    assert got.dtype == np.int32
    assert np.abs(got - wanted).max() <= 1
    assert got[0] == 60
    assert got[-1] == 17


def numpy_scores(history, w, beta1, beta2):
    """Of [(A, B, dA, dB)], in and out axes flattened to `[stack, in|out, rank]`."""
    total = 0
    n, r = len(w.layout.stack), w.rank

    def columns(x, rank_at):
        x = np.moveaxis(np.asarray(x, np.float64), rank_at, -1)
        return x.reshape(*x.shape[:n], -1, r)

    for part, at in ((0, -1), (1, n)):
        s = u = 0
        for step in history:
            i = np.abs(columns(step[part], at) * columns(step[part + 2], at))
            s = beta1 * s + (1 - beta1) * i
            u = beta2 * u + (1 - beta2) * np.abs(i - s)
        total = total + (s * u).mean(n)
    return total


@functools.cache
def watched(steps=3):
    """A few training steps: the tree, what was seen, and all that the steps saw."""
    adapted, x = tree()
    adapted = randomized(adapted)
    tx = flora.optimizer(optax.sgd(1e-2), adapted)
    loss = lambda t: (flora.lora(fn)(t, x) ** 2).mean()  # noqa: E731

    @jax.jit
    def step(adapted, state, seen):
        _, grads = flora.value_and_grad(loss)(adapted)
        seen = budget.observe(seen, adapted, grads, beta1=0.6, beta2=0.7)
        updates, state = tx.update(grads, state, adapted)
        return optax.apply_updates(adapted, updates), state, seen, grads

    state, seen, history = tx.init(adapted), budget.unseen(adapted), []
    for _ in range(steps):
        old = adapted
        adapted, state, seen, grads = step(adapted, state, seen)
        history.append({p: (w.a, w.b, grads[p].a, grads[p].b) for p, w in old.items()})
    return adapted, seen, history


def test_scores_are_the_published_ones():
    adapted, seen, history = watched()
    found = budget.scores(seen)
    for path, w in adapted.items():
        wanted = numpy_scores([step[path] for step in history], w, 0.6, 0.7)
        assert found[path].dtype == jnp.float32
        np.testing.assert_allclose(found[path], wanted, rtol=1e-4)


def test_the_best_components_of_all_leaves_stay():
    adapted, seen, _ = watched()
    found = budget.scores(seen)
    run = jax.jit(lambda found, n: budget.top(found, n))
    every = np.concatenate([np.ravel(s) for s in found.values()])
    for count in (0, 1, 7, 19, 20):
        kept = run(found, jnp.int32(count))
        assert sum(int(k.sum()) for k in kept.values()) == count
        line = np.sort(every)[::-1][count - 1] if count else math.inf
        for path, keep in kept.items():
            assert np.array_equal(keep, found[path] >= line)
    ties = budget.top({"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, 5)
    assert [int(k.sum()) for k in ties.values()] == [5, 0]
    assert adapted["stack"].rank == 4


def test_masking_zeroes_components_that_can_come_back():
    adapted, seen, _ = watched()
    kept = budget.top(budget.scores(seen), 9)
    less = jax.jit(budget.masked)(adapted, kept)
    for path, w in adapted.items():
        keep = np.asarray(kept[path], float)
        n = len(w.layout.stack)
        rows = keep.reshape(*keep.shape, *[1] * (w.b.ndim - n - 1))
        assert np.array_equal(less[path].b, np.asarray(w.b) * rows)
        assert less[path].a is w.a or np.array_equal(less[path].a, w.a)
        assert np.array_equal(less[path].base, w.base)
    x = tree()[1]
    _, grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, x) ** 2).sum())(less)
    for path, g in grads.items():
        gone = ~np.asarray(kept[path])
        norms = np.abs(np.asarray(g.b)).sum(tuple(range(gone.ndim, g.b.ndim)))
        assert (norms[gone] > 0).all()


@pytest.mark.parametrize("count", [9, 2])
def test_cutting_off_keeps_the_model(count):
    adapted, seen, _ = watched()
    x = tree()[1]
    kept = budget.top(budget.scores(seen), count)
    small = budget.compacted(adapted, kept)
    close(flora.lora(fn)(small, x), flora.lora(fn)(budget.masked(adapted, kept), x))
    for path, keep in kept.items():
        rank = int(np.asarray(keep).sum(-1).max())
        if rank == 0:
            assert small[path] is adapted[path].base
            continue
        w = small[path]
        assert w.rank == w.a.shape[-1] == w.b.shape[len(w.layout.stack)] == rank
        assert w.scale == pytest.approx(adapted[path].scale)
        assert w.base is adapted[path].base
    left = {p: w for p, w in small.items() if is_weight(w)}
    assert count == 9 or len(left) < 3
    assert budget.patterns(small)["rank_pattern"] == {
        p: w.rank for p, w in left.items()
    }


def test_rank_stabilized_scales_stay():
    adapted, _ = tree(rank_stabilized=True)
    adapted = randomized(adapted)
    kept = {p: jnp.arange(4) % 2 + jnp.zeros((*w.a.shape[: len(w.layout.stack)], 1)) > 0
            for p, w in adapted.items()}  # fmt: skip
    small = budget.compacted(adapted, kept)
    close(flora.merge(small), flora.merge(budget.masked(adapted, kept)))
    assert small["q"].rank == 2


def test_bfloat16_factors_are_observed_in_float32():
    adapted, _ = tree(dtype=jnp.bfloat16)
    adapted = randomized(adapted)
    grads = flora.split(adapted)[1]
    seen = budget.observe(budget.unseen(adapted), adapted, grads)
    assert seen.sensitivity["q"].a.dtype == jnp.float32
    wanted = 0.15 * np.asarray(adapted["q"].a, np.float32) ** 2
    np.testing.assert_allclose(seen.sensitivity["q"].a, wanted, rtol=1e-5)
    kept = budget.top(budget.scores(seen), 5)
    assert budget.masked(adapted, kept)["q"].b.dtype == jnp.bfloat16
    assert budget.compacted(adapted, kept)["stack"].b.dtype == jnp.bfloat16


@pytest.mark.slow
def test_sharded_trees_stay_where_they_lie():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    whole, _ = tree()
    whole = randomized(whole)
    like = {
        "stack": Spec(None, "fsdp", "tp"),
        "q": Spec("fsdp", "tp"),
        "out": Spec("fsdp"),
    }
    adapted = jax.device_put(whole, flora.sharding.shardings(whole, like, mesh=mesh))
    seen = budget.observe(budget.unseen(adapted), adapted, adapted)
    kept = budget.top(budget.scores(seen), 9)
    for tree_ in (seen.sensitivity, budget.masked(adapted, kept)):
        for path, w in tree_.items():
            assert w.a.sharding.is_equivalent_to(adapted[path].a.sharding, w.a.ndim)
            assert w.b.sharding.is_equivalent_to(adapted[path].b.sharding, w.b.ndim)
    small = budget.compacted(adapted, kept)
    for path, w in small.items():
        if is_weight(w):
            assert w.a.sharding.is_equivalent_to(adapted[path].a.sharding, w.a.ndim)
            assert w.b.sharding.is_equivalent_to(adapted[path].b.sharding, w.b.ndim)
    close(jax.device_get(flora.merge(small)),
          jax.device_get(flora.merge(budget.masked(whole, kept))))  # fmt: skip


def with_e(size=0.3):
    """A tree of AdaLoRA's, as if trained."""
    adapted, x = tree(variant=AdaLoRA())
    adapted = randomized(adapted)
    return {p: dataclasses.replace(w, extra={"e": size * array(
        *w.a.shape[: len(w.layout.stack)], 4, seed=i, dtype=jnp.float32)})
            for i, (p, w) in enumerate(adapted.items())}, x  # fmt: skip


def test_adaloras_own_numbers_are_scored_zeroed_and_cut():
    adapted, x = with_e()
    loss = lambda t: (flora.lora(fn)(t, x) ** 2).mean()  # noqa: E731
    _, grads = flora.value_and_grad(loss)(adapted)
    seen = budget.observe(budget.unseen(adapted), adapted, grads)
    found = budget.scores(seen)
    for path, w in adapted.items():
        g = grads[path]
        wanted = numpy_scores([(w.a, w.b, g.a, g.b)], w, 0.85, 0.85)
        i = np.abs(np.asarray(w.extra["e"] * g.extra["e"], np.float64))
        s = 0.15 * i
        wanted = wanted + s * 0.15 * np.abs(i - s)
        np.testing.assert_allclose(found[path], wanted, rtol=1e-4)
    kept = budget.top(found, 7)
    less = budget.masked(adapted, kept)
    for path, w in less.items():
        assert np.array_equal(w.extra["e"] != 0, kept[path])
        assert w.a is adapted[path].a
        assert w.b is adapted[path].b
    small = budget.compacted(adapted, kept)
    close(flora.lora(fn)(small, x), flora.lora(fn)(less, x))
    for w in small.values():
        if is_weight(w):
            assert w.extra["e"].shape[-1] == w.rank < 4
    wanted = [np.linalg.norm(x.T @ x - np.eye(4)) for w in adapted.values()
              for x in (*np.asarray(w.a).reshape(-1, 8, 4),
                        *np.moveaxis(np.asarray(w.b).reshape(-1, 4, w.b.size // 4 if
                        w.b.ndim < 3 else 8), 1, 2))]  # fmt: skip
    assert float(budget.orthogonality(adapted)) == pytest.approx(
        np.mean(wanted), rel=1e-5
    )


@pytest.mark.parametrize("variant", [None, AdaLoRA(std=0.1)])
def test_the_budget_goes_where_the_change_is(variant):
    """One of two weights needs a change of rank 2; of 12 components 3 may stay."""
    draw = functools.partial(array, dtype=jnp.float32)
    p = {"u": draw(16, 16) / 4, "v": draw(16, 8, seed=1) / 4}
    change = draw(16, 2, seed=2) @ draw(2, 16, seed=3) / 8
    x = draw(128, 16, seed=4)

    def net(p, x):
        return jnp.tanh(x @ p["u"]) @ p["v"]

    y = net({"u": p["u"] + change, "v": p["v"]}, x)
    adapted = adapt(net, p, x, rank=6, variant=variant)
    tx = flora.optimizer(optax.adam(1e-2), adapted)

    def loss(tree):
        return ((flora.lora(net)(tree, x) - y) ** 2).mean()

    def step(carry, i):
        adapted, state, seen, _ = carry
        value, grads = flora.value_and_grad(loss)(adapted)
        seen = budget.observe(seen, adapted, grads)
        updates, state = tx.update(grads, state, adapted)
        adapted = optax.apply_updates(adapted, updates)
        count = budget.components_at(i, 12, 3, warmup=80, final=150, total=400)
        kept = budget.top(budget.scores(seen), count)
        return (budget.masked(adapted, kept), state, seen, kept), value

    start = adapted, tx.init(adapted), budget.unseen(adapted), {
        path: jnp.ones(6, bool) for path in p}  # fmt: skip
    (adapted, _, _, kept), values = jax.jit(
        lambda start: jax.lax.scan(step, start, jnp.arange(400))
    )(start)
    assert {path: int(k.sum()) for path, k in kept.items()} == {"u": 3, "v": 0}
    small = budget.compacted(adapted, kept)
    assert small["v"] is adapted["v"].base
    assert float(loss(small)) < 1e-3 * float(values[0])


def test_orthogonality():
    adapted, _ = tree()
    adapted = randomized(adapted)
    wanted = []
    for w in adapted.values():
        a = np.asarray(w.a, np.float64).reshape(-1, 8, 4)
        wanted += [np.linalg.norm(x.T @ x - np.eye(4)) for x in a]
    assert float(budget.orthogonality(adapted)) == pytest.approx(
        np.mean(wanted), rel=1e-5
    )
    q = {"q": dataclasses.replace(adapted["q"], a=jnp.eye(8, 4))}
    value, grads = jax.value_and_grad(budget.orthogonality)(q)
    assert float(value) == 0
    assert np.isfinite(grads["q"].a).all()


BAD = {
    "rank_pattern: none of the tree's 1 leaves is adapted": lambda: budget.rank_pattern(
        {"w": 1.0}, 5),
    "rank 1 in 3 leaves takes 77 parameters and the budget is 76. Write parameters=77":
        lambda: budget.rank_pattern(tree()[0], 76),
    "parameters=1.5. Write an int": lambda: budget.rank_pattern(tree()[0], 1.5),
    "largest=1 is below smallest=2": lambda: budget.rank_pattern(
        tree()[0], 500, smallest=2, largest=1),
    "importance='size'. Write 'equal', 'parameters' or": lambda: budget.rank_pattern(
        tree()[0], 500, importance="size"),
    "importance has nothing for 'out'.": lambda: budget.rank_pattern(
        tree()[0], 500, importance={"q": 1, "stack": 1}),
    "importance has 'w', which is no adapted leaf.": lambda: budget.rank_pattern(
        tree()[0], 500, importance={"q": 1, "stack": 1, "out": 2, "w": 3}),
    "importance['q']=-1. Write a finite number": lambda: budget.rank_pattern(
        tree()[0], 500, importance={"q": -1, "stack": 1, "out": 2}),
    "importance is 0 for every leaf": lambda: budget.rank_pattern(
        tree()[0], 500, importance=dict.fromkeys(SHAPES, 0)),
    "components_at: first=3, last=4": lambda: budget.components_at(
        0, 3, 4, warmup=1, final=1, total=9),
    "unseen: 'out' has variant VeRA(": lambda: budget.unseen(tree(variant=VeRA())[0]),
    "masked: kept has nothing for 'q'.": lambda: budget.masked(
        tree()[0], {"stack": 1, "out": 1}),
    "observe: grads has nothing for 'q'": lambda: budget.observe(
        budget.unseen(tree()[0]), tree()[0],
        {k: tree()[0][k] for k in ("out", "stack")}),
    "unseen: 'out' is LoraWeight": lambda: budget.unseen(flora.mask(tree()[0])),
    "compacted: 'out' is an adapter without its base": lambda: budget.compacted(
        flora.split(tree()[0])[1], dict.fromkeys(SHAPES, np.ones(4, bool))),
    "compacted: kept has a tracer at": lambda: jax.jit(
        lambda k: budget.compacted(tree()[0], k))(dict.fromkeys(SHAPES, jnp.ones(4))),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_done_is_refused(message):
    with pytest.raises(flora.LoraError) as error:
        BAD[message]()
    assert message in str(error.value)
