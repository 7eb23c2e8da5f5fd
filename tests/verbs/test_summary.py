import re

import jax
import jax.numpy as jnp
import numpy as np

import flora
from flora.quantize import Quantized
from tests.support import contract
from tests.support.quantized import Scaled, dense_of
from tests.verbs.test_coverage import X, fn, params


def test_summary_counts():
    adapted = contract.adapt(
        fn, params(), X, target=["kernel", "head"], train="bias", alpha=3
    )
    report = flora.summary(adapted)
    rows = {row.path: row for row in report.rows}
    kernel, bias = rows["kernel"], rows["bias"]
    assert (kernel.role, kernel.rank, kernel.alpha) == ("lora", 2, 3.0)
    assert (kernel.parameters, kernel.trained) == (35, 7 * 2 + 2 * 5)
    assert (kernel.bytes, kernel.trained_bytes) == (4 * 35 + 4 * 24, 4 * 24)
    assert (bias.role, bias.trained) == ("train", 5)
    assert rows["idle"].role == "frozen"
    assert report.trained == 24 + 5 + (5 * 2 + 2 * 11)
    assert report.parameters == 45 + 35 + 5 + 55 + 6 + 16 + 1
    text = str(report)
    assert "61 of 163 parameters train (37.42 %)" in text
    assert "in=0 out=1" in text
    abstract = flora.summary(jax.eval_shape(lambda: adapted))
    assert abstract == report


def test_summary_of_an_adapter_counts_the_adapter():
    adapted = contract.adapt(fn, params(), X, target=["kernel", "head"])
    _, adapter = flora.split(adapted)
    report = flora.summary(adapter)
    assert report.trained == 24 + 32
    assert report.bytes == 4 * (24 + 32)


def test_leaves_that_are_no_arrays():
    report = flora.summary({"w": jnp.ones((4, 5)), "name": "abc", "scale": 2.0})
    assert [(row.path, row.parameters) for row in report.rows] == [
        ("name", 0), ("scale", 1), ("w", 20)
    ]  # fmt: skip
    assert "21 parameters" in str(report)


def test_a_rank_above_both_sides_is_marked(x64):
    def fn(p, x):
        h = jnp.tanh(x @ p["q"])
        each = jnp.einsum("bd,edo->beo", h, p["experts"])
        return jnp.einsum("be,beo->bo", h @ p["router"], each)

    shapes = {"q": (6, 24), "router": (24, 3), "experts": (3, 24, 5)}
    p = {k: contract.array(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    x = contract.array(4, 6)
    adapted = contract.check(fn, p, x, rank=8, vmap=False, dtype=jnp.float64)
    summary, report = flora.summary(adapted), flora.coverage(fn, adapted, x)
    rows = {row.path: row for row in summary.rows}
    cells = {"experts": (15, "8"), "q": (6, "8 > 6"), "router": (3, "8 > 3")}
    for path, (full, text) in cells.items():
        assert (rows[path].rank, rows[path].full_rank) == (8, full)
        assert re.search(rf"{path} .* {text} ", str(summary))
        assert (report[path].rank, report[path].full_rank) == (8, full)
    assert [f"{n} < 8" in str(report) for n in (3, 6, 15)] == [True, True, False]
    assert "<" not in str(flora.coverage(fn, p, x))
    alone = {r.path: r for r in flora.summary(flora.split(adapted)[1]).rows}
    assert alone["q"].full_rank == 6


def node(**fields):
    settings = {"rank": 2, "alpha": 6.0} | fields
    made = flora.LoraWeight(*map(jnp.ones, ((7, 5), (7, 2), (2, 5))), **settings)
    return made


def test_each_kind_of_leaf():
    vera = flora.variants.VeRA()
    tree = {
        "a": node(),
        "b": node(variant=vera, extra={"d": jnp.ones(2), "v": jnp.ones(5)}),
        "c": flora.Trained(jnp.ones(3, jnp.bfloat16)),
        "d": jnp.ones((0, 4)),
        "e": np.int8(3),
        "f": True,
        "g": None,
        "h": jax.ShapeDtypeStruct((2, 2), jnp.float16),
    }
    rows = {row.path: row for row in flora.summary(tree).rows}
    # None is no leaf of a tree.
    assert list(rows) == ["a", "b", "c", "d", "e", "f", "h"]
    assert (rows["a"].trained, rows["a"].bytes, rows["a"].trained_bytes) == (
        24,
        236,
        96,
    )
    # What a variant freezes is held, but does not train.
    assert (rows["b"].trained, rows["b"].bytes, rows["b"].trained_bytes) == (7, 264, 28)
    assert (rows["c"].role, rows["c"].dtype, rows["c"].bytes) == (
        "train",
        "bfloat16",
        6,
    )
    assert (rows["d"].shape, rows["d"].parameters, rows["d"].bytes) == ((0, 4), 0, 0)
    assert (rows["e"].shape, rows["e"].dtype, rows["e"].bytes) == ((), "int8", 1)
    assert (rows["f"].dtype, rows["f"].parameters) == ("bool", 1)
    assert (rows["h"].dtype, rows["h"].bytes) == ("float16", 8)


def test_stored_weights_count_their_bits():
    quantized = Scaled(jnp.ones((4, 8), jnp.int4), jnp.ones((4, 1), jnp.float32))
    (row,) = flora.summary({"w": Quantized(quantized, dense_of)}).rows
    assert (row.parameters, row.bytes) == (32, 32 // 2 + 4 * 4)
    assert (row.dtype, row.role) == ("int4+float32", "frozen")


def test_the_table_shows_what_trains_and_sums_up_the_rest():
    tree = {"a": node(), "x": jnp.ones((4, 5)), "y": jnp.ones(6)}
    lines = str(flora.summary(tree)).split("\n")
    assert lines[0] == (
        "24 of 61 parameters train (39.34 %); 340 B, of them 96 B trained"
    )
    assert lines[-2].split() == [
        "a", "lora", "(7,", "5)", "float32", "in=0", "out=1",
        "2", "6", "35", "24", "236", "B",
    ]  # fmt: skip
    assert lines[-1].split() == [
        "2",
        "other",
        "leaves",
        "frozen",
        "26",
        "0",
        "104",
        "B",
    ]
    # With nothing trained every leaf is shown.
    plain = str(flora.summary({"x": jnp.ones((4, 5)), "y": jnp.ones(6)}))
    assert "other leaves" not in plain
    assert plain.startswith("0 of 26 parameters train (0.00 %)")


def test_empty_trees():
    for tree in ({}, None, []):
        report = flora.summary(tree)
        assert (report.rows, report.parameters, report.bytes) == ((), 0, 0)
        assert str(report).startswith("0 of 0 parameters train (0.00 %)")
