import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
from flora import monitor
from flora._tree.quantized import Quantized
from flora.variants import AdaLoRA, DoRA, VeRA
from tests.support import contract
from tests.support.adapters import KINDS, WHOLE, f32, on_mesh


def node(shape, layout, rank, seed, dtype=jnp.float32):
    a, b = layout.factor_shapes(shape, rank)
    return flora.LoraWeight(
        f32(*shape, seed=seed),
        f32(*a, seed=seed + 1).astype(dtype),
        f32(*b, seed=seed + 2).astype(dtype),
        layout=layout,
        rank=rank,
        alpha=5.0,
    )


STACKED = flora.Layout((1,), (0, 3), (2,))  # in, stack, out, in


def tree(seed=0, dtype=jnp.float32):
    return {
        "layers": {"kernel": node((4, 3, 7, 2), STACKED, 3, seed, dtype)},
        "q": node((8, 6), flora.Layout(), 3, seed + 10, dtype),
        "head": flora.Trained(f32(6, 2)),
        "bias": f32(6),
    }


def matrices(w):
    """W `[stack, in, out]`, A `[stack, in, r]` and B `[stack, r, out]` in float64."""
    layout = w.layout
    stack, in_, out = (int(np.prod(s)) for s in layout.sizes(w.base.shape))
    order = (*layout.stack, *layout.in_, *layout.out)
    w64, a, b = (np.asarray(x, np.float64) for x in (w.base, w.a, w.b))
    return (
        w64.transpose(order).reshape(stack, in_, out),
        a.reshape(stack, in_, -1),
        b.reshape(stack, -1, out),
    )


def norm(x):
    return np.sqrt((x**2).sum((-2, -1)))


