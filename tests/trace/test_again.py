"""Activations that the backward pass makes again: which, of what, and to what end."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flora
from flora._algebra.choice import Target, makes_again, may_make_again
from flora._trace import interpret
from flora._trace.again import made, recipes
from flora._trace.compat import P
from tests.support.contract import adapt, array, close, equations, scalar

X = jnp.ones((6, 8))
UP, DOWN, HALF = jnp.ones((8, 32)), jnp.ones((32, 8)), jnp.ones((16, 8))
BIAS, SCALE = jnp.ones(32), jnp.ones(8)


def found(fn, *args):
    """The recipes of a function's products, in the products' order."""
    eqns = jax.make_jaxpr(fn)(*args).eqns
    known = recipes(eqns)
    operands = [v for e in eqns if e.primitive is P.dot_general for v in e.invars]
    assert {*known} <= {*operands}
    return [known[v] for v in dict.fromkeys(operands) if v in known]


def shapes(recipe):
    return sorted(v.aval.shape for v in recipe.sources)


def norm(x, scale=SCALE):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), -1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + 1e-6) * scale).astype(x.dtype)


def layer_norm(x):
    return jax.nn.standardize(x) * SCALE + 1


def gated(y, split=None):
    gate, up = split(y, 2, -1) if split else (y[:, :16], y[:, 16:])
    return jnp.tanh(gate) * up


CHEAP = {
    "an activation": (lambda x: jnp.tanh(x @ UP) @ DOWN, [(6, 32)]),
    "a function of JAX's": (lambda x: jax.nn.gelu(x @ UP) @ DOWN, [(6, 32)]),
    "one with a derivative of its own": (
        lambda x: jax.nn.relu(x @ UP) @ DOWN,
        [(6, 32)],
    ),
    "after a bias, which is summed once": (
        lambda x: jax.nn.gelu(x @ UP + BIAS) @ DOWN,
        [(6, 32)],
    ),
    "a gate": (
        lambda x: (jax.nn.silu(x @ UP) * (x @ (2 * UP))) @ DOWN,
        [(6, 32), (6, 32)],
    ),
    "a gate joined with what it gates": (lambda x: gated(x @ UP) @ HALF, [(6, 32)]),
    "both of a split": (lambda x: gated(x @ UP, jnp.split) @ HALF, [(6, 32)]),
    "a norm": (lambda x: norm(x) @ UP, [(6, 8), (8,)]),
    "a norm with means": (lambda x: layer_norm(x) @ UP, [(6, 8), (8,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_made_again(name):
    fn, sources = CHEAP[name]
    (recipe,) = found(fn, X)
    statistics = {(6,), (6, 1)}
    assert [s for s in shapes(recipe) if s not in statistics] == sorted(sources)


DEAR = {
    "x itself": lambda x: x @ UP,
    "a product": lambda x: x @ UP @ DOWN,
    "a product in heads": lambda x: (x @ UP).reshape(6, 4, 8).reshape(6, 32) @ DOWN,
    "a sum of products": lambda x: (x @ UP + x @ (2 * UP)) @ DOWN,
    "a product that nothing else keeps": lambda x: (
        (x @ UP) * jax.nn.sigmoid(x @ (2 * UP)) + x @ (3 * UP)
    ) @ DOWN,
    "noise": lambda x: (
        jax.random.normal(jax.random.key(0), (6, 8)) @ UP
    ),
    "a part of a split": lambda x: jnp.split(x @ UP, 2, 1)[0] @ HALF,
    "a sorted x": lambda x: jnp.sort(x) @ UP,
}  # fmt: skip


@pytest.mark.parametrize("name", DEAR)
def test_what_is_kept(name):
    assert not found(DEAR[name], X)


def test_the_residual_stream_is_kept():
    """Not what it is a sum of, back to the first layer."""

    def model(x):
        for _ in range(3):
            x = x + jnp.tanh(norm(x) @ UP) @ DOWN
        return x

    for recipe in found(model, X):
        large = [s for s in shapes(recipe) if s in ((6, 8), (6, 32))]
        assert len(large) == 1


def test_equal_recipes_are_those_that_compute_the_same():
    def model(power, fn=jax.nn.silu):
        return lambda x: fn(norm(x) ** power @ UP) @ DOWN

    def own(x):
        return jnp.tanh(x)

    (norm2, silu), (again2, again_silu), (norm3, tanh) = (
        found(model(2.0), X), found(model(2.0), X), found(model(3.0, own), X)
    )  # fmt: skip
    assert (norm2, silu) == (again2, again_silu)
    assert len({norm2, silu, again2, again_silu}) == 2
    assert norm2 != norm3
    assert silu != tanh
    wide = found(model(2.0), jnp.ones((12, 8)))
    assert norm2 not in wide


def test_literals_count():
    first, second = (
        found(lambda x, by=by: (jnp.tanh(x @ UP) * by) @ DOWN, X)[0]
        for by in (2.0, 3.0)
    )
    assert first != second


def test_it_is_differentiated_as_what_it_stands_for(x64):
    x, y = array(6, 32), array(6, 32, seed=1)
    (recipe,) = found(lambda x, y: (jax.nn.silu(x * y) * y) @ DOWN, x, y)
    assert len(recipe.sources) == 2
    for fn in (functools.partial(made, recipe), recipe):
        close(fn(x, y), recipe(x, y))
    slopes = [
        jax.grad(lambda *xs, f=f: scalar(f(*xs)), (0, 1))(x, y)
        for f in (functools.partial(made, recipe), recipe)
    ]
    close(*slopes)


def test_masks_have_no_gradient():
    x, mask = array(6, 32, dtype=jnp.float32), jnp.arange(32) % 2 == jnp.ones((6, 1))
    model = lambda x, mask: (jnp.tanh(x) * jnp.exp(mask * x)) @ DOWN  # noqa: E731
    (recipe,) = found(model, x, mask)
    assert {v.aval.dtype for v in recipe.sources} == {x.dtype, mask.dtype}
    of = dict(zip((x.dtype, mask.dtype), (x, mask), strict=True))

    def run(fn):
        def loss(x):
            given = [x if v.aval.dtype == x.dtype else mask for v in recipe.sources]
            return scalar(fn(*given))

        return jax.grad(loss)(of[x.dtype])

    close(run(functools.partial(made, recipe)), run(recipe))


@pytest.fixture
def again(monkeypatch):
    """As on a TPU, where only large products are worth it."""
    for name in ("makes_again", "may_make_again"):
        monkeypatch.setattr(interpret, name, lambda *_: True)


class Block(nn.Module):
    """Norms, a gate, and a norm's result with several readers."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            h = nn.RMSNorm(name=f"norm{i}")(x)
            dense = functools.partial(nn.Dense, use_bias=False)
            gate = nn.silu(dense(32, name=f"gate{i}")(h)) * dense(32, name=f"up{i}")(h)
            x = x + dense(8, name=f"down{i}")(gate) + dense(8, name=f"beside{i}")(h)
        return x


