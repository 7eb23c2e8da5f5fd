"""Ranks, alphas and a choice of layers within one stacked leaf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora

L, D = 3, 4


def stacked(params, x):
    def layer(h, w):
        return jnp.tanh(h @ w["up"]["kernel"] @ w["down"]["kernel"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"]


def unrolled(params, x):
    for i in range(L):
        w = params["layers"][str(i)]
        x = jnp.tanh(x @ w["up"]["kernel"] @ w["down"]["kernel"])
    return x @ params["head"]["kernel"]


def params_of():
    keys = iter(jax.random.split(jax.random.key(0), 3))

    def kernel(*stack):
        return {"kernel": jax.random.normal(next(keys), (*stack, D, D))}

    return {"layers": {"up": kernel(L), "down": kernel(L)}, "head": kernel()}


def apart(params):
    layers = {
        str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(L)
    }
    return {**params, "layers": layers}


CONFIGS = {
    "one layer": {"target": "layers/1/*"},
    "one leaf of a layer": {"target": ["layers/1/up/kernel", "head/kernel"]},
    "all but one": {"target": "kernel", "exclude": "layers/0/*"},
    "ranks": {"target": "kernel", "rank_pattern": {
        "layers/0/*": 4, "layers/2/up/kernel": 1}},
    "alphas": {"target": "kernel", "alpha_pattern": {"layers/[12]/down/kernel": 3.0}},
    "the first wins": {"target": "kernel", "rank_pattern": {
        "layers/1/up/*": 1, "up/kernel": 3, "layers/0/*": 4}},
    "stabilized": {"target": "kernel", "rank_stabilized": True,
                   "rank_pattern": {"layers/0/*": 4}},
    "DoRA": {"target": "kernel", "exclude": "layers/1/*",
             "variant": flora.variants.DoRA()},
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_unrolled_model_with_the_same_config(name):
    """The same leaves, ranks and scales; outputs and gradients of the same factors."""
    params, x = params_of(), jnp.ones((2, D))
    config = flora.LoraConfig(rank=2, alpha=8, dtype=jnp.float64, **CONFIGS[name])
    key = jax.random.key(1)
    tree = flora.init(key, config, stacked, params, x)
    other = flora.init(key, config, unrolled, apart(params), x)
    node = flora.LoraWeight

    def layer(leaf, i):
        return leaf[i] if not isinstance(leaf, node) else leaf.base[i]

    for part in ("up", "down"):
        leaf = tree["layers"][part]["kernel"]
        for i in range(L):
            alone = other["layers"][str(i)][part]["kernel"]
            if not isinstance(alone, node):
                if isinstance(leaf, node):
                    assert not leaf.a[i].any()
                    assert not leaf.b[i].any()
                    assert all(b.index != (i,) for b in leaf.blocks)
                continue
            # The stacked factors in the unrolled tree, with B away from zero.
            b = jax.random.normal(jax.random.fold_in(key, i), alone.b.shape)
            a = leaf.a[i, :, : alone.rank]
            assert a.any(0).all()
            assert not leaf.a[i, :, alone.rank :].any()
            other["layers"][str(i)][part]["kernel"] = dataclasses.replace(
                alone, a=a, b=b
            )
            leaf = dataclasses.replace(leaf, b=leaf.b.at[i, : alone.rank].set(b))
            if leaf.blocks:
                (own,) = [x for x in leaf.blocks if x.index == (i,)]
                assert (own.rank, own.scale) == (alone.rank, alone.scale)
            else:
                assert (leaf.rank, leaf.scale) == (alone.rank, alone.scale)
        tree["layers"][part]["kernel"] = leaf
    if isinstance(other["head"]["kernel"], node):
        other["head"]["kernel"] = tree["head"]["kernel"]

    def loss_of(fn):
        return lambda t: jnp.sum(flora.lora(fn)(t, x) ** 2)

    one, grads = flora.value_and_grad(loss_of(stacked))(tree)
    two, alone_grads = flora.value_and_grad(loss_of(unrolled))(other)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    assert one != loss_of(stacked)(params)
    for part in ("up", "down"):
        g = grads["layers"][part]["kernel"]
        for i in range(L):
            want = alone_grads["layers"][str(i)][part]["kernel"]
            if isinstance(want, node):
                r = want.a.shape[-1]
                np.testing.assert_allclose(g.a[i, :, :r], want.a, rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(g.b[i, :r], want.b, rtol=1e-9, atol=1e-12)
            elif isinstance(g, node):
                assert not any(x[i].any() for x in jax.tree.leaves((g.a, g.b, g.extra)))


def init(**config):
    x = jnp.ones((2, D))
    return flora.init(
        jax.random.key(0), flora.LoraConfig(rank=2, **config), stacked, params_of(), x
    )


def test_a_leaf_of_which_no_index_is_named_stays_plain():
    tree = init(target="layers/1/up/kernel")
    assert tree["layers"]["up"]["kernel"].blocks[0].index == (1,)
    assert isinstance(tree["layers"]["down"]["kernel"], jax.Array)


def test_one_rank_for_all_is_no_blocks():
    tree = init(target=["layers/[01]/*", "layers/2/*"])
    assert tree["layers"]["up"]["kernel"].blocks == ()
    tree = init(target="kernel", rank_pattern={"layers/[0-2]/*": 4})
    assert tree["layers"]["up"]["kernel"].rank == 4
    assert tree["layers"]["up"]["kernel"].blocks == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target": "layers/7/*"}, r"target: 'layers/7/\*' names no index"),
        ({"target": "kernel", "exclude": "layers/3/*"}, "exclude: 'layers/3/"),
        (
            {"target": "kernel", "rank_pattern": {"layers/3/*": 2}},
            "rank_pattern: 'layers/3/",
        ),
        (
            {
                "target": "kernel",
                "alpha_pattern": {"up/kernel": 1.0, "layers/1/up/*": 2.0},
            },
            "alpha_pattern: all that 'layers/1/up/",
        ),
        (
            {
                "target": "kernel",
                "rank_pattern": {"layers/[01]/*": 4, "layers/1/*": 2},
            },
            "rank_pattern: 'layers/1/.*' decides for no index",
        ),
        ({"target": "head/0/kernel"}, "selects none of the 3 leaves"),
    ],
)  # fmt: skip
def test_what_decides_nothing_is_named(config, message):
    with pytest.raises(flora.LoraError, match=message):
        init(**config)


def test_a_plan_has_the_same_blocks():
    shapes = jax.eval_shape(params_of)
    config = flora.LoraConfig(rank=2, target="layers/1/*")
    x = jax.ShapeDtypeStruct((2, D), jnp.float32)
    plan = flora.init(jax.random.key(0), config, stacked, shapes, x)
    leaf = plan["layers"]["up"]["kernel"]
    assert leaf.blocks == init(target="layers/1/*")["layers"]["up"]["kernel"].blocks
    assert flora.summary(plan).trained == 2 * 2 * (D + D)
