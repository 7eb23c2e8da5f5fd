"""Bases in fewer bits: the model of the dequantized weights, nothing dense kept."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix.pallas
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
import flora.quantize
import flora.sharding
from flora._files.fingerprint import fingerprint
from flora.quantize import QTYPES, dequantize, quantize
from tests.support.contract import (
    adapt,
    array,
    close,
    is_weight,
    randomized,
    scalar,
    weights,
)
from tests.support.registry import dense, heads, scanned


def rematted(p, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None))
    return jax.lax.scan(step, x, p["stack"])[0]


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)


def tied(p, x):
    ids = jnp.argmax(x[:, :6], -1)
    return jnp.tanh(p["table"][ids]) @ p["table"].T


def convolved(p, x):
    y = jax.lax.conv_general_dilated(
        x[:, None, :], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(y)


def branched(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: jnp.tanh(x @ p["w"]))


def jitted(p, x):
    return jax.jit(dense)(p, x)


def same_x(p, x):
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"])


def of_two(p, x):
    return x @ p["w"] + x @ (p["w"] * 2)


MODELS = {
    "dense": (dense, {"w": (8, 4), "v": (6, 4)}),
    "heads": (heads, {"q": (8, 2, 4), "o": (2, 4, 6)}),
    "scan": (scanned, {"stack": (3, 8, 8)}),
    "scan of remat": (rematted, {"stack": (3, 8, 8)}),
    "loop": (looped, {"w": (8, 8)}),
    "tied embedding": (tied, {"table": (6, 8)}),
    "convolution": (convolved, {"k": (3, 8, 4)}),
    "branches": (branched, {"w": (8, 4)}),
    "inner jit": (jitted, {"w": (8, 4), "v": (6, 4)}),
    "one x": (same_x, {"gate": (8, 4), "up": (8, 4)}),
    "one weight changed": (of_two, {"w": (8, 4)}),
}


def case(name, qtype="int8", **config):
    """The model, its tree on a quantized base, and the same on the dequantized base."""
    fn, shapes = MODELS[name]
    params = {k: array(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    x = array(4, 8, seed=9)
    quantized = quantize(params, qtype, target="*", block=2)
    adapted = randomized(adapt(fn, quantized, x, dtype=jnp.float64, **config))
    assert all(isinstance(w.base, flora.quantize.Quantized) for w in weights(adapted))
    return fn, adapted, dequantize(adapted), x


def step(fn):
    def run(tree, x):
        base, adapter = flora.split(tree)

        def loss(adapter, x):
            out = flora.lora(fn)(flora.join(base, adapter), x)
            return scalar(out), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(adapter, x)

    return run


def few_and_all(qtypes=("int8", "nf4"), names=("dense", "scan of remat", "one x")):
    """Some pairs of model and type, with every model and every type; all if slow."""
    for name in MODELS:
        for qtype in QTYPES:
            few = qtype in qtypes or name in names
            yield pytest.param(name, qtype, marks=[] if few else pytest.mark.slow)


@pytest.mark.parametrize(("name", "qtype"), list(few_and_all()))
def test_the_gradients_are_those_over_the_dequantized_base(x64, name, qtype):
    fn, adapted, dequantized, x = case(name, qtype)
    run = jax.jit(step(fn))

    @jax.jit
    def of_dense(tree, x):
        return step(fn)(tree, x), fn(flora.merge(tree), x)

    got = run(adapted, x)
    close(got, of_dense(dequantized, x)[0])
    assert float(optax.tree.norm(got[1][0])) > 0
    zero, plain = (
        jax.tree.map(
            lambda w: dataclasses.replace(w, b=0 * w.b), tree, is_leaf=is_weight
        )
        for tree in (adapted, dequantized)
    )
    (_, out), _ = run(zero, x)
    close(out, of_dense(plain, x)[1], 1e-14)


@pytest.mark.parametrize("form", ["thin_last", "concat", "merged"])
@pytest.mark.parametrize("name", ["dense", "heads", "scan", "one x"])
def test_in_other_forms(x64, name, form):
    fn, adapted, dequantized, x = case(name, form=form)
    close(jax.jit(step(fn))(adapted, x), jax.jit(step(fn))(dequantized, x))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_dense_is_kept_for_the_backward_pass(x64, name):
    for form in ("direct", "concat"):
        fn, adapted, dequantized, x = case(name, form=form)
        base, adapter = flora.split(adapted)

        def apply(a, x, fn=fn, base=base):
            return flora.lora(fn)(flora.join(base, a), x)

        _, pull = jax.vjp(apply, adapter, x)
        held = [y for y in jax.tree.leaves(pull) if hasattr(y, "dtype")]
        dense = [np.sort(np.ravel(w.base)) for w in weights(dequantized)]
        dense += [np.sort(np.ravel(w.base[0])) for w in weights(dequantized)]
        for y in held:
            values = np.sort(np.ravel(np.asarray(y, np.float64)))
            assert not any(np.array_equal(values, w) for w in dense), y.shape


def test_transformations(x64):
    fn, adapted, dequantized, x = case("dense")
    two = jnp.stack([x, 2 * x])
    run = flora.lora(fn)
    batched = jax.vmap(run, (None, 0))
    close(batched(adapted, two), batched(dequantized, two))
    close(jax.checkpoint(run)(adapted, x), run(dequantized, x))
    both = [
        jax.jvp(lambda x, t=t: run(t, x), (x,), (x,))[1] for t in (adapted, dequantized)
    ]
    close(*both)
    plain = flora.merge(adapted)
    close(fn(plain, x), flora.lora(fn)(adapted, x))


def test_weights_that_are_stored_but_not_adapted():
    fn = dense
    params = {"w": array(8, 4, dtype=jnp.float32), "v": array(6, 4, dtype=jnp.float32)}
    quantized = quantize(params, "int8", target="*", block=2)
    x = array(4, 8, dtype=jnp.float32)
    close(flora.lora(fn)(quantized, x), fn(dequantize(quantized), x), 1e-6)
    tree = randomized(adapt(fn, quantized, x, target="w"))
    close(flora.lora(fn)(tree, x), fn(dequantize(flora.merge(tree)), x))
    base, adapter = flora.split(tree)
    assert isinstance(base["v"], flora.quantize.Quantized)
    close(flora.join(base, adapter), tree, 0)


class Model(nn.Module):
    """A Linen model, compiled as a whole-tree step with an optimizer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(16)(x)))


