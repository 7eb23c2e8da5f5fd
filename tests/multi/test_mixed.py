"""Mixed batches: another adapter for each row."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
import flora.quantize
from flora._trace.compat import P as Primitives
from tests.support import contract, registry
from tests.support.contract import array, close, equations
from tests.support.many_adapters import METHODS, adapters_of, delta, node, of_model


def two_uses(p, ids, x):
    """An embedding looked up, a product over two axes, a stack of matrices."""
    h = p["embed"][ids] + jnp.einsum("ntij,ijd->ntd", x, p["in"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
    return h


def test_rows_against_numpy(x64):
    """Outputs of each row and gradients of A and B, in float64."""
    rng = np.random.default_rng(0)
    params = {
        "embed": array(11, 6),
        "in": array(3, 2, 6, seed=1),
        "stack": array(2, 6, 6, seed=2),
    }
    layouts = {
        "embed": flora.Layout(),
        "in": flora.Layout((), (0, 1), (2,)),
        "stack": flora.Layout((0,), (1,), (2,)),
    }
    adapters = [
        {k: node(layouts[k], v.shape, r, 7 * r, alpha=al) for k, v in params.items()}
        for r, al in ((2, 1.5), (1, 0.5), (3, 1.0))
    ]
    ids = np.array([1, -1, 2, 1, 0])
    tokens, x, c = (
        rng.integers(0, 11, (5, 4)),
        rng.normal(size=(5, 4, 3, 2)),
        rng.normal(size=(5, 4, 6)),
    )
    stacked = flora.multi.stack(adapters)
    rank_one = [a["embed"].rank for a in adapters]

    wanted, gradients = [], [{k: 0.0 for k in params} for _ in adapters]
    for n, i in enumerate(ids):
        w = {k: np.asarray(v, np.float64) for k, v in params.items()}
        if i >= 0:
            w = {k: v + delta(adapters[i][k]).reshape(v.shape) for k, v in w.items()}
        h0 = w["embed"][tokens[n]] + np.einsum("tij,ijd->td", x[n], w["in"])
        h1 = np.tanh(h0 @ w["stack"][0])
        h2 = np.tanh(h1 @ w["stack"][1])
        wanted.append(h2)
        if i < 0:
            continue
        d2 = c[n] * (1 - h2**2)
        d1 = d2 @ w["stack"][1].T * (1 - h1**2)
        d0 = d1 @ w["stack"][0].T
        de = np.zeros((11, 6))
        np.add.at(de, tokens[n], d0)
        gradients[i]["embed"] += de
        gradients[i]["in"] += np.einsum("tij,td->ijd", x[n], d0)
        gradients[i]["stack"] += np.stack([h0.T @ d1, h1.T @ d2])

    @jax.jit
    def everything(stacked, x):
        found = {}
        for method in METHODS:
            run = flora.multi.lora(two_uses, method=method)

            def loss(s, run=run):
                return jnp.sum(c * run(params, s, ids, jnp.asarray(tokens), x))

            found[method] = (
                run(params, stacked, ids, jnp.asarray(tokens), x),
                jax.grad(loss)(stacked),
            )
        return found

    for y, grads in everything(stacked, jnp.asarray(x)).values():
        close(y, jnp.asarray(np.stack(wanted)))
        for k, layout in layouts.items():
            for i, one in enumerate(flora.multi.unstack(stacked)):
                base = array(*params[k].shape)
                whole = dataclasses.replace(one[k], base=base)
                da, db = contract.factor_gradients(whole, gradients[i][k])
                r, s = rank_one[i], len(layout.stack)
                close(jnp.asarray(grads[k].a[i]), jnp.asarray(da))
                keep = (slice(None),) * s + (slice(r),)
                close(jnp.asarray(grads[k].b[i][keep]), jnp.asarray(db[keep]))
                if r < 3:  # what pads a smaller rank never moves
                    assert not grads[k].a[i][..., r:].any()


@pytest.mark.parametrize(
    "name",
    ["nnx mlp", "scanned decoder", "vmapped experts", "convolutions"],
)
def test_rows_of_models_equal_the_merged_model(name):
    model = registry.MODELS[name]()
    stacked, rows = flora.multi.stack(of_model(model)), model.args[0].shape[0]
    ids = [2, None, 1, 0][:rows]
    runs = [flora.multi.lora(model.fn, method=m) for m in ("gather", "masked")]

    @jax.jit
    def mixed(stacked, args):
        return [run(model.params, stacked, ids, *args) for run in runs]

    @jax.jit
    def merged(stacked, i, args):
        tree = flora.merge(flora.join(model.params, flora.multi.select(stacked, i)))
        return model.fn(tree, *args)

    outs = mixed(stacked, model.args)
    for n, i in enumerate(ids):
        row = tuple(x[n : n + 1] for x in model.args)
        want = merged(stacked, -1 if i is None else i, row)[0]
        for y in outs:
            close(y[n], want, 2e-5)


def test_base_rows_are_the_base_models():
    """Bit for bit where operations run one by one: scale (x A) 0 is 0."""
    model = registry.MODELS["mlp"]()
    stacked = flora.multi.stack(of_model(model))
    for method in METHODS:
        run = flora.multi.lora(model.fn, method=method)
        with jax.disable_jit():
            mixed = run(model.params, stacked, [-1, 0, None], *model.args)
        plain = jax.vmap(lambda x: model.fn(model.params, x[None])[0])(*model.args)
        np.testing.assert_array_equal(mixed[0], plain[0])
        np.testing.assert_array_equal(mixed[2], plain[2])
        assert not np.array_equal(mixed[1], plain[1])
        close(
            jax.jit(run)(model.params, stacked, jnp.array([-1] * 3), *model.args),
            model.fn(model.params, *model.args),
            contract.COMPILED,
        )


ROWS, TOKENS, IN, OUT, RANK, COUNT = 6, 3, 37, 53, 2, 5


def wide_case(tokens=TOKENS):
    def fn(p, x):
        return jnp.einsum("nti,io->nto", x, p["w"])

    layout = flora.Layout()
    made = [{"w": node(layout, (IN, OUT), RANK, k, jnp.float32)} for k in range(COUNT)]
    base = {"w": array(IN, OUT, dtype=jnp.float32)}
    x = array(ROWS, tokens, IN, dtype=jnp.float32)
    return fn, base, flora.multi.stack(made), jnp.arange(ROWS) - 1, x


@pytest.mark.parametrize("method", METHODS)
def test_one_product_with_w_for_the_whole_batch(method):
    fn, base, stacked, ids, x = wide_case()
    run = flora.multi.lora(fn, method=method)

    def step(base, stacked, ids, x):
        loss = lambda s, x: jnp.sum(jnp.square(run(base, s, ids, x)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(stacked, x)

    inputs = base, stacked, ids, x
    products = [
        [tuple(v.aval.shape) for v in e.invars]
        for e in equations(jax.make_jaxpr(run)(*inputs))
        if e.primitive is Primitives.dot_general
    ]
    of_w = [shapes for shapes in products if (IN, OUT) in shapes]
    assert len(of_w) == 1, products
    (other,) = (s for s in of_w[0] if s != (IN, OUT))
    assert np.prod(other) == ROWS * TOKENS * IN
    # Forward and backward: no array of W's size a row, and W itself is the only one.
    made = [
        tuple(v.aval.shape)
        for e in equations(jax.make_jaxpr(step)(*inputs))
        for v in e.outvars
    ]
    assert max(np.prod(s) for s in made) < ROWS * IN * OUT
    assert all({IN, OUT} - {*s} for s in made if s != (IN, OUT)), made
    per_row = [s for s in made if np.prod(s) == ROWS * IN * RANK]
    assert bool(per_row) == (method == "gather"), made
    # What XLA makes of it.
    text = jax.jit(run).lower(*inputs).compile().as_text()
    shapes = [
        [int(n) for n in s.split(",")] for s in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert max(np.prod(s) for s in shapes) < ROWS * IN * OUT
    assert len(re.findall(rf"f32\[{IN},{OUT}\]\S* parameter", text)) <= 2


@pytest.mark.parametrize(("method", "times"), [("gather", 1), ("masked", COUNT)])
def test_what_the_products_of_a_batch_cost(method, times):
    """W's as in the base; the thin ones as for one adapter, or for all of them."""
    fn, base, stacked, ids, x = wide_case()
    run = flora.multi.lora(fn, method=method)
    flops = 0
    for e in equations(jax.make_jaxpr(run)(base, stacked, ids, x)):
        if e.primitive is Primitives.dot_general:
            (summed, _), _ = e.params["dimension_numbers"]
            length = np.prod([e.invars[0].aval.shape[i] for i in summed])
            flops += 2 * e.outvars[0].aval.size * length
    tokens = ROWS * TOKENS
    choice = 2 * 2 * tokens * RANK * RANK * COUNT  # z E and Eᵀ z, of width rank alone
    wanted = 2 * tokens * (IN * OUT + times * RANK * (IN + OUT))
    assert flops - wanted == (0 if method == "gather" else choice)
    alone = flora.lora(fn)
    one = flora.join(base, flora.multi.select(stacked, 0))
    counts = [
        jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        for f, args in ((run, (base, stacked, ids, x)), (alone, (one, x)))
    ]
    assert counts[0] < (1.3 if method == "gather" else 1.6) * counts[1]


