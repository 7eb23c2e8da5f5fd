"""Products of the same activations are computed together, and nothing else changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flora
from flora._trace.compat import P
from flora._trace.share import together
from tests.support.contract import (
    adapt,
    array,
    check,
    close,
    close_to_merged,
    equations,
    named_equations,
    randomized,
)

JOINT = ["thin_first", "thin_last", "concat"]
ADDED = {P.add, P.mul, P.dot_general, P.concatenate}  # by forms that copy W


def attention(params, x):
    """Each projection is used before the next one is made; k's weight is cast late."""
    q = jnp.tanh(x @ params["q"] + params["bias"])
    k = jnp.einsum("bti,ihd->bthd", x, params["k"].astype(x.dtype))
    v = x @ params["v"].T
    return q.sum(-1, keepdims=True) * v + k.reshape(*x.shape[:2], -1).sum(-1)[..., None]


def attention_case(dtype=jnp.float64):
    params = {
        "q": array(6, 5, seed=1, dtype=dtype),
        "k": array(6, 2, 4, seed=2, dtype=jnp.float32),
        "v": array(7, 6, seed=3, dtype=dtype),
        "bias": array(5, dtype=dtype),
    }
    return params, array(2, 3, 6, dtype=dtype)


SETTINGS = {
    "one rank": {},
    "several ranks": {"rank_pattern": {"k": 1, "v": 4}},
    "several scales": {"alpha_pattern": {"k": 1.0}},
    "one leaf in another form": {"form_pattern": {"q": "direct"}},
    "two forms": {"form_pattern": {"k": "thin_first"}},
    "one leaf merged": {"form_pattern": {"v": "merged"}},
    "one leaf not adapted": {"target": ("q", "v")},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("form", JOINT)
def test_the_contract_holds(x64, form, name):
    params, x = attention_case()
    settings = {"form": form, "dtype": jnp.float64, "tolerance": 1e-6}
    # The longer sum of [x z] [W ; Q] may round otherwise; so may what remat compiles.
    fn = jax.checkpoint(attention) if form == "concat" else attention
    check(fn, params, x, views=ADDED, **settings | SETTINGS[name])


def products_with(jaxpr, size):
    """How many products sum over axes of that size."""
    return sum(
        eqn.primitive is P.dot_general
        and [eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0]]
        == [size]
        for eqn in equations(jaxpr)
    )


@pytest.mark.parametrize("form", JOINT)
def test_x_meets_the_factors_once(form):
    params, x = attention_case(jnp.float32)
    adapted = adapt(attention, params, x, form=form)
    run = flora.lora(attention)
    jaxpr = jax.make_jaxpr(run)(adapted, x)
    longer = products_with(jaxpr, 6 + 2)  # [x z] [W ; Q]
    assert longer == (3 if form == "concat" else 0)
    assert products_with(jaxpr, 6) + longer == 3 + 1
    alone = flora.lora(attention, form="merged")
    assert products_with(jax.make_jaxpr(alone)(adapted, x), 6) == 3 + 3


@pytest.mark.parametrize("form", JOINT)
def test_inside_scan_and_remat(x64, form):
    params = {"gate": array(3, 6, 8, seed=1), "up": array(3, 6, 8, seed=2)}
    params["down"] = array(3, 8, 6, seed=3)

    @jax.checkpoint
    def layer(x, p):
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    def fn(params, x):
        return jax.lax.scan(layer, x, params)[0]

    x = array(4, 6)
    adapted = randomized(adapt(fn, params, x, form=form, dtype=x.dtype))
    close_to_merged(fn, adapted, x)


class Block(nn.Module):
    """Casts its input and its weights anew for each projection, as Linen layers do."""

    @nn.compact
    def __call__(self, x):
        q = nn.Dense(8, dtype=jnp.bfloat16, name="query")(x)
        k = nn.Dense(8, dtype=jnp.bfloat16, name="key")(x)
        return nn.silu(q) * k


def test_casts_and_names_of_linen_layers():
    x = array(4, 6, dtype=jnp.float32)
    variables = Block().init(jax.random.key(0), x)
    adapted = randomized(adapt(Block().apply, variables, x, form="thin_last"))
    run = flora.lora(Block().apply)
    jaxpr = jax.make_jaxpr(run)(adapted, x)
    assert products_with(jaxpr, 6) == 2 + 1
    each = named_equations(jaxpr)
    names = [name for name, eqn in each if eqn.primitive is P.dot_general]
    for name in ("query", "key"):
        assert sum(name in x for x in names) == 2, names  # x W and z Q
    close(run(adapted, x), Block().apply(flora.merge(adapted), x), {"bfloat16": 3e-2})


def test_dropout_keeps_its_masks(x64):
    params, x = attention_case()
    adapted = randomized(adapt(attention, params, x, form="concat", dropout=0.5))
    dropped = flora.with_dropout(adapted, jax.random.key(3))
    wanted = flora.lora(attention, form="direct")(dropped, x)
    close(flora.lora(attention)(dropped, x), wanted)


def steps(fn, *args):
    """What is taken together of a function whose first argument is a weight's dict."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    schedule = together(jaxpr.eqns, jaxpr.invars[: len(jax.tree.leaves(args[0]))])
    order = [i for step in schedule.steps for i in step]
    assert sorted(order) == list(range(len(jaxpr.eqns)))
    return [
        [jaxpr.eqns[i].primitive.name for i in step]
        for step in schedule.steps
    ]  # fmt: skip


def test_only_products_of_one_x_that_need_nothing_later_are_taken_together():
    w = {"a": array(5, 5, dtype=jnp.float32), "b": array(5, 5, dtype=jnp.float32)}
    x = array(3, 5, dtype=jnp.float32)
    pair = ["dot_general"] * 2
    assert pair in steps(lambda w, x: (jnp.tanh(x @ w["a"]), x @ w["b"]), w, x)
    assert pair in steps(lambda w, x: (x @ w["a"]) * (x @ w["b"].T), w, x)
    assert pair not in steps(lambda w, x: (x @ w["a"]) @ w["b"], w, x)
    assert pair not in steps(lambda w, x: x @ w["a"] + x.T[:, :3].T @ w["b"], w, x)
    assert pair not in steps(lambda w, x: (x @ w["a"], w["b"] @ x.T), w, x)
    # A weight that activations change is not at hand before they are.
    late = steps(lambda w, x: (x @ w["a"], x @ (w["b"] * x[0])), w, x)
    assert pair not in late


def test_effects_keep_their_order(capsys):
    params = {"a": array(5, 5, dtype=jnp.float32), "b": array(5, 5, dtype=jnp.float32)}

    def fn(params, x):
        y = x @ params["a"]
        jax.debug.print("first", ordered=True)
        y = y * (x @ params["b"])
        jax.debug.print("second", ordered=True)
        return y

    x = array(3, 5, dtype=jnp.float32)
    adapted = randomized(adapt(fn, params, x, form="concat"))
    capsys.readouterr()
    close(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x))
    jax.effects_barrier()
    assert capsys.readouterr().out.split() == ["first", "second"] * 2