TARGETS = {
    "every product": "*/kernel",
    "some of one x": ["gate*/kernel", "down0/kernel"],
    "the norm's scale too": ["*/kernel"],
}


@pytest.mark.parametrize("form", ["thin_first", "thin_last", "concat"])
@pytest.mark.parametrize("name", TARGETS)
def test_gradients_are_those_of_the_direct_form(again, x64, name, form):
    model, x = Block(), array(6, 8)
    params = jax.tree.map(jnp.float64, model.init(jax.random.key(0), x))
    train = ["*/scale"] if "scale" in name else []
    tree = adapt(model.apply, params, x, target=TARGETS[name], train=train)
    base, adapter = flora.split(tree)

    def slopes(form):
        run = flora.lora(model.apply, form=form)
        return jax.jit(
            jax.value_and_grad(lambda a, x: scalar(run(flora.join(base, a), x)), (0, 1))
        )(adapter, x)

    close(slopes(form), slopes("direct"))


def test_the_device_and_the_size_decide():
    v5e, v5p, v6e = map(Target, ("TPU v5 lite", "TPU v5", "TPU v6 lite"))
    large, half = 2**27, 2**26
    assert makes_again(v5e, large, widens=False)
    assert not makes_again(v5e, large, widens=True)
    assert not makes_again(v5e, large - 1, widens=False)
    for widens in (True, False):
        assert makes_again(v5p, half, widens)
        assert not makes_again(v5p, half - 1, widens)
        assert makes_again(v6e, half, widens) == widens
    assert may_make_again({"auto"}, v5p)
    assert not may_make_again({"auto", "concat"}, v5p)
    assert not may_make_again({"auto"}, Target("cpu", certain=False))


