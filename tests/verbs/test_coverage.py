import jax
import jax.numpy as jnp
import pytest

import flora
from tests.support import contract
from tests.support.contract import array
from tests.support.registry import MODELS


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
    assert report.with_status("dense") == ["gate"]
    assert report.with_status("vector") == ["bias"]
    assert report.with_status("unused") == ["idle"]
    head = report["head"]
    assert head.layout == flora.Layout((), (0,), (1,))
    (use,) = head.uses
    assert use.primitive == "dot_general"
    assert use.source.startswith("test_coverage.py:")
    assert use.source.endswith("(fn)")
    (use,) = [use for use in report["gate"].uses if use.dense]
    assert (use.primitive, use.bytes) == ("tanh", 24)
    with pytest.raises(flora.LoraError, match="no leaf 'nose'"):
        report["nose"]
    text = str(report)
    for word in (
        "3 factored, 1 dense, 1 unused, 1 vector",
        "tanh at test_coverage.py",
        "24 B",
    ):
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
        assert row.uses[0].source.startswith("registry.py:")
        assert row.uses[0].source.endswith("(__call__)")


def test_the_source_line_is_the_caller_s_where_jax_reuses_a_trace():
    def lookups(p, ids):
        first = jnp.take(p["first"], ids, axis=0)
        return first + jnp.take(p["second"], ids, axis=0)

    params = {"first": jnp.ones((9, 5)), "second": jnp.ones((9, 5))}
    report = flora.coverage(lookups, params, jnp.arange(3))
    start = lookups.__code__.co_firstlineno
    for i, name in enumerate(params, 1):
        sources = {use.source for use in report[name].uses}
        assert sources == {f"test_coverage.py:{start + i} (lookups)"}


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
        ("name", 0),
        ("scale", 1),
        ("w", 20),
    ]
    assert "21 parameters" in str(report)


ATTENTION = {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}


@pytest.mark.parametrize(
    "name", ["scanned decoder", "nnx decoder", "transformer block"]
)
def test_targets_by_role(name):
    model = MODELS[name]()
    report = flora.coverage(model.fn, model.params, *model.args)
    tails = {"/".join(p.split("/")[-2:]) for p in report.attention.paths}
    assert tails == ATTENTION
    heads = [row.path for row in report.rows if "head" in row.roles]
    assert [p.endswith("embedding") for p in heads] == ([True] if heads else [])
    assert bool(heads) == (name != "transformer block")
    kernels = {r.path for r in report.rows if r.status == "factored"}
    assert set(report.all_linear.paths) == kernels - set(heads)
    config = {"target": report.all_linear, "exclude": report.attention}
    adapted = contract.adapt(model.fn, model.params, *model.args, **config)
    chosen = {r.path for r in flora.summary(adapted).rows if r.role == "lora"}
    assert chosen == set(report.all_linear.paths) - set(report.attention.paths)


def transformer(p, ids):
    """Scores with a looked-up bias, a mixture of experts, two outputs."""
    x = p["embedding"][ids]
    for i in range(2):
        q, k, v = (x @ p[f"{n}{i}"] for n in "qkv")
        scores = jnp.einsum("btd,bsd->bts", q, k) + p["bias"][ids]
        x = x + jax.nn.softmax(scores) @ v @ p[f"o{i}"]
        gates = jax.nn.softmax(x @ p[f"router{i}"])
        parts = jnp.einsum("btd,te->ebtd", x, gates[0])
        parts = jax.nn.gelu(jnp.einsum("ebtd,edf->ebtf", parts, p[f"up{i}"]))
        parts = jnp.einsum("ebtf,efd->ebtd", parts, p[f"down{i}"])
        x = x + jnp.einsum("ebtd,bte->btd", parts, gates)
    return {"logits": x @ p["head"], "loss": jnp.log(gates).mean(), "ids": ids}


def test_roles_are_told_by_what_is_computed():
    shapes = {"embedding": (9, 6), "bias": (9, 5), "head": (6, 9)} | {
        f"{n}{i}": shape
        for i in range(2)
        for n, shape in {
            "q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (4, 6), "router": (6, 3),
            "up": (3, 6, 7), "down": (3, 7, 6),
        }.items()
    }  # fmt: skip
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    report = flora.coverage(transformer, params, ids)
    assert {row.path: set(row.roles) for row in report.rows} == {
        "embedding": {"embedding"},
        "bias": {"embedding"},
        "head": {"linear", "head"},
    } | {
        f"{n}{i}": {"linear", "attention"} if n in "qkvo" else {"linear"}
        for i in range(2)
        for n in ("q", "k", "v", "o", "router", "up", "down")
    }
    assert report["up0"].rank_parameters == 3 * (6 + 7)
    assert report["up0"].rank_flops == pytest.approx(1 / 6 + 1 / 7)
    assert "+30.95 %" in str(report)
    assert set(report.all_but_head.paths) == set(params) - {"head"}
    assert repr(report.attention) == "<attention: 8 leaves>"


def test_wrong_roles_are_named():
    report = flora.coverage(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, X[:, :3])
    with pytest.raises(
        flora.LoraError, match=r"No leaf is conv.* are 1 linear, 0 conv"
    ):
        report.select("conv")
    with pytest.raises(flora.LoraError, match="No leaf is linear, no head"):
        assert report.all_linear
    for wrong in (lambda: report.select("mlp"), report.select):
        with pytest.raises(flora.LoraError, match="they are linear, conv, embedding"):
            wrong()
