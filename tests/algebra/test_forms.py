"""Forms: every one computes the same product, low-rank in both passes."""

import dataclasses
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.quantize
import flora.variants
from flora._algebra import choice
from flora._algebra.axes import Named
from flora._algebra.choice import Form
from flora._algebra.dropout import seed
from flora._algebra.forms import (
    ROUNDED,
    SUMS,
    Spec,
    alike,
    products,
    stochastically_rounded,
)
from flora._trace.compat import P
from flora._trace.rules import dot
from flora._tree.config import COPIES, FORMS
from tests.support.contract import (
    adapt,
    array,
    check,
    close,
    close_to_merged,
    dense_arrays_of_step,
    equations,
    is_weight,
    randomized,
    scalar,
)

EXACT = [form for form in FORMS if form not in ROUNDED]
EXACT_SUMS = [form for form in EXACT if form in SUMS]

PRODUCTS = {
    "dense": ("bi,io->bo", (3, 5), (5, 4)),
    "dense of sequences": ("bti,io->bto", (2, 3, 5), (5, 4)),
    "weight first": ("oi,bi->ob", (4, 5), (3, 5)),
    "heads": ("bti,ihd->bthd", (2, 3, 6), (6, 2, 4)),
    "heads out": ("bthd,hdo->bto", (2, 3, 2, 4), (2, 4, 6)),
    "stack": ("ebi,eio->ebo", (3, 2, 5), (3, 5, 4)),
    "transposed": ("bi,oi->ob", (3, 5), (4, 5)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_form_keeps_the_contract(x64, form, name):
    spec, first, second = PRODUCTS[name]
    shapes = dict(zip(("left", "right"), (first, second), strict=True))
    side = "left" if name == "weight first" else "right"
    other = array(*shapes["right" if side == "left" else "left"])
    params = {"w": array(*shapes[side], seed=1)}

    def fn(params, x):
        pair = (params["w"], x) if side == "left" else (x, params["w"])
        if name == "heads out":  # einsum sums in another order, to the last bit
            return jnp.tensordot(*pair, 2)
        return jnp.einsum(spec, *pair)

    # Copies of W are what these forms are; they are not saved: see below.
    views = set()
    if form in COPIES:
        views = {P.add, P.mul, P.dot_general, P.concatenate}
    settings = {"form": form, "dtype": jnp.float64}
    check(fn, params, other, views=views, **settings)


def product(name):
    """One of `PRODUCTS`, its weight and x."""
    spec, first, second = PRODUCTS[name]
    left = name == "weight first"
    shape, other = (first, second) if left else (second, first)
    params, x = {"w": array(*shape, seed=1)}, array(*other)

    def fn(params, x):
        return jnp.einsum(spec, *((params["w"], x) if left else (x, params["w"])))

    return fn, params, x


def spread(tree):
    """With magnitudes that are not what they start as."""

    def one(x):
        m = x.extra["magnitude"]
        by = 1 + 0.5 * array(*m.shape, seed=3, dtype=m.dtype)
        return dataclasses.replace(x, extra={"magnitude": m * by})

    return jax.tree.map(one, tree, is_leaf=is_weight)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("auto", "direct")])
