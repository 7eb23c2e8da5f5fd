"""Experts whose tokens are sorted, in mixed batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora
import flora.multi
import flora.variants
from flora._multi.ragged import ragged_dot
from tests.support.contract import array, close, equations
from tests.support.many_adapters import GATHER_IS_SLOW

EXPERTS, IN, HIDDEN, OUT, TOKENS, ROWS, RANK = 3, 6, 8, 5, 7, 4, 2


def experts(w, x, choice, wrap):
    """Tokens `[n, t, in]` through the expert that each one chose."""
    n, t, width = x.shape
    flat, of_token = x.reshape(n * t, width), choice.reshape(-1)
    order = jnp.argsort(of_token)
    sizes = jnp.bincount(of_token, length=EXPERTS)

    def run(w, x):
        h = jnp.tanh(lax.ragged_dot(x, w["up"], sizes))
        return lax.ragged_dot(h, w["down"], sizes)

    y = wrap(run)(w, flat[order])
    return jnp.zeros_like(y).at[order].set(y).reshape(n, t, -1)


def fn(p, x, choice):
    """Experts as they are, in a loop under remat, and a head."""
    x = x + experts(p["first"], x, choice, jax.jit)

    def layer(x, w):
        return x + experts(w, x, choice, jax.checkpoint), None

    x, _ = lax.scan(layer, x, p["layers"])
    return x @ p["head"]


def case():
    def mlp(*stack, seed):
        up = array(*stack, EXPERTS, IN, HIDDEN, seed=seed)
        return {"up": up, "down": array(*stack, EXPERTS, HIDDEN, IN, seed=seed + 1)}

    params = {"first": mlp(seed=1), "layers": mlp(2, seed=3), "head": array(IN, OUT)}
    x = array(ROWS, TOKENS, IN, seed=5)
    choice = np.random.default_rng(0).integers(0, EXPERTS, (ROWS, TOKENS))
    return params, x, jnp.asarray(choice)


def adapter(params, x, choice, seed, **options):
    config = flora.LoraConfig(rank=RANK, alpha=3.0, **options)
    adapted = flora.init(jax.random.key(seed), config, fn, params, x, choice)
    leaves, treedef = jax.tree.flatten(flora.split(adapted)[1])
    return treedef.unflatten([a + 0.2 * array(*a.shape, seed=seed) for a in leaves])


@pytest.mark.parametrize("method", GATHER_IS_SLOW)
def test_rows_and_gradients(x64, method):
    params, x, choice = case()
    made = [
        adapter(params, x, choice, 1, target=["up", "down"]),
        adapter(params, x, choice, 2, target=["layers/down", "head"]),
        adapter(params, x, choice, 3, target="first/*", variant=flora.variants.DoRA()),
    ]
    stacked = flora.multi.prepare(params, flora.multi.stack(made, base=params))
    ids, run = [0, 2, -1, 1], flora.multi.lora(fn, method=method)

    def alone(i, stacked, x, choice):
        one = flora.join(params, flora.multi.select(stacked, i))
        return flora.lora(fn)(one, x, choice)

    y = jax.jit(run)(params, stacked, jnp.array(ids), x, choice)
    for n, i in enumerate(ids):
        tree = (
            params if i < 0 else flora.merge(
                flora.join(params, flora.multi.select(stacked, i)))
        )  # fmt: skip
        close(y[n], fn(tree, x[n : n + 1], choice[n : n + 1])[0], 1e-11)

    def mixed(stacked, x):
        return jnp.sum(jnp.sin(run(params, stacked, ids, x, choice)))

    def one_by_one(stacked, x):
        rows = [alone(i, stacked, x[n : n + 1], choice[n : n + 1])
                for n, i in enumerate(ids)]  # fmt: skip
        return sum(jnp.sum(jnp.sin(y)) for y in rows)

    for g, w in zip(
        jax.tree.leaves(jax.jit(jax.grad(mixed, (0, 1)))(stacked, x)),
        jax.tree.leaves(jax.grad(one_by_one, (0, 1))(stacked, x)),
        strict=True,
    ):
        close(g, w, 1e-11)


def test_experts_without_an_adapter_too(x64):
    params, x, choice = case()
    stacked = flora.multi.stack([adapter(params, x, choice, 1, target="head")])
    y = flora.multi.lora(fn)(params, stacked, [0, -1, 0, 0], x, choice)
    close(y[1], fn(params, x, choice)[1], 1e-12)
    assert np.abs(y[0] - fn(params, x, choice)[0]).max() > 1e-3


def test_experts_within_a_derivative_of_ones_own_are_refused():
    @jax.custom_jvp
    def product(x, w, sizes):
        return lax.ragged_dot(x, w, sizes)

    product.defjvps(None, None, None)

    def run(p, x, sizes):
        return product(x[0], p["up"], sizes[0])[None] @ p["head"]

    params = {"up": jnp.ones((EXPERTS, IN, HIDDEN)), "head": jnp.ones((HIDDEN, OUT))}
    node = flora.LoraWeight(None, jnp.ones((HIDDEN, 1)), jnp.ones((1, OUT)))
    stacked = flora.multi.stack([{"up": None, "head": node}])
    x, sizes = jnp.ones((2, 3, IN)), jnp.ones((2, EXPERTS), jnp.int32)
    match = r"'custom_jvp_call' at .*test_ragged.*one at a time"
    with pytest.raises(flora.LoraError, match=match):
        flora.multi.lora(run)(params, stacked, [0, -1], x, sizes)


def test_an_expert_meets_the_tokens_of_all_rows_at_once():
    x, w = jnp.ones((ROWS, TOKENS, 11)), jnp.ones((EXPERTS, 11, 13))
    sizes = jnp.array([[7, 0, 0], [1, 2, 4], [0, 0, 7], [2, 2, 2]])
    mapped = jax.vmap(ragged_dot, (0, None, 0))
    made = [
        tuple(v.aval.shape for v in e.invars)
        for e in equations(jax.make_jaxpr(mapped)(x, w, sizes))
        if e.primitive.name == "ragged_dot_general"
    ]
    assert made == [((ROWS * TOKENS, 11), (EXPERTS, 11, 13), (EXPERTS,))]

    def loss(x, w):
        return jnp.sum(jnp.square(mapped(x, w, sizes)))

    text = jax.jit(jax.grad(loss)).lower(x, w).compile().as_text()
    assert f"{ROWS},{EXPERTS},11,13" not in text  # dw of a frozen w
    assert f"{EXPERTS},{ROWS},11,13" not in text


def test_any_operands_may_be_mapped(x64):
    """Tokens that no group has give zeros, as in `lax.ragged_dot`."""
    x, w = array(ROWS, TOKENS, 4), array(ROWS, EXPERTS, 4, 5, seed=1)
    sizes = jnp.array([[7, 0, 0], [1, 2, 4], [0, 0, 7], [2, 1, 2]])
    cases = [(0, None, 0), (0, 0, 0), (0, 0, None), (None, 0, None), (0, None, None)]
    for axes in [*cases, (None, None, 0)]:
        args = [v if a == 0 else v[3] for v, a in zip((x, w, sizes), axes, strict=True)]
        y = jax.vmap(ragged_dot, axes)(*args)
        c = array(ROWS, TOKENS, 5, seed=2)

        def loss(x, w, args=args, axes=axes, c=c):
            return jnp.sum(c * jax.vmap(ragged_dot, axes)(x, w, args[2]))

        def each(x, w, args=args, axes=axes, c=c):
            total = 0
            for n in range(ROWS):
                one = [v[n] if a == 0 else v for v, a in
                       zip((x, w, args[2]), axes, strict=True)]  # fmt: skip
                total += jnp.sum(c[n] * lax.ragged_dot(*one))
            return total

        for n in range(ROWS):
            one = [v[n] if a == 0 else v for v, a in zip(args, axes, strict=True)]
            close(y[n], lax.ragged_dot(*one), 1e-12)
        found = jax.grad(loss, (0, 1))(*args[:2])
        for g, want in zip(found, jax.grad(each, (0, 1))(*args[:2]), strict=True):
            close(g, want, 1e-12)
    twice = jax.vmap(jax.vmap(ragged_dot, (0, None, 0)), (0, None, 0))
    y = twice(x.reshape(2, 2, TOKENS, 4), w[0], sizes.reshape(2, 2, EXPERTS))
    for n in range(ROWS):
        close(y[n // 2, n % 2], lax.ragged_dot(x[n], w[0], sizes[n]), 1e-12)
