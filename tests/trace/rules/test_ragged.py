import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from tests.support import contract
from tests.support.contract import array
from tests.support.variant_cases import Between

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
    x = array(6, 7, seed=1, dtype=jnp.bfloat16)
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


def test_layers_of_experts_under_scan(x64):
    def layer(x, w):
        up, down = w
        y = lax.ragged_dot(jnp.tanh(x), up, SIZES)
        return x + lax.ragged_dot(y, down, SIZES), None

    def fn(p, x):
        return lax.scan(layer, x, (p["up"], p["down"]))[0]

    p = {"up": array(2, 4, 7, 11), "down": array(2, 4, 11, 7, seed=1)}
    adapted = contract.check(fn, p, array(6, 7), dtype=jnp.float64, vmap=False)
    assert adapted["up"].layout == flora.Layout((0, 1), (2,), (3,))


def general(lhs_contracting, rhs_contracting, group):
    return lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs_contracting,), (rhs_contracting,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[group],
    )


@pytest.mark.parametrize(
    ("shape", "contracting", "group"),
    [((4, 7, 11), 1, 0), ((4, 11, 7), 2, 0), ((7, 4, 11), 0, 1), ((11, 7, 4), 1, 2)],
)
def test_any_order_of_an_expert_weight_s_axes(x64, shape, contracting, group):
    def fn(p, x):
        return lax.ragged_dot_general(x, p["w"], SIZES, general(1, contracting, group))

    adapted = contract.check(
        fn, {"w": array(*shape)}, array(6, 7), dtype=jnp.float64, vmap=False
    )
    layout = adapted["w"].layout
    assert (layout.stack, layout.in_) == ((group,), (contracting,))


def test_dispatch_by_one_hot_einsums(x64):
    """Dense mixture of experts: dispatch and combine are products of activations."""

    def fn(p, x):
        gates = jnp.exp(x @ p["router"])
        dispatch = (jnp.arange(5)[:, None] % 3 == jnp.arange(3)).astype(x.dtype)
        tokens = jnp.einsum("td,te->etd", x, dispatch)
        hidden = jnp.tanh(jnp.einsum("etd,edf->etf", tokens, p["up"]))
        return jnp.einsum("etf,efd,te->td", hidden, p["down"], gates)

    p = {"router": array(7, 3), "up": array(3, 7, 11), "down": array(3, 11, 7, seed=1)}
    adapted = contract.check(fn, p, array(5, 7), dtype=jnp.float64)
    assert adapted["up"].layout == flora.Layout((0,), (1,), (2,))
    # Combined, experts are summed over: each has an A of its own, and all share B.
    assert adapted["down"].layout == flora.Layout((), (0, 1), (2,))


def test_a_function_between_a_and_b_acts_on_each_token(x64):
    def fn(p, x):
        return lax.ragged_dot(x, p["w"], SIZES)

    x = array(6, 7)
    tree = contract.adapt(
        fn, {"w": array(4, 7, 5)}, x, variant=Between(), dtype=jnp.float64
    )
    w = (tree := contract.randomized(tree))["w"]
    z = jax.nn.softmax(lax.ragged_dot(x, w.a, SIZES))
    want = fn({"w": w.base}, x) + w.scale * lax.ragged_dot(z, w.b, SIZES)
    contract.close(flora.lora(fn)(tree, x), want)


def test_scaled_outputs_are_those_of_each_token_s_expert(x64):
    def fn(p, x):
        return lax.ragged_dot(x, p["w"], SIZES)

    for layout in (flora.Layout((0,), (1,), (2,)), flora.Layout((), (0, 1), (2,))):
        tree = contract.adapt(
            fn, {"w": array(4, 7, 5)}, array(6, 7), variant=flora.variants.DoRA(),
            dtype=jnp.float64, layouts={"w": layout},
        )  # fmt: skip
        tree = contract.randomized(tree)
        want = fn(flora.merge(tree), array(6, 7))
        contract.close(flora.lora(fn)(tree, array(6, 7)), want)
