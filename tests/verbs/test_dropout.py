import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora
from tests.support import contract
from tests.support.contract import array

RATE = 0.4


def adapted_with_dropout(fn, params, *args, **config):
    config = {"dropout": RATE, "alpha": 2.0} | config
    return contract.randomized(contract.adapt(fn, params, *args, **config))


def counting(fn, params, x, **config):
    """An adapted tree whose low-rank path counts the inputs that it keeps."""
    adapted = contract.adapt(fn, params, x, rank=1, alpha=1.0, dropout=RATE, **config)
    return jax.tree.map(
        lambda w: dataclasses.replace(
            w, base=0 * w.base, a=jnp.ones_like(w.a), b=jnp.ones_like(w.b)
        ),
        adapted,
        is_leaf=contract.is_weight,
    )


def dense(p, x):
    return x @ p["w"]


def test_without_keys_a_call_is_evaluation():
    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    adapted = adapted_with_dropout(dense, params, x)
    contract.close(flora.lora(dense)(adapted, x), dense(flora.merge(adapted), x))


def test_the_formula_and_its_gradients():
    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(64, 7, dtype=jnp.float32)
    adapted = adapted_with_dropout(dense, params, x)
    apply, key = flora.lora(dense), jax.random.key(3)
    w = adapted["w"]
    probe = dataclasses.replace(
        w, base=0 * w.base, a=jnp.eye(7, 7), b=jnp.eye(7, 5), rank=7, alpha=7.0
    )
    dropped = apply(flora.with_dropout({"w": probe}, key), x)  # dropout(x)[:, :5]
    kept = dropped != 0
    assert 0.5 < kept.mean() < 0.7
    np.testing.assert_allclose(dropped[kept], (x[:, :5] / (1 - RATE))[kept], rtol=1e-6)
    out, grads = flora.value_and_grad(lambda t: contract.scalar(apply(t, x)))(
        flora.with_dropout(adapted, key)
    )
    assert jnp.isfinite(out)
    assert grads["w"].key is None
    assert grads["w"].a.shape == w.a.shape


def test_the_mean_over_keys_is_evaluation():
    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    adapted = adapted_with_dropout(dense, params, x)
    keys = jax.random.split(jax.random.key(0), 4000)
    runs = jax.vmap(lambda k: flora.lora(dense)(flora.with_dropout(adapted, k), x))(
        keys
    )
    spread = runs.std(0) / np.sqrt(len(keys))
    assert (jnp.abs(runs.mean(0) - flora.lora(dense)(adapted, x)) < 5 * spread).all()


def test_masks_differ_by_leaf_step_and_use():
    def fn(p, x):
        return jnp.stack([x @ p["u"], x @ p["v"], x @ p["u"]])

    w, x = jnp.ones((40, 5)), jnp.ones((6, 40))
    tree = counting(fn, {"u": w, "v": w}, x)
    apply = jax.jit(flora.lora(fn))
    first = apply(flora.with_dropout(tree, jax.random.key(0)), x)
    again = apply(flora.with_dropout(tree, jax.random.key(0)), x)
    other = apply(flora.with_dropout(tree, jax.random.key(1)), x)
    assert jnp.array_equal(first, again)
    for one, two in ((first[0], first[1]), (first[0], first[2]), (first, other)):
        assert not jnp.array_equal(one, two)


def scan_xs(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


def scan_consts(p, x):
    return lax.scan(lambda c, _: (c, x @ p["w"][0]), 0, None, length=3)[1]


def remat_scan(p, x):
    return lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0, p["w"])[1]


def loop(p, x):
    ys = jnp.zeros((3, 6, 5))
    return lax.fori_loop(0, 3, lambda i, ys: ys.at[i].set(x @ p["w"][0]), ys)


def experts(p, x):
    return jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"])


@pytest.mark.parametrize("fn", [scan_xs, scan_consts, remat_scan, loop, experts])
def test_masks_differ_by_layer_and_by_step_of_a_loop(fn):
    params, x = {"w": jnp.ones((3, 40, 5))}, jnp.ones((6, 40))
    tree = counting(fn, params, x)
    ys = jax.jit(flora.lora(fn))(flora.with_dropout(tree, jax.random.key(0)), x)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert not jnp.array_equal(ys[i], ys[j])


