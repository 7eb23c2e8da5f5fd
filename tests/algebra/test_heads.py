"""Products in heads: axes that a reshape beside a product divides are its own."""

import functools

import jax
import jax.numpy as jnp
import pytest

import flora
from flora._algebra.choice import Form
from flora._trace import interpret as _interpreter
from flora._trace.rules import dot
from flora.quantize import dequantize, quantize
from tests.support.contract import (
    adapt,
    array,
    check,
    close,
    close_to_merged_over,
    equations,
    randomized,
    scalar,
)


@pytest.fixture(params=["thin_last", "direct"])
def parts(request, monkeypatch):
    """Every product in heads; what each one's axes are divided into, when it runs."""
    seen, own = [], dot._divided

    def divided(*args):
        seen.append(own(*args))
        return seen[-1]

    for module in (dot, _interpreter):
        monkeypatch.setattr(module, "may_differ", lambda name: name != "direct")
        monkeypatch.setattr(module, "is_large", lambda *shapes: True)
    form = Form(request.param, "thin_last", in_heads=True)
    monkeypatch.setattr(dot, "cheapest", lambda *_: form)
    monkeypatch.setattr(dot, "_divided", divided)
    return seen


def lengths(seen):
    """The lengths alone, of each product that was divided."""
    return {
        tuple(size for _, size in axis)
        for found in seen
        for axis in found.values()
    }  # fmt: skip


def attention(p, x):
    """Two heads of 6 for queries, two of 5 for values; the tokens flattened."""
    flat = x.reshape(-1, 8)
    q, k = (
        (flat @ p[n] + p["bias"]).reshape(*x.shape[:-1], 2, 6) for n in ("q", "k")
    )  # fmt: skip
    v = (flat @ p["v"]).reshape(*x.shape[:-1], 2, 5)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:-1], 10)
    return x + y @ p["o"]


def layers(p, x):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, p):
        return jnp.tanh(attention(p, x)), None

    return jax.lax.scan(layer, x, p)[0]


ATTENTION = {"q": (8, 12), "k": (8, 12), "v": (8, 10), "o": (10, 8), "bias": (12,)}
MODELS = {
    "made": (
        lambda p, x: jnp.tanh((x @ p["w"] + p["bias"]).reshape(2, 7, 3, 4)),
        {"w": (8, 12), "bias": (12,)},
        {(3, 4)},
    ),
    "made by a weight that is transposed": (
        lambda p, x: jnp.tanh((x @ p["w"].T).reshape(2, 7, 3, 4)),
        {"w": (12, 8)},
        {(3, 4)},
    ),
    "made from flattened tokens": (
        lambda p, x: jnp.tanh((x.reshape(14, 8) @ p["w"]).reshape(2, 7, 3, 4)),
        {"w": (8, 12)},
        {(3, 4)},
    ),
    "joined": (
        lambda p, x: jnp.tanh(x.reshape(2, 7, 2, 4)).reshape(2, 7, 8) @ p["w"],
        {"w": (8, 12)},
        {(2, 4)},
    ),
    "both": (
        lambda p, x: (
            jnp.tanh(x.reshape(14, 2, 4)).reshape(14, 8) @ p["w"]
        ).reshape(2, 7, 3, 4),
        {"w": (8, 12)},
        {(2, 4), (3, 4)},
    ),
    "nothing to divide": (
        lambda p, x: (x.reshape(14, 8) @ p["w"]).reshape(2, 84),
        {"w": (8, 12)},
        set(),
    ),
    "attention": (attention, ATTENTION, {(2, 6), (2, 5)}),
    "scan of remat": (
        layers,
        {n: (3, *s) for n, s in ATTENTION.items()},
        {(2, 6), (2, 5)},
    ),
}  # fmt: skip


def case(name, dtype=jnp.float64):
    fn, shapes, _ = MODELS[name]
    params = {
        n: array(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())
    }
    return fn, params, array(2, 7, 8, seed=9, dtype=dtype)


def of(params):
    """No bias is adapted, though a stack of them is a matrix."""
    return {"exclude": "*bias"} if "bias" in params else {}