def test_a_linen_model_trains_on_a_stored_base():
    x, y = array(32, 8, dtype=jnp.float32), array(32, 8, seed=1, dtype=jnp.float32)
    quantized = quantize(Model().init(jax.random.key(0), x), "nf4", block=4)
    adapted = adapt(Model().apply, quantized, x, target="kernel", rank=4)
    tx = flora.optimizer(optax.adam(3e-2), adapted)
    apply = flora.lora(Model().apply)

    @jax.jit
    def train(tree, state):
        loss = lambda t: jnp.mean((apply(t, x) - y) ** 2)  # noqa: E731
        value, grads = flora.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    tree, state, losses = adapted, tx.init(adapted), []
    for _ in range(30):
        tree, state, value = train(tree, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    for one, other in zip(weights(tree), weights(adapted), strict=True):
        assert all(map(np.array_equal, *map(jax.tree.leaves, (one.base, other.base))))
    assert "uint4" in repr(adapted["params"]["Dense_0"]["kernel"].base)


def test_a_sharded_tree_is_quantized_where_it_lies():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    place = NamedSharding(mesh, Spec("fsdp", "tp"))
    w = jax.device_put(array(64, 8, dtype=jnp.float32), place)
    whole = quantize({"kernel": np.asarray(w) + jnp.zeros_like(w)}, "int8", block=4)
    quantized = quantize({"kernel": w}, "int8", block=4, donate=True)
    assert w.is_deleted()
    for part in jax.tree.leaves(quantized):
        assert part.sharding.is_equivalent_to(place, 2)
    close(quantized, whole, 0)
    tree = adapt(lambda p, x: x @ p["kernel"], quantized, jnp.ones((2, 64)))
    assert tree["kernel"].a.sharding.spec[0] == "fsdp"
    places = flora.sharding.shardings(tree)
    close(jax.device_put(tree, places), tree, 0)
    wide = flora.sharding.shardings(tree, {"kernel": Spec(("fsdp", "tp"))}, mesh=mesh)
    close(jax.device_put(tree, wide), tree, 0)
    make = flora.quantize._maker("int8", 4, jnp.dtype("float32"), (0,))
    dense = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=place)
    text = make.lower(dense).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text


