import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from flora._trace.compat import P
from tests.support import contract
from tests.support.contract import array
from tests.support.registry import normal

NORMED = {
    "weight norm": lambda p, x: x @ (p["u"] / jnp.linalg.norm(p["u"], axis=0)),
    "along out": lambda p, x: x @ (
        p["u"] * lax.rsqrt((p["u"] ** 2).sum(1, keepdims=True) + 1e-6)),
    "frobenius": lambda p, x: x @ p["u"] / jnp.sqrt(jnp.square(p["u"]).sum()),
    "penalty": lambda p, x: (x @ p["u"]).sum() + (p["u"] * p["u"]).mean(),
    "of a stack": lambda p, x: jnp.einsum(
        "bi,eio->ebo", x, p["s"] * lax.rsqrt((p["s"] ** 2).sum(1, keepdims=True))),
    "of a whole stack": lambda p, x: jnp.einsum("bi,eio->ebo", x, p["s"])
        / jnp.sqrt((p["s"] ** 2).sum()),
    "standardized": lambda p, x: x @ (
        (p["u"] - p["u"].mean(0)) / jnp.sqrt(p["u"].var(0) + 1e-6)),
    "heads": lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["heads"]
        / jnp.linalg.norm(p["heads"], axis=(0, 2), keepdims=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMED)
def test_contract_of_norms(x64, name):
    fn, x = NORMED[name], array(3, 6, seed=9)
    every = {"s": array(2, 6, 5), "heads": array(6, 2, 4), "u": array(6, 5)}
    params = contract.used(fn, every, x)
    layouts = {"s": flora.Layout((0,), (1,), (2,))} if "stack" in name else {}
    # The norm moves with A and B, and its gradient takes a dense dW.
    own = (P.mul, P.square, P.integer_pow, P.div, P.sub, P.dot_general)
    contract.check(fn, params, x, dtype=jnp.float64, views=own, layouts=layouts,
                   tolerance=1e-11)  # fmt: skip


def test_norms_over_parts_of_in_and_out_are_refused():
    def fn(p, x):
        norms = (p["w"] ** 2).sum((0, 2)) + (p["w"] ** 2).sum(2)[0]
        return jnp.einsum("bi,ihd->bhd", x, p["w"]) / norms[:, None]

    with pytest.raises(
        flora.LoraError, match=r"'reduce_sum' at .* parts of in and out"
    ):
        contract.adapt(fn, {"w": normal(6, 2, 4)}, normal(3, 6))


def test_standardized_convolution():
    class Standardized(nn.Conv):
        def param(self, name, *args):
            w = super().param(name, *args)
            if name != "kernel":
                return w
            axes = (0, 1, 2)
            return (w - w.mean(axes)) / jnp.sqrt(w.var(axes) + 1e-5)

    module, x = Standardized(5, (3, 3)), normal(2, 6, 7, 4)
    variables = module.init(jax.random.key(0), x)
    own = (P.sub, P.div, P.square, P.integer_pow, P.mul, P.conv_general_dilated)
    contract.check(module.apply, variables, x, target="kernel", views=own,
                   tolerance=3e-5)  # fmt: skip


@pytest.mark.parametrize("axes", [None, 0, 1, (0, 1)])
def test_the_norm_is_that_of_the_merged_weight(x64, axes):
    """Σ (W + s A B)² without A B: no array of W's shape but W² itself."""
    fn = lambda p, x: (p["w"] * p["w"]).sum(axes) + (x @ p["w"]).sum()  # noqa: E731
    params, x = {"w": array(6, 5)}, array(3, 6, seed=1)
    tree = contract.randomized(contract.adapt(fn, params, x, dtype=jnp.float64))
    w = tree["w"]
    dense = w.base + w.scale * w.a @ w.b
    want = (dense**2).sum(axes) + (x @ dense).sum()
    contract.close(flora.lora(fn)(tree, x), want, 1e-12)
    made = contract.dense_arrays(flora.lora(fn), [(6, 5)], tree, x)
    assert [eqn.primitive for eqn in made] == [P.mul]


UNSUMMED = {
    "a power .* other than the square": lambda w, x: x.sum() * (w**3).sum(),
    "squares of a weight that are not summed": lambda w, x: x @ (w * w),
    "squares of a weight that are not": lambda w, x: x @ jnp.square(w).T.T,
    "the square of a change, or of a complex weight": lambda w, x: (
        x @ jnp.abs(jnp.square(w + 1j).sum(0)[:, None])),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNSUMMED)
def test_squares_that_are_not_summed_are_refused(reason):
    def fn(p, x):
        return UNSUMMED[reason](p["w"], x)

    with pytest.raises(
        flora.LoraError, match=rf"at test_squares.py:\d+ .*reads 'w' .*{reason}"
    ):
        contract.adapt(fn, {"w": normal(6, 6)}, normal(3, 6))


def test_a_cast_of_squares_keeps_their_weight(x64):
    def fn(p, x):
        squares = (p["w"].astype(jnp.float32) ** 2).astype(jnp.float64)
        return x @ p["w"] / jnp.sqrt(squares.sum(0))

    tree = contract.adapt(fn, {"w": array(6, 5)}, array(3, 6), dtype=jnp.float64)
    tree = contract.randomized(tree)
    contract.close(
        flora.lora(fn)(tree, array(3, 6)), fn(flora.merge(tree), array(3, 6)), 1e-6
    )

    def rounded(p, x):
        return x.sum() * jnp.square(p["w"]).astype(jnp.int32).sum() + (x @ p["w"]).sum()

    with pytest.raises(flora.LoraError, match="a cast to int32"):
        contract.adapt(rounded, {"w": array(6, 5)}, array(3, 6))
