import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from flora._trace.compat import P
from tests.support import contract
from tests.support.contract import array
from tests.support.registry import normal
from tests.support.variant_cases import Between, acted

EVERY = {
    "u": (6, 5), "v": (6, 5), "t": (5, 6), "heads": (6, 2, 4), "keys": (6, 1, 4),
    "wide": (6, 9),
}  # fmt: skip

JOINED = {
    "sum": lambda p, x: x @ (p["u"] + p["v"]),
    "difference with a transpose": lambda p, x: x @ (p["u"] - 2 * p["t"].T),
    "of itself": lambda p, x: x @ (p["u"] + p["u"][::-1]),
    "an array is added": lambda p, x: x @ (x.T @ jnp.ones((3, 5)) - p["u"]),
    "complex": lambda p, x: jnp.abs(x @ lax.complex(p["u"], p["v"])),
    "1j": lambda p, x: jnp.abs(x @ (p["u"] + 1j * p["v"])),
    "fused heads": lambda p, x: x @ jnp.concatenate(
        [p["heads"].reshape(6, 8), p["keys"].reshape(6, 4), p["t"].T], 1),
    "centred": lambda p, x: x @ (p["u"] - p["u"].mean(0)),
    "centred along out": lambda p, x: x @ (p["u"] - p["u"].mean(1, keepdims=True)),
    "repeated heads": lambda p, x: x @ jnp.repeat(p["heads"], 3, axis=1).reshape(6, 24),
    "tiled": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.tile(p["wide"], (2, 3)),
    "repeated and summed": lambda p, x: x @ jnp.broadcast_to(
        p["u"][None], (3, 6, 5)).sum(0),
    "padded": lambda p, x: jnp.pad(x, ((0, 0), (1, 2))) @ jnp.pad(
        p["wide"], ((1, 2), (0, 3))),
    "cropped by padding": lambda p, x: x[:, 1:] @ lax.pad(
        p["wide"], 0.0, ((-1, 0, 0), (0, 0, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_contract(x64, name):
    fn, x = JOINED[name], array(3, 6, seed=9)
    every = {k: array(*shape, seed=i) for i, (k, shape) in enumerate(EVERY.items())}
    params = contract.used(fn, every, x)
    # What the function itself makes in a weight's shape.
    own = (P.add, P.sub, P.mul, P.complex, P.pad, P.dot_general)
    adapted = contract.check(fn, params, x, dtype=jnp.float64, views=own)
    for path, w in adapted.items():
        assert w.layout.role(0) == ("out" if path == "t" else "in")


def test_an_inner_gradient_step(x64):
    def loss(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["u"]) @ p["t"] - y) ** 2)

    def fn(p, x, y):  # MAML: the loss after one step
        grads = jax.grad(loss)(p, x, y)
        return loss(jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), x, y)

    params = {"u": array(6, 5), "t": array(5, 6, seed=2)}
    own = (P.sub, P.mul, P.neg, P.dot_general)
    contract.check(fn, params, array(3, 6), array(3, 6, seed=1), views=own,
                   dtype=jnp.float64)  # fmt: skip


def test_stacks_of_other_ranks(x64):
    def fn(p, x):
        return jnp.einsum("bi,kio->kbo", x, jnp.stack([p["u"], p["v"]]))

    params = {"u": array(6, 5), "v": array(6, 5, seed=1)}
    settings = {"rank_pattern": {"u": 3}, "views": (P.stack,), "dtype": jnp.float64}
    contract.check(fn, params, array(3, 6), **settings)


def test_scan_over_joined_stacks(x64):
    def fn(p, x):
        stacks = p["w"].reshape(6, 5, 5)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacks)[0]

    adapted = contract.check(fn, {"w": array(2, 3, 5, 5)}, array(4, 5),
                             dtype=jnp.float64)  # fmt: skip
    assert adapted["w"].layout == flora.Layout((0, 1), (2,), (3,))


def test_joined_weights_keep_dropout():
    def fn(p, x):
        return x @ (p["u"] + p["v"]), x @ jnp.concatenate([p["u"], p["v"]], 1)

    params = {"u": normal(6, 5), "v": normal(6, 5, seed=1)}
    x = normal(3, 6)
    tree = contract.adapt(fn, params, x, dropout=0.5)
    tree = contract.randomized(tree)
    keyed = flora.with_dropout(tree, jax.random.key(0))
    for y, z in zip(flora.lora(fn)(keyed, x), flora.lora(fn)(tree, x), strict=True):
        assert not jnp.allclose(y, z)


