"""Fingerprints depend on every bit and on no sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as Spec

import flora
from flora._files.compare import base_problems
from flora._files.fingerprint import fingerprint
from tests.support.checkpoints import DEVICES, mesh
from tests.support.registry import normal


def one(x):
    return fingerprint({"w": x})["w"]


def test_fingerprints_depend_on_every_bit():
    w = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    seen = {one(w)}
    for i in range(w.size):
        for bit in (0, 13, 31):
            v = w.copy()
            v.view(np.uint32).flat[i] ^= np.uint32(1 << bit)
            seen.add(one(v))
    assert len(seen) == 1 + 3 * w.size
    for other in (
        w.transpose(1, 0, 2),
        w[::-1],
        np.roll(w, 1),
        w.reshape(5, 6, 4),
        w[:5],
        w.astype(np.float64),
        w.view(np.int32),
        w[None],
    ):
        seen.add(one(np.ascontiguousarray(other)))
    assert len(seen) == 9 + 3 * w.size
    assert fingerprint({"v": w})["v"] not in seen
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert one(nans[:1]) != one(nans[1:])
    assert one(nans[:1]) == one(jnp.asarray(nans[:1]))


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16",
     "int32", "uint32", "int64", "uint64", "float4_e2m1fn", "float8_e4m3fn",
     "float8_e5m2", "float8_e8m0fnu", "float16", "bfloat16", "float32", "float64",
     "complex64", "complex128"],
)  # fmt: skip
def test_fingerprints_of_every_dtype(dtype, x64):
    values = np.array([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]])
    x = values.astype(jnp.dtype(dtype))
    assert one(x) == one(jnp.asarray(x))
    assert len({one(jnp.asarray(values[i].astype(x.dtype))) for i in (0, 1)}) == 2


ZEROS = ["float4_e2m1fn", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float16",
         "bfloat16", "float32", "float64", "complex64", "complex128"]  # fmt: skip
ONE_ZERO = ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


def with_zeros(dtype, zero):
    x = np.array([[1, 0, 0.5], [0, 2, 1]]).astype(jnp.dtype(dtype))
    return np.where(x == 0, np.array(zero).astype(x.dtype), x)


@pytest.mark.parametrize("dtype", ZEROS)
def test_zeros_are_alike_whatever_their_sign(dtype, x64):
    """And everything without -0.0 has the fingerprint of files with signed zeros."""
    plus, minus = with_zeros(dtype, 0.0), with_zeros(dtype, -0.0)
    assert plus.tobytes() != minus.tobytes()
    same = [plus, minus, jnp.asarray(plus), jnp.asarray(minus)]
    assert {one(x) for x in same} == {fingerprint({"w": plus}, signed_zeros=True)["w"]}
    kept = [fingerprint({"w": x}, signed_zeros=True)["w"] for x in same]
    assert kept[0] == kept[2] != kept[1] == kept[3]


@pytest.mark.parametrize("dtype", ONE_ZERO)
def test_what_is_no_zero_counts_in_types_that_have_one_zero(dtype):
    """Their NaN, or a power of two, has the bits that -0.0 has elsewhere."""
    x = np.array([0, 0x80, 1], np.uint8)
    y = np.array([0, 0x00, 1], np.uint8)
    for make in (np.asarray, jnp.asarray):
        assert one(make(x.view(dtype))) != one(make(y.view(dtype)))


def test_subnormal_numbers_are_no_zeros():
    bits_ = np.array([0, 1, 0x80000001, 0x00400000], np.uint32)
    for make in (np.asarray, jnp.asarray):
        assert (
            len({one(make(bits_[i : i + 1].view(np.float32))) for i in range(4)}) == 4
        )


def test_fingerprints_in_files_stay_valid():
    """Written down before zeros were alike; the second base holds -0.0."""
    w = (np.arange(12, dtype=np.float32) - 5.5).reshape(3, 4)
    v = w.astype(jnp.bfloat16)
    old = {"v": "bfloat16[3,4] 7ec79bb8363a2989", "w": "float32[3,4] d4e905a3386dbb42"}
    assert fingerprint({"w": w, "v": v}) == old
    w[1, 1:3] = -0.0
    old = {"w": "float32[3,4] 752cf35a7408faf5"}
    assert base_problems(old, {"w": w}, ()) == []
    assert fingerprint({"w": w}) != old
    w[0, 0] = 0.0
    (problem,) = base_problems(old, {"w": w}, ())
    assert problem.startswith("'w': the checkpoint was trained on a base of float32")
    assert "an optimizer without flora.optimizer moved them" in problem


@pytest.mark.parametrize("spec", [Spec(), Spec("data"), Spec("data", "model"),
                                  Spec(None, ("model", "data")),
                                 Spec("model", None, "data")])  # fmt: skip
@pytest.mark.parametrize("kind", jax.sharding.AxisType.__members__)
def test_fingerprints_do_not_depend_on_shardings(spec, kind):
    kinds = (jax.sharding.AxisType[kind],) * 2
    if kind == "Manual":
        kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    for dtype in (np.float32, np.complex64, jnp.bfloat16):
        w = np.random.default_rng(0).normal(size=(16, 24, 4)).astype(dtype)
        x = jax.device_put(w, NamedSharding(grid, spec))
        assert one(x) == one(w)


def test_fingerprints_gather_nothing():
    from flora._files.fingerprint import _hash

    x = jax.device_put(normal(64, 64), NamedSharding(mesh(4, 2), Spec("data", "model")))
    salt = np.uint32(0)
    text = _hash.lower(x, salt, salt).compile().as_text()
    assert "all-reduce" in text
    for wrong in ("all-gather", "all-to-all", "collective-permute", "[64,64]"):
        assert wrong not in text, wrong


def test_fingerprints_of_other_leaves():
    keys = jax.random.split(jax.random.key(0), 3)
    tree = {"keys": keys, "text": "x", "number": 3, "none": None,
            "empty": jnp.zeros((0, 2)), "names": np.array(["a", "bc"]),
            "objects": np.array([{}, 1], object),
            "float0": np.zeros(2, jax.dtypes.float0), "scalar": jnp.uint32(4),
            "object": object()}  # fmt: skip
    found = fingerprint(tree)
    assert found == fingerprint(tree)
    assert found["keys"].startswith("key<fry>[3] ")
    changed = fingerprint(tree | {"keys": keys[::-1], "text": "y", "number": 4})
    assert {k for k in found if found[k] != changed[k]} == {"keys", "text", "number"}
    host = SingleDeviceSharding(DEVICES[0], memory_kind="pinned_host")
    assert one(jax.device_put(normal(4, 3), host)) == one(normal(4, 3))
    with pytest.raises(
        flora.LoraError, match=r"'w' is a ShapeDtypeStruct, float32\[2\]"
    ):
        one(jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(flora.LoraError, match="'w' is a tracer"):
        jax.jit(one)(normal(2))