@pytest.mark.parametrize("name", MODELS)
def test_products_in_heads_keep_the_contract(x64, parts, name):
    fn, params, x = case(name)
    check(fn, params, x, dtype=jnp.float64, **of(params))
    assert lengths(parts) == MODELS[name][2]


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("name", ["made", "both", "attention", "scan of remat"])
def test_on_a_quantized_base(x64, parts, name, block):
    fn, params, x = case(name)
    tree = randomized(adapt(fn, params, x, dtype=jnp.float64, **of(params)))
    tree = quantize(tree, "int8", target="*", block=block)
    close_to_merged_over(fn, tree, dequantize(tree), x, tolerance=1e-12)
    assert lengths(parts) == MODELS[name][2]


@pytest.mark.parametrize("block", [None, 2])
def test_under_vmap_on_a_quantized_base(parts, block):
    fn, params, x = case("attention", jnp.float32)
    tree = randomized(adapt(fn, params, x, **of(params)), size=0.1)
    tree = quantize(tree, "int8", target="*", block=block)
    base, adapter = flora.split(tree)
    two = jax.tree.map(lambda y: jnp.stack([y, 2 * y]), adapter)

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(form, base):
        run = flora.lora(fn, form=form)

        def loss(one, x):
            return scalar(run(flora.join(base, one), x))

        return jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None))(two, x)

    close(slopes("auto", base), slopes("direct", flora.split(dequantize(tree))[0]))
    assert lengths(parts) == {(2, 6), (2, 5)}


@pytest.mark.parametrize("name", ["both", "attention", "scan of remat"])
def test_masks_of_dropout_are_those_without_heads(x64, parts, name):
    fn, params, x = case(name)
    settings = {"dropout": 0.4, "dtype": jnp.float64, **of(params)}
    tree = randomized(adapt(fn, params, x, **settings))

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(form, tree):
        def loss(tree, x):
            dropped = flora.with_dropout(tree, jax.random.key(0))
            return scalar(flora.lora(fn, form=form)(dropped, x))

        return jax.value_and_grad(loss, (0, 1))(tree, x)

    close(slopes("auto", tree), slopes("direct", tree), 1e-9)
    assert lengths(parts) == MODELS[name][2]


def test_results_have_heads_as_axes_and_need_no_other_layout(parts):
    """Between a product and its reshape nothing of the result's size is transposed."""
    fn, params, x = case("made", jnp.float32)
    tree = adapt(fn, params, x, **of(params))
    found = [*equations(jax.make_jaxpr(flora.lora(fn))(tree, x))]
    results = [
        e.outvars[0].aval.shape for e in found if e.primitive.name == "dot_general"
    ]
    assert results.count((2, 7, 3, 4)) == 2  # x W and z Q
    assert (2, 7, 12) not in results


def test_products_of_one_x_whose_stacks_are_divided_otherwise(x64, parts):
    def fn(p, x):
        one, other = (jnp.einsum("sbi,sio->sbo", x, p[n]) for n in ("u", "v"))
        return one.reshape(2, 3, 5, 4), other.reshape(3, 2, 5, 4)

    params = {n: array(6, 8, 4, seed=i) for i, n in enumerate("uv")}
    check(fn, params, array(6, 5, 8, seed=9), dtype=jnp.float64)
    assert lengths(parts) == {(2, 3), (3, 2)}


def test_activations_that_are_a_constant_of_the_program(x64, parts):
    constant = jax.device_get(array(14, 8, seed=9))

    def fn(p, x):
        y = jax.lax.dot_general(constant, p["w"], (((1,), (0,)), ((), ())))
        return x + y.reshape(2, 7, 3, 4)

    params, x = {"w": array(8, 12)}, array(2, 7, 3, 4, seed=1)
    adapted = randomized(adapt(fn, params, x, dtype=x.dtype))
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
        got = flora.lora(fn)(adapted, x)  # a constant is a literal here
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)
    close(got, fn(flora.merge(adapted), x))
    assert lengths(parts) == {(3, 4)}
