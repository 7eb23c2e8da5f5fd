import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora
import flora.quantize
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


IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
SEQ = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
LAST = {"mid": {"linear"}, "head": {"linear", "head"}}


def after(p, x):
    return jnp.tanh(x @ p["mid"]) @ p["head"]


def scattered(ids):
    at = jnp.arange(2)[:, None], jnp.arange(5)[None], ids
    return jnp.zeros((2, 5, 11)).at[at].set(1.0)


# Zeros and ones of which each row picks one of a table, or some.
ONE_HOT = {
    "jax.nn": lambda ids: jax.nn.one_hot(ids, 11),
    "bfloat16": lambda ids: jax.nn.one_hot(ids, 11, dtype=jnp.bfloat16),
    "compared with an iota": lambda ids: (
        ids[..., None] == lax.iota(jnp.int32, 11)
    ).astype(jnp.float32),
    "compared with a constant": lambda ids: jnp.float32(
        ids[..., None] == np.arange(11)
    ),
    "where": lambda ids: jnp.where(ids[..., None] == jnp.arange(11), 1.0, 0.0),
    "rows of a unit matrix": lambda ids: jnp.eye(11)[ids],
    "rows of a constant": lambda ids: jnp.asarray(np.eye(11, dtype=np.float32))[ids],
    "scattered": scattered,
    "masked and scaled": lambda ids: (
        jax.nn.one_hot(ids, 11) * (ids != 0)[..., None] * 8**0.5
    ),
    "a bag of them": lambda ids: jax.nn.one_hot(ids, 11).sum(1, keepdims=True),
    "mapped": jax.vmap(jax.vmap(lambda i: jax.nn.one_hot(i, 11))),
    "in a loop": lambda ids: lax.map(lambda i: jax.nn.one_hot(i, 11), ids),
    "jitted": jax.jit(lambda ids: jax.nn.one_hot(ids, 11)),
}
SHAPES = {"table": (11, 8), "mid": (8, 8), "head": (8, 7)}