def test_rematerialized_masks_are_the_same_in_the_backward_pass():
    def fn(p, x):
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["w"], x))

    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    adapted = adapted_with_dropout(fn, params, x)

    keyed = flora.with_dropout(adapted, jax.random.key(0))
    step = flora.value_and_grad(flora.lora(fn))
    loss, grads = jax.jit(step)(keyed, x)
    base, adapter = flora.split(adapted)
    size = 1e-2

    def at(t):
        moved = jax.tree.map(lambda w, g: w + t * g, adapter, grads)
        tree = flora.with_dropout(flora.join(base, moved), jax.random.key(0))
        return flora.lora(fn)(tree, x)

    slope = (at(size) - at(-size)) / (2 * size)
    norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(slope, norm, rtol=2e-2)
    np.testing.assert_allclose(loss, at(0.0), rtol=1e-6)


def test_convolutions_drop_too_and_lookups_do_not():
    def fn(p, ids):
        x = p["embedding"][ids]
        return lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    params = {
        "embedding": array(11, 6, dtype=jnp.float32),
        "kernel": array(3, 6, 5, dtype=jnp.float32),
    }
    ids = jnp.array([[1, 2, 3]])
    adapted = adapted_with_dropout(fn, params, ids)
    keyed = flora.with_dropout(adapted, jax.random.key(0))
    apply = flora.lora(fn)
    assert not jnp.array_equal(apply(keyed, ids), apply(adapted, ids))
    only_table = keyed | {"kernel": adapted["kernel"]}
    assert jnp.array_equal(apply(only_table, ids), apply(adapted, ids))


def test_no_rate_and_bad_keys_are_refused():
    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    plain = contract.adapt(dense, params, x)
    with pytest.raises(flora.LoraError, match="no leaf has a dropout rate"):
        flora.with_dropout(plain, jax.random.key(0))
    with pytest.raises(flora.LoraError, match="none of the tree's 1 leaves is adapted"):
        flora.with_dropout(params, jax.random.key(0))
    adapted = adapted_with_dropout(dense, params, x)
    with pytest.raises(TypeError, match="expected a PRNG key"):
        flora.with_dropout(adapted, jnp.zeros(3, jnp.uint32))
    with pytest.raises(TypeError, match="expected one key"):
        flora.with_dropout(adapted, jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("wrap", [jax.custom_jvp, jax.custom_vjp])
def test_dropout_in_a_function_with_its_own_derivative_is_refused(wrap):
    mm = wrap(lambda x, w: x @ w)
    if wrap is jax.custom_jvp:
        mm.defjvp(lambda p, t: (mm(*p), t[0] @ p[1] + p[0] @ t[1]))
    else:
        mm.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def fn(p, x):
        return mm(x, p["w"])

    params, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    adapted = adapted_with_dropout(fn, params, x)
    contract.close(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x))
    with pytest.raises(
        flora.LoraError, match="dropout in a function with a derivative"
    ):
        flora.lora(fn)(flora.with_dropout(adapted, jax.random.key(0)), x)


def test_integer_activations_are_dropped_too():
    def fn(p, x):
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], dims, preferred_element_type=jnp.float32)

    params, x = {"w": jnp.ones((40, 5))}, jnp.ones((6, 40), jnp.int8)
    tree = counting(fn, params, x)
    y = flora.lora(fn)(flora.with_dropout(tree, jax.random.key(0)), x)
    kept = y * (1 - RATE)  # a whole number of inputs
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert 10 < kept.min() < kept.max() < 40


