"""Adapters side by side: `flora.multi.stack` and what is done with it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
from tests.support.contract import array
from tests.support.many_adapters import LAYOUTS, delta, node, three


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
    gap = one | {"v": None}, one | {"v": one["w"]}
    refused("'v' is frozen in adapter 0", flora.multi.pad, gap[1], like=gap[0])
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
    refused(
        r"ids holds \[2, -2\]; there are 2 adapters", run, base, stacked, [2, -2, 0], x
    )
    refused(r"ids is float32\[3\]", run, base, stacked, jnp.ones(3), x)
    refused(
        r"argument \[0\] has shape \(3, 5\) and ids 2", run, base, stacked, [0, 1], x
    )
    refused(r"'w' has base \(4, 7\)", run, {"w": jnp.ones((4, 7))}, stacked, [0] * 3, x)
    refused("have other structures", run, {"v": jnp.ones(shape)}, stacked, [0] * 3, x)
    refused("no axis of adapters", run, base, one, [0] * 3, x)
    total = flora.multi.lora(lambda p, x: {"loss": (x @ p["w"]).sum()})
    refused(r"output \['loss'\] has shape \(\)", total, base, stacked, [0] * 3, x)
    refused("method='fast'", flora.multi.lora, total, method="fast")
    refused("got a int", flora.multi.lora, 3)
    refused("'w' has rank 4, above 2", flora.multi.put, stacked, 0,
            {"w": node(layout, shape, 4, dtype=jnp.float32)})  # fmt: skip
