import contract
import jax
import jax.numpy as jnp
import pytest
from contract import array
from models import MODELS

import flora


def fn(p, x):
    y = p["embedding"][jnp.array([0, 1, 2])] + x @ p["kernel"] + p["bias"]
    return y @ p["head"] + jnp.tanh(p["gate"]).sum()


def params():
    return {"embedding": array(9, 5, dtype=jnp.float32), "kernel": jnp.ones((7, 5)),
            "bias": jnp.ones(5), "head": jnp.ones((5, 11)), "gate": jnp.ones((2, 3)),
            "idle": jnp.ones((4, 4)), "step": jnp.int32(0)}  # fmt: skip


X = jnp.ones((3, 7))


def test_coverage_says_what_reads_each_leaf_and_where():
    report = flora.coverage(fn, params(), X)
    assert report.with_status("factored") == ["embedding", "head", "kernel"]
    assert report.with_status("dense") == ["bias", "gate"]
    assert report.with_status("unused") == ["idle"]
    head = report["head"]
    assert head.layout == flora.Layout((), (0,), (1,))
    (use,) = head.uses
    assert use.primitive == "dot_general"
    assert use.source.startswith("test_report.py:")
    assert use.source.endswith("(fn)")
    (use,) = [use for use in report["gate"].uses if use.dense]
    assert (use.primitive, use.bytes) == ("tanh", 24)
    with pytest.raises(flora.LoraError, match="no leaf 'nose'"):
        report["nose"]
    text = str(report)
    for word in ("3 factored, 2 dense, 1 unused", "tanh at test_report.py", "24 B"):
        assert word in text


def test_coverage_of_adapted_and_abstract_trees():
    plain = flora.coverage(fn, params(), X)
    adapted = contract.adapt(fn, params(), X, target=["kernel", "head"])
    for tree in (adapted, jax.eval_shape(params)):
        again = flora.coverage(fn, tree, X)
        assert [(r.path, r.status, r.layout) for r in again.rows] == [
            (r.path, r.status, r.layout) for r in plain.rows
        ]


def test_the_source_line_is_the_user_s_not_flax_s():
    model = MODELS["mlp"]()
    report = flora.coverage(model.fn, model.params, *model.args)
    for row in report.rows:
        assert row.uses[0].source.startswith("models.py:")
        assert row.uses[0].source.endswith("(__call__)")


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
