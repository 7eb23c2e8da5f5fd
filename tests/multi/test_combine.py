"""One adapter of several, and of a full fine-tune, against NumPy."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
from tests.support import contract
from tests.support.contract import adapt, array
from tests.support.many_adapters import LAYOUTS, delta, node, three

WEIGHTS = [0.7, -0.4, 1.1]


def changes(adapters):
    """Each scale A B in NumPy, `[k, stack, in, out]`."""
    return np.stack([delta(a["w"]) for a in adapters])


def best(w, rank):
    """The nearest matrices of a rank, and the relative distance."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    near = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return near, np.linalg.norm((w - near).ravel()) / np.linalg.norm(w.ravel())


def same(found, wanted, tolerance=1e-12):
    np.testing.assert_allclose(
        delta(found), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_sums_are_exact_and_truncations_are_the_best(x64, layout, shape):
    adapters = three(layout, shape)
    total = np.tensordot(WEIGHTS, changes(adapters), 1)
    for method in ("linear", "cat"):
        made = flora.multi.combine(adapters, WEIGHTS, method=method)
        w = made.adapter["w"]
        assert (w.rank, w.scale, made.errors) == (7, 1.0, {"w": 0.0})
        assert w.a.shape == layout.factor_shapes(shape, 7)[0]
        same(w, total)
    for options, rank in (({"rank": 2}, 2), ({"method": "svd"}, 4)):
        made = flora.multi.combine(adapters, WEIGHTS, **options)
        near, error = best(total, rank)
        assert made.adapter["w"].rank == rank
        same(made.adapter["w"], near, 1e-11)
        np.testing.assert_allclose(made.errors["w"], error, rtol=1e-9, atol=1e-12)
    made = flora.multi.combine(adapters, WEIGHTS, rank=9)  # zeros beyond what there is
    same(made.adapter["w"], total, 1e-11)
    assert made.errors["w"] < 1e-12


def test_the_combined_adapter_runs(x64):
    layout, shape = LAYOUTS[1]
    adapters, base = three(layout, shape), {"w": array(*shape, seed=9)}
    x = array(3, 4, 5, seed=8)
    made = flora.multi.combine(adapters, WEIGHTS).adapter
    y = flora.lora(lambda p, x: jnp.einsum("sni,sio->sno", x, p["w"]))(
        flora.join(base, made), x
    )
    total = np.asarray(base["w"]) + np.tensordot(WEIGHTS, changes(adapters), 1)
    contract.close(y, jnp.asarray(np.asarray(x) @ total))


def test_what_peft_calls_linear_is_another_change(x64):
    layout, shape = LAYOUTS[0]
    adapters = [
        {"w": node(layout, shape, 2, k, alpha=a)} for k, a in ((0, 3.0), (1, 1.0))
    ]
    weights = [0.5, -2.0]
    made = flora.multi.combine(adapters, weights, method="peft_linear").adapter["w"]
    a = b = 0.0
    for one, w in zip(adapters, weights, strict=True):
        root = np.sqrt(abs(w * one["w"].scale))
        a = a + np.sign(w) * root * np.asarray(one["w"].a)
        b = b + root * np.asarray(one["w"].b)
    same(made, (a @ b)[None])
    exact = np.tensordot(weights, changes(adapters), 1)
    assert np.linalg.norm(delta(made) - exact) > 0.5 * np.linalg.norm(exact)


def pruned(w, density):
    """The int(density · n) largest of each matrix."""
    out = np.zeros_like(w)
    for at in np.ndindex(w.shape[:2]):
        flat = np.abs(w[at]).ravel()
        keep = np.argsort(-flat)[: int(density * flat.size)]
        out[at].flat[keep] = w[at].flat[keep]
    return out


def voted(tasks, weights, sign):
    vote = (tasks if sign == "total" else np.sign(tasks)).sum(0)
    agrees = np.sign(tasks) == np.where(vote >= 0, 1, -1)
    weighted = (np.asarray(weights)[:, None, None, None] * tasks * agrees).sum(0)
    return weighted / np.maximum(agrees.sum(0), 1)


@pytest.mark.parametrize(("layout", "shape"), [LAYOUTS[0], LAYOUTS[3]])
def test_pruning_and_voting(x64, layout, shape):
    adapters, full = three(layout, shape), 12
    tasks = changes(adapters)
    thin = pruned(tasks, 0.4)
    made = flora.multi.combine(
        adapters, WEIGHTS, method="magnitude_prune", density=0.4, rank=full
    )
    same(made.adapter["w"], np.tensordot(WEIGHTS, thin, 1), 1e-11)
    assert made.errors["w"] < 1e-12
    cases = [("total", [0.7, 0.4, 1.1]), ("frequency", [0.7, 0.4, 1.1])]
    for sign, weights in [*cases, ("total", [0.7, -0.4, 1.1])]:
        wanted = voted(thin, weights, sign)
        ties = {"method": "ties", "density": 0.4, "sign": sign}
        made = flora.multi.combine(adapters, weights, rank=full, **ties)
        same(made.adapter["w"], wanted, 1e-11)
        made = flora.multi.combine(adapters, weights, **ties)  # of the largest rank, 4
        near, error = best(wanted, 4)
        same(made.adapter["w"], near, 1e-10)
        np.testing.assert_allclose(made.errors["w"], error, rtol=1e-9)
        assert error > 0.02


def test_random_pruning_keeps_some_and_scales_them_up(x64):
    layout, shape = flora.Layout(), (30, 40)
    adapter = {k: node(layout, shape, 2, 0, alpha=3.0) for k in "wv"}
    options = {"density": 0.3, "rank": 30}

    def drop(key, method="dare_linear", weight=2.0):
        return flora.multi.combine(
            [adapter], [weight], method=method, key=key, **options
        )

    key = jax.random.key(0)
    w, v = (delta(drop(key).adapter[k])[0] for k in "wv")
    old = delta(adapter["w"])[0]
    ratio = w / old
    kept = ratio > 1
    np.testing.assert_allclose(ratio[kept], 2 / 0.3, rtol=1e-8)
    np.testing.assert_allclose(w[~kept], 0, atol=1e-12)
    assert abs(kept.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / kept.size)
    assert (kept != (v / old > 1)).any()  # each leaf draws its own
    again = drop(jax.random.key(0)).adapter
    np.testing.assert_array_equal(delta(again["w"])[0], w)
    assert (kept != (delta(drop(jax.random.key(1)).adapter["w"])[0] / old > 1)).any()
    # A vote of one: what stays is the same.
    np.testing.assert_allclose(
        delta(drop(key, "dare_ties").adapter["w"])[0], w, atol=1e-10
    )
    # A vote of two opposites: the larger wins where both stay, each where it is alone.
    other = {k: dataclasses.replace(x, b=-0.5 * x.b) for k, x in adapter.items()}
    two = flora.multi.combine(
        [adapter, other], [1.0, 1.0], method="dare_ties", key=key, **options
    )
    found = np.round(delta(two.adapter["w"])[0] / old * 0.3, 6)
    assert {float(x) for x in np.unique(found)} == {-0.5, 0.0, 1.0}


def test_leaves_that_train_whole(x64):
    layout, shape = LAYOUTS[0]
    adapters = [
        a | {"b": flora.Trained(array(7, seed=k))}
        for k, a in enumerate(three(layout, shape))
    ]
    old = array(7, seed=20)
    base = {"w": array(*shape), "b": old}
    values = np.stack([a["b"].value for a in adapters])
    moved = values - np.asarray(old)
    made = flora.multi.combine(adapters, WEIGHTS, base=base).adapter
    np.testing.assert_allclose(
        made["b"].value, np.asarray(old) + np.tensordot(WEIGHTS, moved, 1), rtol=1e-12
    )
    weights = [0.5, 0.2, 0.3]  # a mean: the old value cancels
    made = flora.multi.combine(adapters, weights).adapter
    np.testing.assert_allclose(made["b"].value, np.tensordot(weights, values, 1))
    made = flora.multi.combine(adapters, weights, method="ties", density=0.5, base=base)
    flat = moved[:, None, None, :]
    wanted = np.asarray(old) + voted(pruned(flat, 0.5), weights, "total")[0, 0]
    np.testing.assert_allclose(made.adapter["b"].value, wanted, rtol=1e-12)
    for options in ({}, {"method": "ties", "density": 0.5}):
        weights = [0.7, 0.4, 1.1]
        with pytest.raises(flora.LoraError, match=r"'b' trains whole.*Pass base="):
            flora.multi.combine(adapters, weights, **options)


def test_adapters_with_nothing_in_common(x64):
    """Factors here, a leaf that trains whole there, variants, and nothing."""
    params = {"w": array(6, 5, seed=1), "v": array(5, 4, seed=2), "b": array(4, seed=3)}
    x = array(7, 6, seed=4)

    def fn(p, x):
        return x @ p["w"] @ p["v"] + p["b"]

    def one(seed, **options):
        config = flora.LoraConfig(rank=2, alpha=3.0, **options)
        adapted = flora.init(jax.random.key(seed), config, fn, params, x)
        adapter = flora.split(adapted)[1]
        leaves, treedef = jax.tree.flatten(adapter)
        return treedef.unflatten([a + 0.3 * array(*a.shape, seed=seed) for a in leaves])

    def change(adapter, path):
        node = adapter[path]
        if node is None:
            return 0 * np.asarray(params[path])
        if isinstance(node, flora.Trained):
            return np.asarray(node.value - params[path])
        base = {k: None if isinstance(n, flora.Trained) else params[k]
                for k, n in adapter.items()}  # fmt: skip
        return np.asarray(flora.merge(flora.join(base, adapter))[path] - params[path])

    adapters = [
        one(1, target="w"),
        one(2, target="v", variant=flora.variants.VeRA()),
        one(3, target="w", train=["v", "b"]),
        one(4, target="v", variant=flora.variants.AdaLoRA()),
    ]
    combine = flora.multi.combine
    made = combine(adapters, [*WEIGHTS, 0.3], base=params).adapter
    for path in params:
        wanted = sum(
            w * change(a, path) for a, w in zip(adapters, [*WEIGHTS, 0.3], strict=True)
        )
        np.testing.assert_allclose(change(made, path), wanted, atol=1e-12)
    assert made["w"].rank == 4
    assert isinstance(made["v"], flora.Trained)
    # A DoRA's change is dense: the best of a rank, and the error says how near it is.
    dora = one(5, target=["w", "v"], variant=flora.variants.DoRA())
    pair = [adapters[0], dora]
    for options in ({"method": "svd", "rank": 5}, {"rank": 5}):
        made = combine(pair, [0.5, -2.0], base=params, **options)
        for path in ("w", "v"):
            wanted = 0.5 * change(pair[0], path) - 2 * change(dora, path)
            np.testing.assert_allclose(change(made.adapter, path), wanted, atol=1e-11)
            assert made.errors[path] < 1e-12
    thin = combine(pair, [0.5, -2.0], base=params, rank=1)
    assert thin.errors["w"] > 0.01
    tasks = np.stack([change(a, "v")[None] for a in pair])
    made = combine(
        pair, [1.0, 0.5], base=params, method="ties", density=0.5, rank=4
    ).adapter
    wanted = voted(pruned(tasks, 0.5), [1.0, 0.5], "total")[0]
    np.testing.assert_allclose(change(made, "v"), wanted, atol=1e-11)
    for match, call in (
        ("'v' is a VeRA.*Pass base=", lambda: combine(adapters[:2], [1.0, 1.0])),
        ("'w' is not in all adapters; 'peft_linear'", lambda: combine(
            adapters[:2], [1.0, 1.0], base=params, method="peft_linear")),
        ("'b' trains whole in one.*Pass base=", lambda: combine(
            [adapters[0], adapters[2]], [0.5, 0.5])),
    ):  # fmt: skip
        with pytest.raises(flora.LoraError, match=match):
            call()


def test_what_combine_refuses():
    one, two, three_ = three(*LAYOUTS[0], dtype=jnp.float32)

    def refused(match, *args, adapters=(one, two), weights=(1.0, 1.0), **kwargs):
        with pytest.raises(flora.LoraError, match=match):
            flora.multi.combine(list(adapters), list(weights), *args, **kwargs)

    refused("expected 2 finite numbers", weights=[1.0])
    refused("expected 2 finite numbers", weights=[1.0, math.nan])
    refused("method='mean'. Write one of linear", method="mean")
    refused("method='cat' has its own rank", method="cat", rank=2)
    refused("'ties' needs density", method="ties")
    refused("'linear' takes no density", density=0.5)
    refused(r"lie in \(0, 1\]", method="ties", density=1.5)
    refused("sign='majority'", sign="majority")
    refused("expected a PRNG key", method="dare_ties", density=0.5)
    refused("draws nothing", key=jax.random.key(0))
    refused("rank=0", rank=0)
    refused(r"'w' has ranks \[1, 2\]", method="peft_linear")
    wide = {"w": node(flora.Layout(), (6, 7), 2, dtype=jnp.float32)}
    refused(r"'w' is W.*adapter 1", adapters=[one, wide])
    refused("only adapter 0 has 'v'", adapters=[one | {"v": one["w"]}, three_])


# --- extract -------------------------------------------------------------------------


def model(p, x):
    h = jnp.einsum("ni,ihd->nhd", x, p["in"]) + p["bias"]
    h, _ = jax.lax.scan(lambda h, w: (h @ w, None), h, p["stack"])
    return h * p["gain"]


def trained_whole(rank):
    """A base, and the same with changes of that rank (bias and gain changed too)."""
    base = {
        "in": array(9, 3, 5),
        "stack": array(2, 5, 5, seed=1),
        "bias": array(5, seed=2),
        "gain": array(5, seed=3),
    }
    layouts = {
        "in": flora.Layout((), (0,), (1, 2)),
        "stack": flora.Layout((0,), (1,), (2,)),
    }
    change = {
        k: delta(node(v, base[k].shape, rank, 5)).reshape(base[k].shape)
        for k, v in layouts.items()
    }
    return base, base | {k: base[k] + c for k, c in change.items()} | {
        "bias": base["bias"] + 1
    }


def test_an_adapter_is_taken_out_of_a_full_fine_tune(x64):
    base, tuned = trained_whole(2)
    options = {"target": ["in", "stack"], "train": "bias", "dtype": jnp.float64}
    adapted = adapt(model, base, array(4, 9), rank=2, alpha=6.0, **options)
    found = flora.multi.extract(adapted, tuned)
    assert max(found.errors.values()) < 1e-13
    assert set(found.errors) == {"in", "stack"}
    frozen, adapter = flora.split(adapted)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.adapter, adapter)
    merged = flora.merge(flora.join(frozen, found.adapter))
    contract.close(merged, tuned)
    # Of a lower rank: the best there is, and what is missing.
    lower = adapt(model, base, array(4, 9), rank=1, rank_stabilized=True, **options)
    found = flora.multi.extract(lower, tuned)
    for k, shape in (("in", (1, 9, 15)), ("stack", (2, 5, 5))):
        near, error = best(np.asarray(tuned[k] - base[k]).reshape(shape), 1)
        same(found.adapter[k], near, 1e-11)
        np.testing.assert_allclose(found.errors[k], error, rtol=1e-9)
    assert "largest error" in str(found)


