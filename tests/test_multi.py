"""Adapters side by side: `flora.multi.stack` and what is done with it."""

import dataclasses
import re

import chex
import contract
import jax
import jax.numpy as jnp
import many
import numpy as np
import optax
import pytest
import registry
import serve_many
from contract import adapt, array, close, equations

import flora
import flora.multi
import flora.quantize
from flora._compat import P as Primitives
from flora.variants import DoRA, VeRA

METHODS = ("gather", "masked", "auto")
LAYOUTS = [
    (flora.Layout(), (5, 7)),
    (flora.Layout((0,), (1,), (2,)), (3, 5, 7)),
    (flora.Layout((), (2, 0), (1,)), (4, 7, 2)),
    (flora.Layout((2, 0), (1,), (3, 4)), (2, 5, 3, 4, 2)),
]


def node(layout, shape, rank, seed=0, dtype=np.float64, **statics):
    a, b = layout.factor_shapes(shape, rank)
    a, b = array(*a, seed=seed, dtype=dtype), array(*b, seed=seed + 100, dtype=dtype)
    return flora.LoraWeight(None, a, b, layout=layout, rank=rank, **statics)


def delta(x):
    """Scale A B in NumPy, `[stack, in, out]`."""
    n = len(x.layout.stack)
    a, b = (np.asarray(f, np.float64) for f in (x.a, x.b))
    stack, rank = int(np.prod(a.shape[:n])), a.shape[-1]
    scale = x.alpha / (np.sqrt(rank) if x.rank_stabilized else rank)
    return scale * a.reshape(stack, -1, rank) @ b.reshape(stack, rank, -1)


def three(layout, shape, **options):
    """Adapters of other ranks, alphas and scalings."""
    return [
        {"w": node(layout, shape, 2, 0, alpha=3.0, **options)},
        {"w": node(layout, shape, 1, 1, alpha=5.0, **options)},
        {"w": node(layout, shape, 4, 2, alpha=2.0, rank_stabilized=True, **options)},
    ]


def adapters_of(fn, params, *args, settings=((2, 6.0), (1, 5.0), (2, 2.0)), **options):
    """Random adapters of a model, of those ranks and alphas, as if trained."""
    planned = adapt(fn, jax.eval_shape(lambda: params), *args, **options)

    def drawn(x, rank, alpha, seed):
        if isinstance(x, flora.Trained):
            value = array(*x.value.shape, seed=seed, dtype=x.value.dtype)
            return flora.Trained(value)
        if not contract.is_weight(x):
            return None
        made = node(x.layout, x.base.shape, rank, seed, x.base.dtype, alpha=alpha)
        return dataclasses.replace(made, a=0.3 * made.a, b=0.3 * made.b)

    stop = (flora.Trained, flora.LoraWeight)
    return [
        jax.tree.map(
            lambda x, r=r, alpha=alpha, k=k: drawn(x, r, alpha, k),
            planned, is_leaf=lambda x: isinstance(x, stop),
        )
        for k, (r, alpha) in enumerate(settings)
    ]  # fmt: skip


def of_model(model, **options):
    return adapters_of(model.fn, model.params, *model.args, target=model.target, **options)


# --- stack, select, pad, put ---------------------------------------------------------


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_stacked_adapters_keep_their_change(x64, layout, shape):
    adapters = three(layout, shape)
    stacked = flora.multi.stack(adapters)
    w, n = stacked["w"], len(layout.stack)
    a, b = layout.factor_shapes(shape, 4)
    assert (w.a.shape, w.b.shape, w.rank, w.scale) == ((3, *a), (3, *b), 4, 1.0)
    for i, one in enumerate(flora.multi.unstack(stacked)):
        old = adapters[i]["w"]
        np.testing.assert_allclose(delta(one["w"]), delta(old), rtol=1e-13, atol=1e-14)
        np.testing.assert_array_equal(one["w"].a[..., : old.rank], old.a)
        assert not one["w"].a[..., old.rank :].any()
        assert not jnp.moveaxis(one["w"].b, n, 0)[old.rank :].any()
        chex.assert_trees_all_equal(one, flora.multi.select(stacked, i))
        traced = jax.jit(flora.multi.select)(stacked, i)
        chex.assert_trees_all_equal(one, traced)