@pytest.mark.parametrize("name", ["heads out", "stack", "weight first"])
def test_every_form_scales_its_outputs_for_dora(x64, form, name):
    fn, params, x = product(name)
    settings = {"form": form, "dtype": jnp.float64, "variant": flora.variants.DoRA()}
    adapted = spread(randomized(adapt(fn, params, x, **settings)))

    def step(form):
        run = flora.lora(fn, form=form)
        return jax.value_and_grad(lambda t, x: scalar(run(t, x)), (0, 1))(adapted, x)

    close(*(jax.jit(step, static_argnums=0)(f) for f in (None, "direct")), 1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_magnitude_of_zero_trains_in_a_form(x64, dtype):
    fn, params, x = linear, {"w": array(6, 4, dtype=dtype)}, array(5, 6, dtype=dtype)
    settings = {"form": "thin_last", "variant": flora.variants.DoRA()}
    adapted = randomized(adapt(fn, params, x, dtype=dtype, **settings))
    m = adapted["w"].extra["magnitude"].at[1].set(0).at[2].set(-1e-40)
    adapted["w"] = dataclasses.replace(adapted["w"], extra={"magnitude": m})

    def step(form):
        run = flora.lora(fn, form=form)
        y, back = jax.vjp(lambda t: run(t, x), adapted)
        return y, back(jnp.ones_like(y))[0]["w"].extra["magnitude"]

    (y, dm), (other, direct) = step(None), step("direct")
    close((y, dm), (other, direct), 1e-2 if dtype == "bfloat16" else 1e-5)
    assert float(abs(y[:, 1]).max()) < 1e-28 < float(abs(dm[1]))


@pytest.mark.parametrize("form", ["thin_first", "concat"])
def test_second_derivatives_of_dora_in_a_form(x64, form):
    params, x = {"w": array(6, 4)}, array(5, 6)
    settings = {"variant": flora.variants.DoRA(), "dtype": jnp.float64}
    adapted = spread(randomized(adapt(linear, params, x, **settings)))
    base, adapter = flora.split(adapted)

    def products(form):
        run = flora.lora(linear, form=form)
        loss = jax.jit(lambda a: scalar(run(flora.join(base, a), x) ** 3))
        moved = jax.jvp(jax.grad(loss), (adapter,), (adapter,))[1]

        def inner(a):
            return optax.tree.vdot(jax.grad(loss)(a), adapter)

        return moved, jax.grad(inner)(adapter)

    close(products(form), products("direct"), 1e-10)


def linear(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("base", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_layers_of_dora_in_forms(monkeypatch, base):
    """Heads as axes, products of one x together, in a loop with remat."""
    monkeypatch.setattr(choice, "_MIN_TOKENS", 1)
    monkeypatch.setattr(choice, "_MIN_WIDTH", 1)

    def layer(x, w):
        q, k = ((x @ w[n]).reshape(*x.shape[:-1], 2, 3) for n in ("q", "k"))
        y = (jax.nn.silu(q) * k).reshape(x.shape) @ w["o"]
        return x + y, None

    def fn(params, x):
        body = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(body, x, params)[0]

    params = {n: array(2, 6, 6, seed=i, dtype=jnp.float32) for i, n in enumerate("qko")}
    x = array(2, 5, 6, seed=9, dtype=jnp.float32)
    block = 2 if base == "nf4" else None
    params = flora.quantize.quantize(params, base, target="*", block=block)
    adapted = adapt(fn, params, x, variant=flora.variants.DoRA(), dtype=jnp.float32)
    adapted = spread(randomized(adapted))
    frozen, adapter = flora.split(adapted)

    def step(form, chosen=None):
        run = flora.lora(fn, form=form)

        def loss(adapter, x):
            return scalar(run(flora.join(frozen, adapter), x))

        cheapest = mock.Mock(return_value=chosen)
        monkeypatch.setattr(dot, "cheapest", cheapest)
        out = jax.jit(jax.value_and_grad(loss, (0, 1)))(adapter, x)
        assert cheapest.called == (form == "auto")
        return out

    direct = step("direct")
    for pair in zip(EXACT_SUMS, [*EXACT_SUMS[1:], EXACT_SUMS[0]], strict=True):
        form = Form(*pair, in_heads=True, written=False)
        close(step("auto", form), direct, 1e-4)
    close(step("auto", Form("direct", "direct", by_platform=True)), direct, 1e-4)


def mlp(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def mlp_case(dtype=jnp.float64):
    params = {"up": array(6, 10, dtype=dtype), "down": array(10, 6, dtype=dtype)}
    return params, array(7, 6, seed=2, dtype=dtype)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("auto", "direct")])
def test_forward_mode_needs_the_direct_form(x64, form):
    params, x = mlp_case()
    adapted = randomized(adapt(mlp, params, x, form=form, dtype=x.dtype))
    base, adapter = flora.split(adapted)

    def loss(adapter, name=form):
        return scalar(flora.lora(mlp, form=name)(flora.join(base, adapter), x))

    direct = functools.partial(loss, name="direct")
    tangent = jax.jvp(direct, (adapter,), (adapter,))[1]
    slope = sum(
        jnp.vdot(g, v)
        for g, v in zip(
            jax.tree.leaves(jax.grad(loss)(adapter)),
            jax.tree.leaves(adapter),
            strict=True,
        )
    )
    close(tangent, slope)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (adapter,), (adapter,))
    # Forward over reverse, as Hessian-vector products are computed, always works.
    twice = jax.jvp(jax.grad(loss), (adapter,), (adapter,))
    close(twice, jax.jvp(jax.grad(direct), (adapter,), (adapter,)))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_is_saved(form):
    params, x = mlp_case(jnp.float32)
    adapted = randomized(adapt(mlp, params, x, form=form, dtype=x.dtype))
    base, adapter = flora.split(adapted)

    def saved(form):
        def apply(a):
            return flora.lora(mlp, form=form)(flora.join(base, a), x)

        _, pull = jax.vjp(apply, adapter)
        held = [y for y in jax.tree.leaves(pull) if hasattr(y, "shape")]
        weights = [w for w in jax.tree.leaves(base)]
        return [y for y in held if y.size >= 60 and not any(y is w for w in weights)]

    sizes = {tuple(sorted(w.shape)) for w in jax.tree.leaves(params)}
    dense = [y for y in saved(form) if tuple(sorted(y.shape)) in sizes]
    assert all(any(np.array_equal(y, w) for w in params.values()) for y in dense)


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_base_model_in_bfloat16(form):
    params, x = mlp_case(jnp.bfloat16)
    adapted = adapt(mlp, params, x, form=form)
    chex.assert_trees_all_equal(flora.lora(mlp)(adapted, x), mlp(params, x))


def test_a_form_per_leaf_and_per_call(x64):
    params, x = mlp_case()
    adapted = adapt(mlp, params, x, form="direct", form_pattern={"up": "concat"})
    assert (adapted["up"].form, adapted["down"].form) == ("concat", "direct")

    def concatenations(apply):
        found = [e.primitive for e in equations(jax.make_jaxpr(apply)(adapted, x))]
        return found.count(P.concatenate)

    assert concatenations(flora.lora(mlp)) == 2  # [x | xA] and [W ; B] of 'up'
    assert concatenations(flora.lora(mlp, form="concat")) == 4
    assert concatenations(flora.lora(mlp, form="thin_last")) == 0


OTHERS = [f for f in FORMS if f not in ("auto", "direct")]


def close_with_dropout(fn, adapted, x, form):
    """Value and gradients in the form are those of the direct one, with one mask."""

    def step(form):
        run = flora.lora(fn, form=form)

        def loss(tree, x):
            return scalar(run(flora.with_dropout(tree, jax.random.key(3)), x))

        return jax.value_and_grad(loss, (0, 1))

    close(*(jax.jit(step(f))(adapted, x) for f in (form, "direct")), 1e-12)
    jaxpr = jax.make_jaxpr(step(form))(adapted, x)
    return sum(e.primitive is P.optimization_barrier for e in equations(jaxpr))


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("name", ["heads out", "stack", "weight first"])
def test_every_form_drops_what_the_direct_one_drops(x64, form, name):
    fn, params, x = product(name)
    settings = {"dropout": 0.4, "dtype": jnp.float64}
    adapted = randomized(adapt(fn, params, x, **settings))
    fences = close_with_dropout(fn, adapted, x, form)
    taken = fences > close_with_dropout(fn, adapted, x, "direct")
    assert taken == (form not in ROUNDED)


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("loop", [False, True])
def test_products_of_one_x_drop_apart(x64, form, loop):
    params, x = mlp_case()
    if loop:
        params = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)

    def fn(params, x):
        if not loop:
            return mlp(params, x)
        layer = jax.checkpoint(lambda x, p: (jnp.tanh(mlp(p, x)), None))
        return jax.lax.scan(layer, x, params)[0]

    adapted = randomized(adapt(fn, params, x, dropout=0.4, dtype=jnp.float64))
    close_with_dropout(fn, adapted, x, form)


