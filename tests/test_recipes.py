import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flora
import flora.monitor
from flora import recipes
from flora._weight import Quantized
from flora.variants import DoRA, VeRA

RANK, ALPHA = 2, 6.0
SCALE = ALPHA / math.sqrt(RANK)  # rank-stabilized
LAYOUTS = {"kernel": flora.Layout((0,), (1, 2), (3,)), "embedding": flora.Layout()}
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def f32(*shape, seed=0):
    return array(*shape, seed=seed, dtype=jnp.float32)


def tree(seed=0, dtype=jnp.float32):
    """A stack of three 2·3 × 5 matrices, an embedding, a head and a bias; two frozen."""
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


@pytest.mark.parametrize("way", WAYS)
def test_lora_plus(way):
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), recipes.lora_plus(16.0))
    got, _ = steps(tx, way)
    rates = {place: 1e-2 * (16 if place[1] == "b" else 1) for place in PLACES}
    close(got, expected(rates, dict.fromkeys(PLACES, 0.1)))
    assert unchanged(got)


def test_lora_plus_as_peft_groups_it():
    """A at η, embeddings at their own, B and 1-D arrays at 16 η, biases without decay."""
    lr, ratio, lr_embedding = 1e-2, 16.0, 1e-4
    rates = {"embedding": lr_embedding / lr, "head/bias": ratio, "*": {"b": ratio}}
    tx = optax.chain(
        optax.adamw(lr, weight_decay=0.1, mask=recipes.decay_mask(ADAPTED)),
        recipes.scale_rates(rates, ADAPTED),
    )
    got, _ = steps(tx, "in optimizer")
    want = dict.fromkeys(PLACES, lr)
    want["embedding", "a"] = want["embedding", "b"] = lr_embedding
    want["layers/kernel", "b"] = want["head/bias", "train"] = lr * ratio
    decays = {place: 0.0 if place[0] == "head/bias" else 0.1 for place in PLACES}
    close(got, expected(want, decays))
    assert unchanged(got)


def test_lora_plus_in_injected_hyperparameters_and_sweeps():
    plus = optax.inject_hyperparams(recipes.lora_plus)(ratio=lambda t: 2.0 ** (t + 1))
    got, state = steps(optax.chain(optax.sgd(0.1), plus), "adapter")
    start, grads = values(ADAPTED), [values(g) for g in GRADS]
    b = ("embedding", "b")
    want = start[b] - 0.1 * 2 * grads[0][b] - 0.1 * 4 * grads[1][b]
    np.testing.assert_allclose(values(got)[b], want, rtol=1e-5)
    assert float(state[1].hyperparams["ratio"]) == 4.0

    @jax.jit
    @jax.vmap
    def sweep(lr, ratio):
        tx = optax.chain(optax.sgd(lr), recipes.lora_plus(ratio))
        return values_of(steps(tx, "adapter", GRADS[:1])[0])

    def values_of(t):
        return [get(t) for get in PLACES.values()]

    found = sweep(jnp.array([0.1, 0.2, 0.2]), jnp.array([1.0, 1.0, 5.0]))
    for i, (lr, ratio) in enumerate([(0.1, 1), (0.2, 1), (0.2, 5)]):
        for place, x in zip(PLACES, found, strict=True):
            eta = lr * (ratio if place[1] == "b" else 1)
            np.testing.assert_allclose(
                x[i], start[place] - eta * grads[0][place], rtol=1e-4, atol=1e-5
            )


def projected(g, t):
    """scale⁻² (Aᵀ A)⁻¹ g_B for each matrix, in NumPy."""
    a = np.asarray(t.a, np.float64)
    stack = a.shape[: len(t.layout.stack)]
    a = a.reshape(*stack, -1, RANK)
    g = np.asarray(g.b, np.float64)
    flat = g.reshape(*stack, RANK, -1)
    out = np.linalg.pinv(np.swapaxes(a, -1, -2) @ a) @ flat / SCALE**2
    return out.reshape(g.shape)