def by_hand(w, g, k):
    """Every measure from the dense matrices and their singular values."""
    base, a, b = matrices(w)
    _, ga, gb = matrices(dataclasses.replace(g, base=w.base))
    change = w.scale * a @ b
    s = np.linalg.svd(change, compute_uv=False)
    s = s[:, : w.rank]
    p = s / s.sum(-1, keepdims=True)
    u, _, vt = np.linalg.svd(base, full_matrices=False)
    u, v = u[..., :k], np.swapaxes(vt, -1, -2)[..., :k]
    return {
        "norm_a": norm(a),
        "norm_b": norm(b),
        "norm_delta": norm(change),
        "grad_a": norm(ga),
        "grad_b": norm(gb),
        "grad_delta": norm(w.scale * (a @ gb + ga @ b)),
        "effective_rank": np.exp(-(p * np.log(p)).sum(-1)),
        "stable_rank": (s**2).sum(-1) / s[:, 0] ** 2,
        "relative": norm(change) / norm(base),
        "overlap_in": norm(np.swapaxes(u, -1, -2) @ change) ** 2 / norm(change) ** 2,
        "overlap_out": norm(change @ v) ** 2 / norm(change) ** 2,
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("way", ["whole tree", "adapter"])
def test_measure(way, dtype):
    adapted, grads = tree(dtype=dtype), tree(100, dtype)
    subspaces = monitor.reference(adapted, k=2)
    given = (adapted, grads)
    if way == "adapter":
        given = [flora.split(t)[1] for t in given]
    report = jax.jit(lambda t, g: monitor.measure(t, g, reference=subspaces))(*given)
    assert sorted(report.leaves) == ["layers/kernel", "q"]
    for path, get in {
        "layers/kernel": lambda t: t["layers"]["kernel"],
        "q": lambda t: t["q"],
    }.items():
        leaf = report.leaves[path]
        for name, want in by_hand(get(adapted), get(grads), 2).items():
            got = getattr(leaf, name)
            assert got.dtype == jnp.float32
            assert got.shape == ((3,) if path == "layers/kernel" else ())
            np.testing.assert_allclose(
                np.ravel(got), want, rtol=2e-5, err_msg=f"{path} {name}"
            )


@pytest.mark.parametrize("variant", [DoRA(), VeRA(), AdaLoRA()])
def test_variants(variant):
    """ΔW is that of the variant's factors, and moves as its gradients say."""
    x = f32(5, 6)
    params = {"w": f32(6, 4, seed=1)}
    adapted = contract.adapt(lambda p, x: x @ p["w"], params, x, variant=variant)

    def moved(w, g, t):
        add = {k: v + t * g.extra[k] for k, v in w.extra.items()}
        return dataclasses.replace(w, a=w.a + t * g.a, b=w.b + t * g.b, extra=add)

    w = adapted["w"]
    noise = jax.tree.map(lambda v: f32(*v.shape, seed=v.ndim), w)
    w, g = moved(w, noise, 0.3), jax.tree.map(lambda v: f32(*v.shape, seed=7), w)

    def change(w):  # without column factors
        made = w.variant.product(w)
        return w.scale * np.asarray(made.a, np.float64) @ np.asarray(made.b, np.float64)

    got = jax.jit(monitor.measure)({"w": w}, {"w": g}).leaves["w"]
    np.testing.assert_allclose(got.norm_delta, np.linalg.norm(change(w)), rtol=1e-5)
    np.testing.assert_allclose(got.grad_a, np.linalg.norm(g.a), rtol=1e-5)
    along = (change(moved(w, g, 1e-2)) - change(moved(w, g, -1e-2))) / 2e-2
    np.testing.assert_allclose(got.grad_delta, np.linalg.norm(along), rtol=1e-3)
    s = np.linalg.svd(change(w), compute_uv=False)
    np.testing.assert_allclose(got.stable_rank, (s**2).sum() / s[0] ** 2, rtol=1e-4)
    with pytest.raises(flora.LoraError, match="needs W"):
        monitor.measure(flora.split({"w": w})[1])
    with pytest.raises(flora.LoraError, match="grads has no factors for 'w'"):
        monitor.measure({"w": w}, {"w": dataclasses.replace(g, extra=None)})


def test_what_is_not_asked_for_is_not_there():
    report = monitor.measure(tree(), spectrum=False)
    assert len(jax.tree.leaves(report)) == 6
    assert report.leaves["q"].effective_rank is None


def test_floats():
    report = monitor.measure(tree(), tree(100))
    found = report.floats()
    assert len(found) == 8 * 4
    assert all(type(x) is float for x in found.values())
    want = float(report.leaves["layers/kernel"].grad_b[2])
    assert found["layers/kernel[2]/grad_b"] == want
    assert found["q/norm_a"] == float(report.leaves["q"].norm_a)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_ranks_of_a_deficient_delta(rank):
    """A rank of 8 of which few are used: Gram matrices would see rounding as rank."""
    rng = np.random.default_rng(rank)
    b = rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 300))
    adapter = {"w": flora.LoraWeight(None, f32(200, 8), jnp.asarray(b, jnp.float32))}
    report = monitor.measure(adapter).leaves["w"]
    s = np.linalg.svd(np.asarray(adapter["w"].a, np.float64) @ b, compute_uv=False)
    p = s[:rank] / s.sum()
    want = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(report.effective_rank, want, rtol=1e-5)
    np.testing.assert_allclose(report.stable_rank, (s**2).sum() / s[0] ** 2, rtol=1e-5)


def test_the_start_is_all_zeros_and_no_nan():
    w = tree()["q"]
    adapted = {"w": dataclasses.replace(w, b=0 * w.b)}
    subspaces = monitor.reference(adapted, k=1)
    found = monitor.measure(adapted, adapted, reference=subspaces).floats()
    for name in ("norm_b", "norm_delta", "effective_rank", "stable_rank", "relative",
                 "overlap_in", "overlap_out"):  # fmt: skip
        assert found[f"w/{name}"] == 0.0
    assert found["w/norm_a"] > 0


