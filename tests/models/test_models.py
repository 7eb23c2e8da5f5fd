import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora
from tests.support import contract
from tests.support.registry import MODELS

# What takes long to compile in every transformation: default tests compile it in two.
LARGE = ("transformer block", "scanned decoder", "nnx decoder", "lstm", "gru")


@pytest.mark.parametrize("name", LARGE)
def test_contract_of_large_models(name):
    contract.check_model(MODELS[name]())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in MODELS],
)
def test_contract_of_models(name):
    model = MODELS[name]()
    adapted = contract.check(model.fn, model.params, *model.args, target=model.target,
                             **({"tolerance": 2e-5} | model.settings))  # fmt: skip
    report = flora.coverage(model.fn, model.params, *model.args)
    for row in flora.summary(adapted).rows:
        if row.role == "lora":
            assert report[row.path].status == "factored"
            assert report[row.path].layout == row.layout


@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_inputs_and_sharded(name):
    model = MODELS[name]()
    adapted = contract.randomized(
        contract.adapt(model.fn, model.params, *model.args, target=model.target)
    )
    apply = jax.jit(flora.lora(model.fn))
    expected = apply(adapted, *model.args)
    two = [jnp.stack([x, x]) for x in model.args]
    over = jax.jit(jax.vmap(flora.lora(model.fn), (None, 0)))(adapted, *two)
    tolerance = model.settings.get("tolerance", 2e-5)
    contract.close(jax.tree.map(lambda y: y[1], over), expected, tolerance)
    mesh = Mesh(np.array(jax.devices("cpu")), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    args = [jnp.concatenate([x] * 8) for x in model.args]
    want = jax.jit(model.fn)(flora.merge(adapted), *args)
    got = apply(jax.device_put(adapted, replicated), *jax.device_put(args, by_row))
    contract.close(got, want, tolerance)


class CachedDecoder(nn.Module):
    """A decoder that keeps keys and values between calls."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(31, 8)
        x = embed(ids)
        for _ in range(2):
            attention = nn.MultiHeadDotProductAttention(2, qkv_features=12, decode=True)
            x = x + attention(nn.LayerNorm()(x))
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(22)(x)))
        return embed.attend(x)


def generate(apply, params, cache, first, steps):
    """Greedy tokens, one at a time, with the cache in a loop's state."""

    def step(i, carry):
        cache, ids, out = carry
        logits, changed = apply(
            {"params": params, "cache": cache}, ids, mutable=["cache"]
        )
        ids = logits[:, -1:].argmax(-1)
        return changed["cache"], ids, out.at[:, i].set(ids[:, 0])

    out = jnp.zeros((first.shape[0], steps), first.dtype)
    return jax.lax.fori_loop(0, steps, step, (cache, first, out))[2]


def test_decoding_with_a_cache_gives_the_merged_model_s_tokens():
    module, steps = CachedDecoder(), 12
    variables = module.init(jax.random.key(0), jnp.ones((4, steps), jnp.int32))
    params, cache = variables["params"], variables["cache"]
    first = jnp.array([[3], [1], [4], [15]], jnp.int32)

    def one(params):
        tree = {"params": params, "cache": cache}
        return module.apply(tree, first, mutable=["cache"])

    target = ["kernel", "embedding"]
    tree = contract.adapt(one, params, target=target, alpha=2.0)
    tree = contract.randomized(tree)

    @jax.jit
    def adapted(tree):
        return generate(flora.lora(module.apply), tree, cache, first, steps)

    @jax.jit
    def outside(tree):  # the whole loop through flora.lora
        run = lambda p: generate(module.apply, p, cache, first, steps)  # noqa: E731
        return flora.lora(run)(tree)

    want = generate(module.apply, flora.merge(tree), cache, first, steps)
    assert jnp.array_equal(adapted(tree), want)
    assert jnp.array_equal(outside(tree), want)
    assert not jnp.array_equal(
        want, generate(module.apply, params, cache, first, steps)
    )
    assert len(np.unique(want)) > 3
