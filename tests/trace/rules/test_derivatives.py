import jax
import jax.numpy as jnp

import flora
from tests.support import contract
from tests.support.contract import array


def params():
    return {"w": array(7, 7, seed=1) / 3, "v": array(7, 5, seed=3)}


def test_custom_jvp_keeps_its_rule(x64):
    @jax.custom_jvp
    def clipped(x, w):
        return x @ w

    @clipped.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return clipped(x, w), 3 * (dx @ w) + 2 * (x @ dw)

    def fn(p, x):
        return clipped(jnp.tanh(x @ p["w"]), p["v"])

    x = array(3, 7)
    adapted = contract.check(fn, params(), x, dtype=jnp.float64)
    tangent = jax.tree.map(jnp.ones_like, adapted)
    tangent = flora.join(jax.tree.map(jnp.zeros_like, flora.split(tangent)[0]),
                         flora.split(tangent)[1])  # fmt: skip
    merged = jax.jvp(flora.merge, (adapted,), (tangent,))
    want = jax.jvp(lambda p: fn(p, x), (merged[0],), (merged[1],))
    contract.close(
        jax.jvp(lambda t: flora.lora(fn)(t, x), (adapted,), (tangent,)), want
    )


def test_custom_vjp_keeps_its_rule(x64):
    @jax.custom_vjp
    def scaled(x, w, n):
        return x @ w * n

    def forward(x, w, n):
        return scaled(x, w, n), (x, w)

    def backward(saved, g):
        x, w = saved
        return 3 * (g @ w.T), 2 * (x.T @ g), None

    scaled.defvjp(forward, backward)

    def fn(p, x):
        return scaled(jnp.tanh(x @ p["w"]), p["v"], 4)

    x = array(3, 7)
    own = (contract.P.dot_general, contract.P.mul)  # the rule's own dW
    contract.check(fn, params(), x, dtype=jnp.float64, views=own)


def test_activations_with_custom_rules_stay_untouched(x64):
    fn = lambda p, x: jax.nn.relu(jax.nn.silu(x @ p["w"])) @ p["v"]  # noqa: E731
    x = array(3, 7)
    contract.check(fn, params(), x, dtype=jnp.float64)


def test_a_custom_gradient_that_is_a_piece_of_the_weight(x64):
    @jax.custom_vjp
    def row(x, w, i):
        return x @ w[i]

    def backward(saved, g):
        x, w, i = saved
        return g * w[i], jnp.zeros_like(w).at[i].add(g * x), None

    row.defvjp(lambda x, w, i: (row(x, w, i), (x, w, i)), backward)

    def fn(p, x):
        return row(x, p["w"], 2) + (x @ p["w"]).sum()

    layouts = {"w": flora.Layout()}
    adapted = contract.adapt(fn, {"w": array(7, 7)}, array(7), dtype=jnp.float64,
                             layouts=layouts, fallback="materialize")  # fmt: skip
    contract.close_to_merged(fn, contract.randomized(adapted), array(7))
