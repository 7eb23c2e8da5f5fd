import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from tests.support import contract
from tests.support.contract import array
from tests.support.registry import MODELS, normal


class Model(nn.Module):
    """Takes what models take: flags, methods, mutable collections, rngs, keywords."""

    @nn.compact
    def __call__(self, x, train, *, mode="plain", extra=None, mask=None):
        x = nn.Dense(11)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = jnp.where(mask, x, 0) if mask is not None else x
        y = nn.Dense(7)(x)
        return {"y": y, "mode": mode, "extra": extra, "n": 3, "shape": y.shape}


class TwoMethods(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(5), nn.Dense(6)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.encoder(x)


X = normal(4, 6)
MODULE = Model()
VARIABLES = MODULE.init(jax.random.key(0), X, False)


def adapted():
    config = flora.LoraConfig(rank=2)
    key = jax.random.key(1)
    return flora.init(key, config, MODULE.apply, VARIABLES, X, False)


def test_takes_what_the_function_takes():
    apply, tree = flora.lora(MODULE.apply), adapted()
    rngs = {"dropout": jax.random.key(3)}
    calls = [
        {"x": X, "train": False},
        {"x": X, "train": True, "mutable": ["batch_stats"], "rngs": rngs},
        {"x": X, "train": False, "mode": "other", "extra": (None, "text", 4)},
        {"x": X, "train": False, "mask": np.arange(11) > 4},
        {"x": np.asarray(X), "train": np.bool_(False)},
    ]
    for call in calls:
        got, want = apply(tree, **call), MODULE.apply(VARIABLES, **call)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert type(x) is type(y)
            assert np.array_equal(x, y)
    assert apply.__name__ == "apply"


@pytest.mark.parametrize("method", ["encode", TwoMethods.encode])
def test_methods(method):
    module = TwoMethods()
    variables = module.init(jax.random.key(0), X)
    config = flora.LoraConfig(rank=2, target="encoder/kernel")
    tree = flora.init(
        jax.random.key(0), config, module.apply, variables, X, method=method
    )
    tree = contract.randomized(tree)
    got = flora.lora(module.apply)(tree, X, method=method)
    contract.close(got, module.apply(flora.merge(tree), X, method=method))


def test_a_weight_used_as_an_array_says_what_to_write():
    with pytest.raises(TypeError, match=r"Run the function through flora.lora\(fn\)"):
        MODULE.apply(adapted(), X, False)
    assert repr(adapted()["params"]["Dense_0"]["kernel"]) == (
        "LoraWeight(float32[6,11], in=0 out=1, rank=2, scale=8)"
    )


def test_changed_collections_come_back():
    model = MODELS["batch norm"]()
    tree = contract.adapt(model.fn, model.params, *model.args, target="kernel")
    _, updates = jax.jit(flora.lora(model.fn))(tree, *model.args)
    _, want = model.fn(model.params, *model.args)
    contract.close(updates, want)
    tree = tree | updates
    flora.lora(model.fn)(tree, *model.args)


@pytest.mark.parametrize("name", ["scanned decoder", "nnx decoder", "plain einsums"])
def test_a_plain_tree_costs_nothing(name):
    model = MODELS[name]()

    def text(fn):
        return str(jax.make_jaxpr(fn)(model.params, *model.args))

    assert text(flora.lora(model.fn)) == text(model.fn)
    counts = []

    def fn(params, *args):
        counts.append(1)
        return model.fn(params, *args)

    flora.lora(fn)(model.params, *model.args)
    assert counts == [1]


def test_order_does_not_matter():
    tree = contract.randomized(adapted())
    apply, plain = flora.lora(MODULE.apply), MODULE.apply
    first = apply(tree, X, False)["y"]
    before = plain(VARIABLES, X, False)["y"]
    again = apply(tree, X, False)["y"]
    after = plain(VARIABLES, X, False)["y"]
    assert jnp.array_equal(first, again)
    assert jnp.array_equal(before, after)
    assert not jnp.array_equal(first, after)


def test_no_recompilation_on_the_second_call():
    traced = []

    def fn(params, x):
        traced.append(1)
        return x @ params["kernel"]

    params, x = (
        {"kernel": array(7, 5, dtype=jnp.float32)},
        array(3, 7, dtype=jnp.float32),
    )
    tree = contract.adapt(fn, params, x)
    traced.clear()
    apply = jax.jit(flora.lora(fn))
    apply(tree, x)
    apply(contract.randomized(tree), 2 * x)
    assert len(traced) == 1


def test_the_base_is_an_argument_and_no_constant():
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    params, x = {"kernel": jnp.ones((7, 5))}, jnp.ones((3, 7))
    tree = contract.adapt(fn, params, x)
    jaxpr = jax.make_jaxpr(jax.jit(flora.lora(fn)))(tree, x)
    assert not jaxpr.consts
    assert all(not getattr(e.params.get("jaxpr"), "consts", ()) for e in jaxpr.eqns)


def test_closures_over_arrays_and_tracers():
    shift = jnp.arange(5.0)

    @jax.jit
    def outer(tree, x, more):
        def fn(p, x):
            return x @ p["kernel"] + shift + more

        return flora.lora(fn)(tree, x), fn(flora.merge(tree), x)

    params, x = {"kernel": jnp.ones((7, 5))}, array(3, 7, dtype=jnp.float32)
    tree = contract.adapt(lambda p, x: x @ p["kernel"], params, x)
    contract.close(*outer(contract.randomized(tree), x, jnp.ones(5)))


def test_nested_lora(x64):
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    params, x = {"w": array(7, 5)}, array(3, 7)
    inner = flora.lora(fn)
    tree = contract.randomized(contract.adapt(fn, params, x, dtype=jnp.float64))

    def through(p, x):  # a function that adapts its own weights once more
        own = tree["w"]
        again = flora.LoraWeight(p["w"], own.a, own.b, layout=own.layout, rank=2)
        return inner({"w": again}, x)

    contract.close(flora.lora(inner)(tree, x), inner(tree, x))
    twice = flora.lora(through)(tree, x)
    w = flora.merge(tree)["w"] + 0.5 * tree["w"].a @ tree["w"].b
    contract.close(twice, fn({"w": w}, x))


def test_the_fallback_can_be_allowed_per_call():
    def fn(p, x):
        return x @ jnp.tanh(p["w"])

    def linear(p, x):
        return x @ p["w"]

    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    tree = contract.randomized(contract.adapt(linear, params, x))
    with pytest.raises(flora.LoraError, match=r"'tanh' at test_lora.py:\d+ \(fn\)"):
        flora.lora(fn)(tree, x)
    got = flora.lora(fn, fallback="materialize")(tree, x)
    contract.close(got, fn(flora.merge(tree), x))


def test_weights_returned_as_they_came_in_are_the_same_nodes():
    @jax.jit
    def fn(p, x):
        p = jax.checkpoint(lambda p: p | {"b": p["b"] + 1})(p)
        return {"y": x @ p["w"], "state": p}

    params, x = {"w": jnp.ones((7, 5)), "b": jnp.ones(5)}, jnp.ones((3, 7))
    tree = contract.randomized(contract.adapt(fn, params, x, target="w"))
    out = flora.lora(fn)(tree, x)
    assert jax.tree.structure(out["state"]) == jax.tree.structure(tree)
    assert out["state"]["w"].a is tree["w"].a
    again = flora.lora(fn)(out["state"], x)
    contract.close(again["y"], fn(flora.merge(tree), x)["y"])
    assert again["state"]["b"][0] == 3


def test_weights_returned_changed_are_refused_by_name():
    def fn(p, x):
        return {"y": x @ p["w"], "state": p["w"].T}

    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    tree = contract.adapt(lambda p, x: x @ p["w"], params, x)
    message = r"returns 'w' changed as output \['state'\], and"
    with pytest.raises(flora.LoraError, match=message):
        flora.lora(fn)(tree, x)
    tree = contract.randomized(tree)
    out = flora.lora(fn, fallback="materialize")(tree, x)
    contract.close(out, fn(flora.merge(tree), x))


def test_nan_and_infinity_pass_through():
    params = {"w": array(7, 5, dtype=jnp.float32).at[0, 0].set(jnp.nan)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = array(3, 7, dtype=jnp.float32)
    tree = contract.adapt(fn, params, x)
    got = flora.lora(fn)(tree, x)
    assert jnp.isnan(got[:, 0]).all()
    assert jnp.array_equal(got[:, 1:], fn(params, x)[:, 1:])


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_batches(rows):
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((rows, 7))
    tree = contract.adapt(fn, params, jnp.ones((3, 7)))
    assert flora.lora(fn)(tree, x).shape == (rows, 5)


def test_effects_happen_once():
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        y = x @ p["w"]
        jax.debug.callback(lambda v: seen.append(float(v)), y.sum())
        return y

    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    tree = contract.adapt(fn, params, x)
    assert seen == []
    jax.jit(flora.lora(fn))(tree, x).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [21.0, 105.0]


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16, jnp.complex64])
def test_bases_of_other_dtypes(dtype):
    compute = jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype

    def fn(p, x):
        return x @ p["w"].astype(compute)

    params, x = {"w": normal(7, 5).astype(dtype)}, normal(3, 7).astype(compute)
    tree = contract.adapt(fn, params, x)
    assert jnp.array_equal(flora.lora(fn)(tree, x), fn(params, x))
    tree = contract.randomized(tree)
    got, merged = flora.lora(fn)(tree, x), flora.merge(tree)
    assert merged["w"].dtype == dtype
    want = fn(merged, x).astype(jnp.complex64)
    loose = 0.1 if dtype == jnp.float8_e4m3fn else 4e-3  # the merge rounds to dtype
    assert jnp.abs(got - want).max() <= loose * jnp.abs(want).max()


