"""What a variant makes of the base's values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._linen.starts import of_base

W = jax.random.normal(jax.random.key(0), (4, 3))


def weight(variant):
    layout = flora.Layout((), (0,), (1,))
    return flora.LoraWeight(None, None, None, layout=layout, rank=2, variant=variant)


@dataclasses.dataclass(frozen=True)
class Both:
    """One array that is made of W, and one that is not."""

    frozen = ("fixed",)

    def start(self, key, weight):
        peak = jnp.abs(weight.base).max(0)
        fixed = jax.random.normal(key, weight.base.shape[1:])
        return dataclasses.replace(weight, extra={"peak": peak, "fixed": fixed})

    def product(self, weight):
        return flora.variants.Product(weight.a, weight.b)


@pytest.mark.parametrize(
    "variant", [None, flora.variants.VeRA(), flora.variants.AdaLoRA()]
)
def test_nothing_of_most_variants_is_made_of_the_base(variant):
    assert of_base(weight(variant), W) == {}


def test_the_magnitude_is_the_norm_of_the_base():
    found = of_base(weight(flora.variants.DoRA()), W)
    assert np.allclose(found["magnitude"], np.linalg.norm(W, axis=0), rtol=1e-6)


def test_a_variant_of_one_s_own_is_followed():
    assert list(of_base(weight(Both()), W)) == ["peak"]


def test_shapes_will_do():
    found = of_base(weight(Both()), jax.ShapeDtypeStruct((4, 3), jnp.bfloat16))
    assert {n: x.shape for n, x in found.items()} == {"peak": (3,)}


def test_a_start_has_no_gradient():
    grad = jax.grad(
        lambda w: of_base(weight(flora.variants.DoRA()), w)["magnitude"].sum()
    )
    assert not grad(W).any()