def kept(fn, *args):
    """Elements of arrays as large as an activation that the backward pass is given."""
    _, backward = jax.vjp(fn, *args)
    leaves = [x for x in jax.tree.leaves(backward) if getattr(x, "ndim", 0)]
    return sum(x.size for x in leaves if x.shape[0] == 24)


def test_less_is_kept(again):
    model, x = Block(), array(24, 8, dtype=jnp.float32)
    params = model.init(jax.random.key(0), x)
    base, adapter = flora.split(adapt(model.apply, params, x))

    def run(form, rule=lambda f: f):
        fn = rule(flora.lora(model.apply, form=form))
        return kept(lambda a, x: fn(flora.join(base, a), x), adapter, x)

    direct, again = run("direct"), run("thin_first")
    gates, streams, thin = 2 * 2 * 32, 2 * 8, 2 * 4 * 16
    assert again <= 24 * (gates + streams + thin)
    assert again < 0.7 * direct


class Tied(nn.Module):
    """An embedding whose rows are scaled and normalized before a product."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, 8, name="embed")
        x = embed(ids).astype(jnp.float32) * 8**0.5
        x = x + nn.Dense(8, name="dense")(nn.RMSNorm()(x))
        return embed.attend(jnp.tanh(x))


@pytest.mark.parametrize(
    "target", ["*/embedding", "*/kernel", ["*/embedding", "*/kernel"]], ids=str
)
def test_what_is_made_of_weights_is_kept(again, x64, target):
    model, ids = Tied(), jnp.arange(10).reshape(2, 5)
    params = jax.tree.map(jnp.float64, model.init(jax.random.key(0), ids))
    tree = adapt(model.apply, params, ids, target=target)
    base, adapter = flora.split(tree)
    losses = [
        jax.value_and_grad(
            lambda a, f=f: scalar(
                flora.lora(model.apply, form=f)(flora.join(base, a), ids)
            )
        )(adapter)
        for f in ("thin_first", "direct")
    ]
    close(*losses)


def test_operations_without_results_are_passed_over(again):
    def model(params, x):
        y = jnp.tanh(x @ params["up"])
        jax.debug.callback(lambda: None)
        return y @ params["down"]

    x, params = array(6, 8, dtype=jnp.float32), {"up": UP, "down": DOWN}
    base, adapter = flora.split(adapt(model, params, x))
    losses = [
        jax.value_and_grad(
            lambda a, f=f: scalar(flora.lora(model, form=f)(flora.join(base, a), x))
        )(adapter)
        for f in ("thin_first", "direct")
    ]
    close(*losses)


def test_under_remat_nothing_is_made_twice(again):
    model, x = Block(), array(6, 8, dtype=jnp.float32)
    params = model.init(jax.random.key(0), x)
    base, adapter = flora.split(adapt(model.apply, params, x))

    def tanhs(remat):
        def fn(params, x):
            return (jax.checkpoint(model.apply) if remat else model.apply)(params, x)

        run = flora.lora(fn, form="thin_first")
        grad = jax.grad(lambda a: scalar(run(flora.join(base, a), x)))
        eqns = equations(jax.make_jaxpr(grad)(adapter))
        return sum(e.primitive.name == "logistic" for e in eqns)

    assert tanhs(True) <= tanhs(False)
