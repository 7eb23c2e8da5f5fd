"""What the user's function raises carries a note that flora called it, and how."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import flora
import flora.recipes


def apply(params, x, *, train=False, batch=None):
    if x.shape[0] == 3:
        raise KeyError("the user's own")
    return x @ params["kernel"]


PARAMS = {"kernel": jnp.ones((4, 5))}
GOOD, BAD = jnp.ones((2, 4)), jnp.ones((3, 4))
CONFIG = flora.LoraConfig(rank=2)


@pytest.fixture(scope="module")
def adapted():
    return flora.init(jax.random.key(0), CONFIG, apply, PARAMS, GOOD)


def notes(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    found = getattr(caught.value, "__notes__", [])
    return [x for x in found if " called " in x]


def test_the_verb_that_traces_says_so(adapted):
    how = "which traces with abstract arrays, called apply(tree, float32[3,4]"
    batch = {"y": jnp.ones(7), "name": "x"}
    init = functools.partial(flora.init, jax.random.key(0), CONFIG)
    assert notes(KeyError, init, apply, PARAMS, BAD, train=True, batch=batch) == [
        f"flora.init, {how}, batch=<dict of ['y']: float32[7]>, train=True)."
    ]
    fn = functools.partial(apply, train=True)
    assert notes(KeyError, flora.coverage, fn, PARAMS, BAD) == [
        f"flora.coverage, {how})."
    ]
    assert notes(KeyError, flora.lora(apply), adapted, BAD) == [f"flora.lora, {how})."]


def test_what_jax_finds_in_the_function_counts(adapted):
    (note,) = notes(TypeError, flora.lora(apply), adapted, jnp.ones((2, 9)))
    assert note.endswith("apply(tree, float32[2,9]).")


def test_direct_calls_say_so_too(adapted):
    assert notes(KeyError, flora.lora(apply), PARAMS, BAD) == [
        "flora.lora, on a plain tree, called apply(tree, float32[3,4])."
    ]

    def loss(tree, x):
        return flora.lora(apply)(tree, x).sum()

    inner, outer = notes(KeyError, flora.value_and_grad(loss), adapted, BAD)
    assert inner.startswith("flora.lora, which traces")
    assert outer.startswith("flora.value_and_grad called ")
    assert outer.endswith(".loss(tree, float32[3,4]).")


def test_an_initializer_says_so_too(adapted):
    def draw(key, a, b, dtype):
        raise RuntimeError("the user's own")

    config = flora.LoraConfig(rank=2, init=draw)
    call = (flora.init, jax.random.key(0), config, apply, PARAMS, GOOD)
    (note,) = notes(RuntimeError, *call)
    assert note.endswith(".draw(key, (4, 2), (2, 5), 'float32').")
    tx = flora.optimizer(optax.sgd(1.0), adapted)
    restart = functools.partial(flora.recipes.restart, initializer=draw)
    state = tx.init(adapted)
    assert notes(RuntimeError, restart, jax.random.key(0), tx, state, adapted)


def test_errors_of_floras_own_have_none(adapted):
    def fn(params, x):
        return x @ jnp.tanh(params["kernel"])

    init = (flora.init, jax.random.key(0), CONFIG)
    assert notes(flora.LoraError, *init, fn, PARAMS, GOOD) == []

    def nested(params, x):
        return flora.split(params)

    assert notes(flora.LoraError, *init, nested, PARAMS, GOOD) == []


def test_many_arguments_are_cut_short():
    def fn(params, *args):
        raise ValueError

    many = [jnp.ones(3)] * 20
    (note,) = notes(ValueError, flora.coverage, fn, PARAMS, many, "x" * 99, (1, 2), fn)
    assert "[7]: float32[3], and 12 more>, ..., (1, 2), <function>)." in note