def test_one_array_in_two_places_is_donated_once():
    w = array(64, 8, dtype=jnp.float32)
    whole = quantize({"kernel": w}, "int8")["kernel"]
    quantized = quantize({"a": {"kernel": w}, "b": {"kernel": w}}, "int8", donate=True)
    assert w.is_deleted()
    close(quantized, {"a": {"kernel": whole}, "b": {"kernel": whole}}, 0)


def test_an_array_that_two_layouts_read_is_donated_after_both():
    w = array(4, 2, 6, dtype=jnp.float32)
    adapted = adapt(lambda p, x: jnp.einsum("bih,iho->bo", x, p["q"]), {"q": w},
                    array(3, 4, 2, dtype=jnp.float32), target="q")  # fmt: skip
    tree = {"a": adapted["q"], "b": w}
    stored = quantize(tree, "int8", target="*", donate=True)
    assert w.is_deleted()
    assert stored["a"].base.values.scale.shape == (1, 1, 6)
    assert stored["b"].values.scale.shape == (4, 1, 6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4)])
def test_what_is_empty_stays_empty(shape):
    stored = quantize({"kernel": jnp.ones(shape)}, "int8")
    assert dequantize(stored)["kernel"].shape == shape


def test_scales_are_not_rounded_to_zero():
    w = 1e-4 * array(64, 4, dtype=jnp.float32)
    stored = quantize({"kernel": w.astype(jnp.float16)}, "float8_e5m2")
    assert stored["kernel"].values.scale.all()


def test_inside_jit():
    params = {"kernel": array(64, 8, dtype=jnp.float32)}
    make = lambda p: quantize(p, "int8", donate=True)  # noqa: E731
    close(jax.jit(make)(params), quantize(params, "int8"), 0)


def test_shapes_say_where_they_lie_as_arrays_do():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    place = NamedSharding(mesh, Spec("fsdp", "tp"))
    w = jax.device_put(array(64, 8, dtype=jnp.float32), place)
    made = jax.tree.leaves(quantize({"kernel": w}, "int8"))
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place)
    planned = jax.tree.leaves(quantize({"kernel": shape}, "int8"))
    for x, y in zip(made, planned, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("qtype", QTYPES)
def test_what_is_stored_lies_as_its_weight_in_runs_and_in_plans(qtype):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    x, fn = jnp.ones((2, 16)), lambda p, x: x @ p["kernel"] @ p["other"]
    params, lies = {}, {}
    for name, spec, shape in (
        ("kernel", Spec(None, ("fsdp", "tp")), (16, 8)),
        ("other", Spec(("fsdp", "tp"), None), (8, 4)),  # two scales for eight parts
    ):
        lies[name] = NamedSharding(mesh, spec)
        params[name] = jax.device_put(array(*shape, dtype=jnp.float32), lies[name])
    shapes = {k: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)
              for k, w in params.items()}  # fmt: skip
    store = lambda p: quantize(p, qtype, target="*", block=2)  # noqa: E731
    run, plan = (adapt(fn, store(p), x, target="*") for p in (params, shapes))
    inside = jax.jit(store)(params)
    for name in params:
        codes, scales = jax.tree.leaves(run[name].base)
        assert codes.sharding.is_equivalent_to(lies[name], 2)
        for y in (codes, scales, run[name].a, run[name].b):
            assert len(y.sharding.device_set) == 8
        for one, other in ((run[name], plan[name]), (run[name].base, inside[name])):
            for y, z in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                assert y.sharding.is_equivalent_to(z.sharding, 2)
    assert run["kernel"].b.sharding.spec[1] == ("fsdp", "tp")
    assert run["other"].base.values.scale.sharding.spec[0] == "fsdp"
    places = jax.tree.leaves(flora.sharding.shardings(plan))
    for y, place in zip(jax.tree.leaves(run), places, strict=True):
        assert y.sharding.is_equivalent_to(place, y.ndim)