@pytest.mark.parametrize("form", ["thin_first", "kernel"])
@pytest.mark.parametrize("variant", [None, flora.variants.DoRA()])
def test_dropout_of_other_rates_and_of_dora(x64, form, variant):
    """Products of other rates are apart; DoRA's x W has another x, too."""
    params, x = mlp_case()
    settings = {"dropout": 0.4, "dtype": jnp.float64, "variant": variant}
    adapted = randomized(adapt(mlp, params, x, **settings))
    adapted["up"] = dataclasses.replace(adapted["up"], dropout=0.1)
    close_with_dropout(mlp, adapted, x, form)


@pytest.mark.parametrize("bad", ["fast", "", None, 3])
def test_an_unknown_form_is_refused(bad):
    with pytest.raises(flora.LoraError, match="Write one of 'auto', 'direct'"):
        flora.LoraConfig(form=bad)
    with pytest.raises(flora.LoraError, match="form_pattern"):
        flora.LoraConfig(form_pattern={"up": bad})
    if bad is not None:
        with pytest.raises(flora.LoraError, match="form="):
            flora.lora(mlp, form=bad)


def test_merged_loses_small_changes_and_dithered_keeps_their_mean():
    # W = 1 in bfloat16, whose last place is 2⁻⁷ there; ΔW = 2⁻¹⁰ is an eighth of it.
    n, rank, change = 256, 1, 2.0**-10

    def fn(params, x):
        return x @ params["w"]

    params = {"w": jnp.ones((n, n), jnp.bfloat16)}
    x = jnp.eye(n, dtype=jnp.bfloat16)
    adapted = adapt(fn, params, x, rank=rank, alpha=1.0)
    node = adapted["w"]
    node = type(node)(
        node.base,
        jnp.ones_like(node.a),
        change * jnp.ones_like(node.b),
        layout=node.layout,
        rank=rank,
    )
    merged = flora.lora(fn, form="merged")({"w": node}, x)
    assert np.all(np.asarray(merged, np.float32) == 1)
    dithered = flora.lora(fn, form="dithered")({"w": node}, x)
    mean = np.asarray(dithered, np.float64).mean() - 1
    # An eighth of n² coin tosses of 2⁻⁷ each: the standard error is 1 %.
    assert abs(mean / change - 1) < 0.05