def test_what_does_not_train_gets_no_gradient():
    def fn(p, x):
        y = x @ p["w"] + p["bias"]
        return y * p["scale"] + p["table"][0]

    params = {"w": jnp.ones((7, 5)), "bias": jnp.ones(5), "scale": jnp.ones(5)}
    params["table"], x = jnp.ones((3, 5)), jnp.ones((3, 7))
    tree = contract.adapt(fn, params, x, target="w", train="scale")
    grads = jax.grad(lambda t: flora.lora(fn)(t, x).sum())(contract.randomized(tree))
    assert not any(jnp.any(g) for g in (grads["w"].base, grads["bias"], grads["table"]))
    for part in (grads["w"].a, grads["w"].b, grads["scale"].value):
        assert part.any()
    # The other arguments are differentiable as ever.
    dx = jax.grad(lambda x: flora.lora(fn)(tree, x).sum())(x)
    contract.close(dx, jax.grad(lambda x: fn(params, x).sum())(x))


def test_a_tree_with_only_whole_leaves_trains_them():
    tree = {"w": flora.Trained(jnp.ones((7, 5))), "v": jnp.ones((5, 4))}
    loss = lambda t: flora.lora(lambda p: (p["w"] @ p["v"]).sum())(t)  # noqa: E731
    grads = jax.grad(loss)(tree)
    assert (grads["w"].value == 4).all()
    assert not grads["v"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flora.lora(None), r"lora\(\) got a NoneType; expected the function"),
        (lambda: flora.lora({}), "got a dict"),
        (lambda: flora.lora(abs, fallback="no"), "fallback='no'. Write 'error' or"),
        (lambda: flora.lora(abs, form="fast"), "form='fast'. Write one of 'auto'"),
    ],
)
def test_what_lora_is_given_is_checked_at_once(make, message):
    with pytest.raises(flora.LoraError, match=message):
        make()
