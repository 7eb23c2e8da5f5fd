"""Products with W + scale A B, against einsum of the dense weight by names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora._algebra import low_rank as module
from flora._algebra.axes import RANK, Named
from flora._algebra.low_rank import (
    compute_dtype_of,
    contract,
    densified,
    drop,
    low_rank,
    named,
    on_hidden,
    sizes_of,
    widened,
    with_gradient_of_scale,
    with_output_scale,
)
from flora._tree.errors import LoraError, Unfactorable
from tests.support.contract import equations
from tests.support.named import apart, einsum, factored, random, whole

SIZES = {"i": 3, "j": 4, "k": 5, "l": 2, "u": 1}


def array(names, seed=0, dtype=jnp.float64):
    shape = [SIZES[n] for n in names]
    return Named(random(*shape, seed=seed, dtype=dtype), tuple(names))


def close(got, names, want, tolerance=1e-12):
    assert got.names == tuple(names)
    assert got.array.shape == want.shape
    real = np.asarray(got.array.astype(jnp.result_type(got.array.dtype, jnp.float32)))
    atol = tolerance * np.abs(want).max(initial=1e-30)
    np.testing.assert_allclose(real, want, rtol=0, atol=atol)


# --- Two arrays -----------------------------------------------------------------------

CONTRACTIONS = [
    ("ij", "jk", "ik"), ("ij", "jk", "ki"), ("ji", "kj", "ik"), ("ijl", "jlk", "ki"),
    ("ijk", "jkl", "kli"), ("ijk", "ijk", "ijk"), ("ijk", "kji", "j"),
    ("ij", "kl", "kijl"),
    ("iuj", "juk", "uik"), ("iu", "ju", "ij"), ("ij", "i", "ji"), ("", "ij", "ji"),
    ("ij", "ij", ""), ("uj", "ju", "u"),
]  # fmt: skip


@pytest.mark.parametrize(("u", "v", "out"), CONTRACTIONS)
def test_contract_is_einsum(x64, u, v, out):
    x, y = array(u, 1), array(v, 2)
    close(contract(x, y, out), out, einsum(out, x, y))


def test_contract_writes_the_result_in_the_order_that_is_asked():
    """No transpose where one of both orders of the operands has none."""

    def transposes(out):
        def run(x, y):
            return contract(Named(x, ("i", "j")), Named(y, ("j", "k")), out).array

        jaxpr = jax.make_jaxpr(run)(jnp.ones((3, 4)), jnp.ones((4, 5)))
        perms = [e.params["permutation"] for e in equations(jaxpr)
                 if e.primitive.name == "transpose"]  # fmt: skip
        return [p for p in perms if p != (0, 1)]

    assert transposes("ik") == transposes("ki") == []


def test_dtype_and_precision_of_a_contraction():
    x, y = array("ij", dtype=jnp.bfloat16), array("jk", dtype=jnp.bfloat16)
    assert contract(x, y, "ik").array.dtype == jnp.bfloat16
    wide = contract(x, y, "ik", dtype=jnp.float32)
    assert wide.array.dtype == jnp.float32
    close(wide, "ik", einsum("ik", x, y), 1e-5)

    def precisions(precision):
        jaxpr = jax.make_jaxpr(lambda x: contract(x, y, "ik", precision=precision))(x)
        return [
            e.params["precision"] for e in equations(jaxpr)
            if e.primitive.name == "dot_general"
        ]  # fmt: skip

    highest = jax.lax.Precision.HIGHEST
    assert precisions(highest) == [(highest, highest)]
    assert precisions(None) == [None]


# --- The low-rank term ----------------------------------------------------------------

#  The weight's axes: i a stack, j and u in, k and l out.
ROLES = {"i": "stack", "j": "in", "u": "in", "k": "out", "l": "out"}
PRODUCTS = [
    ("jk", "lj", "lk"), ("jk", "lj", "kl"), ("jk", "kl", "jl"), ("ijk", "lij", "ilk"),
    ("ijk", "lj", "lik"), ("kj", "j", "k"), ("juk", "lju", "lk"), ("ujk", "j", "uk"),
    ("jkl", "ij", "kil"), ("jk", "ijk", "i"), ("jk", "jk", ""), ("jk", "l", "ljk"),
    ("ijk", "ijk", "jk"), ("jukl", "ui", "jkli"),
]  # fmt: skip


def weight(names, **settings):
    return factored([[(n, SIZES[n], ROLES[n])] for n in names], **settings)


@pytest.mark.parametrize("order", ["thin first", "the other first"])
@pytest.mark.parametrize(("w", "x", "out"), PRODUCTS)
def test_low_rank_is_einsum_of_the_dense_change(x64, monkeypatch, order, w, x, out):
    w, x = weight(w), array(x, 9)
    if order == "the other first":  # right at any cost
        cost = module._cost
        monkeypatch.setattr(module, "_cost", lambda *args: -cost(*args))
    change = dataclasses.replace(w, base=None)
    want = einsum(out, x, Named(apart(change), w.names))
    close(low_rank(x, w, out, precision=None, dtype=jnp.float64), out, want)
    close(contract(change, x, out), out, want)
    want = einsum(out, x, Named(apart(w), w.names))
    close(contract(w, x, out), out, want)


BOTH = [
    ("jk", "ki", "ji"),
    ("jk", "jl", "kl"),
    ("jk", "ijk", "i"),
    ("ijk", "kij", "ji"),
]


@pytest.mark.parametrize(("v", "w", "out"), BOTH)
def test_weights_on_both_sides(x64, v, w, out):
    roles = {"i": "out", "j": "in", "k": "in", "l": "out"}
    v = weight(v)
    w = factored([[(n, SIZES[n], roles[n])] for n in w], scale=0.5, rank=3)
    shape = [*sizes_of(v).items()]
    v = named(v, shape)  # its rank has another name
    change = dataclasses.replace(w, base=None)
    want = einsum(out, *(Named(apart(x), x.names) for x in (_reranked(v), change)))
    got = low_rank(v, change, out, precision=None, dtype=jnp.float64)
    close(got, out, want)


def _reranked(w):
    return w.on_factors(lambda f: f.renamed({"other rank": RANK}))


def test_a_pure_change_times_a_pure_change(x64):
    v, w = (dataclasses.replace(weight(n), base=None) for n in ("jk", "kl"))
    w = factored([[("k", 5, "in")], [("l", 2, "out")]])
    w = dataclasses.replace(w, base=None)
    got = low_rank(
        named(v, [("j", 4), ("k", 5)]), w, "jl", precision=None, dtype=jnp.float64
    )
    close(got, "jl", whole(v) @ whole(w))


@pytest.mark.parametrize("tokens", [1, 200])
def test_the_cheaper_thin_product_comes_first(tokens):
    """X meets the factor that has its axis, whichever factor that is."""
    a, b = random(64, 2, dtype=jnp.float32), random(2, 16, dtype=jnp.float32)
    w = factored([[("i", 64, "in")], [("o", 16, "out")]], dtype=jnp.float32)
    w = dataclasses.replace(
        w, base=None, factors={"a": Named(a, ("i", RANK)), "b": Named(b, (RANK, "o"))}
    )

    def shapes(names, size):
        x = Named(jnp.ones(size, jnp.float32), names)
        out = [*names[:-1], "o"] if names[-1] == "i" else [*names[:-1], "i"]
        jaxpr = jax.make_jaxpr(
            lambda x: low_rank(x, w, out, precision=None, dtype=jnp.float32)
        )(x)
        return [
            e.outvars[0].aval.shape for e in equations(jaxpr)
            if e.primitive.name == "dot_general"
        ]  # fmt: skip

    assert shapes(("t", "i"), (tokens, 64)) == [(tokens, 2), (tokens, 16)]
    assert shapes(("t", "o"), (tokens, 16)) == [(tokens, 2), (tokens, 64)]


@pytest.mark.parametrize(
    ("sizes", "first"), [((50, 2), "in"), ((2, 50), "out")], ids=["a", "b"]
)
def test_where_x_meets_both_factors_the_longer_axis_goes_first(sizes, first):
    n, m = sizes
    w = factored([[("i", n, "in")], [("o", m, "out")]], dtype=jnp.float32)
    x = Named(jnp.ones((3, n, m), jnp.float32), ("t", "i", "o"))
    jaxpr = jax.make_jaxpr(
        lambda x: low_rank(x, w, ["t"], precision=None, dtype=jnp.float32)
    )(x)
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    kept = m if first == "in" else n
    assert dots[0].outvars[0].aval.size == 3 * kept * 2
    assert dots[0].outvars[0].aval.size + 3 == sum(e.outvars[0].aval.size for e in dots)


# --- Dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "dtype", "tolerance"),
    [
        (jnp.int8, jnp.float32, 1e-5), (jnp.int32, jnp.int32, None),
        (jnp.bfloat16, jnp.bfloat16, 2e-2), (jnp.bfloat16, jnp.float32, 2e-2),
        (jnp.float8_e4m3fn, jnp.float32, 1e-5), (jnp.float32, jnp.float32, 1e-5),
        (jnp.float16, jnp.float16, 1e-3), (jnp.float16, jnp.float32, 1e-5),
    ],
)  # fmt: skip
def test_dtypes_of_activations(x, dtype, tolerance):
    w = dataclasses.replace(weight("jk", dtype=jnp.float32), base=None)
    values = Named(jnp.arange(8).reshape(2, 4).astype(x), ("l", "j"))
    if tolerance is None:  # a result that holds no fraction
        got = low_rank(values, w, "lk", precision=None, dtype=jnp.float32)
        tolerance = 1e-5
    else:
        got = low_rank(values, w, "lk", precision=None, dtype=dtype)
        assert got.array.dtype == dtype
    close(got, "lk", einsum("lk", values, Named(whole(w), w.names)), tolerance)


def test_complex_results_keep_complex_factors(x64):
    w = dataclasses.replace(weight("jk"), base=None)
    b = Named(w.b.array * (1 + 2j), w.b.names)
    w = dataclasses.replace(w, factors={**w.factors, "b": b})
    x = array("lj", 9)
    got = low_rank(x, w, "lk", precision=None, dtype=jnp.complex128)
    want = w.settings.scale * einsum("lk", x, w.a, b)
    close(got, "lk", want)
    assert np.abs(want.imag).max() > 0.1


def test_the_scale_acts_in_float32():
    """1.1 · 1.75 rounded once: in bfloat16, 1.1 itself would be rounded before."""
    w, one = weight("jk", dtype=jnp.bfloat16, scale=1.1), jnp.bfloat16(1)
    b = Named(jnp.full((5, 1), 1.75, jnp.bfloat16), ("k", RANK))
    a = Named(jnp.ones((1, 4), jnp.bfloat16), (RANK, "j"))
    w = dataclasses.replace(w, base=None, factors={"a": a, "b": b})
    x = Named(jnp.asarray([[one, 0, 0, 0]], jnp.bfloat16), ("l", "j"))
    got = low_rank(x, w, "lk", precision=None, dtype=jnp.bfloat16).array
    assert jnp.bfloat16(1.1) * jnp.bfloat16(1.75) != jnp.bfloat16(1.1 * 1.75)
    assert (got == jnp.bfloat16(1.1 * 1.75)).all()


def test_which_dtype_computes():
    f32, bf16, f8, c64 = jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.complex64
    f16 = jnp.float16
    for x, y, want in [
        (bf16, f32, bf16), (jnp.int8, bf16, bf16), (f8, bf16, bf16), (f8, f8, f32),
        (jnp.int8, jnp.int32, f32), (c64, f32, c64), (f16, f16, f32), (f8, f16, f32),
        (f32, f16, f32), (bf16, f16, bf16),
    ]:  # fmt: skip
        assert compute_dtype_of(x, y) == want
    half, ints = jnp.ones(2, bf16), jnp.ones(2, jnp.int32)
    assert widened(half).dtype == widened(half, ints).dtype == f32
    assert widened(half, jnp.ones(2, c64)).dtype == c64


# --- Functions between A and B --------------------------------------------------------


def test_a_function_between_sees_the_rank_last(x64):
    w = weight("jk", between=lambda z: z * jnp.arange(2.0))
    z = Named(random(2, 5), (RANK, "l"))
    got = on_hidden(w, z)
    assert got.names == z.names
    np.testing.assert_array_equal(got.array, z.array * jnp.arange(2.0)[:, None])
    assert on_hidden(weight("jk"), z) is z


@pytest.mark.parametrize(("x", "out"), [("lj", "lk"), ("lk", "lj")])
@pytest.mark.parametrize("cheap", [True, False])
def test_x_meets_its_own_factor_first_at_any_cost(x64, monkeypatch, x, out, cheap):
    w = dataclasses.replace(weight("jk", between=jnp.tanh), base=None)
    if not cheap:
        cost = module._cost
        monkeypatch.setattr(module, "_cost", lambda *args: -cost(*args))
    x = array(x, 9)
    first, second = (w.a, w.b) if "j" in x.names else (w.b, w.a)
    z = Named(jnp.tanh(jnp.asarray(einsum(["l", RANK], x, first))), ("l", RANK))
    want = w.settings.scale * einsum(out, z, second)
    close(low_rank(x, w, out, precision=None, dtype=jnp.float64), out, want)


@pytest.mark.parametrize(("x", "out"), [("ljk", "l"), ("l", "ljk"), ("jk", "jk")])
def test_which_factor_x_meets_must_be_clear(x64, x, out):
    w = weight("jk", between=jnp.tanh)
    with pytest.raises(
        Unfactorable, match="over both in and out axes, or over neither"
    ):
        low_rank(array(x), w, out, precision=None, dtype=jnp.float64)


# --- Operands -------------------------------------------------------------------------


def test_named_arrays_and_weights(x64):
    x = random(6, 4)
    got = named(x, [("p", 2), ("q", 3), ("r", 4)])
    assert got.sizes == {"p": 2, "q": 3, "r": 4} == sizes_of(got)
    np.testing.assert_array_equal(got.array, x.reshape(2, 3, 4))
    w = factored([[("0", 6, "in")], [("1", 4, "out")]])
    got = named(w, [("p", 2), ("q", 3), ("r", 4)])
    assert got.names == ("p", "q", "r")
    assert got.a.sizes == {"p": 2, "q": 3, "other rank": 2}
    assert sizes_of(got) == {"p": 2, "q": 3, "r": 4}
    np.testing.assert_allclose(apart(_reranked(got)), whole(w).reshape(2, 3, 4))
    pure = named(dataclasses.replace(w, base=None), [("p", 6), ("r", 4)])
    assert pure.base is None
    joined = factored([[("0", 2, "in"), ("1", 3, "out")], [("2", 4, "out")]])
    for bad in (joined, dataclasses.replace(
        w, settings=dataclasses.replace(w.settings, between=jnp.tanh))
    ):  # fmt: skip
        with pytest.raises(Unfactorable, match="joined axes or a variant"):
            named(bad, [("p", 6), ("r", 4)])


AXES = {
    "dense": [[("0", 3, "in")], [("1", 4, "out")]],
    "pieces": [[("0", 2, "in"), ("1", 3, "out"), ("2", 2, "out")], [("3", 2, "stack")]],
    "units": [[("0", 1, "stack")], [], [("1", 1, "out"), ("2", 3, "in")]],
    "an axis of no factor": [[("0", 2, "")], [("1", 3, "in")], [("2", 4, "out")]],
}  # fmt: skip


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", AXES)
def test_densified(x64, name, columns):
    w = factored(AXES[name], columns=columns)
    if name == "an axis of no factor":  # A B repeats along it
        w = w.on_factors(lambda f: f.repeated("0", 2))
    got = densified(w)
    assert got.dtype == w.base.dtype
    np.testing.assert_allclose(got, whole(w), rtol=1e-12)
    pure = dataclasses.replace(w, base=None)
    assert densified(pure).dtype == w.a.array.dtype == jnp.float64
    np.testing.assert_allclose(densified(pure), whole(pure), rtol=1e-12)
    bare = w.frozen(w.base)
    assert densified(bare) is bare.base


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_densified_is_rounded_once(dtype):
    w = weight("jk", dtype=dtype)
    got = densified(w)
    assert got.dtype == dtype
    half = {
        k: float(getattr(jnp.finfo(dtype), k)) / 2
        for k in ("eps", "smallest_subnormal")
    }
    np.testing.assert_allclose(
        np.asarray(got, np.float32), whole(w),
        rtol=1.01 * half["eps"], atol=half["smallest_subnormal"],
    )  # fmt: skip


def test_a_function_between_has_no_dense_weight(x64):
    with pytest.raises(
        LoraError, match=r"'w' would have to be formed, .*between A and B"
    ):
        densified(weight("jk", between=jnp.tanh))


# --- Output scales and dropout --------------------------------------------------------


def test_output_scales(x64):
    y, scale = random(6, 4), Named(random(4, 2, seed=1), ("o", "s"))
    got = with_output_scale(y, scale, [("s", 2), ("t", 3), ("o", 4)])
    want = np.asarray(y).reshape(2, 3, 4) * np.asarray(scale.array).T[:, None]
    np.testing.assert_allclose(got, want.reshape(6, 4), rtol=1e-12)
    with pytest.raises(Unfactorable, match="axes that the result does not have"):
        with_output_scale(y, scale, [("t", 6), ("o", 4)])


def test_output_scales_multiply_in_float32_and_keep_the_dtype():
    y = jnp.full((1, 4), 3, jnp.bfloat16)
    scale = Named(jnp.full(4, 1 + 2.0**-12, jnp.float32), ("o",))
    got, pull = jax.vjp(lambda y: with_output_scale(y, scale, [("t", 1), ("o", 4)]), y)
    assert got.dtype == jnp.bfloat16
    assert (got == 3).all()
    (dy,) = pull(jnp.ones_like(got))
    assert dy.dtype == jnp.bfloat16


def test_dropout(x64):
    w = weight("jk", dropout=0.25)
    x = jnp.ones((50, 40), jnp.float32)
    assert drop(x, w, 0) is x  # no keys
    key = Named(jax.random.split(jax.random.key(3), 2), ("i",))
    w = dataclasses.replace(w, factors={**w.factors, "key": key})
    got = drop(x, w, 5)
    np.testing.assert_allclose(np.unique(got), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float((got == 0).mean()) - 0.25) < 0.04
    np.testing.assert_array_equal(got, drop(x, w, 5))
    assert (got != drop(x, w, 6)).any()
    other = Named(jax.random.split(jax.random.key(4), 2), ("i",))
    other = dataclasses.replace(w, factors={**w.factors, "key": other})
    assert (got != drop(x, other, 5)).any()
    assert drop(jnp.ones((3, 4), jnp.int32), w, 5).dtype == jnp.float32
    assert drop(jnp.ones((3, 4), jnp.bfloat16), w, 5).dtype == jnp.bfloat16
    assert drop(w, w, 5) is w


def test_the_gradient_of_a_scale_that_is_already_in_y(x64):
    x, dy = (random(5, 3, seed=i) for i in range(2))
    scale = 1 + random(1, 3, seed=4) ** 2
    y, back = jax.vjp(with_gradient_of_scale, x * scale, scale)
    np.testing.assert_array_equal(y, x * scale)
    found = back(dy)
    np.testing.assert_array_equal(found[0], dy)
    np.testing.assert_allclose(found[1], (dy * x).sum(0, keepdims=True), 1e-13)
