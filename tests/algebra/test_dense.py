"""ΔW and W + ΔW as dense arrays, against the formulas in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._algebra.dense import delta, in_place, materialize
from flora._tree.errors import Unfactorable
from flora._tree.weight import Product
from flora.quantize import Quantized
from tests.support.contract import array, close
from tests.support.quantized import Scaled, dense_of

LAYOUTS = {
    "dense": ((5, 4), flora.Layout()),
    "transposed": ((4, 5), flora.Layout((), (1,), (0,))),
    "heads": ((5, 2, 3), flora.Layout((), (0,), (1, 2))),
    "experts, any order": ((5, 4, 3, 2), flora.Layout((2,), (3, 0), (1,))),
    "stacks of stacks": ((2, 4, 3, 5), flora.Layout((2, 0), (1,), (3,))),
    "axes of size 1": ((1, 4, 1), flora.Layout((), (1, 2), (0,))),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
    """A variant that scales columns, or puts a function between the factors."""

    scaled: bool = False
    squashed: bool = False
    frozen = ()

    def product(self, w):
        between = jnp.tanh if self.squashed else None
        columns = w.extra["c"] if self.scaled else None
        return Product(w.a, w.b, columns, between)


def weight(name, dtype=jnp.float64, factors=None, **settings):
    shape, layout = LAYOUTS[name]
    factors = factors or dtype
    drawn = jnp.float64 if dtype == jnp.float64 else jnp.float32
    made = [
        array(*s, seed=i, dtype=drawn).astype(dtype if i == 0 else factors)
        for i, s in enumerate((shape, *layout.factor_shapes(shape, 2)))
    ]
    settings = {"rank": 2, "alpha": 3.0} | settings
    return flora.LoraWeight(*made, layout=layout, **settings)


def change(w):
    """Scale A B in W's shape, by einsum: one letter for each axis of W."""
    letters = "ijklm"
    stack, in_, out = ("".join(letters[i] for i in axes) for axes in
                       (w.layout.stack, w.layout.in_, w.layout.out))  # fmt: skip
    spec = f"{stack}{in_}r,{stack}r{out}->{letters[: w.base.ndim]}"
    a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
    return w.alpha / w.rank * np.einsum(spec, a, b)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_change_and_the_sum(x64, name):
    w = weight(name)
    close(delta(w), jnp.asarray(change(w)))
    close(materialize(w), w.base + change(w))


@pytest.mark.parametrize("name", ["dense", "experts, any order"])
def test_scaled_columns(x64, name):
    w = weight(name, variant=Made(scaled=True))
    stack, out = len(w.layout.stack), len(w.layout.out)
    columns = array(*w.b.shape[:stack], *w.b.shape[-out:], seed=3)
    w = dataclasses.replace(w, extra={"c": columns})
    c = np.asarray(columns)
    if name == "experts, any order":  # stack 2 and out 1 of W's four axes
        c = c.T[None, :, :, None]
    whole = (np.asarray(w.base) + change(w)) * c
    close(materialize(w), jnp.asarray(whole))
    close(delta(w), jnp.asarray(whole - np.asarray(w.base)))


def test_scaled_columns_of_a_quantized_weight():
    quantized = Quantized(
        Scaled(jnp.ones((5, 4), jnp.int8), jnp.full((1, 4), 2.0)), dense_of
    )
    w = weight("dense", jnp.float32, variant=Made(scaled=True))
    w = dataclasses.replace(w, base=quantized, extra={"c": 2 * jnp.ones(4)})
    close(materialize(w), jnp.float32(2 * (2 + change(w))))
    close(delta(w), jnp.float32(2 * (2 + change(w)) - 2))


@pytest.mark.parametrize("factors", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_the_sum_is_rounded_once(dtype, factors):
    w = weight("dense", dtype, factors)
    assert delta(w).dtype == jnp.float32
    whole = np.asarray(w.base, np.float32) + np.float32(change(w))
    got = materialize(w)
    assert got.dtype == dtype
    half = {
        k: float(getattr(jnp.finfo(dtype), k)) / 2
        for k in ("eps", "smallest_subnormal")
    }
    np.testing.assert_allclose(
        np.asarray(got, np.float32), whole,
        rtol=1.01 * half["eps"], atol=half["smallest_subnormal"],
    )  # fmt: skip


def test_a_change_below_half_a_unit_vanishes_in_the_sum_only():
    w = flora.LoraWeight(
        jnp.ones((2, 2), jnp.bfloat16), jnp.full((2, 1), 2.0**-10), jnp.ones((1, 2))
    )
    assert (materialize(w) == 1).all()
    assert (delta(w) == 2.0**-10).all()


def test_complex_weights_stay_complex():
    w = weight("dense", jnp.complex64, jnp.float32)
    w = dataclasses.replace(w, base=(1 + 2j) * w.base)
    got = materialize(w)
    assert delta(w).dtype == got.dtype == jnp.complex64
    np.testing.assert_allclose(got, np.asarray(w.base) + change(w), rtol=1e-5)


def test_a_function_between_the_factors_has_no_sum():
    w = weight("dense", jnp.float32, variant=Made(squashed=True))
    for fn in (delta, materialize):
        with pytest.raises(
            Unfactorable, match=r"Made\(.*puts a function between A and B"
        ):
            fn(w)


def test_shapes_and_derivatives():
    w = weight("heads", jnp.float32)
    assert jax.eval_shape(materialize, w) == jax.ShapeDtypeStruct(
        (5, 2, 3), jnp.float32
    )
    grads = jax.grad(lambda w: (delta(w) * 2).sum())(w)
    np.testing.assert_allclose(
        grads.a, 3 * np.broadcast_to(w.b.sum((1, 2)), (5, 2)), rtol=1e-5
    )


def test_a_stack_of_size_0_is_formed():
    w = flora.LoraWeight(
        jnp.ones((0, 4, 3)), jnp.ones((0, 4, 2)), jnp.ones((0, 2, 3)),
        layout=flora.Layout((0,), (1,), (2,)), rank=2,
    )  # fmt: skip
    assert delta(w).shape == materialize(w).shape == (0, 4, 3)


def test_in_place():
    layout = flora.Layout((2,), (3, 0), (1,))
    x = jnp.arange(5 * 7 * 3 * 2.0).reshape(3, 2, 5, 7)
    want = np.einsum("skio->iosk", np.asarray(x))
    np.testing.assert_array_equal(
        in_place(x.reshape(3, 10, 7), layout, (5, 7, 3, 2)), want
    )
