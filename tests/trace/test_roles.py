"""Attention and the head, told by what is computed and never by a name."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flora._trace.roles import parts_played

SHAPES = {
    "q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (4, 6), "up": (6, 8), "down": (8, 6),
    "head": (6, 9), "table": (9, 6), "bias": (5, 5), "scale": (6,),
}  # fmt: skip
X = jax.ShapeDtypeStruct((5, 6), jnp.float32)
IDS = jax.ShapeDtypeStruct((5,), jnp.int32)


def played(fn, *args):
    """(attention, head) of a function of the weights that it reads."""
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    jaxpr = jax.make_jaxpr(fn)(params, *args)
    parts = parts_played(jaxpr, dict(enumerate(sorted(params))))
    return parts.attention, parts.head


def attend(p, x, weighting=jax.nn.softmax):
    q, k, v = (x @ p[n] for n in "qkv")
    return weighting(q @ k.T) @ v @ p["o"]


def mlp(p, x):
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


QKVO = {"q", "k", "v", "o"}
FUNCTIONS = {
    "one product": (lambda p, x: x @ p["head"], X, set(), {"head"}),
    "an mlp has a head and no attention": (mlp, X, set(), {"down"}),
    "attention": (attend, X, QKVO, {"o"}),
    "a decoder": (
        lambda p, x: (lambda y: (y + mlp(p, y)) @ p["head"])(x + attend(p, x)), X,
        QKVO, {"head"}),
    "scores with a bias": (
        lambda p, x: jax.nn.softmax(x @ p["q"] @ (x @ p["k"]).T + p["bias"])
        @ (x @ p["v"]), X, {"q", "k", "v"}, {"v"}),
    "scores with a bias that is looked up": (
        lambda p, x: jax.nn.softmax(
            x @ p["q"] @ (x @ p["k"]).T + p["bias"][jnp.arange(5)]) @ (x @ p["v"]),
        X, {"q", "k", "v"}, {"v"}),
    "scores with such a bias and no softmax": (
        lambda p, x: (x @ p["q"] @ (x @ p["k"]).T + p["bias"][jnp.arange(5)])
        @ (x @ p["v"]), X, set(), {"q", "k", "v"}),
    "linear attention without a softmax": (
        lambda p, x: attend(p, x, lambda s: s), X, QKVO, {"o"}),
    "sigmoid attention": (lambda p, x: attend(p, x, jax.nn.sigmoid), X, QKVO, {"o"}),
    "values of the stream itself": (
        lambda p, x: jax.nn.softmax(x @ p["q"] @ (x @ p["k"]).T) @ x @ p["up"], X,
        {"q", "k", "up"}, {"up"}),
    "values of the stream, and the stream": (
        lambda p, x: (lambda y: (jax.nn.softmax(y @ p["q"] @ (y @ p["k"]).T) @ y + y)
        @ p["head"])(mlp(p, x)), X, {"q", "k", "down"}, {"head"}),
    "a gate is no attention": (
        lambda p, x: (jax.nn.sigmoid(x @ p["up"]) * (x @ p["up"])) @ p["down"], X,
        set(), {"down"}),
    "looked up, the table is no head": (
        lambda p, ids: p["table"][ids] @ p["head"], IDS, set(), {"head"}),
    "a table alone": (lambda p, ids: p["table"][ids], IDS, set(), set()),
    "tied": (
        lambda p, ids: mlp(p, p["table"][ids]) @ p["table"].T, IDS, set(), {"table"}),
    "several outputs": (
        lambda p, x: {"y": x @ p["head"], "z": mlp(p, x), "n": 3}, X, set(),
        {"head", "down"}),
    "elementwise after it": (
        lambda p, x: jax.nn.log_softmax(x @ p["head"]).mean(), X, set(), {"head"}),
    "weights that meet weights": (
        lambda p, x: x @ (p["up"] @ p["down"]), X, set(), {"up", "down"}),
    "a loss on argmax": (
        lambda p, x: jnp.argmax(x @ p["head"], -1), X, set(), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parts(name):
    fn, x, attention, head = FUNCTIONS[name]
    assert played(fn, x) == (attention, head)


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda p, x: lax.cond(x[0, 0] > 0, f, lambda p, x: x, p, x),
    "scan": lambda f: lambda p, x: lax.scan(
        lambda x, _: (x + f(p, x), None), x, None, length=2)[0],
    "while": lambda f: lambda p, x: lax.fori_loop(0, 3, lambda i, x: x + f(p, x), x),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_other_functions(name):
    run = WRAPPERS[name](attend)
    assert played(lambda p, x: run(p, x) @ p["head"], X) == (QKVO, {"head"})


def test_a_loop_meets_itself():
    """What a step gives feeds the next one, so that nothing inside is the head."""

    def step(p):
        return lambda x, _: (x @ p["up"] @ p["down"], None)

    def unrolled(p, x):
        return lax.scan(step(p), x, None, length=2)[0]

    params = {k: jax.ShapeDtypeStruct(SHAPES[k], jnp.float32) for k in ("down", "up")}
    jaxpr = jax.make_jaxpr(unrolled)(params, X)
    parts = parts_played(jaxpr, {0: "down", 1: "up"})
    assert parts.head == set()
    assert {visit.path for visit in parts.feeding} == {"up", "down"}


def test_inputs_that_are_no_weights_play_no_part():
    jaxpr = jax.make_jaxpr(lambda w, x: x @ w)(jnp.ones((6, 9)), jnp.ones((5, 6)))
    assert parts_played(jaxpr, {}).head == set()
    assert parts_played(jaxpr, {0: "w"}).head == {"w"}
    empty = jax.make_jaxpr(lambda w: w)(jnp.ones(3))
    assert parts_played(empty, {0: "w"}).head == set()
