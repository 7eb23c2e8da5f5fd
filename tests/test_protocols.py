"""What other libraries ask of adapted trees, and what JAX checks of their use."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
import flora.quantize
from tests.support.contract import array

X = array(2, 8, dtype=jnp.float32)
MATRIX = {"w": array(8, 8, seed=1, dtype=jnp.float32) / 3}
STACK = {"w": array(3, 8, 8, seed=2, dtype=jnp.float32) / 3}


@jax.custom_vjp
def own(x, w):
    return x @ w


own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

LEAKS = {
    "jit": (MATRIX, lambda p, x: jax.jit(jnp.matmul)(x, p["w"])),
    "scan of remat": (
        STACK,
        lambda p, x: lax.scan(
            jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0],
    ),
    "vmap": (STACK, lambda p, x: jax.vmap(lambda w: x @ w)(p["w"])),
    "rows and their product": (
        MATRIX, lambda p, x: x @ p["w"].T + p["w"][jnp.arange(2)]),
    "custom_vjp": (MATRIX, lambda p, x: own(x, p["w"])),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_no_tracer_outlives_its_trace(name):
    params, fn = LEAKS[name]
    if name.startswith("rows"):  # what is dequantized late
        params = flora.quantize.quantize(params, "int8", target="*", block=1)

    def loss(tree, x):
        return jnp.sum(flora.lora(fn)(tree, x) ** 2)

    def step(params, x):
        config = flora.LoraConfig(rank=2, target="*")
        tree = flora.init(jax.random.key(0), config, fn, params, x)
        return flora.value_and_grad(loss)(tree, x)

    with jax.checking_leaks():
        flora.coverage(fn, params, X)
        jax.make_jaxpr(step)(params, X)
