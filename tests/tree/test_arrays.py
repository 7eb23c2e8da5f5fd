"""What counts as an array, and its dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import flora
from flora._tree.arrays import bits_of, compute_dtype, is_array, shown


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((), jnp.float32),
        ((jnp.bfloat16, jnp.float16), jnp.float32),
        ((jnp.bfloat16, jnp.float64), jnp.float64),
        ((jnp.float32, jnp.complex64), jnp.complex64),
        ((jnp.float16, jnp.complex128), jnp.complex128),
        # Dtypes of one byte or less promote with nothing: they are passed over.
        ((jnp.float8_e4m3fn, jnp.bfloat16), jnp.float32),
        ((jnp.int8, jnp.uint4), jnp.float32),
    ],
)
def test_what_sums_are_formed_in(x64, dtypes, wanted):
    assert compute_dtype(*dtypes) == wanted


def test_what_counts_as_an_array():
    struct = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for x in (jnp.ones(2), np.ones(2), np.float32(1), struct, jax.random.key(0)):
        assert is_array(x), x
    traced = []
    jax.eval_shape(lambda x: traced.append(is_array(x)), struct)
    assert traced == [True]
    node = flora.LoraWeight(struct, struct, struct)
    for x in (1.0, True, None, "abc", [1.0], (), object(), np.dtype("float32"), node):
        assert not is_array(x), x


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (jnp.uint4, 4),
        (ml_dtypes.int2, 2),
        (jnp.float8_e5m2, 8),
        (ml_dtypes.float4_e2m1fn, 4),
        (jnp.bool_, 8),
        (jnp.int32, 32),
        ("bfloat16", 16),
        (np.float64, 64),
        (jnp.complex64, 64),
    ],
)
def test_bits_of_an_element(dtype, bits):
    assert bits_of(dtype) == bits


def test_how_values_are_shown():
    assert shown(jnp.ones((4, 3))) == "float32[4,3]"
    assert shown(jax.ShapeDtypeStruct((), jnp.bfloat16)) == "bfloat16[]"
    assert shown(np.zeros((2, 0), np.int8)) == "int8[2,0]"
    assert [shown(None), shown(2.5), shown("frozen")] == ["None", "2.5", "'frozen'"]
