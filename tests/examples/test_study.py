"""The study's arithmetic, its facts that are exact, and its page."""

import csv
import dataclasses
import importlib
import math
import pathlib

import _minilm
import _page
import _smollm2
import _study as study
import e04_invariance
import e05_floors
import e07_spectral
import e10_merging
import e15_real_variants
import finetune_minilm as example
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_all as run
from scipy import stats

import flora

FOLDER = pathlib.Path(run.__file__).parent


def test_adam_without_eps_does_not_see_how_the_scale_is_split():
    sizes = e04_invariance.Sizes(seeds=2, pairs=((3.0, 0.7),), rates=(1e-3,))
    found = e04_invariance.compare(sizes)
    assert all(x.shape == (2, 1, sizes.steps) for x in found.values())
    assert sizes.steps == 200
    worst = {name: x.max() for (name, _, _), x in found.items()}
    assert worst["Adam, eps = 0"] <= 1e-14
    assert worst["SGD"] <= 1e-14
    assert worst["Adam, eps = 1e-8"] >= 1e-6
    assert worst["SGD, the rates of Adam"] >= 0.1


@pytest.mark.slow
def test_regression_comes_down_to_its_floors():
    sizes = e05_floors.Sizes(
        (2,), samples=8, inputs=6, outputs=4, steps=900, seeds=2, rates=(0.05,)
    )
    key = jax.random.split(study.seeds(2)[1])[0]
    y = np.asarray(e05_floors.problem(key, sizes)[2], np.float64)
    result = e05_floors.run(sizes)
    rows = {row["arm"]: row for row in result.tables["floors"]}
    own = np.linalg.svd(y, compute_uv=False)
    floor = (own[2:] ** 2).sum() / (own**2).sum()
    assert rows["LoRA"]["floor_low"] < floor < rows["LoRA"]["floor_high"]
    for row in rows.values():
        assert abs(row["error/floor - 1"]) < 1e-2
    assert rows["LoRA"]["floor"] < rows["LoRA-FA (A frozen)"]["floor"]


