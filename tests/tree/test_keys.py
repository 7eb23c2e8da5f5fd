"""PRNG keys: typed, one at a time, consumed once, apart for each path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.keys import consumed, path_salt, require_key

KEY = jax.random.key(0)

REFUSED = {
    "int": (0, "key is a int; expected a typed PRNG key"),
    "None": (None, "key is a NoneType; expected"),
    "old key": (jax.random.PRNGKey(0), r"key is a uint32\[2\] array; expected"),
    "NumPy": (np.zeros(2, np.uint32), r"key is a uint32\[2\] array"),
    "shape": (jax.ShapeDtypeStruct((3,), jnp.float32), r"key is a float32\[3\] array"),
    "several": (jax.random.split(KEY), r"key has shape \(2,\); expected one key"),
    "stack of one": (KEY[None], r"key has shape \(1,\); expected one key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_key_is_refused(name):
    value, text = REFUSED[name]
    with pytest.raises(flora.LoraError, match=f"verb: {text}") as error:
        require_key(value, "verb")
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_kind_concrete_abstract_or_traced(impl):
    key = jax.random.key(0, impl=impl)
    require_key(key, "verb")
    require_key(jax.ShapeDtypeStruct((), key.dtype), "verb")
    jax.eval_shape(lambda k: require_key(k, "verb"), key)


def test_a_consumed_key_is_another_and_cannot_be_used_again():
    derived = consumed(KEY)
    assert derived.shape == ()
    assert derived.dtype == KEY.dtype
    assert (jax.random.key_data(derived) != jax.random.key_data(KEY)).any()
    assert jnp.array_equal(
        jax.random.key_data(consumed(KEY)), jax.random.key_data(derived)
    )
    struct = jax.ShapeDtypeStruct((), KEY.dtype)
    assert consumed(struct) is struct
    with jax.debug_key_reuse(True):
        key = jax.random.key(1)
        consumed(key)
        with pytest.raises(jax.errors.KeyReuseError):
            consumed(key)


def test_salts_are_the_same_in_every_process():
    # CRC-32, never Python's hash, which differs from process to process.
    assert path_salt("params/head/kernel") == 0xB80A951A
    assert path_salt("") == 0
    assert path_salt("größe") == path_salt("größe")
    assert 0 <= path_salt("b") < 2**32
    assert path_salt("a/b") != path_salt("b/a")
