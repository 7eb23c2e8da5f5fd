"""‖W + scale A B‖ against NumPy in float64, of columns that nearly cancel too."""

import dataclasses
import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
import flora.quantize
from flora._algebra import norms
from flora.variants import DoRA, column_norms
from tests.support.contract import array, close, dense_arrays, dense_arrays_of_step

LAYOUTS = {
    "dense": ((40, 6), flora.Layout((), (0,), (1,))),
    "transposed": ((6, 40), flora.Layout((), (1,), (0,))),
    "one input": ((1, 6), flora.Layout((), (0,), (1,))),
    "prime": ((37, 3), flora.Layout((), (0,), (1,))),
    "heads out": ((4, 3, 6), flora.Layout((), (0, 1), (2,))),
    "heads": ((30, 2, 3), flora.Layout((), (0,), (1, 2))),
    "stack": ((3, 16, 5), flora.Layout((0,), (1,), (2,))),
    "convolution": ((3, 3, 4, 6), flora.Layout((), (0, 1, 2), (3,))),
    "stack inside": ((5, 3, 7, 2), flora.Layout((1,), (2,), (0, 3))),
}


def turned(shape, layout, rank, ratio, scale, *, seed=0, dtypes=(np.float32,) * 2):
    """A weight of which ‖W + s A B‖ is that part of ‖s A B‖, and its norms in NumPy."""
    rng, (count, in_, out) = np.random.default_rng(seed), layout.matrix(shape)
    a, b = (
        np.asarray(jnp.asarray(rng.normal(size=s), dtypes[1]), np.float64)
        for s in ((count, in_, rank), (count, rank, out))
    )
    change = scale * a @ b
    left = rng.normal(size=change.shape)
    sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (change, left)]
    w = np.asarray(
        jnp.asarray(left * ratio * sizes[0] / sizes[1] - change, dtypes[0]), np.float64
    )
    want, whole = np.linalg.norm(w + change, axis=1), np.linalg.norm(w, axis=1)
    parts = np.abs(a).max(1, keepdims=True) @ np.abs(b)
    order = layout.order
    base = w.reshape([shape[i] for i in order]).transpose(np.argsort(order))
    sizes = layout.factor_shapes(shape, rank)
    weight = flora.LoraWeight(
        jnp.asarray(base, dtypes[0]),
        *(
            jnp.asarray(x.reshape(s), dtypes[1])
            for x, s in zip((a, b), sizes, strict=True)
        ),
        layout=layout,
        rank=rank,
        alpha=scale * rank,
    )
    return (
        weight,
        want,
        (want >= 1e-3 * whole) & (scale * parts[:, 0] * in_**0.5 < 1e3 * whole),
    )


def worst(got, want, counts=True):
    return float(
        np.max(np.abs(np.asarray(got).reshape(want.shape) / want - 1) * counts)
    )