def test_what_diverged_is_not_a_number():
    w = tree()["q"]
    adapted = {"w": dataclasses.replace(w, b=w.b.at[0, 0].set(jnp.nan))}
    subspaces = monitor.reference(adapted, k=1)
    found = monitor.measure(adapted, adapted, reference=subspaces).floats()
    fine = [name for name, x in found.items() if not np.isnan(x)]
    assert fine == ["w/norm_a", "w/grad_a"]


def test_orthogonal_factors_have_full_effective_rank():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 4)))[0]
    adapter = {"w": flora.LoraWeight(None, jnp.asarray(q), jnp.asarray(q.T), rank=4)}
    report = monitor.measure(adapter).leaves["w"]
    np.testing.assert_allclose(report.effective_rank, 4, rtol=1e-5)
    np.testing.assert_allclose(report.stable_rank, 4, rtol=1e-5)


def test_overlap_by_construction():
    """ΔW inside W's leading directions is 1, outside 0, at random k/in and k/out."""
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(64, 48)))
    w = (u[:, :48] * np.linspace(9, 1, 48)) @ vt

    def overlaps(a, b):
        weight = flora.LoraWeight(
            *(jnp.asarray(x, jnp.float32) for x in (w, a, b)), rank=a.shape[1]
        )
        subspaces = monitor.reference({"w": weight}, k=8)
        leaf = monitor.measure({"w": weight}, reference=subspaces).leaves["w"]
        return float(leaf.overlap_in), float(leaf.overlap_out)

    np.testing.assert_allclose(overlaps(u[:, 3:5], vt[:2]), (1, 1), rtol=1e-4)
    np.testing.assert_allclose(overlaps(u[:, 20:22], vt[:2]), (0, 1), atol=1e-4)
    rng = np.random.default_rng(1)
    found = overlaps(rng.normal(size=(64, 40)), rng.normal(size=(40, 48)))
    np.testing.assert_allclose(found, (8 / 64, 8 / 48), atol=0.05)


def test_reference_of_a_stored_weight():
    w = tree()["q"]
    quantized = dataclasses.replace(w, base=Quantized(w.base, dequantize=jnp.negative))
    one, two = (monitor.reference({"w": x}, k=3)["w"] for x in (w, quantized))
    np.testing.assert_allclose(one.norm, np.linalg.norm(w.base), rtol=1e-6)
    np.testing.assert_allclose(one.norm, two.norm, rtol=1e-6)
    np.testing.assert_allclose(abs(np.sum(one.in_ * two.in_, 0)), np.ones(3), rtol=1e-4)