@pytest.mark.parametrize("way", [*WAYS, "bare whole tree"])
def test_lora_fa(way):
    tx = recipes.lora_fa(optax.adamw(1e-2, weight_decay=0.1))
    got, state = steps(tx, way)
    grads = [values(g) for g in GRADS]
    for each, g in zip(grads, GRADS, strict=True):
        each["layers/kernel", "b"] = projected(
            g["layers"]["kernel"], ADAPTED["layers"]["kernel"]
        )
        each["embedding", "b"] = projected(g["embedding"], ADAPTED["embedding"])
    rates = {place: 0.0 if place[1] == "a" else 1e-2 for place in PLACES}
    want = numpy_adamw(values(ADAPTED), grads, rates, dict.fromkeys(PLACES, 0.1))
    close(got, want)
    assert unchanged(got)
    for name in ("embedding", "layers"):
        x, y = (t[name] if name == "embedding" else t[name]["kernel"]
                for t in (got, ADAPTED))  # fmt: skip
        assert np.array_equal(bits(x.a), bits(y.a))
    trained = sum(x.size for (_, part), x in values(ADAPTED).items() if part != "a")
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == 2 * trained + 1  # A has no moments


def test_lora_fa_moves_delta_by_the_projected_full_gradient():
    """ΔW ← ΔW - η A (AᵀA)⁻¹ Aᵀ G, with g_B = scale Aᵀ G; A's updates are -0.0."""
    w = ADAPTED["embedding"]
    full = np.asarray(f32(9, 6, seed=7), np.float64)
    a = np.asarray(w.a, np.float64)
    g = flora.LoraWeight(None, w.a, jnp.asarray(SCALE * a.T @ full, jnp.float32),
                         rank=RANK, alpha=ALPHA, rank_stabilized=True)  # fmt: skip
    params = {"w": flora.split({"w": w})[1]["w"]}
    tx = recipes.lora_fa(optax.sgd(0.5))
    updates, _ = tx.update({"w": g}, tx.init(params), params)
    moved = SCALE * a @ np.asarray(updates["w"].b, np.float64)
    want = -0.5 * a @ np.linalg.pinv(a) @ full
    np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-5)
    assert np.array_equal(bits(updates["w"].a), bits(jnp.full(w.a.shape, -0.0)))


WHOLE = flora.LoraWeight(f32(8, 6), f32(8, 2, seed=1), f32(2, 6, seed=2), rank=2)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
def placed(request):
    """The weight WHOLE divided over a mesh of 2 × 2, which is set."""
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        specs = flora.LoraWeight(("in", "out"), ("in", None), (None, "out"), rank=2)
        places = jax.tree.map(
            lambda spec: NamedSharding(mesh, PartitionSpec(*spec)),
            specs,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        yield jax.device_put(WHOLE, places)


def test_lora_fa_on_a_mesh(placed):
    tx = recipes.lora_fa(optax.sgd(0.5))

    def update(w):
        return tx.update({"w": w}, tx.init({"w": w}), {"w": w})[0]["w"].b

    got = jax.jit(update)(placed)
    assert got.sharding.spec == PartitionSpec(None, "out")
    contract.close(got, update(WHOLE), 1e-6)


def test_restart_on_a_mesh(placed):
    tx = optax.adam(0.5)

    def renew(w):
        return recipes.restart(jax.random.key(0), tx, tx.init({"w": w}), {"w": w})

    want, state = renew(WHOLE)
    eager, compiled = renew(placed), jax.jit(renew)(placed)
    for got in (eager, compiled):
        contract.close(got, (want, state), 1e-6)
    places = jax.tree.map(lambda x: x.sharding, placed)
    assert jax.tree.map(lambda x: x.sharding, eager[0]["w"]) == places
    if jax.typeof(placed.a).sharding.mesh.explicit_axes:
        assert compiled[0]["w"].a.sharding.spec == PartitionSpec("in", None)


def test_lora_fa_computes_no_gradient_of_a():
    """Under jit: 2 · tokens · in · rank FLOPs fewer than training both."""
    _, adapted, _ = small()
    x = f32(64, 7)

    def flops(tx):
        tx = flora.optimizer(tx, adapted)

        def step(t, state):
            _, grads = flora.value_and_grad(flora.lora(loss_fn))(t, x)
            return tx.update(grads, state, t)

        compiled = jax.jit(step).lower(adapted, tx.init(adapted)).compile()
        return compiled.cost_analysis()["flops"]

    tx = optax.sgd(0.1)
    both, b_alone = flops(tx), flops(recipes.lora_fa(tx))
    assert both - b_alone > 0.8 * 2 * 64 * 7 * 2


def test_rates_by_pattern_and_part():
    rates = {
        "layers/*": {"b": 3.0},
        "kernel": 0.5,  # the rest of layers/kernel, and the head
        "head/*": {"train": 7.0},
    }
    got, _ = steps(recipes.scale_rates(rates, ADAPTED), "adapter", GRADS[:1])
    factors = {
        ("layers/kernel", "a"): 0.5,
        ("layers/kernel", "b"): 3.0,
        ("head/kernel", "train"): 0.5,
        ("head/bias", "train"): 7.0,
    }
    start, grads = values(ADAPTED), values(GRADS[0])
    want = {p: start[p] + factors.get(p, 1.0) * grads[p] for p in PLACES}
    close(got, want)


def test_rates_keep_the_dtype_of_updates():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS[0])
    tx = recipes.scale_rates({"*": jnp.float32(0.5)}, ADAPTED)
    updates, _ = tx.update(half, tx.init(ADAPTED), ADAPTED)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("way", [*WAYS, "bare whole tree"])
