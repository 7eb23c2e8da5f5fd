"""Reshapes beside products: what makes heads, and what joins them."""

import jax
import jax.numpy as jnp
import pytest

from flora._trace.compat import Literal, P
from flora._trace.reshapes import reshapes

X = jnp.ones((6, 8))
W = jnp.ones((8, 10))
BIAS = jnp.ones(10)
HEADS = (6, 2, 5)


def found(fn, *args):
    """What a function's products are given: `[(result, x), ...]`, in order."""
    eqns = jax.make_jaxpr(fn)(*args).eqns
    shapes = reshapes(eqns)
    products = [e for e in eqns if e.primitive is P.dot_general]
    mine = [(e.outvars[0], e.invars[0]) for e in products]
    assert {*shapes} <= {v for pair in mine for v in pair}
    return [(shapes.get(y), shapes.get(x)) for y, x in mine]


MADE = {
    "at once": lambda x: x @ W,
    "after a bias": lambda x: x @ W + BIAS,
    "after a bias in front": lambda x: BIAS + x @ W,
    "after a cast": lambda x: (x @ W).astype(jnp.bfloat16),
    "after a cast, a bias and a cast": lambda x: (
        (x @ W).astype(jnp.bfloat16) + BIAS.astype(jnp.bfloat16)
    ).astype(jnp.float32),
    "after a scalar is added": lambda x: x @ W + 1.0,
    "after a residual": lambda x: jnp.tanh(x[:, :1]) * jnp.ones(10) + x @ W,
}


@pytest.mark.parametrize("name", MADE)
def test_a_result_that_is_divided(name):
    assert found(lambda x: MADE[name](x).reshape(HEADS), X) == [(HEADS, None)]


UNSEEN = {
    "another operation": lambda x: jnp.tanh(x @ W),
    "a product element by element": lambda x: (x @ W) * BIAS,
    "a sum": lambda x: (x @ W).sum(-1, keepdims=True) + jnp.ones((6, 10)),
    "a slice": lambda x: (x @ W)[::-1],
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_result_that_something_else_reads_first(name):
    assert found(lambda x: UNSEEN[name](x).reshape(HEADS), X) == [(None, None)]


JOINED = {
    "at once": lambda x: x,
    "before a cast": lambda x: x.astype(jnp.bfloat16),
    "before two casts": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
}


@pytest.mark.parametrize("name", JOINED)
def test_an_operand_that_was_joined(name):
    def fn(x):
        x = JOINED[name](x.reshape(6, 8))
        return x @ W.astype(x.dtype)

    assert found(fn, jnp.ones((6, 2, 4))) == [(None, (6, 2, 4))]


def test_an_operand_that_something_else_read_first():
    fn = lambda x: jnp.tanh(x.reshape(6, 8)) @ W  # noqa: E731
    assert found(fn, jnp.ones((6, 2, 4))) == [(None, None)]


def test_tokens_that_are_joined_and_divided_again():
    def fn(x):
        y = x.reshape(6, 8) @ W + BIAS
        return y.reshape(2, 3, 2, 5)

    assert found(fn, jnp.ones((2, 3, 8))) == [((2, 3, 2, 5), (2, 3, 8))]


def test_each_product_of_several():
    def fn(x):
        q, k = x @ W, x @ W + BIAS
        out = q.reshape(HEADS) * k.reshape(6, 5, 2).swapaxes(1, 2)
        return out.reshape(6, 10) @ W.T

    want = [(HEADS, None), ((6, 5, 2), None), (None, HEADS)]
    assert found(fn, X) == want


def test_the_first_of_two_reshapes_counts():
    def fn(x):
        y = x @ W
        return y.reshape(HEADS), y.reshape(60)

    assert found(fn, X) == [(HEADS, None)]


def test_reshapes_with_no_product():
    for fn in (
        lambda x: x.reshape(48),
        lambda x: (x.reshape(48) + 1).reshape(2, 24),
        lambda x: (x + x).reshape(48),
    ):
        assert reshapes(jax.make_jaxpr(fn)(X).eqns) == {}
    assert reshapes([]) == {}


def test_literals_are_no_products():
    def fn(x):
        return jax.lax.reshape(2.0, (1,)) + x, x.reshape(48)

    eqns = jax.make_jaxpr(fn)(1.0 * jnp.ones((48,))).eqns
    read = [v for e in eqns if e.primitive is P.reshape for v in e.invars]
    assert any(isinstance(v, Literal) for v in read)
    assert reshapes(eqns) == {}


def test_a_long_way_back_takes_no_longer_than_the_program():
    def doubled(x):
        y = x @ W
        for _ in range(1200):
            y = y + y
        return y.reshape(HEADS)

    assert found(doubled, X) == [(HEADS, None)]