def test_auto_copies_factors_where_rows_are_long():
    for tokens, rows, copies in ((12, 6, False), (13, 6, True), (1, 4, True)):
        fn, base, stacked, ids, x = wide_case(tokens)
        inputs = base, stacked, ids[:rows], x[:rows]
        found = [
            tuple(v.aval.shape)
            for e in equations(jax.make_jaxpr(flora.multi.lora(fn))(*inputs))
            for v in e.outvars
        ]
        assert ((rows, IN, RANK) in found) == copies


def test_no_adapter_reaches_another_ones_rows():
    fn, base, stacked, ids, x = wide_case()
    for method in METHODS:
        run = jax.jit(flora.multi.lora(fn, method=method))
        before = run(base, stacked, ids, x)
        other = jax.tree.map(lambda f: f.at[2].multiply(1e6), stacked)
        after = run(base, other, ids, x)
        np.testing.assert_array_equal(np.delete(after, 3, 0), np.delete(before, 3, 0))
        assert not np.array_equal(after[3], before[3])
        beyond = run(base, stacked, ids.at[0].set(COUNT).at[1].set(-2), x)
        assert np.isnan(beyond[:2]).all()
        if method == "gather":  # the others say so: 0 · NaN
            np.testing.assert_array_equal(beyond[2:], before[2:])
    bad = flora.multi.unstack(stacked)
    bad[2]["w"] = dataclasses.replace(
        bad[2]["w"], a=bad[2]["w"].a.at[0, 0].set(jnp.inf)
    )
    with pytest.raises(flora.LoraError, match="'w' of adapter 2 is not finite"):
        flora.multi.stack(bad)