STACKS = {
    "indexed": lambda p, x: jnp.einsum("ni,nio->no", x, p["w"][jnp.array([2, 0, 2])]),
    "looked up": lambda p, x: jnp.einsum("ni,nio->no", x, jnp.take(
        p["w"], jnp.array([2, 0, 2]), axis=0, mode="fill")),
    "indexed, joined": lambda p, x: jnp.einsum(
        "ni,nio->no", x, jnp.concatenate([p["w"], p["w"]])[jnp.array([5, 0, 1])]),
    "joined": lambda p, x: jnp.einsum(
        "ni,eio->eno", x, jnp.concatenate([p["w"], p["w"][:1]])),
    "joined, by a loop": lambda p, x: lax.scan(
        lambda _, w: (0, x @ w), 0, jnp.concatenate([p["w"], p["w"]]))[1],
    "of two": lambda p, x: jnp.einsum("ni,eio->eno", x, jnp.stack([p["u"], p["v"]])),
    "of two, by a loop": lambda p, x: lax.scan(
        lambda _, w: (0, x @ w), 0, jnp.stack([p["u"], p["v"]]))[1],
    "turned": lambda p, x: jnp.einsum(
        "ni,ioe->eno", x, jnp.concatenate([p["w"], p["w"]]).transpose(1, 2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_inputs_of_stacks_are_dropped_one_by_one(name):
    def weight(*stack):
        eye = jnp.broadcast_to(jnp.eye(4), (*stack, 4, 4))
        keys = jax.random.split(jax.random.key(len(stack)), stack)
        layout = flora.Layout((0,), (1,), (2,)) if stack else flora.Layout()
        return flora.LoraWeight(
            0 * eye, eye, eye, keys, layout=layout, rank=4, alpha=4.0, dropout=0.5
        )

    tree = {"w": weight(3), "u": weight(), "v": weight()}
    y = flora.lora(STACKS[name])(tree, jnp.ones((3, 4)))
    assert {*y.ravel().tolist()} == {0.0, 2.0}


def of_adapter(base, apply, *, attach=lambda tree: tree):
    return lambda adapter, x: apply(attach(flora.join(base, adapter)), x).sum()


# What differentiates a loss by the adapter, or runs it in another loop.
DIFFERENTIATED = {
    "grad": jax.grad,
    "jitted": lambda f: jax.jit(jax.grad(f)),
    "of a jitted loss": lambda f: jax.grad(jax.jit(f)),
    "of a checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "in a scan": lambda f: jax.grad(
        lambda t, x: jax.lax.map(lambda x: f(t, x), x[:, None]).sum()),
    "mapped": lambda f: jax.vmap(jax.grad(f), (None, 0)),
    "forward": lambda f: lambda t, x: jax.jvp(lambda t: f(t, x), (t,), (t,)),
    "of B alone": lambda f: lambda t, x: jax.grad(
        lambda b: f({"w": dataclasses.replace(t["w"], b=b)}, x))(t["w"].b),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_step_that_forgot_its_keys_is_an_error(name):
    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    adapted = adapted_with_dropout(dense, params, x)
    base, adapter = flora.split(adapted)
    apply, step = flora.lora(dense, form="direct"), DIFFERENTIATED[name]
    with pytest.raises(
        flora.LoraError, match=r"'w' trains without its dropout of 0.4: no keys are"
    ):
        step(of_adapter(base, apply))(adapter, x)
    for key in (jax.random.key(0), None):  # None: on purpose
        attach = functools.partial(flora.with_dropout, key=key)
        step(of_adapter(base, apply, attach=attach))(adapter, x)
    rateless = flora.with_dropout(adapted, None)
    assert (rateless["w"].dropout, rateless["w"].key) == (0.0, None)
    step(of_adapter(base, apply))(flora.split(rateless)[1], x)


def test_an_evaluation_needs_no_keys():
    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((3, 7))
    base, adapter = flora.split(adapted_with_dropout(dense, params, x))
    loss = of_adapter(base, flora.lora(dense))
    want = loss(adapter, x)
    contract.close(jax.jit(loss)(adapter, x), want)
    contract.close(jax.vmap(loss, (None, 0))(adapter, x[:, None]).sum(), want)
    # By the inputs, as for a saliency map.
    for by_x in (jax.grad(loss, 1), jax.grad(jax.jit(loss), 1)):
        assert by_x(adapter, x).shape == x.shape
    plain = jax.grad(lambda t: dense(flora.merge(flora.join(base, t)), x).sum())
    assert plain(adapter)["w"].a.shape == adapter["w"].a.shape
    with pytest.raises(flora.LoraError, match="trains without its dropout"):
        flora.value_and_grad(lambda t: flora.lora(dense)(t, x).sum())(
            flora.join(base, adapter)
        )


def test_all_leaves_without_keys_are_counted():
    params, x = {"u": jnp.ones((7, 5)), "w": jnp.ones((5, 4))}, jnp.ones((3, 7))
    fn = lambda p, x: x @ p["u"] @ p["w"]  # noqa: E731
    adapted = contract.adapt(fn, params, x, dropout=0.25)
    with pytest.raises(flora.LoraError, match="'u' and 1 more trains without its"):
        jax.grad(lambda t: flora.lora(fn)(t, x).sum())(adapted)


def test_no_mask_is_saved():
    params, x = {"w": array(70, 5, dtype=jnp.float32)}, array(9, 70, dtype=jnp.float32)
    base, adapter = flora.split(adapted_with_dropout(dense, params, x))

    def loss(adapter, x):
        tree = flora.with_dropout(flora.join(base, adapter), jax.random.key(0))
        return contract.scalar(flora.lora(dense, form="direct")(tree, x))

    _, pull = jax.vjp(loss, adapter, x)
    saved = [y for y in jax.tree.leaves(pull) if hasattr(y, "dtype")]
    assert sum(y.shape == x.shape for y in saved) == 1  # what A has seen
    assert not any(y.dtype == bool for y in saved)
