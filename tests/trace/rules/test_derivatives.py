import jax
import jax.numpy as jnp
import pytest

import flora
from tests.support import contract
from tests.support.contract import array
from tests.support.variant_cases import Between


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


def times(wrap):
    """x w with a derivative of its own: three times JAX's along x, twice along w."""

    def product(x, w):
        return x @ w

    own = wrap(product)
    if wrap is jax.custom_jvp:
        own.defjvp(lambda p, t: (own(*p), 3 * (t[0] @ p[1]) + 2 * (p[0] @ t[1])))
    else:
        own.defvjp(
            lambda x, w: (own(x, w), (x, w)),
            lambda saved, g: (3 * (g @ saved[1].T), 2 * (saved[0].T @ g)),
        )
    return own


BOTH = pytest.mark.parametrize("wrap", [jax.custom_jvp, jax.custom_vjp])


@BOTH
def test_what_a_custom_rule_says_of_w_reaches_a_and_b(x64, wrap):
    own, x = times(wrap), array(3, 7)
    fn = lambda p, x: own(x, p["w"])  # noqa: E731
    tree = contract.adapt(fn, {"w": array(7, 5)}, x, dtype=jnp.float64)
    tree = contract.randomized(tree)
    w = tree["w"]
    grads = jax.grad(lambda t: flora.lora(fn)(t, x).sum())(tree)["w"]
    dw = 2 * x.T @ jnp.ones((3, 5))
    contract.close(grads.a, w.scale * dw @ w.b.T)
    contract.close(grads.b, w.scale * w.a.T @ dw)
    assert not grads.base.any()
    dx = jax.grad(lambda x: flora.lora(fn)(tree, x).sum())(x)
    contract.close(dx, 3 * jnp.ones((3, 5)) @ flora.merge(tree)["w"].T)


@BOTH
def test_the_layout_is_what_the_function_computes(wrap):
    own = times(wrap)
    report = flora.coverage(
        lambda p, x: own(x, p["w"]), {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    )
    assert report["w"].layout == flora.Layout()
    read = [use.primitive for use in report["w"].uses if use.binding]
    assert read == ["dot_general"]


def test_a_dense_gradient_is_reported_with_its_bytes():
    """A linear layer and its loss in one, of which the backward pass returns dW."""

    @jax.custom_vjp
    def head(x, w):
        return jnp.square(x @ w).sum()

    head.defvjp(
        lambda x, w: (head(x, w), (x, w)),
        lambda saved, g: (2 * g * saved[0] @ saved[1] @ saved[1].T,
                          2 * g * saved[0].T @ (saved[0] @ saved[1])),
    )  # fmt: skip

    def scanned(p, x):
        def part(total, w):
            return total + head(x @ p["w"], w.T), None

        return jax.lax.scan(part, 0.0, p["v"].T.reshape(5, 2, 7))[0]

    small = {"w": jnp.ones((7, 7)), "v": jnp.ones((7, 10))}
    whole, x = (lambda p, x: head(x @ p["w"], p["v"])), jnp.ones((3, 7))
    for fn, size in (
        (whole, 7 * 10 * 4),
        (jax.jit(whole), 7 * 10 * 4),
        (scanned, 7 * 2 * 4),
    ):
        for p in (small, contract.adapt(fn, small, x)):
            report = flora.coverage(fn, p, x)
            assert report["v"].status == "factored"
            assert (report["v"].gradient_bytes, report["w"].gradient_bytes) == (size, 0)
            (use,) = (use for use in report["v"].uses if use.gradient)
            assert use.source.startswith("test_derivatives.py:")
    text = str(flora.coverage(whole, small, x))
    assert "1 with a dense gradient" in text
    row = next(line for line in text.split("\n") if "dense gradient " in line)
    for part in (" v ", "custom_vjp_call at test_derivatives.py:", "280 B"):
        assert part in row


@pytest.mark.parametrize("wrap", [jax.custom_jvp, None])
def test_other_gradients_are_low_rank(wrap):
    own = times(wrap) if wrap else jnp.matmul
    fn = lambda p, x: own(x, p["w"])  # noqa: E731
    report = flora.coverage(fn, {"w": jnp.ones((7, 5))}, jnp.ones((3, 7)))
    assert report["w"].gradient_bytes == 0
    assert "dense gradient" not in str(report)


@BOTH
def test_scaled_columns_are_refused_by_name(wrap):
    own, x = times(wrap), jnp.ones((3, 7))
    fn = lambda p, x: own(x, p["w"])  # noqa: E731
    tree = contract.adapt(fn, {"w": jnp.ones((7, 5))}, x, variant=flora.variants.DoRA())
    match = (
        rf"'{wrap.__name__}_call' at test_derivatives.py:\d+ .*reads 'w'.* derivative"
    )
    with pytest.raises(flora.LoraError, match=match):
        flora.lora(fn)(tree, x)


@BOTH
def test_a_function_between_a_and_b_is_refused_by_name(wrap):
    own, x = times(wrap), jnp.ones((3, 7))
    fn = lambda p, x: own(x, p["w"])  # noqa: E731
    tree = contract.adapt(fn, {"w": jnp.ones((7, 5))}, x, variant=Between())
    with pytest.raises(
        flora.LoraError, match=r"reads 'w' .*derivative of its own, .*between A and B"
    ):
        flora.lora(fn)(tree, x)


@BOTH
def test_a_weight_as_the_result_is_refused(wrap):
    same = wrap(lambda w: w * 2)
    if wrap is jax.custom_jvp:
        same.defjvp(lambda p, t: (same(*p), t[0] * 2))
    else:
        same.defvjp(lambda w: (same(w), None), lambda _, g: (g * 2,))
    fn = lambda p, x: x @ same(p["w"])  # noqa: E731
    tree = contract.adapt(fn, {"w": jnp.ones((7, 5))}, jnp.ones((3, 7)))
    with pytest.raises(flora.LoraError, match=r"reads 'w' .*a weight as the result"):
        flora.lora(fn)(tree, jnp.ones((3, 7)))
