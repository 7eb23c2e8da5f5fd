"""An adapter merged into the base, and the base again, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
import flora.quantize
import flora.variants
from tests.support.contract import array

SHAPE = (3, 64, 96)


def fn(p, x):
    return jnp.einsum("sni,sio->sno", x, p["w"].astype(jnp.float32)) + p["b"]


def case(dtype, **options):
    w = 0.02 * array(*SHAPE, dtype=jnp.float32)
    params = {"w": w.astype(dtype), "b": jnp.ones(96)}
    x = array(3, 2, 64, dtype=jnp.float32)
    settings = {"rank": 4, "target": "w", "train": "b", "dtype": jnp.float32} | options
    config = flora.LoraConfig(**settings)
    adapted = flora.init(jax.random.key(0), config, fn, params, x)
    leaves, treedef = jax.tree.flatten(flora.split(adapted)[1])
    moved = [a + 0.01 * array(*a.shape, dtype=a.dtype, seed=k) for k, a in
             enumerate(leaves)]  # fmt: skip
    return params, treedef.unflatten(moved), x


def same_bits(tree, other):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        x, y = (np.ascontiguousarray(a).view(np.uint8) for a in (x, y))
        np.testing.assert_array_equal(x, y)


VARIANTS = [None, flora.variants.DoRA(), flora.variants.VeRA()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("variant", VARIANTS, ids=["LoRA", "DoRA", "VeRA"])
def test_the_base_comes_back_bit_for_bit(dtype, variant):
    params, adapter, _ = case(dtype, variant=variant)
    merged = flora.multi.merge(params, adapter)
    base = {**params, "b": None}
    same_bits(merged.tree, flora.merge(flora.join(base, adapter)))
    same_bits(flora.multi.unmerge(merged), params)
    assert not np.array_equal(merged.tree["b"], params["b"])
    # What is kept besides the tree and the adapter is a byte an element.
    rest = merged.rest["w"]
    if params["w"].dtype.itemsize == 1:
        assert rest is params["w"]
        return
    assert rest.steps.nbytes == np.prod(SHAPE)
    assert rest.at.size < 1e-3 * np.prod(SHAPE)
    off = float((rest.steps != 0).mean())  # where W + ΔW - ΔW alone is not W
    assert off > 0.01
    if variant is None and dtype in ("bfloat16", "float32"):  # examples/howto/multi.md
        assert abs(1 / off - {"bfloat16": 7, "float32": 5}[dtype]) < 0.5, off


def test_odd_values_and_parts_of_a_stack(x64):
    params, adapter, _ = case("float64", target="w/1", train=())
    w = params["w"].at[1, 0, :4].set(jnp.array([0.0, -0.0, 1e-300, 5e-324]))
    w = w.at[1, 1, :2].set(jnp.array([1e8, -1e8])).at[0, 0, 0].set(-jnp.inf)
    params = {**params, "w": w}
    merged = flora.multi.merge(params, adapter)
    assert merged.rest["w"].at.size
    same_bits(flora.multi.unmerge(merged), params)


def test_a_quantized_base_is_kept_as_it_is():
    params, adapter, x = case("float32", train=())
    coded = flora.quantize.quantize(params, "int8", target="w")
    merged = flora.multi.merge(coded, adapter)
    same_bits(flora.multi.unmerge(merged), coded)
    want = flora.lora(fn)(flora.join(coded, adapter), x)
    np.testing.assert_allclose(fn(merged.tree, x), want, rtol=1e-4, atol=1e-4)


def test_the_old_base_can_be_given_up():
    params, adapter, _ = case("bfloat16")
    copy = jax.tree.map(jnp.array, params)
    merged = flora.multi.merge(params, adapter, donate=True)
    assert params["w"].is_deleted()
    assert not params["b"].is_deleted()
    same_bits(flora.multi.unmerge(merged), copy)


def test_what_cannot_be_taken_out_is_refused():
    params, adapter, _ = case("float32")
    merged = flora.multi.merge(params, adapter)
    merged.tree["w"] = merged.tree["w"].at[2, 3, 4].add(1e-4)
    with pytest.raises(flora.LoraError, match="unmerge: 'w' is not what merge made"):
        flora.multi.unmerge(merged)
    with pytest.raises(flora.LoraError, match="merged is a dict"):
        flora.multi.unmerge(params)
    with pytest.raises(flora.LoraError, match=r"merge: 'w' is .* Merge outside of"):
        jax.jit(flora.multi.merge)(params, adapter)
    bad = {**adapter, "b": flora.Trained(adapter["b"].value[:3])}
    with pytest.raises(flora.LoraError, match="base"):
        flora.multi.merge({"w": params["w"]}, bad)
    nan = jax.tree.map(lambda a: a * jnp.nan, adapter)
    with pytest.raises(flora.LoraError, match="'w' holds NaN"):
        flora.multi.merge(params, nan)