def test_extraction_by_a_random_projection(x64):
    layout, shape = flora.Layout(), (60, 50)
    base = {"w": array(*shape)}
    small = 1e-3 * array(*shape, seed=4)
    tuned = {"w": base["w"] + delta(node(layout, shape, 3))[0] + small}
    adapted = adapt(
        lambda p, x: x @ p["w"], base, array(2, 60), rank=3, dtype=jnp.float64
    )
    exact = flora.multi.extract(adapted, tuned)
    found = flora.multi.extract(adapted, tuned, svd="randomized", key=jax.random.key(0))
    assert 1e-4 < exact.errors["w"] * (1 - 1e-12) <= found.errors["w"]
    assert found.errors["w"] < exact.errors["w"] * 1.001


def test_what_extract_refuses(x64):
    base, tuned = trained_whole(1)
    adapted = adapt(model, base, array(4, 9), target=["in"], rank=1)

    def refused(match, new=tuned, **options):
        with pytest.raises(flora.LoraError, match=match):
            flora.multi.extract(adapted, new, **options)

    refused(r"2 problems:[\s\S]*'bias' is frozen[\s\S]*'stack' is frozen")
    refused("'stack' is frozen", ignore="bias")
    found = flora.multi.extract(adapted, tuned, ignore=["bias", "stack"])
    assert found.errors["bias"] == found.errors["stack"] == 1.0
    assert found.adapter["stack"] is None
    refused(
        r"'in' has shape \(9, 3, 5\) in adapted", tuned | {"in": jnp.ones((9, 3, 4))}
    )
    refused(r"other leaves: \['v'\]", tuned | {"v": jnp.ones(3)})
    refused("svd='fast'", svd="fast")
    refused("expected a PRNG key", svd="randomized")
    refused("draws nothing", key=jax.random.key(0))
    with pytest.raises(flora.LoraError, match="none of the tree's 4 leaves is adapted"):
        flora.multi.extract(base, tuned)