CONCATENATIONS = {
    "along out": lambda p, x: x @ jnp.concatenate([p["u"], p["v"]], 1),
    "along in": lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate(
        [p["u"], 2 * p["t"]]),
    "with one that is not adapted": lambda p, x: x @ jnp.concatenate(
        [p["u"], jnp.ones((6, 3)), p["v"]], 1),
    "stacked": lambda p, x: jnp.einsum(
        "ebi,eio->bo", jnp.stack([x, -x]), jnp.stack([p["u"], p["t"]])),
    "stacked beside more that are not adapted": lambda p, x: jnp.einsum(
        "ebi,eio->bo", jnp.stack([x, -x, 2 * x]),
        jnp.concatenate([p["u"][None], jnp.ones((2, 6, 10))])),
    "views of one": lambda p, x: x @ jnp.concatenate([p["u"][:, 5:], p["u"][:, :5]], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_contract_of_concatenations(x64, name):
    every = {"u": array(6, 10), "v": array(6, 9, seed=1), "t": array(6, 10, seed=2)}
    fn, x = CONCATENATIONS[name], array(5, 6)
    params = contract.used(fn, every, x)
    settings = {"dtype": jnp.float64, "rank": 3, "rank_pattern": {"u": 4}}
    contract.check(fn, params, x, views=(P.mul,), **settings)


def pair_of(first, second, ranks=(2, 3)):
    """Two weights whose variants put a function between A and B, or `None`."""
    params = {"u": array(6, 5), "v": array(6, 5, seed=1)}
    tree = contract.randomized(contract.adapt(
        lambda p, x: x @ p["u"] + x @ p["v"], params, array(3, 6), dtype=jnp.float64,
        rank_pattern=dict(zip("uv", ranks, strict=True)),
    ))  # fmt: skip
    kinds = {"u": first, "v": second}
    return {k: dataclasses.replace(w, variant=kinds[k]) for k, w in tree.items()}


VARIANTS = {"first": (Between(), None), "second": (None, Between()),
            "both": (Between(), Between(jnp.tanh))}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_each_of_joined_weights_keeps_its_function_between_a_and_b(x64, name):
    tree, x = pair_of(*VARIANTS[name]), array(3, 6, seed=9)

    def fn(p, x):
        return {
            "sum": x @ (p["u"] + p["v"]),
            "difference": x @ (p["u"] - p["v"]),
            "along out": x @ jnp.concatenate([p["u"], p["v"]], 1),
            "along in": jnp.concatenate([x, 2 * x], 1) @ jnp.concatenate(
                [p["u"], p["v"]], 0),
        }  # fmt: skip

    u, v = acted(tree["u"], x), acted(tree["v"], x)
    want = {
        "sum": u + v, "difference": u - v, "along out": jnp.concatenate([u, v], 1),
        "along in": u + acted(tree["v"], 2 * x),
    }  # fmt: skip
    contract.close(jax.jit(flora.lora(fn))(tree, x), want)


def test_a_stack_keeps_the_function_that_all_share(x64):
    def fn(p, x):
        return jnp.einsum("bi,kio->kbo", x, jnp.stack([p["u"], p["v"]]))

    x = array(3, 6, seed=9)
    tree = pair_of(Between(), Between(), (2, 2))
    want = jnp.stack([acted(tree[k], x) for k in "uv"])
    contract.close(flora.lora(fn)(tree, x), want)
    others = [pair_of(*VARIANTS[k], (2, 2)) for k in VARIANTS]
    for tree in (*others, pair_of(Between(), Between(), (2, 3))):
        with pytest.raises(flora.LoraError, match=r"a stack of weights whose variants"):
            flora.lora(fn)(tree, x)


def test_rows_of_tables_are_joined_as_activations(x64):
    def fn(p, i):
        one, other = p["u"][i], p["v"][i + 1]
        return jnp.tanh(jnp.concatenate([one, other])), jnp.tanh(one + other)

    params, i = {"u": array(6, 5), "v": array(6, 5, seed=1)}, jnp.asarray(2)
    adapted = contract.adapt(fn, params, i, dtype=jnp.float64)
    contract.close_to_merged(fn, contract.randomized(adapted), i)


JOINS = {
    "a sum": lambda p, x: x @ (p["u"] + p["v"]),
    "a concatenation": lambda p, x: x @ jnp.concatenate([p["u"], p["v"]], 1),
}


@pytest.mark.parametrize("name", JOINS)
def test_weights_of_other_dropout_rates_are_not_joined(name):
    params, x = {"u": jnp.ones((6, 5)), "v": jnp.ones((6, 5))}, jnp.ones((3, 6))
    tree = contract.adapt(JOINS[name], params, x)
    tree["v"] = dataclasses.replace(tree["v"], dropout=0.5)
    with pytest.raises(flora.LoraError, match=f"{name} of weights with other dropout"):
        flora.lora(JOINS[name])(tree, x)


def test_output_scales_of_a_sum_are_refused_and_joined_along_out_alone(x64):
    def along(axis):
        return lambda p, x: jnp.tile(x, 2 - axis) @ jnp.concatenate(
            [p["u"], p["v"]], axis)  # fmt: skip

    params, x = {"u": array(6, 5), "v": array(6, 5, seed=1)}, array(3, 6)
    settings = {"dtype": jnp.float64, "variant": flora.variants.DoRA()}
    tree = contract.randomized(contract.adapt(along(1), params, x, **settings))
    contract.close(flora.lora(along(1))(tree, x), along(1)(flora.merge(tree), x))
    # One with scaled outputs beside one without, either first.
    for k in "uv":
        mixed = tree | {k: dataclasses.replace(tree[k], variant=None, extra=None)}
        got = flora.lora(along(1))(mixed, x)
        contract.close(got, along(1)(flora.merge(mixed), x))
    with pytest.raises(flora.LoraError, match="in axes joined, of weights whose out"):
        flora.lora(along(0))(tree, x)
    with pytest.raises(flora.LoraError, match="a sum, of a weight whose outputs are"):
        flora.lora(JOINS["a sum"])(tree, x)