def test_groups_with_their_own_optimizers(way):
    tx = recipes.partition(
        {"heads": optax.sgd(0.1), "b": optax.adamw(1e-3), "rest": optax.adamw(1e-2)},
        {"head/*": "heads", re_compiled: {"b": "b"}, "*": "rest"},
        ADAPTED,
    )
    got, state = steps(tx, way)
    rates = {p: 1e-2 if p[1] == "a" else 1e-3 for p in PLACES}
    rates["embedding", "b"] = 1e-2
    want = expected(rates, dict.fromkeys(PLACES, 1e-4))
    start, grads = values(ADAPTED), [values(g) for g in GRADS]
    for p in [("head/kernel", "train"), ("head/bias", "train")]:
        want[p] = start[p] - 0.1 * (grads[0][p] + grads[1][p])
    close(got, want)
    assert unchanged(got)
    heads = state.inner_states if way != "in optimizer" else (
        state.inner_states["train"].inner_state.inner_states)  # fmt: skip
    assert jax.tree.leaves(heads["heads"]) == []


def re_compiled(path, leaf):
    """A callable pattern; it sees the weight where there is one."""
    return path == "layers/kernel" and (leaf is None or leaf.ndim == 4)


def test_decay_mask():
    mask = recipes.decay_mask(ADAPTED)
    base, adapter = flora.split(ADAPTED)
    got = mask(ADAPTED)
    assert jax.tree.structure(got) == jax.tree.structure(ADAPTED)
    named = {p: get(got) for p, get in PLACES.items()}
    assert named == {p: p[0] != "head/bias" for p in PLACES}
    assert not any(jax.tree.leaves(flora.split(got)[0]))
    assert mask(adapter)["frozen"]["kernel"] is None
    own = recipes.decay_mask(
        ADAPTED, {"kernel": {"a": False}, "head/*": {"train": True}}
    )
    named = {p: get(own(adapter)) for p, get in PLACES.items()}
    assert named == {p: p != ("layers/kernel", "a") for p in PLACES}
    assert base["frozen"]["kernel"] is ADAPTED["frozen"]["kernel"]


