"""Operations are compared by what they compute, and traced once for equal layers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._algebra.axes import Named, undiscovered
from flora._algebra.low_rank import drop
from flora._trace.rules import context, dot
from flora._trace.rules.product import Operation, Scaling, multiplied, plain
from tests.support import contract
from tests.support.contract import array
from tests.support.named import factored, whole


def eqns(fn, *args):
    """The products of a function; its own trace each time."""
    found = contract.equations(jax.make_jaxpr(fn)(*args))
    return [e for e in found if e.primitive is contract.P.dot_general]


def change(operation, w, x):
    return x


def scaling(operation, w, x):
    return Scaling(w.output_scale, ())


X = jnp.ones((3, 5))
W = jnp.ones((5, 4))


def test_the_same_product_twice_is_equal():
    first, second = eqns(lambda x, w: (x @ w, (x + 1) @ w), X, W)
    assert first is not second
    for static in ((), ("name",)):
        one, other = (
            Operation(eqn, change, scaling, 1, *static) for eqn in (first, second)
        )
        assert one == other
        assert hash(one) == hash(other)
    assert one != "another"


@pytest.mark.parametrize(
    ("fn", "args"),
    {
        "precision": (lambda x, w: jnp.matmul(x, w, precision="highest"), (X, W)),
        "dtype of x": (lambda x, w: x @ w, (X.astype(jnp.bfloat16), W)),
        "dtype of y": (
            lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float16), (X, W)
        ),
        "shape of x": (lambda x, w: x @ w, (X[:2], W)),
        "shape of w": (lambda x, w: x @ w, (X, W[:, :2])),
    }.values(),
)  # fmt: skip
def test_other_products_are_not_equal(fn, args):
    (mine,), (other,) = eqns(lambda x, w: x @ w, X, W), eqns(fn, *args)
    assert Operation(mine, change, scaling, 1) != Operation(other, change, scaling, 1)


def test_the_summed_axes_tell_products_apart():
    one, other = eqns(lambda x: (x @ x, jnp.einsum("ij,kj->ik", x, x)), W[:4])
    assert Operation(one, change, scaling, 1) != Operation(other, change, scaling, 1)


def test_what_is_asked_of_a_product_counts_too():
    (eqn,) = eqns(lambda x, w: x @ w, X, W)
    one = Operation(eqn, change, scaling, 1)
    others = [
        Operation(eqn, change, scaling, 0),
        Operation(eqn, dot._change, scaling, 1),
        Operation(eqn, change, dot._scaling, 1),
        Operation(eqn, change, scaling, 1, "name"),
    ]
    assert all(one != other for other in others)


@pytest.mark.parametrize("side", [0, 1])
def test_the_base_meets_the_equation_as_it_stands(side):
    (eqn,) = eqns(lambda x, w: x @ w, X, W)
    pair = array(3, 5, dtype=jnp.float32), array(5, 4, seed=1, dtype=jnp.float32)
    w, x = pair if side == 0 else pair[::-1]
    got = Operation(eqn, change, scaling, side).base(undiscovered(w, "w"), x)
    np.testing.assert_array_equal(got, jnp.matmul(*pair))


def product(**settings):
    """An equation x W, its operation, and weights and activations for it."""
    (eqn,) = eqns(lambda x, w: x @ w, array(3, 5), array(5, 4))
    w = factored([[("0", 5, "in")], [("1", 4, "out")]], **settings)
    return Operation(eqn, dot._change, dot._scaling, 1), w, array(3, 5, seed=7)


def test_plain_is_the_product_with_the_sum(x64):
    operation, w, x = product()
    contract.close(plain(context(), operation, w, x), x @ whole(w))
    pure = dataclasses.replace(w, base=None)
    contract.close(plain(context(), operation, pure, x), x @ whole(pure))
    bare = w.frozen(w.base)
    contract.close(plain(context(), operation, bare, x), x @ w.base)


def test_while_uses_are_recorded_a_kind_of_product_is_evaluated_once(x64):
    operation, w, x = product()
    ctx = context({})
    first = plain(ctx, operation, w, x)
    assert plain(ctx, operation, w, x + 1) is first
    assert plain(ctx, operation, w.frozen(w.base), x) is not first


@pytest.mark.parametrize("met", ["in", "out"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_multiplied(x64, met, scaled, dropped, base):
    """What adapting changes, output scale included, sees x dropped; x W does not."""
    operation, w, x = product(columns=scaled, dropout=0.5)
    eqn = operation.eqn
    if met == "out":
        (eqn,), x = eqns(lambda x, w: x @ w, array(3, 4), array(4, 5)), x[:, :4]
        w = dataclasses.replace(w, axes=w.axes[::-1], base=w.base.T)
    if not base:
        w = dataclasses.replace(w, base=None)
    c = np.asarray(w.output_scale.array) if scaled else np.ones(4)
    bare = whole(w.without("scale")) - (0 if w.base is None else np.asarray(w.base))
    frozen = 0 if w.base is None else np.asarray(w.base)
    seen = x
    if dropped:
        key = Named(jax.random.split(jax.random.key(0), 1)[0], ())
        w = dataclasses.replace(w, factors={**w.factors, "key": key})
        seen = np.asarray(drop(x, w, 0))
        assert (seen == 0).any()
    adapted = (frozen + bare) * (c if met == "in" else c[:, None])
    # x W + x' (W' - W), of which x' is dropped and W' is adapted.
    want = np.asarray(x) @ (0 * adapted + frozen) + seen @ (adapted - frozen)

    def sizes(operation, w, x):
        y, axis = ("1", "0") if met == "in" else ("0", "1")
        of_x, of_y = ((n, size) for n, size in zip((axis, y), bare.shape, strict=True))
        return Scaling(w.output_scale, [("t", 3), of_y], [("t", 3), of_x])

    operation = Operation(eqn, dot._change, sizes, 1)
    got = multiplied(context(), operation, w, x)
    contract.close(got, jnp.asarray(want))


# --- Traced once ----------------------------------------------------------------------

LAYERS = 20


def deep(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def gradient_step(fn):
    def step(adapted, *args):
        grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, *args) ** 2).sum())
        return grads(adapted)

    return jax.jit(step)


@pytest.fixture
def changes(monkeypatch):
    """The low-rank terms that are traced, from nothing that JAX remembers."""
    seen, own = [], dot._change

    def counted(operation, w, x):
        seen.append(x.shape)
        return own(operation, w, x)

    monkeypatch.setattr(dot, "_change", counted)
    return seen


def test_equal_layers_are_traced_once(changes):
    params = [array(6, 6, seed=i, dtype=jnp.float32) for i in range(LAYERS)]
    x = array(3, 6, dtype=jnp.float32)
    adapted = contract.randomized(contract.adapt(deep, params, x))
    changes.clear()
    step = gradient_step(deep)
    lowered = step.lower(adapted, x)
    assert changes == [(3, 6)]
    # In the program each layer has its own: W, A and B, forward and backward.
    count = lowered.as_text().count("stablehlo.dot_general")
    assert count >= 7 * LAYERS - 1
    step(adapted, x)
    step(adapted, x + 1)
    assert len(changes) == 1
    step.lower(adapted, x[:2])
    assert changes == [(3, 6), (2, 6)]


def test_unlike_layers_are_traced_each(changes):
    params = [array(6, n, seed=n, dtype=jnp.float32) for n in (4, 5)]

    def fn(params, x):
        return (x @ params[0]).sum() + (x @ params[1]).sum() + (x @ params[0]).sum()

    x = array(3, 6, dtype=jnp.float32)
    adapted = contract.adapt(fn, params, x)
    changes.clear()
    gradient_step(fn).lower(adapted, x)
    assert len(changes) == 2


def test_ranks_and_scales_tell_layers_apart(changes):
    params = {k: array(6, 6, seed=i, dtype=jnp.float32) for i, k in enumerate("uvw")}

    def fn(params, x):
        return x @ params["u"] + x @ params["v"] + x @ params["w"]

    x = array(3, 6, dtype=jnp.float32)
    config = {"rank_pattern": {"u": 3}, "alpha_pattern": {"v": 1.0}}
    adapted = contract.randomized(contract.adapt(fn, params, x, **config))
    changes.clear()
    got = jax.jit(flora.lora(fn))(adapted, x)
    assert len(changes) == 3
    contract.close(got, fn(flora.merge(adapted), x))


def two_scopes(params, x):
    with jax.named_scope("lower_part"):
        x = x @ params[0]
    with jax.named_scope("upper_part"):
        return x @ params[1]


FIRST, SECOND = (two_scopes.__code__.co_firstlineno + k for k in (2, 4))


def test_names_and_lines_of_each_layer_survive():
    params = [array(6, 6, seed=i, dtype=jnp.float32) for i in range(2)]
    x = array(3, 6, dtype=jnp.float32)
    adapted = contract.adapt(two_scopes, params, x)
    text = gradient_step(two_scopes).lower(adapted, x).as_text(debug_info=True)
    places = dict(re.findall(r"^(#loc\d+) = (loc\(.*\))$", text, re.M))

    def resolved(name, depth=9):
        found = places.get(name, name)
        if not depth:
            return found
        return re.sub(r"#loc\d+", lambda m: resolved(m[0], depth - 1), found)

    dots = re.findall(r"stablehlo\.dot_general.*loc\((#loc\d+)\)", text)
    found = [resolved(name) for name in dots]
    for scope, line in (("lower_part", FIRST), ("upper_part", SECOND)):
        mine = [place for place in found if scope in place]
        # x W, x A and z B, and what their gradients need.
        assert len(mine) >= 6, scope
        # Newer JAX adds the line of the first trace, called from the layer's own.
        assert all(f'test_product.py":{line}:' in place for place in mine)


def test_equal_layers_drop_other_inputs():
    params = [jnp.zeros((6, 6)) for _ in range(2)]
    x = jnp.ones((200, 6))

    def fn(params, x):
        return [x @ w for w in params] + [x @ params[0]]

    adapted = contract.randomized(contract.adapt(fn, params, x, dropout=0.5))
    first, _ = flora.with_dropout(adapted, jax.random.key(1))
    dropped = [first, first]  # the same factors and the same keys
    for run in (flora.lora(fn), jax.jit(flora.lora(fn))):
        first, second, again = run(dropped, x)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, again)
