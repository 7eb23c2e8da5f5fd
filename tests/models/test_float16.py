"""Models in float16: what the range of float16 would take from A, B and x A."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from tests.support.contract import adapt, array
from tests.support.variant_cases import case, in_place, matrices

HALF = jnp.float16
NAMES = ("dense", "heads", "heads out", "stack of vmap", "one of a stack",
         "convolution", "grouped convolution", "embedding", "experts")  # fmt: skip
# Sizes of A, of B and of x: x A overflows, or B vanishes, or A does.
SIZES = {"x A": (40.0, 1e-5, 2e3), "B": (2e4, 1e-8, 1e3), "A": (1e-8, 2e4, 1e3)}


def is_index(x):
    return jnp.issubdtype(x.dtype, jnp.integer)


def half(name, a, b, x):
    """A function, its adapted tree with W in float16, and its arguments."""
    with jax.enable_x64(True):
        fn, params, args = case(name)
        params = jax.tree.map(lambda w: (w * 1e-3).astype(HALF), params)
        args = [
            v.astype(jnp.int32) if is_index(v) else (v * x).astype(HALF) for v in args
        ]
    made = adapt(fn, params, *args)["w"]
    a, b = (
        size * array(*part.shape, seed=seed, dtype=jnp.float32)
        for size, part, seed in ((a, made.a, 3), (b, made.b, 4))
    )
    return fn, {"w": dataclasses.replace(made, a=a, b=b)}, args


def merged(fn, tree, args):
    """The outputs in float64 with W + ΔW."""
    w = tree["w"]
    base, a, b, _ = matrices(w)
    with jax.enable_x64(True):
        wide = [v if is_index(v) else v.astype(jnp.float64) for v in args]
        effective = jnp.asarray(in_place(w, base + w.scale * a @ b), jnp.float64)
        return np.asarray(fn({"w": effective}, *wide))


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_merged_model(name, what):
    fn, tree, args = half(name, *SIZES[what])
    got = jax.jit(flora.lora(fn))(tree, *args)
    want = merged(fn, tree, args)
    assert got.dtype == HALF
    assert np.abs(want).max() < 60000
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=3e-3 * np.abs(want).max()
    )
    # The change shows: it is no rounding error of what W gives.
    base = np.asarray(fn({"w": tree["w"].base}, *args), np.float64)
    assert np.abs(want - base).max() > 0.02 * np.abs(want).max()


@pytest.mark.parametrize("factors", [jnp.float32, HALF, jnp.bfloat16])
@pytest.mark.parametrize("x", [jnp.float32, HALF, jnp.bfloat16])
@pytest.mark.parametrize("w", [jnp.float32, HALF])
def test_the_dtype_is_the_base_models(w, x, factors):
    params, x = {"w": jnp.ones((6, 4), w)}, jnp.ones((3, 6), x)

    def fn(p, x):
        return x @ p["w"]

    tree = adapt(fn, params, x, dtype=factors)
    got, want = flora.lora(fn)(tree, x), fn(params, x)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    grads = jax.grad(lambda t: flora.lora(fn)(t, x).astype(jnp.float32).sum())(tree)
    assert grads["w"].a.dtype == grads["w"].b.dtype == factors


@pytest.mark.parametrize("name", ["dense", "convolution", "experts"])
def test_gradients_too(name):
    """dA = xᵀ g and dB = zᵀ dy with a loss that is scaled, as float16 asks for."""
    fn, tree, args = half(name, 40.0, 1e-5, 2e3)

    def loss(w, args):
        tree = {"w": w} if isinstance(w, jax.Array) else w
        return flora.lora(fn)(tree, *args).astype(jnp.float32).sum() * 1024

    got = jax.grad(loss)(tree, args)["w"]
    with jax.enable_x64(True):
        wide = [v if is_index(v) else v.astype(jnp.float64) for v in args]
        base, a, b, (s, _, o) = matrices(tree["w"])
        effective = jnp.asarray(in_place(tree["w"], base + tree["w"].scale * a @ b))
        dw = jax.grad(lambda w: fn({"w": w}, *wide).sum() * 1024.0)(effective)
        order = tree["w"].layout.order
        dw = np.asarray(dw).transpose(order).reshape(s, -1, o)
    scale = tree["w"].scale
    for part, want in {"a": scale * dw @ b.swapaxes(1, 2),
                       "b": scale * a.swapaxes(1, 2) @ dw}.items():  # fmt: skip
        found = np.asarray(getattr(got, part), np.float64).reshape(want.shape)
        np.testing.assert_allclose(
            found, want, rtol=0, atol=1e-3 * np.abs(want).max(), err_msg=part
        )


@pytest.mark.parametrize("name", ["dense", "convolution", "experts"])
def test_activations_are_kept_in_float16(name):
    fn, tree, args = half(name, *SIZES["x A"])
    _, pull = jax.vjp(lambda t: flora.lora(fn)(t, *args), tree)
    kept = [(v.dtype, v.size) for v in jax.tree.leaves(pull)]
    assert (HALF, args[0].size) in kept
    assert (jnp.float32, args[0].size) not in kept


@pytest.mark.parametrize("form", ["concat", "merged", "dithered", "thin_last"])
def test_every_form_is_the_direct_one(form):
    fn, tree, args = half("dense", *SIZES["x A"])
    got = flora.lora(fn, form=form)(tree, *args)
    np.testing.assert_array_equal(got, flora.lora(fn, form="direct")(tree, *args))
    assert np.isfinite(got).all()


def test_the_sum_is_taken_before_it_is_rounded():
    """ΔW of the other sign and of W's size: x ΔW alone is above 65504."""
    fn, tree, (x,) = half("dense", 1.0, 1.0, 1.0)
    w = tree["w"]
    ones = dataclasses.replace(
        w, base=jnp.full_like(w.base, -40), a=jnp.ones_like(w.a), alpha=1.0, rank=2,
        b=jnp.full_like(w.b, 50.0),
    )  # fmt: skip
    x = jnp.full_like(x, 320)  # x W = -64000, x ΔW = 80000
    assert ones.base.shape[0] == 5
    np.testing.assert_array_equal(flora.lora(fn)({"w": ones}, x), 16000)


def test_float8_activations_of_a_float16_result():
    x, w = jnp.full((2, 64), 400, jnp.float8_e4m3fn), jnp.full((64, 3), 1e-3, HALF)

    def fn(p, x):
        return jax.lax.dot_general(
            x.astype(HALF), p["w"], (((1,), (0,)), ((), ())),
            preferred_element_type=HALF,
        )  # fmt: skip

    made = adapt(fn, {"w": w}, x)["w"]
    made = dataclasses.replace(
        made, a=jnp.full_like(made.a, 8.0), b=jnp.full_like(made.b, 1e-7)
    )
    got = flora.lora(fn)({"w": made}, x)
    want = (
        64
        * np.float64(x[0, 0])
        * (np.float64(w[0, 0]) + made.scale * made.rank * 8 * 1e-7)
    )
    assert got.dtype == HALF
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-3)