def test_floors_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 4))
    y = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    a, b = rng.normal(size=(5, 2)), rng.normal(size=(2, 4))
    found = e05_floors.floors(*(jnp.asarray(z, jnp.float32) for z in (y, x, a, b)))
    u, s, v = np.linalg.svd(y)
    of_a = x @ a @ np.linalg.lstsq(x @ a, y, rcond=None)[0]
    of_b = np.linalg.lstsq(b.T, y.T, rcond=None)[0].T @ b
    best = (u[:, :2] * s[:2]) @ v[:2]
    want = [((y - z) ** 2).sum() / (y**2).sum() for z in (best, of_a, of_b)]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_starts_made_of_w_keep_the_function_and_lora_ga_is_the_best_step():
    w = jax.random.normal(jax.random.key(0), (6, 5))
    u, s, v = np.linalg.svd(np.asarray(w, np.float64))
    a, b = e07_spectral.pissa(w, 2.0, 3)
    np.testing.assert_allclose(2 * a @ b, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
    a, b = e07_spectral.olora(w, 2.0, 3)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(a, w @ b.T, atol=1e-5)  # W projected on B's rows
    a, b = e07_spectral.lora_ga(w, 2.0, 2)
    g = np.asarray(w, np.float64)
    step = g @ b.T @ b + a @ a.T @ g  # what the first step of SGD adds, to first order
    cosine = (step * g).sum() / np.linalg.norm(step) / np.linalg.norm(g)
    assert cosine == pytest.approx(
        math.sqrt((s[:4] ** 2).sum() / (s**2).sum()), rel=1e-5
    )


def test_merging_a_small_change_into_bfloat16_loses_it():
    rows = e10_merging.run(e10_merging.SMOKE).tables["rounding"]
    small, large = rows
    assert small["merged_unchanged"] > 0.9 > 0.1 > large["merged_unchanged"]
    assert small["merged_along"] < 0.5 < 0.8 < small["dithered_along"] < 1.2
    assert large["merged_error"] < 0.05


def layer(params, x):
    return x @ params["w"]


def test_scales_as_an_axis_are_those_of_alpha():
    key = jax.random.key(0)
    w, x = jax.random.normal(key, (6, 4)), jax.random.normal(key, (3, 6))

    def losses(alpha, scale):
        config = flora.LoraConfig(rank=2, alpha=alpha, target="w")
        base, adapter = flora.split(flora.init(key, config, layer, {"w": w}, x))

        def loss(adapter, step):
            tree = flora.join(base, study.scaled(adapter, scale))
            return jnp.square(flora.lora(layer)(tree, x) - 1).mean()

        return study.train(loss, adapter, optax.sgd(0.1), 4)[1]

    np.testing.assert_allclose(losses(6, 1.0), losses(2, 3.0), rtol=1e-5)


def test_a_rate_of_zero_freezes_a_factor():
    config, key = flora.LoraConfig(rank=2, target="w"), jax.random.key(0)
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    adapter = flora.split(flora.init(key, config, layer, params, x))[1]
    tx = study.two_rates(optax.adam, 0.0, 0.1)
    grads = jax.tree.map(jnp.ones_like, adapter)
    updates, _ = tx.update(grads, tx.init(adapter), adapter)
    assert not updates["w"].a.any()
    np.testing.assert_allclose(updates["w"].b, -0.1, rtol=1e-5)


def test_intervals_exponents_and_best_rates():
    x = np.array([1.0, 2.0, 4.0, 3.0])
    found = study.interval(x)
    low, high = stats.t.interval(0.95, 3, x.mean(), x.std(ddof=1) / 2)
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, low, high))
    assert study.interval(x, log=True).mean == pytest.approx(24**0.25)
    assert math.isnan(study.interval(np.array([1.0, np.inf])).mean)
    sizes = np.array([2.0, 4.0, 8.0])
    values = np.stack([3 * sizes**0.5, sizes**-1.0], axis=1)
    np.testing.assert_allclose(study.exponent(sizes, values), [0.5, -1.0])
    grid = study.rates(1e-3, 1e-1, 5)
    curve = (np.log10(grid) + 2.1) ** 2
    losses = np.exp(np.stack([curve, curve], axis=1))
    assert study.best(losses) == 2
    np.testing.assert_allclose(study.own_best(grid, losses), 10**-2.1, rtol=1e-4)
    assert study.best(np.array([[np.inf, 1.0], [2.0, 2.0], [1e-9, np.inf]])) == 1


def test_what_an_encoder_keeps_of_other_text():
    rng = np.random.default_rng(0)
    found = rng.normal(size=(30, 8))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert _minilm.similarity(found, found @ turn) == pytest.approx(1)
    other = np.roll(found, 1, axis=0)
    pairs = [(i, j) for i in range(30) for j in range(i)]
    ours, theirs = ([x[i] @ x[j] for i, j in pairs] for x in (found, other))
    want = stats.pearsonr(ours, theirs).statistic
    assert _minilm.similarity(found, other) == pytest.approx(want)
    near = np.repeat(np.eye(5), 2, axis=0) + 0.01 * rng.normal(size=(10, 5))
    groups = np.repeat(np.arange(5), 2)
    assert _minilm.neighbors(near, groups) == 1
    assert _minilm.neighbors(near, np.roll(groups, 1)) == 0


@pytest.mark.slow
def test_layers_that_do_not_train_are_computed_once():
    sizes = dataclasses.replace(_minilm.SMOKE, first=0)
    above, whole = _minilm.world(_minilm.SMOKE), _minilm.world(sizes)
    assert set(above.variables["params"]) == {"layer_1", "head"}
    assert set(whole.variables["params"]) > {"words", "layer_0", "head"}
    one, two = (
        x.model.apply(x.variables, *example.tokens(x.splits[0].test[:3]))
        for x in (above, whole)
    )
    np.testing.assert_allclose(one, two, atol=1e-5)
    kept = (_minilm.before_training(x) for x in (_minilm.SMOKE, sizes))
    assert _minilm.similarity(*kept) == pytest.approx(1)