# The rank, the scale and the dtypes of W and of the factors.
SETTINGS = {
    "dense": (16, 10 / 3, jnp.float32, jnp.float32),
    "transposed": (2, 1.0, jnp.float32, jnp.bfloat16),
    "one input": (1, 77.7, jnp.float32, jnp.float32),
    "prime": (8, 0.25, jnp.bfloat16, jnp.float32),
    "heads out": (3, 0.7, jnp.float32, jnp.float32),
    "heads": (16, 2.0, jnp.float16, jnp.float16),
    "stack": (4, 64.0, jnp.float32, jnp.float32),
    "convolution": (7, 10 / 3, jnp.float32, jnp.float32),
    "stack inside": (5, 1.0, jnp.float32, jnp.float32),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_norm_is_right_however_much_cancels(name):
    rank, scale, *dtypes = SETTINGS[name]
    run = jax.jit(column_norms)

    @settings(max_examples=25)
    @given(st.floats(-3, 0.3), st.integers(0, 10**6))
    def check(log, seed):
        made = turned(*LAYOUTS[name], rank, 10**log, scale, seed=seed, dtypes=dtypes)
        assert worst(run(made[0]), *made[1:]) < 1e-4

    check()


@pytest.mark.parametrize("rows", [5000, 4999])
def test_slab_by_slab(rows, monkeypatch):
    monkeypatch.setattr(norms, "_SLAB", 512)
    weight, want, _ = turned((rows, 4), flora.Layout((), (0,), (1,)), 8, 1e-3, 2.0)
    assert worst(jax.jit(column_norms)(weight), want) < 1e-5


def test_without_the_second_look_nothing_is_right():
    weight, want, _ = turned(*LAYOUTS["dense"], 4, 1e-3, 2.0)
    square, terms = norms._by_products(weight)
    assert worst(jnp.sqrt(jnp.maximum(square, 0)), want) > 1e-2
    assert np.all(square < norms._CANCELS * terms)


def test_what_does_not_cancel_is_looked_at_once(monkeypatch):
    weight, want, _ = turned(*LAYOUTS["stack"], 4, 1.0, 2.0)
    monkeypatch.setattr(norms, "_by_slabs", lambda w: jnp.full((3, 5), jnp.nan))
    assert worst(column_norms(weight), want) < 1e-6
    alike = dataclasses.replace(weight, b=weight.b.at[1].multiply(-1))
    np.testing.assert_array_equal(column_norms(weight)[0], column_norms(alike)[0])
    less = turned(*LAYOUTS["stack"], 4, 0.1, 2.0)[0]
    assert np.isnan(column_norms(less)).all()


def test_in_the_parts_the_first_product_is_exact():
    weight = turned(*LAYOUTS["dense"], 16, 1e-3, 10 / 3)[0]
    (a, b), (more_a, more_b) = norms._divided(weight)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_array_equal(jnp.dot(a, b, precision="highest"), exact)
    rest = np.asarray(more_a, np.float64) @ np.asarray(more_b, np.float64)
    whole = 10 / 3 * np.asarray(weight.a, np.float64) @ np.asarray(weight.b, np.float64)
    assert np.abs(exact + rest - whole).max() < 1e-8 * np.abs(whole).max()
    assert np.abs(rest).max() < 1e-2 * np.abs(whole).max()


def test_zeros_in_factors_and_in_the_weight():
    weight, _, _ = turned(*LAYOUTS["dense"], 3, 1e-3, 2.0)
    for part in ("base", "a", "b"):
        none = dataclasses.replace(weight, **{part: 0 * getattr(weight, part)})
        w, a, b = (np.asarray(x, np.float64) for x in (none.base, none.a, none.b))
        assert worst(column_norms(none), np.linalg.norm(w + 2 * a @ b, axis=0)) < 1e-5
    nothing = jax.tree.map(jnp.zeros_like, weight)
    assert not column_norms(nothing).any()
    half = dataclasses.replace(weight, a=weight.a.at[:, 1].set(0))
    w, a, b = (np.asarray(x, np.float64) for x in (half.base, half.a, half.b))
    assert (
        worst(norms._by_slabs(half) ** 0.5, np.linalg.norm(w + 2 * a @ b, axis=0))
        < 1e-5
    )


def test_under_every_transformation():
    weight, want, _ = turned(*LAYOUTS["stack"], 4, 1e-3, 2.0)

    def norm(b):
        return column_norms(dataclasses.replace(weight, b=b))

    two = jnp.stack([weight.b, 0 * weight.b])
    for got in (
        jax.vmap(norm)(two)[0],
        jax.lax.scan(lambda c, b: (c, norm(b)), 0, two)[1][0],
        jax.jit(jax.checkpoint(norm))(weight.b),
        jax.jvp(norm, (weight.b,), (weight.b,))[0],
        jax.vjp(norm, weight.b)[0],
    ):
        assert worst(got, want[:, None, :]) < 1e-5
    found = dense_arrays(norm, {weight.base.shape}, weight.b)
    assert found == [], [eqn.primitive for eqn in found]


def test_its_derivative_is_that_of_the_norm(x64):
    weight = turned(*LAYOUTS["dense"], 4, 0.2, 2.0)[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), weight)

    def dense(b):
        return jnp.linalg.norm(wide.base + 2.0 * wide.a @ b, axis=0).sum()

    want = jax.grad(dense)(wide.b)
    for w, tolerance in ((wide, 1e-11), (weight, 1e-4)):
        got = jax.grad(lambda b, w=w: column_norms(dataclasses.replace(w, b=b)).sum())(
            w.b
        )
        assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < tolerance


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("x", "y"), (("x", "y"), None), (None, "y"), ("y",)])
def test_on_a_mesh_no_part_of_the_weight_moves(kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    weight, want, _ = turned((256, 64), flora.Layout((), (0,), (1,)), 4, 1e-3, 2.0)
    rows, columns = (*spec, None)[:2]
    places = {"base": spec, "a": (rows,), "b": (None, columns)}
    with jax.set_mesh(mesh):
        placed = dataclasses.replace(weight, **{
            k: jax.device_put(getattr(weight, k), NamedSharding(mesh, Spec(*s)))
            for k, s in places.items()})  # fmt: skip
        compiled = jax.jit(column_norms).lower(placed).compile()
        got = compiled(placed)
    assert worst(got, want) < 1e-5
    moved = re.findall(r"= \S+ (all-gather|all-to-all)\(", compiled.as_text())
    assert moved == []
    # No more than a slab of half of a device's rows, its product and the factors.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * 256 * 64
    if kind is AxisType.Explicit:
        assert got.sharding.spec == Spec(columns)


def test_in_a_shard():
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    weight, want, _ = turned((40, 8), flora.Layout((), (0,), (1,)), 4, 1e-3, 2.0)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(Spec(None, "tp"), Spec(), Spec(None, "tp")),
        out_specs=Spec("tp"),
    )  # fmt: skip
    def run(base, a, b):
        return column_norms(dataclasses.replace(weight, base=base, a=a, b=b))

    assert worst(run(weight.base, weight.a, weight.b), want) < 1e-5