def test_rounding_at_random_is_exact_on_the_grid_and_unbiased_off_it():
    key = jax.random.key(0)
    on_grid = jax.random.normal(key, (64, 64), jnp.bfloat16)
    odd = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, 1e-40], jnp.float32)
    wide = on_grid.astype(jnp.float32)
    chex.assert_trees_all_equal(stochastically_rounded(wide, jnp.bfloat16), on_grid)
    rounded = stochastically_rounded(odd, jnp.bfloat16)[:5]
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), odd[:5])
    assert stochastically_rounded(wide, jnp.float16).dtype == jnp.float16
    x = jnp.full((512, 512), 1 + 0.3 * 2.0**-7, jnp.float32)
    got = np.asarray(stochastically_rounded(x, jnp.bfloat16), np.float64)
    assert set(np.unique(got)) == {1, 1 + 2.0**-7}
    assert abs((got.mean() - 1) / 2.0**-7 - 0.3) < 0.01


@pytest.mark.parametrize("form", EXACT)
def test_transposed_weights_and_loops(x64, form):
    params = {"w": array(3, 5, 5), "tied": array(7, 5, seed=3)}

    def fn(params, ids):
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), params["tied"][ids], params["w"]
        )
        return x @ params["tied"].T

    ids = jnp.asarray([1, 4, 4, 0])
    adapted = randomized(adapt(fn, params, ids, form=form, dtype=jnp.float64))
    close_to_merged(fn, adapted, ids)
    if form not in COPIES:
        assert dense_arrays_of_step(fn, adapted, ids) == []


def test_what_makes_products_of_one_x_alike():
    p = Named(jnp.ones((5, 2)), ("x1", "rank"))
    one = Spec("direct", "concat", ("x0", "1"), jnp.float32), p
    assert alike(one, (Spec("concat", "direct", ("x0", "2"), jnp.float32), p))
    assert alike(one, (one[0], Named(jnp.ones((5, 3)), p.names)))  # of another rank
    others = [
        (Spec("direct", "concat", ("x0", "1"), jnp.bfloat16), p),
        (Spec("direct", "concat", ("x0", "1"), jnp.float32, "highest"), p),
        (one[0], p.renamed({"x1": "x2"})),
        (one[0], Named(jnp.ones((6, 2)), p.names)),
    ]
    for other in others:
        assert not alike(one, other)
    for form in ("merged", "dithered"):
        for pair in ((form, "direct"), ("direct", form)):
            copied = Spec(*pair, ("x0", "1"), jnp.float32), p
            assert not alike(copied, copied)