def test_leaves_that_train_whole_differ_by_row():
    model = registry.MODELS["mlp"]()
    adapters = of_model(model, train="bias")
    stacked = flora.multi.stack(adapters)
    run = flora.multi.lora(model.fn)
    mixed = jax.jit(run)(model.params, stacked, jnp.array([1, -1, 2]), *model.args)
    base = jax.tree.map(lambda x: None if x.ndim == 1 else x, model.params)
    for n, i in ((0, 1), (1, -1), (2, 2)):
        tree = model.params if i < 0 else flora.merge(flora.join(base, adapters[i]))
        close(mixed[n], model.fn(tree, *model.args)[n], 2e-5)
    with pytest.raises(
        flora.LoraError, match=r"bias' trains whole, and the base has no"
    ):
        run(base, stacked, [0, 1, 2], *model.args)
    with pytest.raises(flora.LoraError, match=r"bias' trains whole, so no adapter"):
        flora.multi.select(stacked, None)


def test_a_sharded_base_and_a_sharded_batch():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    base = {
        "up": array(16, 8, dtype=jnp.float32),
        "down": array(8, 16, dtype=jnp.float32),
    }
    x = array(4, 3, 16, dtype=jnp.float32)
    placed = {"up": put(base["up"], None, "model"), "down": put(base["down"], "model")}
    adapters = adapters_of(fn, placed, x, settings=((1, 2.0), (2, 3.0)))
    stacked = flora.multi.stack(adapters)
    ids = put(jnp.array([1, -1, 0, 1]), "data")
    for method in METHODS:
        run = jax.jit(flora.multi.lora(fn, method=method))
        y = run(placed, stacked, ids, put(x, "data"))
        text = run.lower(placed, stacked, ids, put(x, "data")).compile().as_text()
        assert not re.search(r"all-gather\S* = f32\[(16,8|8,16)\]", text)
        for n, i in enumerate([1, -1, 0, 1]):
            tree = base if i < 0 else flora.merge(flora.join(base, adapters[i]))
            close(y[n], fn(tree, x[n]), 2e-5)


def test_the_base_gets_no_gradient_and_statics_pass():
    def fn(p, x, *, gain, flag):
        assert flag is True
        return gain * (x @ p["w"])

    _, base, stacked, ids, x = wide_case()
    run = flora.multi.lora(fn)

    def loss(base, x):
        return run(base, stacked, ids, x[:, 0], gain=jnp.float32(2), flag=True).sum()

    dw, dx = jax.grad(loss, (0, 1))(base, x)
    assert not dw["w"].any()
    assert dx.any()


def test_a_base_in_fewer_bits():
    params, x = (
        {"w": array(64, 64, dtype=jnp.float32)},
        array(3, 2, 64, dtype=jnp.float32),
    )
    quantized = flora.quantize.quantize(params, "int8", target="*")

    def fn(p, x):
        return jnp.einsum("nti,io->nto", x, p["w"])

    adapters = adapters_of(fn, params, x, settings=((1, 2.0), (2, 3.0)))
    mixed = flora.multi.lora(fn)(
        quantized, flora.multi.stack(adapters), [1, None, 0], x
    )
    for n, i in enumerate((1, None, 0)):
        run = flora.lora(fn)
        tree = quantized if i is None else flora.join(quantized, adapters[i])
        close(mixed[n], run(tree, x[n : n + 1])[0], 2e-5)