def test_of_a_base_in_fewer_bits():
    weight = turned((64, 8), flora.Layout((), (0,), (1,)), 4, 0.01, 2.0)[0]
    base = flora.quantize.quantize({"w": weight.base}, "int8", target="*")["w"]
    stored = dataclasses.replace(weight, base=base)
    dense = dataclasses.replace(stored, base=stored.base.dense())
    w, a, b = (np.asarray(x, np.float64) for x in (dense.base, dense.a, dense.b))
    got = jax.jit(column_norms)(stored)
    assert worst(got, np.linalg.norm(w + 2 * a @ b, axis=0)) < 1e-5


FUNCTIONS = {
    "dense": lambda p, x: x @ p["w"],
    "stack": lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
    "convolution": lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
}  # fmt: skip
INPUTS = {"dense": (7, 40), "stack": (7, 16), "convolution": (2, 5, 5, 4)}


@pytest.mark.parametrize("name", [*FUNCTIONS, "embedding"])
def test_a_model_with_columns_that_turned(name):
    """One step: outputs and the gradients of m are those of W_eff in NumPy."""
    shape, layout = LAYOUTS["dense" if name == "embedding" else name]
    weight, want, _ = turned(shape, layout, 4, 1e-3, 2.0)
    magnitude = jnp.ones((*weight.b.shape[: len(layout.stack)], shape[-1]))
    weight = dataclasses.replace(weight, variant=DoRA(), extra={"magnitude": magnitude})
    fn = FUNCTIONS.get(name, lambda p, i: p["w"][i])
    x = jnp.arange(9)
    if name != "embedding":
        x = array(*INPUTS[name], dtype=jnp.float32)
    tree = {"w": weight}
    columns = weight.variant.product(weight).columns
    assert worst(1 / columns, want) < 1e-5
    w, a, b = (np.asarray(v, np.float64) for v in (weight.base, weight.a, weight.b))
    change = 2 * (np.einsum("sir,sro->sio", a, b) if layout.stack else
                  np.tensordot(a, b, 1))  # fmt: skip
    with jax.enable_x64(True):
        v = w + change
        effective = v / np.sqrt((v * v).sum(layout.in_, keepdims=True))
        wide = x if name == "embedding" else x.astype(jnp.float64)
        wanted = fn({"w": jnp.asarray(effective)}, wide)
    close(jax.jit(flora.lora(fn))(tree, x), wanted.astype(jnp.float32), 2e-3)
    grads = jax.grad(lambda t: flora.lora(fn)(t, x).sum())(tree)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if name != "embedding":
        assert dense_arrays_of_step(fn, tree, x) == []


ZEROS = {"w": jnp.ones((8, 6)).at[:, 2].set(0), "v": jnp.zeros((6, 3))}


def test_columns_of_zeros_are_refused_by_name_and_finite_in_a_step():
    def fn(p, x):
        return x @ p["w"] @ p["v"]

    config, x = flora.LoraConfig(rank=2, target="*", variant=DoRA()), jnp.ones((4, 8))

    def init(params):
        return flora.init(jax.random.key(0), config, fn, params, x)

    with pytest.raises(flora.LoraError, match=r"'v'.*3 of its 3 .*\n.*'w'.*1 of its 6"):
        init(ZEROS)
    shapes = init(jax.eval_shape(lambda: ZEROS))
    assert shapes["w"].extra["magnitude"].shape == (6,)
    tree = jax.jit(init)(ZEROS)  # no values are seen while tracing
    y, grads = jax.jit(jax.value_and_grad(lambda t: flora.lora(fn)(t, x).sum()))(tree)
    assert y == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