def test_loftq_on_a_mesh_inside_jit_and_of_shapes():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    params = {"kernel": array(16, 8, dtype=jnp.float32)}
    fn, x = lambda p, x: x @ p["kernel"], jnp.ones((2, 16))
    place = NamedSharding(mesh, Spec("fsdp", "tp"))
    sharded = adapt(fn, jax.device_put(params, place), x)
    plain, settings = adapt(fn, params, x), {"qtype": "int8", "block": 4, "steps": 2}
    start = lambda tree: flora.quantize.loftq(tree, **settings)  # noqa: E731
    got, want = start(sharded)["kernel"], start(plain)["kernel"]
    for part in ("a", "b"):
        lies, lay = (
            getattr(got, part).sharding,
            getattr(sharded["kernel"], part).sharding,
        )
        assert lies.is_equivalent_to(lay, 2)
    assert got.a.sharding.spec[0] == "fsdp"
    compiled = jax.jit(start)(plain)["kernel"]
    for one in (got, compiled):
        close(one.a @ one.b, want.a @ want.b, 1e-2)  # rounding may flip a code
    shapes = start(adapt(fn, {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}, x))
    assert isinstance(shapes["kernel"].base, flora.quantize.Quantized)
    assert shapes["kernel"].a.shape == (16, 2)


def test_shapes_alone():
    shapes = {"kernel": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16)}
    quantized = quantize(shapes, "nf4")
    tree = adapt(
        lambda p, x: x @ p["kernel"], quantized, jnp.ones((2, 64), jnp.bfloat16)
    )
    assert tree["kernel"].a.shape == (64, 2)
    assert tree["kernel"].base.dtype == jnp.bfloat16


def test_reports_and_trees_that_are_adapted_already(x64):
    params = {"w": array(8, 4, dtype=jnp.float32), "v": array(6, 4, dtype=jnp.float32)}
    x = array(4, 8, dtype=jnp.float32)
    plain = quantize(params, "nf4", target="*", block=2)
    later = quantize(adapt(dense, params, x), "nf4", target="*", block=2)
    close(later, adapt(dense, plain, x), 0)
    report = flora.coverage(dense, plain, x)
    assert {report[path].status for path in params} == {"factored"}
    row = next(row for row in flora.summary(later).rows if row.path == "w")
    assert (row.shape, row.dtype, row.parameters) == ((8, 4), "uint4+float32", 32)
    assert row.bytes == 8 * 4 // 2 + 4 * 4 * 4 + row.trained_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("block", [None, 64])
def test_what_is_opened_is_what_qwix_opens(qtype, dtype, block):
    x = array(3, 128, 16, dtype=dtype)
    w = quantize(x, qtype, target="*", block=block)
    assert w.dtype == w.dense().dtype == dtype
    kind = qtype if qtype == "nf4" else jnp.dtype(qtype)
    theirs = qwix.pallas.quantize(
        x.astype(jnp.float32), kind, channelwise_axes=(0, 2),
        tiled_axes={1: 64} if block or qtype == "nf4" else {}, scale_dtype=dtype,
    )  # fmt: skip
    assert np.array_equal(w.values.qvalue, theirs.qvalue)
    assert np.array_equal(w.dense(), qwix.dequantize(theirs))
    codes = {int(x) for x in np.unique(np.asarray(w.values.qvalue, np.float32))}
    assert qtype != "nf4" or codes == set(range(16))