def tree_of(**shapes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


def roles_of(fn, tree, *args):
    return {row.path: set(row.roles) for row in flora.coverage(fn, tree, *args).rows}


@pytest.mark.parametrize("name", ONE_HOT)
def test_a_table_that_is_read_by_one_hot_is_an_embedding(name):
    def fn(p, ids):
        return after(p, ONE_HOT[name](ids) @ p["table"])

    assert roles_of(fn, tree_of(**SHAPES), IDS) == LAST | {"table": {"embedding"}}
    report = flora.coverage(fn, tree_of(**SHAPES), IDS)
    assert report.all_linear.paths == ("mid",)
    assert report.all_but_head.paths == ("mid", "table")


# Numbers that are computed from integers, or beside zeros and ones.
NO_LOOKUP = {
    "pixels": (lambda x: x.astype(jnp.float32) / 255, jnp.uint8),
    "bits": (lambda x: x.astype(jnp.float32), jnp.bool_),
    "sinusoids": (lambda x: jnp.sin(x[..., :1] * jnp.arange(11.0)), jnp.int32),
    "a one-hot action beside observations": (
        lambda x: jnp.concatenate(
            [x[..., :7], jax.nn.one_hot(jnp.argmax(x, -1), 4)], -1
        ),
        jnp.float32,
    ),
}


@pytest.mark.parametrize("name", NO_LOOKUP)
def test_what_is_multiplied_by_other_numbers_is_none(name):
    features, dtype = NO_LOOKUP[name]
    x = jax.ShapeDtypeStruct((2, 5, 11), dtype)
    found = roles_of(
        lambda p, x: after(p, features(x) @ p["table"]), tree_of(**SHAPES), x
    )
    assert found == LAST | {"table": {"linear"}}


def test_tied_embeddings_by_one_hot():
    def fn(p, ids):
        x = jnp.tanh(jax.nn.one_hot(ids, 11) @ p["table"] @ p["mid"])
        return jnp.einsum("bsd,vd->bsv", x, p["table"])

    report = flora.coverage(fn, tree_of(table=(11, 8), mid=(8, 8)), IDS)
    assert report["table"].roles == ("linear", "embedding", "head")
    assert report.all_linear.paths == ("mid",)
    then = flora.coverage(
        lambda p, ids: jnp.tanh(fn(p, ids)) @ p["out"],
        tree_of(table=(11, 8), mid=(8, 8), out=(11, 3)),
        IDS,
    )
    assert then["table"].roles == ("linear", "embedding")
    assert then.all_linear.paths == ("mid",)  # although it is no head


def test_learned_tokens_are_no_linear_layer():
    """Latents of a perceiver, the probe of a pooling head."""

    def fn(p, x):
        latents = jnp.broadcast_to(p["latents"], (2, 3, 8))
        scores = latents @ p["q"] @ (x @ p["k"]).swapaxes(1, 2)
        return jax.nn.softmax(scores) @ (x @ p["v"]) @ p["o"]

    kernels = dict.fromkeys("qkv", (8, 4)) | {"o": (4, 8)}
    report = flora.coverage(fn, tree_of(latents=(3, 8), **kernels), SEQ)
    assert report["latents"].roles == ("embedding",)
    assert report.attention.paths == ("k", "o", "q", "v")


def depthwise(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=8,
    )  # fmt: skip


@pytest.mark.parametrize("times", [1, 2])
def test_depthwise_kernels_are_no_attention(times):
    """As in Primer, CvT or a convolution before a state space."""

    def fn(p, x):
        q, k, v = (depthwise(x @ p[n], p[f"dw_{n}"]) for n in "qkv")
        y = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
        return depthwise(y @ p["o"], p["dw_out"]) @ p["head"]

    kernels = dict.fromkeys("qkv", (8, 8)) | {"o": (8 * times, 8), "head": (8, 3)}
    convs = dict.fromkeys([f"dw_{n}" for n in "qkv"], (3, 1, 8 * times))
    report = flora.coverage(fn, tree_of(**kernels, **convs, dw_out=(3, 1, 8)), SEQ)
    assert report.attention.paths == ("k", "o", "q", "v")
    assert report.select("conv").paths == ("dw_k", "dw_out", "dw_q", "dw_v")
    assert all(report[p].roles == ("conv",) for p in report.select("conv").paths)
    assert report["head"].roles == ("linear", "head")


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def layer(p, x):
    y = norm(x, p["scale"], p["bias"])
    q, k, v = (jnp.einsum("bsd,dhk->bshk", y, p[n]) + p[f"b_{n}"] for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
    x = x + jnp.einsum("bhqs,bshk->bqhk", a, v).reshape(x.shape) @ p["o"]
    return x + jax.nn.gelu(x @ p["up"] + p["b_up"]) @ p["down"]


LAYER = {
    **dict.fromkeys("qkv", (8, 2, 4)), **dict.fromkeys(["b_q", "b_k", "b_v"], (2, 4)),
    "o": (8, 8), "up": (8, 16), "b_up": (16,), "down": (16, 8), "scale": (8,),
    "bias": (8,),
}  # fmt: skip


def of_layer(p, i):
    return {k: x[i] for k, x in p["layers"].items()}


def unrolled(p, x):
    for i in range(3):
        x = layer(of_layer(p, i), x)
    return x @ p["head"]


STACKS = {
    "scan": lambda p, x: lax.scan(
        lambda x, p: (layer(p, x), None), x, p["layers"])[0] @ p["head"],
    "remat": lambda p, x: lax.scan(
        jax.checkpoint(lambda x, p: (layer(p, x), None)), x, p["layers"])[0]
        @ p["head"],
    "scan over indices": lambda p, x: lax.scan(
        lambda x, i: (layer(of_layer(p, i), x), None), x, jnp.arange(3))[0]
        @ p["head"],
    "fori_loop": lambda p, x: lax.fori_loop(
        0, 3, lambda i, x: layer(of_layer(p, i), x), x) @ p["head"],
    "unrolled": unrolled,
    "vmap": lambda p, x: jax.vmap(layer, (0, None))(p["layers"], x).sum(0)
        @ p["head"],
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_norms_and_biases_of_a_stack_are_vectors(name):
    layers = tree_of(**{k: (3, *s) for k, s in LAYER.items()})
    tree = {"layers": layers, "head": jax.ShapeDtypeStruct((8, 7), jnp.float32)}
    report = flora.coverage(STACKS[name], tree, SEQ)
    vectors = {f"layers/{n}" for n in ("scale", "bias", "b_q", "b_k", "b_v", "b_up")}
    assert {*report.with_status("vector")} == vectors
    assert {*report.attention.paths} == {f"layers/{n}" for n in "qkvo"}
    linear = {f"layers/{n}" for n in ("q", "k", "v", "o", "up", "down")}
    assert {*report.all_linear.paths} == linear
    assert report.select("head").paths == ("head",)


def test_biases_of_experts_that_are_looked_up_are_vectors():
    def fn(p, x):
        expert = jnp.argmax(x @ p["router"], -1)
        y = jnp.einsum("bsd,bsdf->bsf", x, p["up"][expert]) + p["bias"][expert]
        y = jnp.einsum("bsf,bsfd->bsd", y, p["down"][expert])
        return (y + p["table"][jnp.argmax(x, -1)]) @ p["head"]

    shapes = {
        "router": (8, 4), "up": (4, 8, 6), "bias": (4, 6), "down": (4, 6, 8),
        "table": (8, 8), "head": (8, 7),
    }  # fmt: skip
    report = flora.coverage(fn, tree_of(**shapes), SEQ)
    assert report.with_status("vector") == ["bias"]
    assert report["table"].roles == ("embedding",)
    assert report.all_linear.paths == ("down", "router", "up")


def test_vectors_are_met_element_by_element():
    def fn(p, x):
        x = norm(x, p["of_all"], p["unit"]) + p["positions"]
        return x @ jnp.tanh(p["gate"]) @ (p["kernel"] * p["mask"])

    shapes = {
        "of_all": (5, 8), "unit": (1, 1, 8), "positions": (1, 5, 8), "gate": (8, 8),
        "kernel": (8, 3), "mask": (8, 3),
    }  # fmt: skip
    report = flora.coverage(fn, tree_of(**shapes), SEQ)
    assert report.with_status("vector") == ["of_all", "positions", "unit"]
    assert report.with_status("dense") == ["gate", "kernel", "mask"]


def test_weights_of_few_bits_are_listed_and_play_their_part():
    def opened(w):
        return w["q"].astype(jnp.float32) * w["scale"]

    def fn(p, x):
        q, k, v = (x @ opened(p[n]) for n in "qkv")
        y = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ p["o"]
        low = (p["packed"] & 15).astype(jnp.int8) - 8
        return jnp.tanh(y @ low.astype(jnp.float32)) @ opened(p["head"])

    def stored(*shape, dtype=jnp.int8):
        scale = jax.ShapeDtypeStruct((1, shape[1]), jnp.float32)
        return {"q": jax.ShapeDtypeStruct(shape, dtype), "scale": scale}

    tree = {
        **{n: stored(8, 8) for n in "qkv"}, "head": stored(8, 7, dtype=jnp.int4),
        "o": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "packed": jax.ShapeDtypeStruct((8, 8), jnp.uint8),
        "words": jax.ShapeDtypeStruct((2, 8), jnp.int32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }  # fmt: skip
    report = flora.coverage(fn, tree, SEQ)
    stored_paths = [f"{n}/q" for n in ("head", "k", "q", "v")]
    assert {*report.with_status("integer")} == {*stored_paths, "packed", "words"}
    assert report["q/q"].layout == flora.Layout((), (0,), (1,))
    assert report["head/q"].dtype == "int4"
    assert report["packed"].uses[0].primitive == "and"
    assert {*report.with_status("vector")} == {
        f"{n}/scale" for n in ("head", "k", "q", "v")
    }
    # Weights that carry no factors come before and after others all the same.
    assert report["o"].roles == ("linear", "attention")
    assert report.all_linear.paths == ("o",)
    text = str(report)
    assert "1 factored, 0 dense, 0 unused, 4 vector, 6 integer" in text
    assert "factors need a floating weight, and this one is int8" in text


def test_weights_of_few_bits_as_flora_stores_them():

    p = {n: array(8, 8, dtype=jnp.float32) for n in ("q", "k", "v", "o")}

    def fn(p, x):
        scores = jax.nn.softmax(x @ p["q"] @ (x @ p["k"]).swapaxes(1, 2))
        return scores @ (x @ p["v"]) @ p["o"]

    stored = flora.quantize.quantize(p, "int8", target="*", block=8)
    for tree in (p, stored):
        report = flora.coverage(fn, tree, SEQ)
        assert report.attention.paths == ("k", "o", "q", "v")
        assert report.with_status("factored") == ["k", "o", "q", "v"]
