"""How A and B are drawn: compiled quickly, and the same bits however."""

import jax
import jax.numpy as jnp
import pytest

import flora
from flora._tree.layout import Layout
from flora._verbs.draw import draw_of, stacked


@pytest.mark.parametrize("count", [1, 3])
def test_draws_are_those_of_a_batch_of_keys(count):
    draw = draw_of(
        flora.LoraConfig().init, jnp.dtype("float32"), Layout((0,), (1,), (2,)),
        (count, 9, 5), 2,
    )  # fmt: skip
    key = jax.random.key(7)
    keys = jax.random.split(jax.random.fold_in(key, 5), count)
    batch = jax.vmap(lambda k: draw.initializer(k, (9, 2), (2, 5), draw.dtype))
    expected = jax.jit(batch)(keys)
    for in_turn in (False, True):
        got = jax.jit(lambda k, turn=in_turn: stacked(draw, k, 5, turn))(key)
        for x, y in zip(got, expected, strict=True):
            assert (x == y).all()
