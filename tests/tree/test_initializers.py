"""The variances that the names promise, by tests of the distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora import initializers

IN, RANK, OUT = 300, 16, 200


def draw(start, dtype=jnp.float32, in_=IN, rank=RANK, out=OUT):
    a, b = start(jax.random.key(3), (in_, rank), (rank, out), dtype)
    assert a.dtype == b.dtype == dtype
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def kolmogorov(values, cdf):
    """The largest distance of the empirical distribution from `cdf`, times √n."""
    x = np.sort(np.ravel(values))
    steps = np.arange(len(x) + 1) / len(x)
    off = np.maximum(np.abs(cdf(x) - steps[1:]), np.abs(cdf(x) - steps[:-1]))
    return off.max() * math.sqrt(len(x))


def normal_cdf(std):
    return np.vectorize(lambda x: 0.5 * (1 + math.erf(x / std / math.sqrt(2))))


def uniform_cdf(size):
    return lambda x: np.clip((x + size) / (2 * size), 0, 1)


NAMED = {
    "PEFT, loralib": (initializers.uniform("peft"), uniform_cdf(IN**-0.5)),
    "loralib": (initializers.uniform("loralib"), uniform_cdf(IN**-0.5)),
    "default of uniform": (initializers.uniform(), uniform_cdf(IN**-0.5)),
    "qwix": (initializers.uniform("qwix"), uniform_cdf((6 / IN) ** 0.5)),
    "default": (initializers.gaussian(), normal_cdf((3 * IN) ** -0.5)),
    "gaussian of PEFT's variance": (
        initializers.gaussian("peft"),
        normal_cdf((3 * IN) ** -0.5),
    ),
    "gaussian of 2/in": (initializers.gaussian(2), normal_cdf((2 / IN) ** 0.5)),
    "PEFT's gaussian": (initializers.by_rank(), normal_cdf(1 / RANK)),
    "by rank, 4": (initializers.by_rank(4.0), normal_cdf(2 / RANK)),
    "PEFT, what is no table": (initializers.peft(), uniform_cdf(IN**-0.5)),
    "PEFT's gaussian, likewise": (
        initializers.peft("gaussian"),
        normal_cdf(1 / RANK),
    ),
    "a table by its width": (initializers.embedding(vocabulary="out"), normal_cdf(1)),
    "another variance": (
        initializers.embedding(4.0, vocabulary="out"),
        normal_cdf(2),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_distributions(name):
    start, cdf = NAMED[name]
    a, b = draw(start)
    assert not b.any()
    assert kolmogorov(a, cdf) < 1.95  # p = 0.001
    assert kolmogorov(1.1 * a, cdf) > 1.95  # the test can fail


def test_the_factor_between_peft_and_qwix():
    std = [draw(initializers.uniform(name))[0].std() for name in ("peft", "qwix")]
    assert abs(std[1] / std[0] - math.sqrt(6)) < 1e-5
    # PEFT's "gaussian" at rank 8 and in = 4096, as the docstring says.
    std = [
        draw(s, in_=4096, rank=8)[0].std()
        for s in (initializers.by_rank(), initializers.gaussian())
    ]
    assert abs(std[0] / std[1] - 14) < 0.5


@pytest.mark.parametrize("rank", [2, 16])
def test_orthogonal_factors_cancel(rank):
    a, b = draw(initializers.orthogonal(), rank=rank)
    assert np.abs(a @ b).max() < 1e-6 * np.abs(a).max() * np.abs(b).max() * rank
    # Half of the directions each: A's rows and B's columns span complements.
    assert np.linalg.matrix_rank(a, 1e-4) == np.linalg.matrix_rank(b, 1e-4) == rank // 2
    wide, _ = draw(initializers.orthogonal(variance=0.5), rank=rank)
    for x, variance in ((a, 1 / 200), (b, 1 / 200), (wide, 1 / 2)):
        spread = 4 * math.sqrt(2 / (x.size / 2))  # as of rank/2 normals a row
        spread *= math.sqrt(rank)
        assert abs((x**2).mean() / variance - 1) < spread


def test_orthogonal_trains_both_from_the_start_and_keeps_the_model():
    p, x = {"k": jnp.asarray(np.eye(6, 5), jnp.float32)}, jnp.ones((2, 6))
    fn = lambda p, x: x @ p["k"]  # noqa: E731
    config = flora.LoraConfig(rank=4, target="k", init=initializers.orthogonal())
    adapted = flora.init(jax.random.key(0), config, fn, p, x)
    np.testing.assert_allclose(flora.lora(fn)(adapted, x), fn(p, x), atol=1e-6)
    _, grads = flora.value_and_grad(lambda t: flora.lora(fn)(t, x).sum())(adapted)
    assert np.abs(grads["k"].a).max() > 1e-3
    assert np.abs(grads["k"].b).max() > 1e-3
    config = flora.LoraConfig(rank=3, target="k", init=initializers.orthogonal())
    with pytest.raises(flora.LoraError, match=r"6×5 has rank 3; expected an even one"):
        flora.init(jax.random.key(0), config, fn, p, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_other_dtypes(dtype):
    for start in (initializers.uniform(), initializers.by_rank()):
        a, b = start(jax.random.key(0), (64, 4), (4, 3), dtype)
        assert a.dtype == b.dtype == dtype
        assert float(jnp.abs(a).max()) > 0


@pytest.mark.parametrize("make", [
    initializers.uniform, initializers.gaussian, initializers.by_rank,
    initializers.orthogonal, initializers.a_zero, initializers.both_random,
    initializers.embedding,
])  # fmt: skip
@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "kaiming", None])
def test_bad_variances(make, bad):
    with pytest.raises(
        flora.LoraError, match=r"It must be a finite number above 0.*'qwix'"
    ):
        make(bad)


def test_factors_of_a_table():
    a, b = draw(initializers.embedding())
    assert not a.any()
    assert kolmogorov(b, normal_cdf(1)) < 1.95
    assert kolmogorov(1.1 * b, normal_cdf(1)) > 1.95


def test_pytorchs_own_start_of_both():
    a, b = draw(initializers.peft(False))
    assert kolmogorov(a, uniform_cdf(IN**-0.5)) < 1.95
    assert kolmogorov(b, uniform_cdf(RANK**-0.5)) < 1.95


# What is done with each weight of a model, and how PEFT would start it.
V, D, F = 230, 90, 70
KINDS = {
    "table": (V, D), "tied": (V, D), "tied_turned": (D, V), "one_hot": (V, D),
    "tied_one_hot": (V, D), "unit": (D, D), "linear": (D, F), "heads": (D, 5, 14),
    "experts": (4, D, F), "conv": (3, D, F), "stack": (20, D, D), "norms": (20, D),
}  # fmt: skip


def every_kind(p, ids):
    picks = jax.nn.one_hot(ids, V)
    x = p["table"][ids] + p["tied"][ids] + p["tied_turned"].T[ids]
    x += picks @ p["one_hot"] + picks @ p["tied_one_hot"]
    x += jax.nn.one_hot(ids % D, D) @ p["unit"]
    x = jax.lax.fori_loop(
        0, 20, lambda i, x: jnp.tanh(x @ p["stack"][i]) * p["norms"][i], x
    )
    outs = [x @ p["linear"], jnp.einsum("bsd,dhk->bshk", x, p["heads"])]
    grouped = jnp.stack([x] * 4)
    outs += [jnp.einsum("ebsd,edf->ebsf", grouped, p["experts"])]
    outs += [jax.lax.conv_general_dilated(
        x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )]  # fmt: skip
    outs += [x @ p["tied"].T, x @ p["tied_turned"], x @ p["tied_one_hot"].T]
    return outs


def adapted_as(init, **settings):
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in KINDS.items()}
    config = flora.LoraConfig(rank=RANK, target="*", init=init, **settings)
    ids = jnp.ones((2, 7), jnp.int32)

    def draw(key):
        params = {k: jnp.ones(s) for k, s in KINDS.items()}
        return flora.init(key, config, every_kind, params, ids)

    assert jax.tree.structure(
        flora.init(jax.random.key(0), config, every_kind, params, ids)
    ) == jax.tree.structure(jax.eval_shape(draw, jax.random.key(0)))
    return jax.jit(draw)(jax.random.key(0))


TABLES = ("table", "tied", "tied_turned", "one_hot", "tied_one_hot", "unit")


def variances(node):
    """Of the factor of the rows and of the other, of what is looked up."""
    turned = node.a.shape[0] == D != node.b.shape[-1]
    rows, width = (node.b, node.a) if turned else (node.a, node.b)
    return float(jnp.var(rows)), float(jnp.var(width))


@pytest.mark.parametrize("how", [True, "orthogonal"])
def test_pefts_start_for_every_kind_of_leaf(how):
    adapted = adapted_as(initializers.peft(how))
    for name in TABLES:
        rows, width = variances(adapted[name])
        assert rows == 0, name
        assert abs(width - 1) < 0.1, name
    for name in KINDS.keys() - {*TABLES}:
        node = adapted[name]
        in_ = node.layout.matrix(node.base.shape)[1]
        wanted = {True: 1 / (3 * in_), "orthogonal": 1 / 200}
        assert abs(jnp.var(node.a) / wanted[how] - 1) < 0.2, name
        assert bool(node.b.any()) == (how == "orthogonal"), name


def test_floras_start_is_the_same_for_all():
    for node in adapted_as(initializers.gaussian()).values():
        in_ = node.layout.matrix(node.base.shape)[1]
        assert abs(jnp.var(node.a) * 3 * in_ - 1) < 0.2
        assert not node.b.any()


def test_a_pattern_chooses_by_leaf_and_the_first_wins():
    starts = {
        "table": initializers.both_zero(),
        "t*": initializers.embedding(),
        "linear": initializers.by_rank(),
    }
    adapted = adapted_as(initializers.gaussian(), init_pattern=starts)
    assert not adapted["table"].b.any()
    assert abs(jnp.var(adapted["tied"].b) - 1) < 0.1
    assert abs(jnp.var(adapted["linear"].a) * RANK**2 - 1) < 0.1
    assert abs(jnp.var(adapted["conv"].a) * 3 * 3 * D - 1) < 0.1
    preset = adapted_as(
        initializers.by_rank(), init_pattern={"t*": initializers.peft()}
    )
    assert abs(jnp.var(preset["tied"].a) - 1) < 0.1
    assert abs(jnp.var(preset["conv"].a) * RANK**2 - 1) < 0.1
    with pytest.raises(flora.LoraError, match="init_pattern='nose' selects none"):
        adapted_as(initializers.gaussian(), init_pattern={"nose": initializers.peft()})


@pytest.mark.parametrize("wrong", ["pissa", "eva", None, 2, []])
def test_other_names_of_peft(wrong):
    with pytest.raises(flora.LoraError, match=r"True, False, .* are in flora.starts"):
        initializers.peft(wrong)
    with pytest.raises(flora.LoraError, match="Write 'in' or 'out'"):
        initializers.embedding(vocabulary=wrong)
