"""W = C ⊙ s: outputs and gradients are those over W; nothing of its shape is made."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora
from flora._algebra.axes import Named, from_weight
from flora._algebra.codes import Stored, stored
from flora.quantize import Quantized, dequantize, quantize
from tests.support.contract import (
    P,
    adapt,
    array,
    close,
    equations,
    is_weight,
    randomized,
    scalar,
)

IDS = jnp.array([[3, 1], [0, 5]])


def layers(p, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(step, x, p["s"])[0]


def heads(p, x):
    h = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, p["q"]))
    return jnp.einsum("bhd,hdo->bo", h, p["o"])


def turned(p, x):
    h = jnp.tanh(x @ p["w"].T.reshape(8, 2, 3)[:, ::-1].reshape(8, 6))
    return jnp.concatenate([h @ part for part in jnp.split(p["w"], 2, 1)])


def convolved(p, x):
    dims = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x[:, None], p["k"], (1,), "SAME",
                                 dimension_numbers=dims)  # fmt: skip
    return jnp.tanh(y)


MODELS = {
    "product": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], {"w": (8, 6), "v": (6, 4)}),
    "heads": (heads, {"q": (8, 2, 4), "o": (2, 4, 6)}),
    "scan of remat": (layers, {"s": (3, 8, 8)}),
    "tied": (
        lambda p, x: jnp.tanh(jnp.take(p["t"], IDS, axis=0)) @ p["t"].T,
        {"t": (6, 8)},
    ),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": (5, 8)}),
    "turned, reversed, split": (turned, {"w": (6, 8)}),
    "convolution": (convolved, {"k": (3, 8, 4)}),
    "experts": (
        lambda p, x: jnp.tanh(lax.ragged_dot(x, p["e"], jnp.array([1, 3, 0]))),
        {"e": (3, 8, 5)},
    ),
    "one x": (lambda p, x: jnp.tanh(x @ p["g"]) * (x @ p["u"]),
              {"g": (8, 4), "u": (8, 4)}),
    "of a stack": (lambda p, x: jnp.tanh(x @ p["s"][1]) @ p["s"][0], {"s": (3, 8, 8)}),
    "rows of a stack": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["s"][jnp.array([0, 2, 1, 1])]),
        {"s": (3, 8, 8)},
    ),
}  # fmt: skip


def case(name, qtype="int8", dtype=jnp.float64, **config):
    """The model, its tree on stored bases, and the same on dequantized ones."""
    fn, shapes = MODELS[name]
    params = {k: array(*s, seed=i, dtype=dtype) for i, (k, s) in
              enumerate(shapes.items())}  # fmt: skip
    x = array(4, 8, seed=9, dtype=dtype)
    adapted = randomized(adapt(fn, params, x, dtype=dtype, **config))
    stored = quantize(adapted, qtype, target="*")
    return fn, stored, dequantize(stored), x


def step(fn, form=None):
    def run(tree, x):
        base, adapter = flora.split(tree)

        def loss(adapter, x):
            out = flora.lora(fn, form=form)(flora.join(base, adapter), x)
            return scalar(out), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(adapter, x)

    return run


@pytest.mark.parametrize("form", ["direct", "thin_first", "concat"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_over_the_dequantized_base(x64, name, form):
    fn, stored, dense, x = case(name, form=form)
    close(jax.jit(step(fn))(stored, x), jax.jit(step(fn))(dense, x))


@pytest.mark.parametrize("form", ["thin_last", "merged"])
@pytest.mark.parametrize("qtype", ["int4", "float8_e4m3fn", "float8_e5m2"])
def test_in_other_types(x64, qtype, form):
    fn, stored, dense, x = case("one x", qtype, form=form)
    close(jax.jit(step(fn))(stored, x), jax.jit(step(fn))(dense, x))


@pytest.mark.parametrize("name", MODELS)
def test_with_scaled_outputs_and_without_factors(x64, name):
    fn, stored, dense, x = case(name, variant=flora.variants.DoRA())
    close(jax.jit(step(fn))(stored, x), jax.jit(step(fn))(dense, x))
    bare, plain = (
        jax.tree.map(lambda w: w.base, tree, is_leaf=is_weight)
        for tree in (stored, dense)
    )

    def slope(run):
        return jax.jit(jax.value_and_grad(lambda p, x: scalar(run(p, x)), 1))

    close(slope(flora.lora(fn))(bare, x), slope(fn)(plain, x))


def made(jaxpr, shapes):
    """Operations that make a floating array as large as a weight."""
    sizes = {math.prod(s) for s in shapes}
    return [
        e.primitive
        for e in equations(jaxpr)
        for v in e.outvars
        if getattr(v.aval, "size", 0) in sizes
        and len(v.aval.shape) > 1
        and jnp.issubdtype(v.aval.dtype, jnp.floating)
    ]


@pytest.mark.parametrize("form", ["direct", "thin_last"])
@pytest.mark.parametrize("name", ["product", "heads", "transposed", "experts", "one x"])
def test_a_cast_is_all_that_is_made_of_the_codes(name, form):
    fn, shapes = MODELS[name]
    wide = {k: (*s[:-2], 5 * s[-2], 7 * s[-1]) for k, s in shapes.items()}
    if name == "heads":
        wide = {"q": (40, 2, 28), "o": (2, 28, 42)}
    if name == "product":
        wide = {"w": (40, 42), "v": (42, 28)}
    params = {k: array(*s, seed=i, dtype=jnp.float32) for i, (k, s) in
              enumerate(wide.items())}  # fmt: skip
    x = array(4, 56 if name == "transposed" else 40, dtype=jnp.float32)
    tree = quantize(adapt(fn, params, x, form=form), "int8", target="*")

    def whole(tree, x):
        (_, _), (grads, dx) = step(fn)(tree, x)
        return jax.tree.leaves(grads), dx

    found = made(jax.make_jaxpr(whole)(tree, x), wide.values())
    moved = {P.convert_element_type, P.transpose, P.reshape, P.jit, P.remat}
    assert P.convert_element_type in found
    assert {*found} <= moved, found


def test_what_is_kept_for_the_backward_pass_is_the_codes(x64):
    for form in ("direct", "thin_last"):
        fn, stored, _, x = case("product", form=form)
        base, adapter = flora.split(stored)

        def apply(a, x, fn=fn, base=base):
            return flora.lora(fn)(flora.join(base, a), x)

        _, pull = jax.vjp(apply, adapter, x)
        kept = [y for y in jax.tree.leaves(pull) if hasattr(y, "dtype")]
        of_w = [y.dtype for y in kept if y.shape in ((8, 6), (6, 4))]
        assert of_w.count(jnp.int8) >= 2
        assert {*of_w} == {jnp.dtype("int8")}


def test_a_scale_that_varies_along_in_is_right_too(x64):
    fn, shapes = MODELS["heads"]
    params = {k: array(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}
    stored = quantize(params, "int8", target="*")  # taken for [stack, in, out]
    assert stored["q"].values.scale.shape == (8, 1, 4)
    x = array(4, 8, seed=9)
    tree = randomized(adapt(fn, stored, x, dtype=jnp.float64))
    close(jax.jit(step(fn))(tree, x), jax.jit(step(fn))(dequantize(tree), x))


def test_rows_out_of_bounds_are_nan_as_of_a_dense_table():
    fn = lambda p, x: jnp.take(p["t"], jnp.array([1, 99]), axis=0)  # noqa: E731
    params = {"t": array(6, 8, dtype=jnp.float32)}
    tree = quantize(adapt(fn, params, jnp.ones(1)), "int8", target="*")
    got = flora.lora(fn)(tree, jnp.ones(1))
    want = fn(dequantize(flora.merge(tree)), None)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isnan(got[1]).all()


def test_float16_cannot_hold_sums_of_codes():
    w = {"kernel": 1e-3 * array(512, 8, dtype=jnp.float32)}
    x = jnp.ones((2, 512), jnp.float16)
    fn = lambda p, x: x @ p["kernel"].astype(x.dtype)  # noqa: E731
    stored = quantize(adapt(fn, w, x), "float8_e5m2")
    got = flora.lora(fn)(stored, x)
    assert got.dtype == jnp.float16
    assert np.isfinite(np.asarray(got)).all()


def test_transformations(x64):
    fn, stored, dense, x = case("product")
    run, two = flora.lora(fn), jnp.stack([x, 2 * x])
    close(jax.vmap(run, (None, 0))(stored, two), jax.vmap(run, (None, 0))(dense, two))
    base, adapter = flora.split(stored)
    several = jax.tree.map(lambda y: jnp.stack([y, 2 * y]), adapter)
    each = jax.vmap(lambda a, base: run(flora.join(base, a), x), (0, None))
    close(each(several, base), each(several, flora.split(dense)[0]))
    moved = [jax.jvp(lambda x, t=t: run(t, x), (x,), (x,))[1] for t in (stored, dense)]
    close(*moved)


def test_a_scale_an_output_for_each_index_of_a_stack():
    w = array(3, 16, 4, dtype=jnp.float32)
    fn = lambda p, x: lax.scan(lambda x, w: ((x @ w) @ w.T, None), x, p["s"])[0]  # noqa: E731
    tree = adapt(fn, {"s": w}, jnp.ones((2, 16)))
    base = quantize(tree, "int8", target="*")["s"].base
    assert isinstance(base, Quantized)
    assert base.values.scale.shape == (3, 1, 4)
    largest = np.abs(w).max(1, keepdims=True)
    np.testing.assert_allclose(base.values.scale, largest / 127.5, rtol=1e-6)
    assert float(abs(base.dense() - w).max()) <= float(largest.max()) / 255 * 1.01


def test_a_cast_weight_has_its_dtype_and_its_values():
    fn = lambda p, x: x @ p["kernel"].astype(jnp.bfloat16)  # noqa: E731
    x = array(4, 64, dtype=jnp.bfloat16)
    for block in (None, 16):
        tree = adapt(fn, {"kernel": array(64, 8, dtype=jnp.float32)}, x)
        tree = randomized(quantize(tree, "int8", block=block))
        got = flora.lora(fn)(tree, x)
        plain = dataclasses.replace(tree["kernel"], base=tree["kernel"].base.dense())
        want = flora.lora(fn)({"kernel": plain}, x)
        assert got.dtype == want.dtype == jnp.bfloat16
        close(got.astype(jnp.float32), want.astype(jnp.float32), 2e-2)


def operand(block=None):
    """A weight `[8, 12]` as a product takes it, and its array."""
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    tree = quantize({"w": array(8, 12)}, "int8", target="*", block=block)
    tree = adapt(fn, tree, array(3, 8), dtype=jnp.float64)
    w = stored(from_weight(tree["w"], "w"), ("t", "0"), ("t", "1"))
    return w, tree["w"].base.dense()


@pytest.mark.parametrize("block", [None, 4])
def test_a_stored_operand_is_split_as_an_array_is(x64, block):
    w, dense = operand(block)
    assert isinstance(w, Stored)
    assert (w.scale is None) == (block is not None)
    close(w.dense(), Named(dense, ("0", "1")))
    pieces = {"0": [("h", 2), ("i", 4)], "1": [("a", 3), ("b", 4)], "other": [("z", 1)]}
    for some in ({}, {"0": pieces["0"]}, {"1": pieces["1"]}, pieces):
        new, want = w.split(some), Named(dense, w.names).split(some)
        assert new.base is w.base  # the codes stay as they are stored
        assert (new.names, new.sizes) == (want.names, want.array.shape)
        close(new.dense(), want)
        assert new.opened().names == want.names
        if w.scale is not None:
            assert new.scale.names == (("a", "b") if "1" in some else ("1",))


LARGE = {
    "product": (lambda p, x: x @ p["w"], {"w": (1024, 1024)}),
    "one x": (lambda p, x: jnp.tanh(x @ p["g"]) * (x @ p["u"]),
              {"g": (1024, 1024), "u": (1024, 1024)}),
    "scanned": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["s"])[0],
        {"s": (2, 1024, 1024)},
    ),
}  # fmt: skip


def in_float32(fn, shapes, tokens, **how):
    """A tree on a stored base, the same on the dequantized one, and activations."""
    params = {
        k: array(*s, seed=i, dtype=jnp.float32) / s[-2] ** 0.5
        for i, (k, s) in enumerate(shapes.items())
    }
    x = array(tokens, shapes[next(iter(shapes))][-2], seed=9, dtype=jnp.float32)
    tree = randomized(adapt(fn, params, x), size=0.03)
    tree = quantize(tree, "int8", target="*", **how)
    return tree, dequantize(tree), x


@pytest.mark.parametrize("block", [None, 8])
def test_the_kernel_off_tpus(block):
    fn, shapes = MODELS["product"][0], {"w": (16, 24), "v": (24, 8)}
    tree, dense, x = in_float32(fn, shapes, 40, block=block)
    run = step(fn, "kernel")
    found = [e.primitive.name for e in equations(jax.make_jaxpr(run)(tree, x))]
    assert "pallas_call" in found
    close(jax.jit(run)(tree, x), jax.jit(step(fn))(dense, x))


@pytest.mark.parametrize("block", [None, 256])
@pytest.mark.parametrize("name", LARGE)
def test_large_products_whose_platform_is_open(name, block):
    fn, shapes = LARGE[name]
    tree, dense, x = in_float32(fn, shapes, 1024, block=block)
    run = step(fn, "auto")
    found = [e.primitive.name for e in equations(jax.make_jaxpr(run)(tree, x))]
    assert "platform_index" in found
    got, want = jax.jit(run)(tree, x), jax.jit(step(fn, "direct"))(dense, x)
    close(got[0][1], want[0][1])
    close((got[0][0], got[1]), (want[0][0], want[1]), 1e-4)


@pytest.mark.parametrize("block", [None, 256])
def test_an_open_platform_keeps_nothing_dense(block):
    fn, shapes = LARGE["one x"]
    tree, _, x = in_float32(fn, shapes, 1100, block=block)
    base, adapter = flora.split(tree)

    def apply(a, x):
        return flora.lora(fn)(flora.join(base, a), x)

    kept = jax.tree.leaves(jax.eval_shape(lambda a, x: jax.vjp(apply, a, x)[1],
                                          adapter, x))  # fmt: skip
    of_w = [y.dtype for y in kept if y.shape == (1024, 1024)]
    assert {*of_w} <= {jnp.dtype("int8")}
    assert any(y.shape == (1100, 1024) for y in kept)


@pytest.mark.parametrize(("block", "fences"), [(None, []), (4, [(8, 12)])])
def test_blocks_are_opened_in_the_weights_own_shape(x64, block, fences):
    w, _ = operand(block)
    heads = w.split({"1": (("h", 3), ("d", 4))})

    def fenced(x):
        each = equations(jax.make_jaxpr(Stored.opened)(x))
        barriers = [e for e in each if e.primitive.name == "optimization_barrier"]
        return [e.outvars[0].aval.shape for e in barriers]

    assert (fenced(w), fenced(heads)) == ([], fences)


@pytest.mark.parametrize("form", ["direct", "thin_last", "concat", "merged"])
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_in_a_loop_blocks_are_opened_out_of_the_stack(x64, qtype, form):
    """A fence around the slice that a step takes would have it written to memory.

    Longer operands and copies of W are written in any case, and W with them.
    """
    params = {k: array(2, 8, 8, seed=i) for i, k in enumerate("gud")}

    def fn(p, x):
        def layer(x, p):
            hidden = jnp.tanh(x @ p["g"]) * (x @ p["u"])
            return jnp.tanh(x + hidden @ p["d"]), None

        return lax.scan(jax.checkpoint(layer), x, p)[0]

    x = array(5, 8, seed=9)
    tree = randomized(adapt(fn, params, x, dtype=jnp.float64, form=form))
    stored = quantize(tree, qtype, target="*", block=4)
    close(jax.jit(step(fn))(stored, x), jax.jit(step(fn))(dequantize(stored), x))

    def of_codes(fn, *args):
        each = equations(jax.make_jaxpr(fn)(*args))
        fenced = [e for e in each if e.primitive is P.optimization_barrier]
        found = [v.aval for e in fenced for v in e.outvars]
        return any(v.shape == (8, 8) and v.dtype.itemsize < 2 for v in found)

    assert of_codes(step(fn), stored, x) == (form in ("concat", "merged"))
    one = jax.tree.map(lambda y: y[0], params)
    whole = adapt(lambda p, x: x @ p["g"], {"g": one["g"]}, x, form=form)
    whole = quantize(whole, qtype, target="*", block=4)
    expected = form != "direct"
    assert of_codes(step(lambda p, x: x @ p["g"]), whole, x) == expected
