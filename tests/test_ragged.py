import contract
import jax.numpy as jnp
import pytest
from contract import array
from jax import lax

import flora

SIZES = jnp.array([2, 0, 3, 1])


def experts(p, x):
    y = lax.ragged_dot(x, p["up"], SIZES)
    return lax.ragged_dot(jnp.tanh(y), p["down"].transpose(0, 2, 1), SIZES)


def params(dtype=jnp.float64):
    return {"up": array(4, 7, 11, dtype=dtype), "down": array(4, 5, 11, dtype=dtype)}


@pytest.mark.parametrize(
    ("up", "shapes"),
    [
        (flora.Layout((0,), (1,), (2,)), ((4, 7, 2), (4, 2, 11))),
        (flora.Layout((), (0, 1), (2,)), ((4, 7, 2), (2, 11))),
        (flora.Layout((), (1,), (0, 2)), ((7, 2), (2, 4, 11))),
        (flora.Layout((0,), (2,), (1,)), ((4, 11, 2), (4, 2, 7))),
    ],
)
def test_contract_of_ragged_products(x64, up, shapes):
    adapted = contract.check(
        experts, params(), array(6, 7), dtype=jnp.float64, layouts={"up": up},
        vmap=False,
    )  # fmt: skip
    assert (adapted["up"].a.shape, adapted["up"].b.shape) == shapes


def test_experts_are_discovered_as_a_stack():
    x = array(6, 7, dtype=jnp.bfloat16)
    adapted = contract.check(
        experts, params(jnp.bfloat16), x, tolerance=3e-2, vmap=False
    )
    assert adapted["up"].layout == flora.Layout((0,), (1,), (2,))
    assert adapted["down"].layout == flora.Layout((0,), (2,), (1,))


def test_weights_as_tokens_are_refused():
    def fn(p, x):
        return lax.ragged_dot(p["w"], x, jnp.array([3, 4]))

    with pytest.raises(flora.LoraError, match="tokens of a ragged product"):
        contract.adapt(fn, {"w": jnp.ones((7, 5))}, jnp.ones((2, 5, 3)))


def test_one_expert_that_gained_its_axis(x64):
    def fn(p, x):
        return lax.ragged_dot(x, p["w"][None], jnp.array([2]))

    contract.check(fn, {"w": array(7, 5)}, array(4, 7), dtype=jnp.float64, vmap=False)