def test_a_search_stops_at_its_bounds_and_says_so():
    arm = example.Arm("arm", lambda seed: None, lambda *x: None, example.tokens, 1, 2)
    sizes = dataclasses.replace(_minilm.SMOKE, steps_of_grid=2)

    def run(best):
        return lambda rate, seed: example.Run(abs(rate - best), None, 0, None, None)

    best, tried = _minilm.searched(run(1), arm, sizes)
    assert best == 1
    assert list(tried) == [0, 1, 2, 3]
    best, tried = _minilm.searched(run(9), arm, sizes)
    assert best == max(tried) == 4
    rates = tuple(map(example.rate_of, tried))
    assert study.rate_cells(rates, list(tried).index(best))["edge"] == "edge"


def test_arms_that_are_compared_train_as_many_numbers():
    for group in e15_real_variants.arms(_minilm.SMOKE):
        trained = [jax.tree.leaves(arm.start(0)[1]) for arm in group]
        assert len({sum(x.size for x in leaves) for leaves in trained}) == 1


def test_a_language_model_is_asked_for_the_word_after_a_chat():
    sizes = _smollm2.SMOKE
    here = _smollm2.world(sizes)
    arm = _smollm2.arm(sizes, "standard")
    chats = here.splits[0].test[:3]
    lengths = chats.mask.sum(1)
    assert len({*lengths.tolist()}) > 1  # and so is the padding
    whole = here.model.apply(here.params, chats.ids)
    found = arm.logits(*arm.start(0), chats.ids, chats.mask)
    wanted = [y[n - 1] for y, n in zip(whole, lengths, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert len({*here.splits[0].train.labels.tolist()}) == 2  # a token an answer


def test_the_verdicts_quote_the_tables():
    tables = {"t": [{"a": "1", "b": "0.12345"}, {"a": "2", "b": "7"}]}
    assert _page.with_numbers("x [[t | a=1 | b]] y", tables) == "x 0.123 y"
    for wrong in ("[[t | a=3 | b]]", "[[t | a=1 | c]]", "[[u | a=1 | b]]"):
        with pytest.raises(KeyError):
            _page.with_numbers(wrong, tables)


def test_the_runner_and_the_page(tmp_path):
    with pytest.raises(SystemExit, match="e04_invariance"):
        run.chosen(["e77"])
    with pytest.raises(SystemExit):
        run.main(["e05", "--smoke"])  # would replace the results
    run.main(["e05", "--smoke", "--out", str(tmp_path)])
    assert (tmp_path / "e05_floors.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "README.md").read_text()
    assert "| 2 | LoRA-FA (A frozen) |" in text
    assert "![5. Down to the floor](e05_floors.png)" in text
    (row,) = _page.read_csv(tmp_path / "meta.csv")
    assert row["experiment"] == "e05_floors"


def test_the_committed_page_is_made_of_the_committed_results():
    texts = {name: importlib.import_module(name).TEXT for name in run.NAMES}
    page = _page.page(texts, FOLDER / "results", "results/", run.HEAD)
    assert (FOLDER / "README.md").read_text() == page
    for name in run.NAMES:
        picture = FOLDER / "results" / f"{name}.png"
        assert picture.stat().st_size < 150_000
        assert importlib.import_module(name).FULL is not None
    with (FOLDER / "results" / "meta.csv").open() as file:
        assert [row["experiment"] for row in csv.DictReader(file)] == list(run.NAMES)


LONGEST = ("e06_full", "e09_dora", "e17_real_language_scale")  # about 35 s each


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.by_hand) if n in LONGEST else n
        for n in run.NAMES
    ],
)
def test_every_experiment_runs_in_small(name, tmp_path):
    module = importlib.import_module(name)
    _page.save(tmp_path, name, module.run(module.SMOKE))
    for table in module.TEXT.captions:
        path = tmp_path / f"{name}_{table}.csv"
        assert not path.exists() or _page.read_csv(path)
