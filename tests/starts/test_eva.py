"""EVA against singular vectors of inputs that were collected by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

import flora
import flora.quantize
import flora.sharding
from flora import budget, starts
from flora._starts import eva as _eva
from flora.variants import DoRA, VeRA
from tests.support.contract import adapt, array, close, is_weight

KEY = 11
IN = 12


def net(p, x):
    """A scan with remat, several in axes, and a convolution inside jit."""
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x = jax.lax.scan(step, x, p["stack"])[0]
    x = jnp.einsum("bthd,hdo->bto", x.reshape(*x.shape[:2], 3, 4), p["heads"])
    return jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            jax.nn.relu(x), w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
    )(x, p["conv"])


SHAPES = {"stack": (2, IN, IN), "heads": (3, 4, 5), "conv": (2, 5, 9)}


def inputs(p, x):
    """What each matrix multiplies, `[stack, tokens, in]`, in NumPy."""
    p = {k: np.asarray(w, np.float64) for k, w in p.items()}
    x, of_stack = np.asarray(x, np.float64), []
    for w in p["stack"]:
        of_stack.append(x.reshape(-1, IN))
        x = np.tanh(x @ w)
    found = {"stack": np.stack(of_stack), "heads": x.reshape(1, -1, IN)}
    x = np.maximum(x @ p["heads"].reshape(IN, 5), 0)
    windows = np.concatenate([x[:, :-1], x[:, 1:]], -1)
    return found | {"conv": windows.reshape(1, -1, 10)}


@functools.cache
def setting(dtype=jnp.float64, **config):
    """Parameters, batches with a few strong directions, and the adapted tree."""
    p = {
        k: array(*s, seed=i, dtype=dtype) / 3 for i, (k, s) in enumerate(SHAPES.items())
    }
    wide = jnp.promote_types(dtype, jnp.float32)
    strong = array(IN, IN, seed=5, dtype=wide) * (0.3 ** jnp.arange(IN))[:, None]
    batches = [
        ((array(3, 8, IN, seed=7 + i, dtype=wide) @ strong).astype(dtype),)
        for i in range(2)
    ]
    adapted = adapt(net, p, *batches[0], **{"dtype": dtype} | config)
    return p, batches, adapted


def collected(p, batches):
    parts = [inputs(p, x) for (x,) in batches]
    return {k: np.concatenate([part[k] for part in parts], 1) for k in p}


def columns(w):
    """A as `[stack, in, rank]`, in NumPy."""
    stack = int(np.prod(w.a.shape[: len(w.layout.stack)], dtype=int))
    return np.asarray(w.a, np.float64).reshape(stack, -1, w.a.shape[-1])


def test_a_spans_the_principal_directions_of_the_inputs(x64):
    p, batches, adapted = setting()
    start = starts.eva(jax.random.key(KEY), adapted, net, batches, rho=1, passes=30)
    for path, x in collected(p, batches).items():
        w, (_, s, v) = start[path], np.linalg.svd(x, full_matrices=False)
        assert w.rank == adapted[path].rank
        assert w.base is p[path]
        assert not np.asarray(w.b).any()
        a = columns(w)
        for row in range(len(a)):
            assert s[row, 1] > 1.01 * s[row, 2]  # so that the directions are defined
            np.testing.assert_allclose(
                np.abs(v[row, :2] @ a[row]), np.eye(2), atol=1e-6
            )
    close(flora.lora(net)(start, *batches[0]), net(p, *batches[0]), 1e-12)


def redistributed(spectra, ranks, rho, most):
    """Ranks for each leaf and stacked layer, by sorting all shares in Python."""
    shares = []
    for path, s in spectra.items():
        for row, values in enumerate(s):
            top = values[: min(round(rho * ranks), most[path])] / values.sum()
            shares += [(-x, path, row) for x in top]
    won = sorted(shares)[: sum(len(s) for s in spectra.values()) * ranks]
    return {
        path: [sum(w[1:] == (path, row) for w in won) for row in range(len(s))]
        for path, s in spectra.items()
    }


def test_ranks_move_to_what_explains_most(x64):
    p, batches, adapted = setting(rank_stabilized=True)
    start = starts.eva(jax.random.key(KEY), adapted, net, batches, rho=3.0, passes=12)
    spectra = {
        k: np.linalg.svd(x, compute_uv=False) ** 2
        for k, x in collected(p, batches).items()
    }
    most = {"stack": 12, "heads": 5, "conv": 9}
    wanted = redistributed(spectra, 2, 3.0, most)
    assert len({max(rows) for rows in wanted.values()}) > 1  # something moved
    for path, rows in wanted.items():
        w = start[path]
        if max(rows) == 0:
            assert w is p[path]
            continue
        assert w.rank == max(rows)
        assert w.scale == pytest.approx(adapted[path].scale)
        norms = np.linalg.norm(columns(w), axis=1)
        for row, n in enumerate(rows):  # orthonormal, and padded with zeros
            np.testing.assert_allclose(norms[row], np.arange(w.rank) < n, atol=1e-12)
    found = budget.patterns(start)
    target = [k for k in wanted if is_weight(start[k])]
    settings = {"dtype": jnp.float64, "rank_stabilized": True, "target": target}
    again = adapt(net, p, *batches[0], **settings, **found)
    assert jax.tree.structure(again) == jax.tree.structure(start)


def test_the_share_of_what_is_left_out_is_estimated_without_bias(x64):
    """λ / tr(XᵀX), with the trace from eight probes."""
    p, batches, adapted = setting()
    ratios = []
    for seed in range(5):
        watch = {k: _eva._Watch.of(w, 1) for k, w in adapted.items()}
        moments = _eva._moments(adapted, watch, net, batches)
        keys = {k: jax.random.fold_in(jax.random.key(seed), i) for i, k in enumerate(p)}
        q = {k: w.run(_eva._random, keys[k]) for k, w in watch.items()}
        q = {k: watch[k].run(_eva._with_probes, q[k], keys[k]) for k in q}
        y = moments(q)
        ratios.append({k: _eva._directions(watch[k], q[k], y[k])[2] for k in q})
    for k, x in collected(p, batches).items():
        exact = (x**2).sum((1, 2))
        got = np.mean([np.asarray(r[k]) for r in ratios], 0)
        assert np.abs(got / exact - 1).max() < 0.25
        if k == "conv":  # nothing is left out: 10 rows, 2 directions and 8 probes
            np.testing.assert_allclose(got, exact)


def test_in_bfloat16_and_over_a_stored_base():
    p, batches, adapted = setting(jnp.bfloat16)
    quantized = flora.quantize.quantize(adapted, "int8", target="heads", block=1)
    start = starts.eva(jax.random.key(KEY), quantized, net, batches, rho=1)
    for path, x in collected(p, batches).items():
        w, v = start[path], np.linalg.svd(x, full_matrices=False)[2]
        assert w.a.dtype == w.b.dtype == jnp.bfloat16
        overlap = np.linalg.norm(v[:, :2] @ columns(w), axis=(1, 2)) / math.sqrt(2)
        assert overlap.min() > 0.9
    assert isinstance(start["heads"].base, flora.quantize.Quantized)


def test_a_sharded_tree_stays_where_it_lies():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    _, batches, whole = setting(jnp.float32)
    like = {
        "stack": Spec(None, "fsdp", "tp"),
        "heads": Spec(None, "fsdp"),
        "conv": Spec(),
    }
    adapted = jax.device_put(whole, flora.sharding.shardings(whole, like, mesh=mesh))
    key = jax.random.key(KEY)
    start = starts.eva(key, adapted, net, batches, target="heads")
    alone = starts.eva(key, whole, net, batches, target="heads")
    assert start["stack"] is adapted["stack"]
    for got, old in (
        (start["heads"].a, adapted["heads"].a),
        (start["heads"].b, adapted["heads"].b),
    ):
        assert got.sharding.is_equivalent_to(old.sharding, got.ndim)
    a, b = columns(start["heads"])[0], columns(alone["heads"])[0]
    np.testing.assert_allclose(np.abs(a.T @ b), np.eye(a.shape[1]), atol=1e-3)


def test_with_dora():
    x, p = array(3, 8, dtype=jnp.float32), {"w": array(8, 5, dtype=jnp.float32)}
    adapted = adapt(dot, p, x, variant=DoRA())
    start = starts.eva(jax.random.key(KEY), adapted, dot, [x])
    assert start["w"].variant == DoRA()
    assert start["w"].extra is adapted["w"].extra
    close(flora.lora(dot)(start, x), dot(p, x))


W = {"w": jnp.ones((8, 5))}


def dot(p, x):
    return x @ p["w"]


def eva(fn=dot, batches=None, config=None, **options):
    batches = [(jnp.ones((2, 8)),)] if batches is None else batches
    adapted = adapt(dot, W, jnp.ones((2, 8)), **config or {})
    return starts.eva(jax.random.key(0), adapted, fn, batches, **options)


BAD = {
    "batches is empty": lambda: eva(batches=[]),
    "batches is a generator; expected a list": lambda: eva(batches=(x for x in W)),
    "rho=0.5. Write a number of at least 1": lambda: eva(rho=0.5),
    "passes=1. Write an int of at least 2": lambda: eva(passes=1),
    "fn is a tuple; expected the function": lambda: eva(fn=()),
    "target='v' selects none": lambda: eva(target="v"),
    "eva: 'w' receives no inputs in these batches": lambda: eva(
        batches=[(jnp.zeros((2, 8)),)]),
    "eva: 'w' receives no inputs": lambda: eva(
        fn=lambda p, x: jnp.argmax(x @ p["w"], -1)),
    "eva: 'w' is a ShapeDtypeStruct, and eva reads values. Pass arrays.":
        lambda: starts.eva(
            jax.random.key(0), jax.eval_shape(lambda: adapt(dot, W, jnp.ones((2, 8)))),
            dot, [(jnp.ones((2, 8)),)]),
    "eva: 'w' is a tracer": lambda: jax.jit(lambda t: starts.eva(
        jax.random.key(0), t, dot, [(jnp.ones((2, 8)),)]))(
            adapt(dot, W, jnp.ones((2, 8)))),
    "eva: 'w' has variant VeRA(": lambda: eva(config={"variant": VeRA()}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_done_is_refused(message):
    with pytest.raises(flora.LoraError) as error:
        BAD[message]()
    assert message in str(error.value)