def test_adapters_that_agree_keep_every_bit_and_their_scale():
    layout, shape = LAYOUTS[1]
    same = [{"w": node(layout, shape, 2, k, jnp.bfloat16, alpha=3.0)} for k in (0, 1)]
    w = flora.multi.stack(same)["w"]
    assert (w.alpha, w.rank, w.b.dtype) == (3.0, 2, jnp.bfloat16)
    np.testing.assert_array_equal(w.b[1], same[1]["w"].b)
    # Other ranks of one scale: zeros are all that is added.
    other = [same[0], {"w": node(layout, shape, 4, 1, jnp.bfloat16, alpha=6.0)}]
    w = flora.multi.stack(other)["w"]
    assert (w.scale, w.rank, w.b.dtype) == (1.5, 4, jnp.bfloat16)
    np.testing.assert_array_equal(w.b[0][:, :2], same[0]["w"].b)
    # Other scales: B holds them, in float32.
    other = [same[0], {"w": node(layout, shape, 2, 1, jnp.bfloat16, alpha=2.5)}]
    w = flora.multi.stack(other)["w"]
    assert (w.scale, w.b.dtype, w.a.dtype) == (1.0, jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(w.b[1], 1.25 * np.float32(other[1]["w"].b))


def test_select_of_the_base_and_out_of_range():
    stacked = flora.multi.stack(three(*LAYOUTS[0], dtype=jnp.float32))
    for i in (-1, None, jnp.int32(-1)):
        assert not flora.multi.select(stacked, i)["w"].b.any()
    pick = jax.jit(flora.multi.select)
    assert not pick(stacked, -1)["w"].b.any()
    for i in (-2, 3):
        assert np.isnan(pick(stacked, i)["w"].b).all()
        with pytest.raises(flora.LoraError, match="there are 3 adapters, 0 to 2"):
            flora.multi.select(stacked, i)
    with pytest.raises(flora.LoraError, match=r"i is 1\.5"):
        flora.multi.select(stacked, 1.5)


def test_padded_adapters_are_swapped_without_recompiling():
    layout, shape = LAYOUTS[0]
    base, x, traces = {"w": array(*shape, dtype=jnp.float32)}, jnp.ones((2, 5)), []
    apply = flora.lora(lambda p, x: x @ p["w"])

    @jax.jit
    def run(base, adapter, x):
        traces.append(1)
        return apply(flora.join(base, adapter), x)

    adapters = three(layout, shape, dtype=jnp.float32)
    adapters.append({"w": node(layout, shape, 2, 3, jnp.bfloat16, alpha=2.0)})
    padded = [flora.multi.pad(a, rank=4) for a in adapters[:3]]
    alike = [flora.multi.pad(a, like=padded[0]) for a in adapters]
    chex.assert_trees_all_equal(padded, alike[:3])
    for adapter, made in zip(adapters, alike, strict=True):
        want = np.asarray(x) @ (np.asarray(base["w"]) + delta(adapter["w"])[0])
        np.testing.assert_allclose(run(base, made, x), want, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_put_replaces_one_adapter_without_recompiling():
    layout, shape = LAYOUTS[3]
    adapters, traces = three(layout, shape, dtype=jnp.float32), []
    stacked = flora.multi.stack(adapters[:2], rank=4)

    @jax.jit
    def put(stacked, i, adapter):
        traces.append(1)
        return flora.multi.put(stacked, i, adapter)

    new = flora.multi.put(stacked, 0, adapters[2])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stacked)
    np.testing.assert_allclose(
        delta(flora.multi.select(new, 0)["w"]), delta(adapters[2]["w"]), rtol=2e-6
    )
    chex.assert_trees_all_equal(
        flora.multi.select(new, 1), flora.multi.select(stacked, 1)
    )
    chex.assert_trees_all_equal(put(stacked, 0, adapters[2]), new)
    for i in (-1, 2):  # traced and out of range: nothing changes
        chex.assert_trees_all_equal(put(stacked, i, adapters[2]), stacked)
        with pytest.raises(flora.LoraError):
            flora.multi.put(stacked, i, adapters[2])
    assert len(traces) == 1


def test_planning_with_no_memory():
    adapters = three(*LAYOUTS[1], dtype=jnp.float32)
    planned = [jax.eval_shape(lambda a=a: a) for a in adapters]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        flora.multi.stack(planned), flora.multi.stack(adapters)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(
        flora.multi.pad(planned[0], rank=3), flora.multi.pad(adapters[0], rank=3)
    )


# --- Mixed batches -------------------------------------------------------------------


def two_uses(p, ids, x):
    """An embedding looked up, a product over two axes, a stack of matrices."""
    h = p["embed"][ids] + jnp.einsum("ntij,ijd->ntd", x, p["in"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
    return h


def test_rows_against_numpy(x64):
    """Outputs of each row and gradients of A and B, in float64."""
    rng = np.random.default_rng(0)
    params = {"embed": array(11, 6), "in": array(3, 2, 6, seed=1),
              "stack": array(2, 6, 6, seed=2)}  # fmt: skip
    layouts = {"embed": flora.Layout(), "in": flora.Layout((), (0, 1), (2,)),
               "stack": flora.Layout((0,), (1,), (2,))}  # fmt: skip
    adapters = [
        {k: node(layouts[k], v.shape, r, 7 * r, alpha=al) for k, v in params.items()}
        for r, al in ((2, 1.5), (1, 0.5), (3, 1.0))
    ]
    ids = np.array([1, -1, 2, 1, 0])
    tokens, x, c = rng.integers(0, 11, (5, 4)), rng.normal(size=(5, 4, 3, 2)), rng.normal(
        size=(5, 4, 6)
    )  # fmt: skip
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

            found[method] = run(params, stacked, ids, jnp.asarray(tokens), x), jax.grad(
                loss
            )(stacked)
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
        close(jax.jit(run)(model.params, stacked, jnp.array([-1] * 3), *model.args),
              model.fn(model.params, *model.args), contract.COMPILED)  # fmt: skip


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
    shapes = [[int(n) for n in s.split(",")] for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(np.prod(s) for s in shapes) < ROWS * IN * OUT
    assert len(re.findall(rf"f32\[{IN},{OUT}\]\S* parameter", text)) <= 2


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
    bad[2]["w"] = dataclasses.replace(bad[2]["w"], a=bad[2]["w"].a.at[0, 0].set(jnp.inf))
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
    with pytest.raises(flora.LoraError, match=r"bias' trains whole, and the base has no"):
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

    base = {"up": array(16, 8, dtype=jnp.float32), "down": array(8, 16, dtype=jnp.float32)}
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


def swapped_layout(adapter):
    x = adapter["w"]
    layout = flora.Layout((), (1,), (0,))
    return {"w": dataclasses.replace(x, layout=layout)}


def test_what_does_not_fit_is_named():
    layout, shape = LAYOUTS[0]
    one, two, _ = three(layout, shape, dtype=jnp.float32)
    stack = flora.multi.stack

    def refused(match, fn, *args, **kwargs):
        with pytest.raises(flora.LoraError, match=match):
            fn(*args, **kwargs)

    wide = {"w": node(layout, (6, 7), 2, dtype=jnp.float32)}
    refused(r"'w' is W with in=0 out=1.*\(6,\) x rank.*adapter 1", stack, [one, wide])
    refused(r"'w' is W.*in=1 out=0", stack, [one, swapped_layout(one)])
    refused("only adapter 1 has 'v'", stack, [one, two | {"v": two["w"]}])
    refused("'v' is frozen in adapter 0", stack, [one | {"v": None}, one | {"v": one["w"]}])
    dropped = {"w": dataclasses.replace(two["w"], dropout=0.5)}
    refused(r"'w' has dropout=0.0 and 0.5.*like=adapters\[0\]", stack, [one, dropped])
    stack([one, flora.multi.pad(dropped, like=flora.multi.pad(one, rank=2))][:1])
    refused("'w' has rank 2, above 1", stack, [one, two], rank=1)
    refused("expected a list", stack, one)
    refused("expected a list", stack, [])
    whole = {"w": dataclasses.replace(one["w"], base=jnp.ones(shape))}
    refused(r"'w' is a weight of the base.*flora.split", stack, [whole])
    refused("holds no trained leaf", stack, [{"w": None}])
    refused("pass either rank= or like=", flora.multi.pad, one)
    refused("rank=0", flora.multi.pad, one, rank=0)
    half = {"w": dataclasses.replace(one["w"], b=one["w"].b.astype(jnp.bfloat16))}
    refused("'w' would be rounded from float32 to bf", flora.multi.pad, two, like=half)
    refused("no axis of adapters", flora.multi.unstack, one)
    stacked, x, base = stack([one, two]), jnp.ones((3, 5)), {"w": jnp.ones(shape)}
    run = flora.multi.lora(lambda p, x: x @ p["w"])
    refused(r"ids holds \[2, -2\]; there are 2 adapters", run, base, stacked, [2, -2, 0], x)
    refused(r"ids is float32\[3\]", run, base, stacked, jnp.ones(3), x)
    refused(r"argument \[0\] has shape \(3, 5\) and ids 2", run, base, stacked, [0, 1], x)
    refused(r"'w' has base \(4, 7\)", run, {"w": jnp.ones((4, 7))}, stacked, [0] * 3, x)
    refused("have other structures", run, {"v": jnp.ones(shape)}, stacked, [0] * 3, x)
    refused("no axis of adapters", run, base, one, [0] * 3, x)
    total = flora.multi.lora(lambda p, x: {"loss": (x @ p["w"]).sum()})
    refused(r"output \['loss'\] has shape \(\)", total, base, stacked, [0] * 3, x)
    refused("method='fast'", flora.multi.lora, total, method="fast")
    refused("got a int", flora.multi.lora, 3)
    refused("'w' has rank 4, above 2", flora.multi.put, stacked, 0,
            {"w": node(layout, shape, 4, dtype=jnp.float32)})  # fmt: skip


# --- Training side by side -----------------------------------------------------------


def regression(adapted, x, y):
    out = flora.lora(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"])(adapted, x)
    return jnp.mean(jnp.square(out - y))


def sweep(settings, dtype=jnp.float32):
    params = {"up": array(5, 8, dtype=dtype), "down": array(8, 3, dtype=dtype),
              "bias": jnp.zeros(3, dtype)}  # fmt: skip
    x, y = array(16, 5, seed=3, dtype=dtype), array(16, 3, seed=4, dtype=dtype)
    made = [
        {k: node(flora.Layout(), params[k].shape, seed=i, dtype=dtype, **s)
         for k in ("up", "down")} | {"bias": flora.Trained(params["bias"])}
        for i, s in enumerate(settings)
    ]  # fmt: skip
    return params | {"bias": None}, made, x, y


def make_tx(rate):
    return optax.adamw(rate, weight_decay=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        [{"rank": 1, "alpha": 8.0}, {"rank": 3, "alpha": 8.0},
         {"rank": 2, "alpha": 3.0, "rank_stabilized": True}],
        [{"rank": 2, "alpha": 4.0}] * 2 + [{"rank": 3, "alpha": 6.0}],
    ],
    ids=["other scales", "one scale"],
)  # fmt: skip
def test_runs_side_by_side_are_the_runs_one_by_one(x64, settings):
    base, adapters, x, y = sweep(settings, jnp.float64)
    rates, traces = jnp.array([1e-2, 3e-2, 1e-1]), []

    def loss(adapted, x, y):
        traces.append(1)
        return regression(adapted, x, y)

    runs = flora.multi.start(adapters, make_tx, rates)
    step = jax.jit(flora.multi.train_step(loss, make_tx))
    many = []
    for _ in range(6):
        runs, losses = step(base, runs, x, y)
        many.append(losses)
    assert len(traces) == 1
    assert many[-1][0] < many[0][0]
    found = flora.multi.finish(runs)
    for k, (one, rate) in enumerate(zip(adapters, rates, strict=True)):
        tx = make_tx(float(rate))

        @jax.jit
        def alone(adapter, state, tx=tx):
            value, grads = jax.value_and_grad(
                lambda a: regression(flora.join(base, a), x, y)
            )(adapter)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        state = tx.init(one)
        for n in range(6):
            one, state, value = alone(one, state)
            np.testing.assert_allclose(many[n][k], value, rtol=1e-12)
        close(found[k], one, 1e-9)  # Adam divides by small numbers
        assert found[k]["up"].rank == settings[k]["rank"]
    assert not runs.adapter["up"].a[0, :, settings[0]["rank"] :].any()


def test_each_run_can_have_its_own_batch():
    base, adapters, x, y = sweep([{"rank": 2}] * 2)
    runs = flora.multi.start(adapters, optax.sgd, jnp.array([0.1, 0.1]))
    step = flora.multi.train_step(regression, optax.sgd, batch_axis=0)
    _, losses = jax.jit(step)(base, runs, jnp.stack([x, 2 * x]), jnp.stack([y, -y]))
    close(losses, jnp.stack([regression(flora.join(base, adapters[0]), x, y),
                             regression(flora.join(base, adapters[1]), 2 * x, -y)]))  # fmt: skip


def test_runs_share_the_product_with_w():
    base, adapters, x, y = sweep([{"rank": 2}] * 4)
    runs = flora.multi.start(adapters, optax.sgd, jnp.full(4, 0.1))
    step = flora.multi.train_step(regression, optax.sgd)
    made = jax.make_jaxpr(step)(base, runs, x, y)
    shapes = [[v.aval.shape for v in e.invars] for e in equations(made)
              if e.primitive is Primitives.dot_general]  # fmt: skip
    # The first layer meets x once for all runs; the second the batch of all of them.
    assert shapes.count([(16, 5), (5, 8)]) == 1
    assert sorted(s[0] for s in shapes if s[1] == (8, 3)) == [(4, 16, 3), (4, 16, 8)]


def test_what_runs_refuse():
    _, adapters, _, _ = sweep([{"rank": 2}] * 2)
    with pytest.raises(flora.LoraError, match=r"shape \(3,\); there are 2 adapters"):
        flora.multi.start(adapters, optax.sgd, jnp.ones(3))
    with pytest.raises(flora.LoraError, match="expected what makes an optimizer"):
        flora.multi.start(adapters, optax.sgd(0.1), jnp.ones(2))
    dropped = jax.tree.map(
        lambda x: dataclasses.replace(x, dropout=0.1) if contract.is_weight(x) else x,
        adapters[1], is_leaf=contract.is_weight,
    )  # fmt: skip
    with pytest.raises(flora.LoraError, match=r"'up' has dropout rates \[0.0, 0.1\]"):
        flora.multi.start([adapters[0], dropped], optax.sgd, jnp.ones(2))
    with pytest.raises(flora.LoraError, match="expected what"):
        flora.multi.finish(adapters)
    with pytest.raises(flora.LoraError, match="expected what"):
        flora.multi.train_step(regression, optax.sgd)(None, adapters)


# --- Variants ------------------------------------------------------------------------


def of_variant(variant, count=2):
    """A base, adapters of a variant, x and y."""
    params = {"w": array(5, 3, dtype=jnp.float64)}
    x, y = array(16, 5, seed=3), array(16, 3, seed=4)
    made = [
        contract.randomized(
            adapt(product, params, x, key=k, variant=variant, dtype=jnp.float64), key=k
        )
        for k in range(count)
    ]
    return params, [flora.split(t)[1] for t in made], x, y


def product(p, x):
    return x @ p["w"]


def test_variants_are_stacked_and_selected(x64):
    params, adapters, x, _ = of_variant(DoRA())
    stacked = flora.multi.stack(adapters)
    assert stacked["w"].extra["magnitude"].shape == (2, 3)
    apply = flora.lora(product)
    for i, one in enumerate(adapters):
        for made in (flora.multi.select(stacked, i), jax.jit(flora.multi.select)(stacked, i)):
            close(apply(flora.join(params, made), x), apply(flora.join(params, one), x))
    assert np.isnan(jax.jit(flora.multi.select)(stacked, -1)["w"].b).all()
    for match, call in (
        ("'w' is a DoRA.*stands for the base", lambda: flora.multi.select(stacked, -1)),
        ("'w' is a DoRA.*no mixed", lambda: flora.multi.lora(product)(params, stacked, [0], x)),
        ("'w' is a DoRA", lambda: flora.multi.combine(adapters, [0.5, 0.5])),
        ("'w' is a DoRA.*are its own", lambda: flora.multi.stack(adapters, rank=3)),
    ):
        with pytest.raises(flora.LoraError, match=match):
            call()


@pytest.mark.parametrize("variant", [DoRA(), VeRA()], ids=["DoRA", "VeRA"])
def test_variants_train_side_by_side(x64, variant):
    """What a variant freezes stays bit for bit, with weight decay too."""
    base, adapters, x, y = of_variant(variant)

    def loss(adapted, x, y):
        return jnp.mean(jnp.square(flora.lora(product)(adapted, x) - y))

    rates = jnp.array([1e-2, 3e-2])
    runs = flora.multi.start(adapters, make_tx, rates)
    step = jax.jit(flora.multi.train_step(loss, make_tx))
    for _ in range(3):
        runs, _ = step(base, runs, x, y)
    for one, found, rate in zip(adapters, flora.multi.finish(runs), rates, strict=True):
        adapted = flora.join(base, one)
        tx = flora.optimizer(make_tx(float(rate)), adapted)
        state = tx.init(adapted)
        for _ in range(3):
            _, grads = flora.value_and_grad(loss)(adapted, x, y)
            updates, state = tx.update(grads, state, adapted)
            adapted = optax.apply_updates(adapted, updates)
        close(found, flora.split(adapted)[1], 1e-9)
        for name in variant.frozen:
            np.testing.assert_array_equal(getattr(found["w"], name), getattr(one["w"], name))


def test_a_base_in_fewer_bits():
    params, x = {"w": array(64, 64, dtype=jnp.float32)}, array(3, 2, 64, dtype=jnp.float32)
    stored = flora.quantize.quantize(params, "int8", target="*")

    def fn(p, x):
        return jnp.einsum("nti,io->nto", x, p["w"])

    adapters = adapters_of(fn, params, x, settings=((1, 2.0), (2, 3.0)))
    mixed = flora.multi.lora(fn)(stored, flora.multi.stack(adapters), [1, None, 0], x)
    for n, i in enumerate((1, None, 0)):
        run = flora.lora(fn)
        tree = stored if i is None else flora.join(stored, adapters[i])
        close(mixed[n], run(tree, x[n : n + 1])[0], 2e-5)


# --- Examples ------------------------------------------------------------------------


@pytest.mark.slow
def test_serve_many():
    options = ["--requests", "9", "--rounds", "1", "--d", "64", "--layers", "1"]
    for method in METHODS:
        assert serve_many.main([*options, "--method", method])["error"] < 1e-4


@pytest.mark.slow
def test_many_runs_have_the_losses_of_single_ones():
    sizes = ["--tokens", "16", "--d", "32", "--layers", "1"]
    assert many.main(["--runs", "3", "--rounds", "2", *sizes])[3]["differ"] <= 1e-4
