"""What reads no weight goes back to JAX as it was; what has no rule is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl

import flora
from flora._trace.source import source_line
from tests.support import contract
from tests.support.contract import P, equations
from tests.support.registry import normal

PARAMS, X = {"w": normal(7, 5), "v": normal(5, 4, seed=1)}, normal(3, 7, seed=2)


def adapted(fn, params=PARAMS, **config):
    """A tree of the weights that a function of X reads, with factors as if trained."""
    params = contract.used(fn, params, X)
    return contract.randomized(contract.adapt(fn, params, X, **config))


def as_merged(fn, tree, *args):
    """The outputs are those of the merged tree, in one compiled program."""
    both = jax.jit(
        lambda t, *args: (flora.lora(fn)(t, *args), fn(flora.merge(t), *args))
    )
    contract.close(*both(tree, *args))


def test_untouched_equations_keep_names_lines_and_parameters():
    def block(p, x):
        with jax.named_scope("before"):
            x = jnp.sin(x)
            x = jax.nn.relu(x)
        y = x @ p["w"]
        with jax.named_scope("after"), jax.named_scope("inner"):
            y = jnp.cos(y) * jnp.exp2(y)
        return (y @ p["v"]).sum()

    def fn(p, x):
        with jax.named_scope("model"):
            return block(p, x)

    own = {"sin", "custom_jvp_call", "cos", "exp2", "reduce_sum"}

    def seen(fn, tree):
        eqns = jax.make_jaxpr(fn)(tree, X).eqns
        return [
            (str(e.source_info.name_stack), source_line(e), e.primitive,
             {k: v for k, v in e.params.items() if isinstance(v, int | tuple)})
            for e in eqns if e.primitive.name in own
        ]  # fmt: skip

    found = seen(flora.lora(fn), adapted(fn))
    assert found == seen(fn, PARAMS)
    names = [name for name, *_ in found]
    assert names == [*["model/before"] * 2, *["model/after/inner"] * 2, "model"]
    assert all("(block)" in line for _, line, *_ in found)


def test_what_replaces_an_equation_has_its_name_and_line():
    def fn(p, x):
        with jax.named_scope("up"):
            return x @ p["w"]

    start = fn.__code__.co_firstlineno
    products = [
        e
        for e in equations(jax.make_jaxpr(flora.lora(fn))(adapted(fn), X))
        if e.primitive is P.dot_general
    ]
    assert len(products) == 3
    assert {str(e.source_info.name_stack) for e in products} == {"up", "up/lora"}
    for eqn in products:
        assert source_line(eqn) == f"test_interpret.py:{start + 2} (fn)"


def test_inner_functions_that_touch_no_weight_are_not_traced_again():
    traced = []

    @jax.jit
    def shifted(x):
        traced.append(1)
        return jnp.sin(x) + 1

    def fn(p, x):
        return lax.cond(x[0, 0] > 0, jnp.cos, shifted, shifted(x)) @ p["w"]

    plain = [e for e in jax.make_jaxpr(fn)(PARAMS, X).eqns if e.primitive is P.cond]
    tree, before = adapted(fn), len(traced)
    got = jax.make_jaxpr(flora.lora(fn))(tree, X)
    assert len(traced) == before
    (branch,) = (e for e in got.eqns if e.primitive is P.cond)
    assert str(branch.params["branches"]) == str(plain[0].params["branches"])
    (inner,) = (e for e in got.eqns if e.primitive is P.jit)
    assert inner.params["name"] == "shifted"


def test_effects_keep_their_order_among_weights():
    def fn(p, x):
        seen = []

        def say(n):
            io_callback(lambda: log.append(n), None, ordered=True)

        say(1)
        y = x @ p["w"]
        say(2)
        z = y @ p["v"]
        y = jnp.sin(y)
        say(3)
        seen.append(y)
        return z.sum() + y.sum()

    tree, log = adapted(fn), []
    jax.jit(flora.lora(fn))(tree, X).block_until_ready()
    jax.effects_barrier()
    assert log == [1, 2, 3]
    eqns = jax.make_jaxpr(flora.lora(fn))(tree, X).eqns
    order = [
        e.primitive.name for e in eqns if e.primitive.name in ("io_callback", "sin")
    ]
    assert order == ["io_callback", "io_callback", "sin", "io_callback"]


VALUES = {
    "kept for much later": lambda p, x: (
        lambda early: (jnp.tanh(x @ p["w"]) @ p["v"] + early[:, :4], early)
    )(jnp.sin(x)),
    "some outputs unused": lambda p, x: (
        lax.top_k(x, 2)[0] @ p["w"][:2], jnp.split(x @ p["w"], [2], 1)[1]),
    "none used": lambda p, x: (jnp.sin(x), x @ p["w"], x @ p["w"])[1],
    "literals": lambda p, x: (
        2.0 * (x * 3.0) @ (p["w"] * 0.5) - 1.0, 7.0, jnp.float32(3)),
    "outputs that are inputs": lambda p, x: (x, x @ p["w"], x, p["v"] @ p["v"].T),
    "constants": lambda p, x: (x + np.float32(CONSTANT)) @ p["w"] + CONSTANT[0, 0],
    "one value twice": lambda p, x: (lambda y: (y + y, y * y, y))(x @ p["w"]),
    "nothing after": lambda p, x: x @ p["w"],
    "weights read last": lambda p, x: jnp.cos(jnp.sin(x).sum() * x)[:, :5].T.T @ p["v"],
    "integers": lambda p, x: (jnp.argmax(x @ p["w"], -1), jnp.arange(3) + 1),
    "empty": lambda p, x: (x[:0] @ p["w"], (x @ p["w"])[:, :0] @ p["v"][:0]),
}  # fmt: skip
CONSTANT = np.linspace(0, 1, 21).reshape(3, 7)


@pytest.mark.parametrize("name", VALUES)
def test_values_go_where_they_went(name):
    fn = VALUES[name]
    as_merged(fn, adapted(fn), X)


def test_an_input_comes_back_as_the_very_same_array():
    tree = adapted(lambda p, x: x @ p["w"])
    y, x, w, again = flora.lora(lambda p, x: (x @ p["w"], x, p["w"], x))(tree, X)
    assert x is again is X
    assert w is tree["w"]
    assert y.shape == (3, 5)


def test_a_function_that_ignores_the_adapted_weight():
    tree = adapted(lambda p, x: x @ p["w"])
    traced = str(jax.make_jaxpr(flora.lora(lambda p, x: jnp.sin(x)))(tree, X))
    assert "dot_general" not in traced
    assert flora.lora(lambda p, x: 3)(tree, X) == 3
    assert flora.lora(lambda p: None)(tree) is None


LINES = {
    "its own": lambda w, x: x @ jnp.tanh(w),
    "inside what JAX jits": lambda w, x: x @ jnp.clip(w, 0, 1),
    "inside two of JAX's": lambda w, x: x @ jax.jit(lambda w: jnp.clip(w, 0, 1))(w),
    "in a loop": lambda w, x: lax.map(lambda row: row @ jnp.sin(w), x),
    "in a branch": lambda w, x: lax.cond(x.any(), jnp.sin, jnp.cos, w),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_what_is_refused_names_the_user_s_line(name):
    call = LINES[name]

    def fn(p, x):
        return call(p["w"], x)

    tree = {"w": flora.LoraWeight(jnp.ones((7, 5)), jnp.ones((7, 1)), jnp.ones((1, 5)))}
    line = call.__code__.co_firstlineno
    with pytest.raises(
        flora.LoraError,
        match=rf"' at test_interpret.py:{line} \(<lambda>\) reads 'w' and flora has no "
        r"factored rule for it .*Write exclude='/w' in LoraConfig, or pass .*140 B",
    ):
        flora.lora(fn)(tree, X)
    out = jax.eval_shape(flora.lora(fn, fallback="materialize"), tree, X)
    assert out == jax.eval_shape(fn, {"w": jnp.ones((7, 5))}, X)


def test_the_materialized_weight_trains_as_the_factored_one():
    fn = lambda p, x: (x @ jnp.tanh(p["w"]), jnp.square(p["w"]))  # noqa: E731
    tree = adapted(fn, fallback="materialize")
    as_merged(fn, tree, X)
    grads = jax.jit(functools.partial(contract.gradients, fn))(tree, X)
    contract.close_to_formula(tree, *grads)


def by_pallas(w, x):
    def kernel(w_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(w, x)


def by_callback(w, x):
    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), shape, w, x)


@pytest.mark.parametrize(
    ("call", "name"), [(by_pallas, "pallas_call"), (by_callback, "pure_callback")]
)
def test_weights_in_kernels_and_callbacks_are_refused_by_name(call, name):
    def fn(p, x):
        return call(p["w"], x)

    params, x = {"w": normal(7, 5)}, normal(3, 7)
    with pytest.raises(flora.LoraError, match=rf"'{name}' at test_interpret.py:\d+"):
        contract.adapt(fn, params, x)
    tree = contract.randomized(contract.adapt(fn, params, x, fallback="materialize"))
    contract.close(flora.lora(fn)(tree, x), fn(flora.merge(tree), x))
