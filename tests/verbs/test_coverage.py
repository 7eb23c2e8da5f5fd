import jax
import jax.numpy as jnp
import pytest

import flora
from flora._verbs.coverage import STATUSES, LeafCoverage
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
        "embedding": {"embedding"}, "bias": {"embedding"}, "head": {"linear", "head"},
    } | {
        f"{n}{i}": {"linear", "attention"} if n in "qkvo" else {"linear"}
        for i in range(2) for n in ("q", "k", "v", "o", "router", "up", "down")
    }  # fmt: skip
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


def test_costs_of_a_leaf_for_each_unit_of_rank():
    def row(layout, shape):
        return LeafCoverage("w", shape, "float32", "factored", layout, ())

    experts = row(flora.Layout((2,), (3, 0), (1,)), (5, 7, 3, 2))
    assert experts.rank_parameters == 3 * (10 + 7)
    assert experts.rank_flops == pytest.approx(1 / 10 + 1 / 7)
    unknown = row(None, (5, 7))
    assert (unknown.rank_parameters, unknown.rank_flops) == (0, 0.0)
    assert row(flora.Layout(), (5, 0)).rank_flops == 5.0  # of an empty product


def test_statuses_and_reasons():
    def both(p, x):
        return (
            jnp.einsum("i,ijk->jk", x[:, 0], p["w"])
            + jnp.einsum("ij,ijk->k", x, p["w"]),
            p["r"].T,
            x[:, :2] @ p["r"],
        )

    tree = {"w": jnp.ones((3, 3, 3)), "r": jnp.ones((2, 4)), "n": jnp.int32(1)}
    report = flora.coverage(both, tree, jnp.ones((3, 3)))
    assert [row.path for row in report.rows] == [
        "r",
        "w",
    ]  # what is not floating is none
    assert (report["w"].status, report["w"].layout) == ("dense", None)
    assert "reads it as" in report["w"].reason
    assert report["r"].reason == "returned, changed, by the function"
    assert report.with_status("unused") == []
    for status in STATUSES:
        assert isinstance(report.with_status(status), list)
    with pytest.raises(
        flora.LoraError, match="they are factored, dense, unused, vector"
    ):
        report.with_status("frozen")


def test_a_selection_is_a_pattern_of_paths():
    report = flora.coverage(fn, params(), X)
    linear = report.select("linear")
    assert linear.paths == ("head", "kernel")
    assert repr(linear) == "<linear: 2 leaves>"
    assert linear("kernel", None)
    assert not linear("kernel/x", None)
    assert report.select("linear", "embedding").paths == ("embedding", "head", "kernel")
    without = report.select("linear", without=("head", "conv"))
    assert without.paths == ("kernel",)
    assert repr(without) == "<linear, no head, no conv: 1 leaves>"
    assert report.select("head", without=[]).paths == ("head",)


def test_the_function_is_traced_once_and_never_run():
    calls = []

    def counted(p, x):
        calls.append(isinstance(x, jax.core.Tracer))
        return x @ p["w"]

    flora.coverage(counted, {"w": jnp.ones((7, 5))}, X)
    assert calls == [True]
