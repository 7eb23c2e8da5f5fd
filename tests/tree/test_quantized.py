"""A weight that is stored in fewer bits, without the library that stores it."""

import jax
import jax.numpy as jnp
import pytest

import flora
from flora._tree.quantized import Quantized, abstract, dequantized, is_quantized
from tests.support.quantized import Scaled, dense_of


def weight():
    q = jnp.arange(-6, 6, dtype=jnp.int8).reshape(4, 3)
    return Quantized(Scaled(q, jnp.full((4, 1), 0.5, jnp.bfloat16)), dense_of)


def test_it_has_the_weights_shape_and_dequantizes_to_it():
    w = weight()
    assert (w.shape, w.dtype, w.ndim) == ((4, 3), jnp.bfloat16, 2)
    want = (jnp.arange(-6, 6) / 2).reshape(4, 3)
    assert w.dense().dtype == jnp.bfloat16
    assert (w.dense() == want).all()
    assert (dequantized(w) == want).all()
    assert repr(w) == "Quantized(bfloat16[4,3] as int8+bfloat16)"


def test_what_is_no_stored_weight_passes():
    x = jnp.ones((4, 3))
    for value in (x, None, "label", jax.ShapeDtypeStruct((2,), jnp.float32)):
        assert dequantized(value) is value
        assert abstract(value) is value
        assert not is_quantized(value)
    w = weight()
    assert is_quantized(w)
    assert abstract(w) == jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)


def test_it_is_a_node_of_what_is_stored():
    w = weight()
    leaves, treedef = jax.tree.flatten(w)
    assert [x.dtype for x in leaves] == [jnp.int8, jnp.bfloat16]
    assert treedef.unflatten(leaves) == w
    other = Quantized(w.values, lambda quantized: quantized.q)
    assert jax.tree.structure(other) != treedef
    assert (jax.jit(lambda w: w.dense())(w) == w.dense()).all()
    # Labels, gradients and shapes can stand for it.
    assert repr(jax.tree.map(lambda x: "frozen", w)).startswith("Quantized(Scaled(")
    assert "as int8+bfloat16" in repr(jax.eval_shape(lambda: w))
    assert repr(Quantized(None, dense_of)) == "Quantized(None)"


@pytest.mark.parametrize("use", [jnp.asarray, jnp.tanh, lambda w: jnp.ones((2, 4)) @ w])
def test_used_as_an_array_it_says_what_to_write(use):
    match = (
        r"int8\+bfloat16\) was used as an array. Run the function through flora.lora"
    )
    with pytest.raises(flora.LoraError, match=match):
        use(weight())