def test_accumulated_gradients_give_the_step_of_the_whole_batch():
    """MultiSteps, the mean by hand and one large batch: the same AdamW steps."""

    def fn(p, x):
        return jnp.tanh(x @ p["kernel"]) @ p["head"]

    x, y = f32(8, 7), f32(8, 3, seed=1)
    params = {"kernel": f32(7, 5), "head": f32(5, 3)}
    adapted = contract.randomized(
        contract.adapt(fn, params, x, target="kernel", train="head")
    )
    base, adapter = flora.split(adapted)
    apply = flora.lora(fn)

    @jax.jit
    def gradient(adapter, x, y):
        return jax.grad(
            lambda a: jnp.mean((apply(flora.join(base, a), x) - y) ** 2)
        )(adapter)  # fmt: skip

    def train(tx, way):
        @jax.jit
        def step(p, state, g):
            updates, state = tx.update(g, state, p)
            return optax.apply_updates(p, updates), state

        p, state = adapter, tx.init(adapter)
        for _ in range(2):
            parts = [gradient(p, x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4, 6)]
            if way == "by hand":
                parts = [jax.tree.map(lambda *g: sum(g) / 4, *parts)]
            elif way == "one batch":
                parts = [gradient(p, x, y)]
            for g in parts:
                p, state = step(p, state, g)
        return p

    inner = optax.chain(optax.adamw(1e-2), recipes.lora_plus(4.0))
    for wrap in (lambda tx: tx, recipes.lora_fa):
        results = {
            way: train(wrap(tx), way)
            for way, tx in {
                "MultiSteps": optax.MultiSteps(inner, 4),
                "by hand": inner,
                "one batch": inner,
            }.items()
        }
        assert not np.array_equal(results["by hand"]["kernel"].b, adapter["kernel"].b)
        for way in ("by hand", "one batch"):
            contract.close(results["MultiSteps"], results[way], 1e-5)


def loss_fn(p, x):
    y = jnp.tanh(x @ p["kernel"] + p["bias"])
    return jnp.sum((y @ p["head"]) ** 2)


def small():
    p = {"kernel": f32(7, 11).at[0, 0].set(-0.0), "bias": 0.1 * f32(11),
         "head": f32(11, 5), "step": jnp.int32(3)}  # fmt: skip
    x = f32(3, 7, seed=3)
    return p, contract.adapt(loss_fn, p, x, target="kernel", train="head"), x


