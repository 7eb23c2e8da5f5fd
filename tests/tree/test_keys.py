"""PRNG keys: one at a time, typed or not, consumed once, apart for each path."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.multi
import flora.recipes
import flora.starts
from flora._tree.keys import consumed, path_salt, require_key

KEY = jax.random.key(0)

REFUSED = {
    "int": (0, "key is a int; expected a PRNG key"),
    "None": (None, "key is a NoneType; expected"),
    "of another kind": (
        jax.random.PRNGKey(0, impl="rbg"),
        r"key is a uint32\[4\] array; .*wrap_key_data\(key, impl=...\)",
    ),
    "numbers": (np.zeros(2, np.int32), r"key is a int32\[2\] array"),
    "a number": (np.uint32(2), r"key is a uint32\[\] array"),
    "several old ones": (
        jax.random.split(jax.random.PRNGKey(0), 3),
        r"key has shape \(3, 2\); expected one key",
    ),
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


def test_keys_of_the_old_kind_are_those_of_the_new():
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    want = jax.random.key_data(consumed(new))
    for key in (old, np.asarray(old)):
        require_key(key, "verb")
        assert consumed(key).dtype == new.dtype
        assert (jax.random.key_data(consumed(key)) == want).all()
    traced = jax.jit(lambda k: jax.random.key_data(consumed(k)))(old)
    assert (traced == want).all()
    mapped = jax.vmap(consumed)(jax.random.split(old, 3))  # a stack of them
    assert mapped.shape == (3,)
    struct = jax.ShapeDtypeStruct(old.shape, old.dtype)
    assert consumed(struct) == jax.ShapeDtypeStruct((), new.dtype)
    with jax.default_prng_impl("rbg"):
        require_key(jax.random.PRNGKey(0), "verb")
        assert consumed(jax.random.PRNGKey(0)).dtype == jax.random.key(0).dtype


W = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
X = jnp.ones((2, 8))


def fn(p, x):
    return x @ p["kernel"]


def adapted(key=KEY):
    return flora.init(key, flora.LoraConfig(rank=2, dropout=0.5), fn, W, X)


def restarted(key):
    tx = flora.optimizer(optax.sgd(1.0), adapted())
    return flora.recipes.restart(key, tx, tx.init(adapted()), adapted())[0]


def combined(key):
    adapters = [flora.split(adapted())[1]] * 2
    how = {"method": "dare_linear", "density": 0.5, "key": key}
    return flora.multi.combine(adapters, [0.5, 0.5], **how).adapter


VERBS = {
    "init": adapted,
    "abstract": lambda key: jax.eval_shape(adapted, key),
    "with_dropout": lambda key: flora.lora(fn)(flora.with_dropout(adapted(), key), X),
    "mapped": lambda key: jax.vmap(adapted)(jnp.stack([key, key])),
    "restart": restarted,
    "pissa": lambda key: flora.starts.pissa(adapted(), method="randomized", key=key),
    "lora_ga": lambda key: flora.starts.lora_ga(
        adapted(), W, method="randomized", key=key
    ),
    "eva": lambda key: flora.starts.eva(key, adapted(), fn, [(X,)]),
    "combine": combined,
    "extract": lambda key: (
        flora.multi.extract(
            adapted(), {"kernel": W["kernel"] + 1}, svd="randomized", key=key
        ).adapter
    ),
    "initializer": lambda key: flora.initializers.peft(False)(
        key, (8, 2), (2, 6), jnp.float32
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_takes_keys_of_both_kinds(name):
    chex.assert_trees_all_equal(
        VERBS[name](jax.random.PRNGKey(3)), VERBS[name](jax.random.key(3))
    )


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