def test_merge_error_is_small_in_float32():
    assert float(monitor.merge_error(tree())["q"]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_measure_on_a_mesh(kind):
    measure = jax.jit(monitor.measure)
    want = measure({"w": WHOLE}, {"w": WHOLE})
    with on_mesh(kind) as placed:
        got = measure({"w": placed}, {"w": placed})
    contract.close(got, want, 1e-5)


def fn(p, x):
    y = jax.nn.gelu(x @ p["up"]) @ p["down"]
    return jnp.mean((y - 1) ** 2)


def model(d, ff, tokens, rank):
    params = {"up": f32(d, ff) / d**0.5, "down": f32(ff, d, seed=1) / ff**0.5}
    x = f32(tokens, d, seed=2)
    return contract.adapt(fn, params, x, rank=rank), x


def test_measuring_costs_next_to_nothing():
    """XLA's FLOPs of a step with and without; LAPACK's, which XLA cannot see, added."""
    d, ff, tokens, rank, k = 256, 704, 1024, 8, 8
    adapted, x = model(d, ff, tokens, rank)
    subspaces = monitor.reference(adapted, k=k)
    tx = flora.optimizer(optax.adam(1e-3), adapted)
    loss = flora.lora(fn)

    def step(measured, t, state):
        value, grads = flora.value_and_grad(loss)(t, x)
        updates, state = tx.update(grads, state, t)
        out = optax.apply_updates(t, updates), state, value
        if not measured:
            return out
        return *out, monitor.measure(t, grads, reference=subspaces)

    def flops(measured):
        lowered = jax.jit(step, static_argnums=0).lower(measured, adapted, state)
        return lowered.compile().cost_analysis()["flops"]

    state = tx.init(adapted)
    plain, measured = flops(False), flops(True)
    qr = 2 * 2 * (d + ff) * rank**2  # two leaves; 2 m r² for R alone
    svd = 2 * 20 * rank**3
    assert measured > plain
    ratio = (measured + qr + svd) / plain
    print("FLOPs of a step, measured to plain:", ratio)
    assert ratio < 1.002


def test_inside_a_scan_and_a_sweep():
    adapted, x = model(6, 9, 5, 2)
    base, adapter = flora.split(adapted)
    loss = flora.lora(fn)

    def run(lr):
        tx = optax.sgd(lr)

        def step(carry, _):
            a, state = carry
            value, g = jax.value_and_grad(lambda a: loss(flora.join(base, a), x))(a)
            updates, state = tx.update(g, state, a)
            return (optax.apply_updates(a, updates), state), (
                value,
                monitor.measure(a, g),
            )

        return jax.lax.scan(step, (adapter, tx.init(adapter)), None, length=25)[1]

    losses, reports = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.03]))
    assert reports.leaves["up"].norm_b.shape == (2, 25)
    # B starts at zero and moves first, A does not move at the first step.
    assert not reports.leaves["up"].norm_b[:, 0].any()
    assert not reports.leaves["up"].grad_a[:, 0].any()
    assert reports.leaves["up"].grad_b[1, 0] > 0
    assert reports.leaves["up"].norm_delta[1, -1] > 0
    alarms = jax.jit(jax.vmap(monitor.alarm))(losses)
    assert alarms.slow.tolist() == [True, False]
    one = jax.tree.map(lambda v: v[1], reports)
    figure = monitor.plot(one, losses[1], steps=np.arange(25))
    assert len(figure.axes) == 4


# The plot.


def test_plot(tmp_path):
    adapted, grads = tree(), tree(100)
    subspaces = monitor.reference(adapted, k=2)
    reports = [
        monitor.measure(
            jax.tree.map(lambda x, s=s: s * x, adapted), grads, reference=subspaces
        )
        for s in (1.0, 2.0)
    ]
    figure = monitor.plot(reports, np.linspace(2, 1, 30), steps=[0, 10])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["norms", "gradients", "rank of ΔW", "ΔW against W"]
    assert titles[4].endswith("No alarm")
    line = figure.axes[0].lines[2]
    leaves = [r.leaves for r in reports]
    want = [
        np.median([*x["layers/kernel"].norm_delta, x["q"].norm_delta]) for x in leaves
    ]
    np.testing.assert_allclose(line.get_ydata(), want, rtol=1e-6)
    assert line.get_xdata().tolist() == [0, 10]
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(flora.LoraError, match=r"pip install 'flora-jax\[examples\]'"):
        monitor.plot([monitor.measure(tree())])


# What is refused.

ERRORS = {
    "measure: none of the tree's": lambda: monitor.measure({"w": f32(2, 2)}),
    "measure: no leaf has factors":
        lambda: monitor.measure({"w": flora.Trained(f32(2, 2))}),
    "measure: 'w' has no arrays": lambda: monitor.measure(
        {"w": flora.LoraWeight(None, True, True)}),
    "measure: grads has no factors for 'q'": lambda: monitor.measure(
        tree(), tree() | {"q": None}),
    "measure: reference lacks 'q'": lambda: monitor.measure(
        tree(), reference={"layers/kernel": None}),
    "reference: k=0": lambda: monitor.reference(tree(), k=0),
    "2 problems.*8×6; k=7 is above 6|2 problems": lambda: monitor.reference(
        tree(), k=9),
    "reference: 'layers/kernel'.*without its base": lambda: monitor.reference(
        flora.split(tree())[1] | {"q": tree()["q"]}),
    "merge_error: none of": lambda: monitor.merge_error({"w": f32(2, 2)}),
    "plot: expected reports": lambda: monitor.plot([]),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
