import jax
import jax.numpy as jnp

import flora
from tests.support import contract
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