def test_a_fingerprint_sees_every_part(x64):
    _, adapted, _, _ = case("dense", "nf4")
    base = flora.split(adapted)[0]
    found = fingerprint(base)
    assert set(found) == {f"{k}/{part}" for k in "wv" for part in ("qvalue", "scale")}
    other = fingerprint(jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(3), base))
    assert all(found[k] != other[k] for k in found)


def test_loftq_is_nearer_than_rounding(x64):
    fn, shapes = MODELS["heads"]
    params = {k: array(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    x = array(4, 8, seed=9)
    adapted = adapt(fn, params, x, dtype=jnp.float64)

    def off(tree):
        found = dequantize(flora.merge(tree))
        return sum(float(jnp.sum((found[k] - params[k]) ** 2)) for k in params)

    def left(w, name):
        return np.asarray(params[name] - w.base.dense()).reshape(8, 8)

    once = flora.quantize.loftq(adapted, "int4", block=2, steps=1)
    often = flora.quantize.loftq(adapted, "int4", block=2)
    quantized = quantize(params, "int4", target="*", block=2)
    rounded = off(
        {k: dataclasses.replace(adapted[k], base=quantized[k]) for k in quantized}
    )
    assert off(often) <= off(once) < 0.8 * rounded
    # Eckart and Young: what is left is the tail of the singular values.
    w, rest = once["q"], left(once["q"], "q")
    change = np.asarray(w.scale * jnp.einsum("ir,rhd->ihd", w.a, w.b)).reshape(8, 8)
    tail = np.linalg.svd(rest, compute_uv=False)[w.rank :]
    np.testing.assert_allclose(np.linalg.norm(rest - change), np.linalg.norm(tail))


BAD = {
    "type": (
        {"kernel": jnp.ones((64, 4))}, {"qtype": "int3"}, "qtype='int3'. Write one"),
    "block": ({"kernel": jnp.ones((64, 4))}, {"block": 0}, "block=0"),
    "no target": ({"w": jnp.ones((64, 4))}, {}, "target='kernel' selects none"),
    "does not divide": (
        {"kernel": jnp.ones((60, 4))}, {"block": 64}, r"\(60, 4\); neither of"),
    "integers": ({"kernel": jnp.ones((64, 4), int)}, {}, "only floating arrays"),
    "8 bits": (
        {"kernel": jnp.ones((64, 4), jnp.float8_e5m2)}, {}, r"float8_e5m2\[64,4\]"),
    "vectors": (
        {"kernel": jnp.ones(64)}, {}, r"'kernel' has shape \(64,\); only leaves"),
    "opens to integers": (
        {"kernel": jnp.ones((64, 4))}, {"dtype": "int8"}, "dtype='int8'"),
    "no dtype": ({"kernel": jnp.ones((64, 4))}, {"dtype": "foo"}, "dtype='foo'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_stored_is_refused(name):
    params, settings, message = BAD[name]
    with pytest.raises(flora.LoraError, match=message):
        quantize(params, **{"qtype": "int8"} | settings)


def test_a_stored_weight_cannot_train_or_pass_for_an_array():
    quantized = quantize({"kernel": jnp.ones((64, 4))}, "int8")
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    with pytest.raises(flora.LoraError, match=r"'kernel' is Quantized\(.*cannot train"):
        adapt(fn, quantized, jnp.ones((2, 64)), target=(), train="kernel")
    with pytest.raises(flora.LoraError, match=r"Run the function through flora.lora"):
        fn(quantized, jnp.ones((2, 64)))
