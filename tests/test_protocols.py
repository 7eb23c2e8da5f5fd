"""What other libraries ask of adapted trees, and what JAX checks of their use."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import flora
import flora.quantize
from tests.support.contract import P, array, named_equations

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


CONFIGS = [
    flora.LoraConfig(),
    flora.LoraConfig(init=flora.initializers.orthogonal(1e-3), target=re.compile("w")),
    flora.LoraConfig(
        rank_pattern={"w": 4}, layouts={"w": flora.Layout((0,), (1,), (2,))},
        init=flora.initializers.gaussian("qwix"), variant=flora.variants.VeRA(seed=3)),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_are_copied_pickled_and_hashed(config):
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again == config
        assert hash(again) == hash(config)
    a, _ = again.init(jax.random.key(0), (4, 2), (2, 3), jnp.float32)
    assert (a == config.init(jax.random.key(0), (4, 2), (2, 3), jnp.float32)[0]).all()
    static = jax.jit(lambda x, config: x * config.rank, static_argnames="config")
    assert static(1.0, config) == config.rank


def test_trees_reports_and_errors_are_copied_and_pickled():
    fn, config = (lambda p, x: x @ p["w"]), flora.LoraConfig(rank=2, target="w")
    tree = flora.init(jax.random.key(0), config, fn, MATRIX, X)
    stored = flora.quantize.quantize(tree, "nf4", target="w", block=4)
    for x in (tree, stored, flora.split(tree)[1]):
        for again in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
            assert jax.tree.structure(again) == jax.tree.structure(x)
            for y, z in zip(jax.tree.leaves(again), jax.tree.leaves(x), strict=True):
                assert (y == z).all()
    for x in (flora.coverage(fn, MATRIX, X), flora.summary(tree)):
        assert pickle.loads(pickle.dumps(x)) == x
    with pytest.raises(flora.LoraError) as error:
        flora.merge(MATRIX)
    again = pickle.loads(pickle.dumps(error.value))
    assert (type(again), str(again)) == (type(error.value), str(error.value))


@pytest.mark.parametrize("form", ["direct", "thin_last", "concat"])
def test_profiles_name_the_low_rank_products(form):
    def fn(p, x):
        with jax.named_scope("head"):
            return x @ p["w"]

    def loss(tree, x):
        return jnp.sum(flora.lora(fn)(tree, x) ** 2)

    config, x = flora.LoraConfig(rank=2, target="w", form=form), jnp.ones((3, 8))
    tree = flora.init(jax.random.key(0), config, fn, MATRIX, x)
    jaxpr = jax.make_jaxpr(flora.value_and_grad(loss))(tree, x)
    found = []
    for name, e in named_equations(jaxpr):
        if e.primitive is not P.dot_general:
            continue
        shapes = [v.aval.shape for v in (*e.invars, *e.outvars)]
        assert "head" in name
        assert ("lora" in name) == any(2 in shape for shape in shapes)
        found.append("lora" in name)
    assert set(found) == {True, False}


def test_no_constant_goes_to_the_device_unasked(tmp_path):
    """Under `jax.transfer_guard`, as far as JAX itself does without."""
    fn, path, key = (
        (lambda p, x: x @ p["w"] * p["s"]),
        tmp_path / "a",
        jax.random.key(0),
    )
    params = MATRIX | {"s": jnp.ones(8)}
    with jax.transfer_guard("disallow"):
        for variant in (None, flora.variants.DoRA(), flora.variants.VeRA()):
            config = flora.LoraConfig(
                rank=2, target="w", train="s", dropout=0.1, variant=variant
            )
            tree = flora.init(key, config, fn, params, X)
            tx = flora.optimizer(optax.adamw(1e-3), tree)

            @jax.jit
            def step(tree, key, x, tx=tx):
                keyed = flora.with_dropout(tree, key)
                grads = flora.value_and_grad(lambda t: flora.lora(fn)(t, x).sum())(
                    keyed
                )
                updates, _ = tx.update(grads[1], tx.init(tree), tree)
                return optax.apply_updates(tree, updates)

            tree = step(tree, key, X)
            flora.with_dropout(tree, key)
            flora.merge(tree)
            flora.join(*flora.split(tree))
            flora.save(path, tree)
            flora.load(path, params)
            str(flora.summary(tree)), str(flora.coverage(fn, tree, X))