def test_fences_stand_where_the_forms_say():
    """What each form writes first, and what no pass may share with the other."""

    def fences(fn, *args):
        found = equations(jax.make_jaxpr(fn)(*args))
        return sum(e.primitive is P.optimization_barrier for e in found)

    def fn(params, x):
        return x @ params["w"]

    x, params = jnp.ones((3, 5)), {"w": jnp.ones((5, 4))}
    base, adapter = flora.split(adapt(fn, params, x))
    # x, then what the form writes first; dy, the same for dx, and in copies W.
    wanted = {"thin_first": (2, 2), "thin_last": (2, 2), "concat": (1, 2),
              "merged": (2, 3), "dithered": (2, 3)}  # fmt: skip
    for form, (forward, backward) in wanted.items():

        def loss(adapter, x, form=form):
            return flora.lora(fn, form=form)(flora.join(base, adapter), x).sum()

        assert fences(loss, adapter, x) == forward
        both = fences(jax.grad(loss, (0, 1)), adapter, x)
        assert both == forward + backward


@pytest.mark.parametrize("how", ["", "by a kernel", "with dropout"])
@pytest.mark.parametrize("backward", EXACT_SUMS)
@pytest.mark.parametrize("forward", EXACT_SUMS)
def test_both_passes_of_products_of_one_x(x64, forward, backward, how):
    """Each pass in a form of its own, as `cheapest` chooses on TPUs."""
    x = Named(array(3, 5), ("t", "i"))
    ws, ps, qs = (
        tuple(Named(array(*s, seed=start + k), names) for k, s in enumerate(shapes))
        for start, names, shapes in (
            (1, ("i", "o"), [(5, 4), (5, 4)]),
            (3, ("i", "rank"), [(5, 2), (5, 3)]),
            (5, ("rank", "o"), [(2, 4), (3, 4)]),
        )
    )
    spec = Spec(forward, backward, ("t", "o"), x.array.dtype, rate=0.4, columns=5)
    if how == "by a kernel":
        spec = dataclasses.replace(spec, kernel=())
    seeds = [seed(jax.random.key(i)) for i in range(2)]
    if how != "with dropout":
        seeds = [None, None]

    def run(x, ps, qs):
        return scalar(products((spec, spec), None, x, (), ws, ps, qs, seeds))

    def direct(x, ps, qs):
        each = zip(ws, ps, qs, seeds, strict=True)
        return scalar(
            [
                x.array @ w.array + spec.dropped(x, own).array @ p.array @ q.array
                for w, p, q, own in each
            ]
        )

    def slopes(x, ps, qs):
        return [jax.grad(f, (0, 1, 2))(x, ps, qs) for f in (run, direct)]

    close(*jax.jit(slopes)(x, ps, qs))


@pytest.mark.parametrize("form", ["auto", "thin_first", "thin_last", "concat"])
def test_a_policy_that_saves_products_saves_one_array_a_layer(form):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    p = {"w": jnp.ones((1024, 2048)), "v": jnp.ones((2048, 1024))}

    def fn(p, x):
        layers = jax.checkpoint(
            lambda x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]), policy=policy
        )
        return jnp.sum(jnp.sin(layers(x)))

    config = flora.LoraConfig(rank=4, target="*", form=form)
    x = jnp.ones((1025, 1024))
    base, adapter = flora.split(flora.init(jax.random.key(0), config, fn, p, x))
    step = lambda a, x: flora.lora(fn)(flora.join(base, a), x)  # noqa: E731
    saved = [y.shape for y in jax.tree.leaves(jax.vjp(step, adapter, x)[1])]
    assert saved.count((1025, 2048)) == 1  # x W
    assert saved.count((1025, 1024)) <= 3  # h W, x and the last layer's