RECIPES = {
    "lora_plus": lambda tx, t: optax.chain(tx, recipes.lora_plus(4.0)),
    "scale_rates": lambda tx, t: optax.chain(
        tx, recipes.scale_rates({"head": 0.1, "*": {"b": 2.0}}, t)
    ),
    "lora_fa": lambda tx, t: recipes.lora_fa(tx),
    "partition": lambda tx, t: recipes.partition(
        {"head": optax.sgd(1e-3), "rest": tx}, {"head": "head", "*": "rest"}, t
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_composes_with_optax(name):
    """Clipping, MultiSteps, injected schedules, masked decay and EMA, under jit."""
    p, adapted, x = small()
    schedule = optax.warmup_cosine_decay_schedule(0.1, 1.0, 2, 20)
    adamw = optax.inject_hyperparams(optax.adamw, static_args=("mask",))
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(
            adamw(
                learning_rate=lambda t: 2e-2 * schedule(t),
                weight_decay=0.1,
                mask=recipes.decay_mask(adapted),
            ),
            2,
        ),
        optax.ema(0.5),
    )
    tx = flora.optimizer(RECIPES[name](inner, adapted), adapted)
    loss = flora.lora(loss_fn)

    @jax.jit
    def step(t, average, state):
        _, grads = flora.value_and_grad(loss)(t, x)
        updates, state = tx.update(grads, state, t)
        t = optax.apply_updates(t, updates)
        adapter = flora.split(t)[1]
        return t, optax.incremental_update(adapter, average, 0.1), state

    start, average = adapted, flora.split(adapted)[1]
    state, before = tx.init(adapted), loss(adapted, x)
    for _ in range(8):
        adapted, average, state = step(adapted, average, state)
    assert loss(adapted, x) < before
    assert np.array_equal(bits(adapted["kernel"].base), bits(p["kernel"]))
    assert np.array_equal(bits(adapted["bias"]), bits(p["bias"]))
    assert int(adapted["step"]) == 3
    frozen = np.array_equal(bits(adapted["kernel"].a), bits(start["kernel"].a))
    assert frozen == (name == "lora_fa")
    assert jax.tree.structure(average) == jax.tree.structure(flora.split(adapted)[1])
    assert not np.array_equal(average["kernel"].b, adapted["kernel"].b)


def test_parts_of_variants():
    """Magnitudes have rates and groups of their own; VeRA's A and B stay frozen."""
    p, x = {"w": f32(6, 4), "v": f32(4, 3)}, f32(2, 6)

    def adapt(variant):
        return contract.adapt(lambda p, x: x @ p["w"] @ p["v"], p, x, variant=variant)

    dora, vera = adapt(DoRA()), adapt(VeRA())
    rates = {"w": {"magnitude": 5.0}, "*": {"b": 2.0, "magnitude": 0.0}}
    tx = recipes.scale_rates(rates, dora)
    got, _ = tx.update(dora, tx.init(dora), dora)
    contract.close(got["w"].extra["magnitude"], 5 * dora["w"].extra["magnitude"])
    assert not got["v"].extra["magnitude"].any()
    contract.close(got["v"].a, dora["v"].a)
    mask = recipes.decay_mask(dora)(dora)["w"]
    assert (mask.a, mask.b, mask.extra["magnitude"]) == (True, True, False)
    with pytest.raises(flora.LoraError, match=r"has no part 'b'; the parts.* d, v"):
        recipes.scale_rates({"w": {"b": 1.0}}, vera)
    tx = recipes.partition(
        {"d": optax.sgd(1.0), "v": optax.sgd(2.0)}, {"*": {"d": "d", "v": "v"}}, vera
    )
    updates, _ = tx.update(vera, tx.init(vera), vera)
    assert np.array_equal(bits(updates["w"].a), bits(jnp.full((6, 2), -0.0)))
    contract.close(updates["w"].extra["d"], -vera["w"].extra["d"])
    with pytest.raises(flora.LoraError, match=r"lora_fa: 'w' has the variant DoRA\(\)"):
        recipes.lora_fa(optax.sgd(0.1)).init({"w": dora["w"]})
    with pytest.raises(flora.LoraError, match=r"restart: 'w' has the variant DoRA\(\)"):
        sgd_restart({"w": dora["w"]})
    plus = recipes.lora_plus(3.0)
    got, _ = plus.update(vera, plus.init(vera), vera)  # B is frozen: no rate is raised
    contract.close(got, vera)


# Restarts.


@pytest.mark.parametrize("way", ["whole tree", "adapter"])
def test_restart(way):
    """W + scale A B, new factors, moments of A and B zero, the next step by hand."""
    lr = 1e-2
    tx = optax.adam(lr)
    if way == "whole tree":
        tx = flora.optimizer(tx, ADAPTED)
        trained, state = steps(optax.adam(lr), "in optimizer", GRADS)
    else:
        trained, state = steps(tx, "adapter", GRADS)
    renew = jax.jit(lambda k, s, t: recipes.restart(k, tx, s, t))
    got, new = renew(jax.random.key(5), state, trained)
    eager = recipes.restart(jax.random.key(5), tx, state, trained)
    contract.close((got, new), eager, 1e-6)

    w = trained["layers"]["kernel"]
    a, b, base = (np.asarray(x, np.float64) for x in (w.a, w.b, w.base))
    want = base + SCALE * np.einsum("sijr,sro->sijo", a, b)
    kernel = got["layers"]["kernel"]
    np.testing.assert_allclose(kernel.base, want, rtol=1e-5, atol=1e-5)
    assert kernel.base.dtype == w.base.dtype
    assert not kernel.b.any()
    assert not np.array_equal(kernel.a[0], kernel.a[1])  # layers differ
    assert np.array_equal(bits(got["head"]["kernel"].value),
                          bits(trained["head"]["kernel"].value))  # fmt: skip
    contract.close(flora.merge(got), flora.merge(trained), 1e-6)

    adams = [
        x for s in (state, new)
        for x in jax.tree.leaves(s, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(x, "mu")
    ]  # fmt: skip
    old, new_adam = adams
    assert int(new_adam.count) == int(old.count) == 2
    for moment in ("mu", "nu"):
        before, after = getattr(old, moment), getattr(new_adam, moment)
        for p, get in PLACES.items():
            wanted = get(before) if p[1] == "train" else 0 * get(before)
            assert get(before).any(), p
            assert np.array_equal(get(after), wanted), p

    # One more step: A and B with fresh moments under the old count.
    params = got if way == "whole tree" else flora.split(got)[1]
    g = tree(seed=300)
    grads = g if way == "whole tree" else flora.split(g)[1]
    updates, _ = tx.update(grads, new, params)
    for p in [("embedding", "a"), ("layers/kernel", "b")]:
        grad = values(g)[p]
        m = 0.1 * grad / (1 - 0.9**3)
        v = 0.001 * grad**2 / (1 - 0.999**3)
        np.testing.assert_allclose(
            PLACES[p](updates), -lr * m / (np.sqrt(v) + 1e-8), rtol=1e-4
        )


def test_restart_draws_as_asked():
    tx = optax.sgd(1e-2, momentum=0.9)
    wide = flora.LoraWeight(f32(400, 300), f32(400, 50), f32(50, 300), rank=50)
    adapted = {"w": wide}
    start = flora.initializers.a_zero(2.0)
    _, adapter = flora.split(adapted)
    state = tx.init(adapter)
    one, _ = recipes.restart(jax.random.key(0), tx, state, adapted)
    assert abs(float(jnp.var(one["w"].a)) * 400 - 1 / 3) < 0.02
    two, _ = recipes.restart(jax.random.key(1), tx, state, adapted)
    assert not np.array_equal(one["w"].a, two["w"].a)
    other, _ = recipes.restart(
        jax.random.key(0), tx, state, adapted, initializer=start
    )
    assert not other["w"].a.any()
    assert abs(float(jnp.var(other["w"].b)) * 50 - 2) < 0.1


def test_restart_takes_states_that_do_not_start_at_zero():
    """Adagrad's accumulators start at 0.1, and A's and B's do so again."""
    tx = flora.optimizer(optax.adagrad(1e-2), ADAPTED)
    trained, state = steps(optax.adagrad(1e-2), "in optimizer")
    _, new = recipes.restart(jax.random.key(0), tx, state, trained)
    sums = [x for x in jax.tree.leaves(new, is_leaf=contract.is_weight)
            if contract.is_weight(x)]  # fmt: skip
    assert len(sums) == 2
    assert all((x.a == 0.1).all() and (x.b == 0.1).all() for x in sums)


def test_restart_in_bfloat16_rounds_the_base():
    """A change under half a unit in the last place is lost, and the doc's numbers hold."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 256)), jnp.bfloat16)
    a, b = rng.normal(size=(256, 4)), rng.normal(size=(4, 256))
    for size, (low, high) in LOST.items():
        b_now = jnp.asarray(b * size / 2, jnp.float32)  # std of A B: 2 · size/2
        node = flora.LoraWeight(
            w, jnp.asarray(a, jnp.float32), b_now, rank=4, alpha=4.0
        )
        adapted = {"w": node}
        tx = optax.sgd(1.0)
        got, _ = recipes.restart(jax.random.key(0), tx, tx.init(adapted), adapted)
        assert got["w"].base.dtype == jnp.bfloat16
        base, change = np.asarray(w, np.float64), a @ np.asarray(b_now, np.float64)
        kept = np.asarray(got["w"].base, np.float64) - base
        lost = np.linalg.norm(kept - change) / np.linalg.norm(change)
        assert low < lost < high, (size, lost)
        error = float(flora.monitor.merge_error(adapted)["w"])
        np.testing.assert_allclose(error, lost, rtol=1e-3)


LOST = {1e-1: (0.015, 0.02), 1e-2: (0.15, 0.19), 1e-3: (0.74, 0.8)}


def test_restart_goes_on_where_the_model_was():
    p, adapted, x = small()
    loss = flora.lora(loss_fn)
    tx = flora.optimizer(optax.sgd(1e-3), adapted)
    adapted = contract.randomized(adapted)
    got, _ = recipes.restart(jax.random.key(2), tx, tx.init(adapted), adapted)
    contract.close(loss(got, x), loss(adapted, x), 1e-5)
    assert got["bias"] is adapted["bias"]
    assert not np.array_equal(got["kernel"].base, p["kernel"])


def test_jagged():
    rate = recipes.jagged(optax.linear_schedule(1.0, 0.0, 10), every=4, warmup=2)
    got = [float(jax.jit(rate)(t)) for t in range(10)]
    want = [1, 0.9, 0.8, 0.7, 0.6 / 2, 0.5, 0.4, 0.3, 0.2 / 2, 0.1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# What is refused.


def sgd_restart(t, state=None, tx=None, key=None):
    tx = tx or optax.sgd(0.1)
    state = tx.init(t) if state is None else state
    return recipes.restart(jax.random.key(0) if key is None else key, tx, state, t)


def update_without_params():
    tx = recipes.lora_fa(optax.sgd(0.1))
    tx.update(ADAPTED, tx.init(ADAPTED))


def b_without_a():
    fa = recipes.lora_fa(optax.sgd(0.1))
    tx = recipes.partition(
        {"b": fa, "rest": optax.sgd(0.1)},
        {"*": {"b": "b", "a": "rest", "train": "rest"}},
        ADAPTED,
    )
    adapter = flora.split(ADAPTED)[1]
    tx.update(adapter, tx.init(adapter), adapter)


def stored():
    base = Quantized(ADAPTED["embedding"].base, opener=lambda x: x)
    w = flora.LoraWeight(base, jnp.ones((9, 2)), jnp.ones((2, 6)), rank=2)
    sgd_restart({"w": w})


def rates(spec, t=ADAPTED):
    return recipes.scale_rates(spec, t)


def groups(spec, names=("x",)):
    return recipes.partition({n: optax.sgd(0.1) for n in names}, spec, ADAPTED)


ERRORS = {
    r"rates='head/kernl' selects none of the 4 leaves.*Closest: 'head/kernel'.*Only "
    "leaves that train": lambda: rates({"head/kernl": 1.0}),
    "rates='scale' selects none": lambda: rates({"scale": 1.0}),  # it is frozen
    "'head/\\*' has no part 'b'; the parts of the 2 leaves.* train":
        lambda: rates({"head/*": {"b": 1.0}}),
    "all that 'embedding' selects is taken by earlier":
        lambda: rates({"*": 1.0, "embedding": 2.0}),
    "'embedding' is given -1.0; expected a finite number":
        lambda: rates({"embedding": -1.0}),
    "'embedding' is given True": lambda: rates({"embedding": True}),
    "2 problems": lambda: rates({"embeding": 1.0, "head/*": {"a": 1.0}}),
    "rates=3.0. Write a dict": lambda: rates(3.0),
    "rates key=3 holds a int": lambda: rates({3: 1.0}),
    "rates: none of the tree's": lambda: rates({"*": 1.0}, {"w": jnp.ones(3)}),
    "part 'train' of 'head/bias' is in no group.*'\\*': group":
        lambda: groups({"kernel": "x", "embedding": "x"}),
    "the group 'y' has no transformation; there are 'x'":
        lambda: groups({"head/*": "y", "*": "x"}),
    "the transformation 'y' has no arrays": lambda: groups({"*": "x"}, ("x", "y")),
    "'\\*' is given 3; expected the name": lambda: groups({"*": 3}),
    "the group 'frozen' is taken": lambda: groups({"*": "frozen"}, ("frozen",)),
    "decay: '\\*' is given 1.0; expected True or False":
        lambda: recipes.decay_mask(ADAPTED, {"*": 1.0}),
    "lora_plus: ratio is nan": lambda: recipes.lora_plus(float("nan")),
    "lora_plus: ratio is Array": lambda: recipes.lora_plus(jnp.ones(2)),
    "lora_fa: tx is a float": lambda: recipes.lora_fa(0.1),
    "lora_fa: damping=-1": lambda: recipes.lora_fa(optax.sgd(0.1), damping=-1),
    "lora_fa: the step needs A": update_without_params,
    "lora_fa: B of '.*' is to train and its A is not in params": b_without_a,
    "restart: key is a int": lambda: sgd_restart(ADAPTED, key=3),
    "restart: none of the tree's": lambda: sgd_restart({"w": jnp.ones((2, 2))}),
    "restart: no leaf of the tree has factors":
        lambda: sgd_restart({"w": flora.Trained(jnp.ones(2))}),
    "restart: 'embedding' .*without its base": lambda: sgd_restart(flora.split(ADAPTED)[1]),
    "restart: 'w' is Quantized.*merging would round": stored,
    "restart: the state is not one of tx": lambda: sgd_restart(
        ADAPTED, optax.adam(0.1).init(ADAPTED)),
    "Leave out optax.flatten": lambda: sgd_restart(
        ADAPTED, tx=optax.flatten(optax.adam(0.1))),
    "jagged: every=4, warmup=9": lambda: recipes.jagged(1.0, every=4, warmup=9),
    "jagged: every=0, warmup=0": lambda: recipes.jagged(1.0, every=0, warmup=0),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
