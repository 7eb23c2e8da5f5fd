"""Starts that read values, against NumPy's decompositions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
import flora.quantize
import flora.sharding
from flora import starts
from flora.variants import DoRA, VeRA
from tests.support.contract import adapt, array, close, is_weight, randomized, weights
from tests.support.registry import dense, heads, scanned


def convolved(p, x):
    return jax.lax.conv_general_dilated(
        jnp.stack([x, 2 * x, -x], 1), p["k"], (1,), "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip


MODELS = {
    "dense": (dense, {"w": (8, 7), "v": (6, 7)}),
    "heads": (heads, {"q": (8, 2, 4), "o": (2, 4, 6)}),
    "scan": (scanned, {"stack": (3, 8, 8)}),
    "convolution": (convolved, {"k": (3, 8, 5)}),
}

SCALED = [*((name, False) for name in MODELS), ("dense", True)]


def case(name, dtype=jnp.float64, factor=None, **config):
    """The function, its parameters, the adapted tree and an input."""
    fn, shapes = MODELS[name]
    params = {
        k: array(*s, seed=i, dtype=dtype) for i, (k, s) in enumerate(shapes.items())
    }
    x = array(4, 8, seed=9, dtype=dtype)
    return fn, params, adapt(fn, params, x, dtype=factor or dtype, **config), x


def flat(x, layout):
    """As `[stack, in, out]`, in NumPy, float64."""
    sizes = [int(np.prod([x.shape[i] for i in g], dtype=int))
             for g in (layout.stack, layout.in_, layout.out)]  # fmt: skip
    order = [*layout.stack, *layout.in_, *layout.out]
    return np.asarray(x, np.float64).transpose(order).reshape(sizes)


def factors(w):
    """A `[stack, in, rank]` and B `[stack, rank, out]` in NumPy."""
    stack = int(np.prod(w.a.shape[: len(w.layout.stack)], dtype=int))
    a, b = (np.asarray(x, np.float64) for x in (w.a, w.b))
    return a.reshape(stack, -1, w.rank), b.reshape(stack, w.rank, -1)


def same_model(new, old, tolerance=1e-12):
    """W + scale A B is what it was; all but base and factors as well."""
    for x, y in zip(weights(new), weights(old), strict=True):
        sums = [
            flat(w.base, w.layout) + w.scale * np.matmul(*factors(w)) for w in (x, y)
        ]
        np.testing.assert_allclose(
            *sums, rtol=0, atol=tolerance * np.abs(sums[1]).max()
        )
        own = {"base": y.base, "a": y.a, "b": y.b, "start": y.start}
        assert dataclasses.replace(x, **own) == y
        for one, other in ((x.base, y.base), (x.a, y.a), (x.b, y.b)):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def norm(x):
    return np.linalg.norm(x, axis=(1, 2))


@pytest.mark.parametrize(("name", "stabilized"), SCALED)
def test_pissa_leaves_the_tail_of_the_singular_values(x64, name, stabilized):
    fn, params, adapted, x = case(name, rank_stabilized=stabilized)
    start = starts.pissa(adapted)
    same_model(start, adapted)
    close(flora.lora(fn)(start, x), fn(params, x), 1e-12)
    for w, old in zip(weights(start), weights(adapted), strict=True):
        # Eckart and Young: the nearest of rank r leaves the other singular values.
        s = np.linalg.svd(flat(old.base, w.layout), compute_uv=False)
        rest = flat(w.base, w.layout)
        np.testing.assert_allclose(norm(rest), np.sqrt((s[:, w.rank :] ** 2).sum(-1)))
        np.testing.assert_allclose(np.linalg.norm(rest, 2, (1, 2)), s[:, w.rank])
        a, b = factors(w)
        for gram in (np.einsum("sir,siq->srq", a, a), np.einsum("sro,sqo->srq", b, b)):
            wanted = np.stack([np.diag(row) for row in s[:, : w.rank] / w.scale])
            np.testing.assert_allclose(gram, wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["scan"])
def test_randomized_pissa_comes_near(x64, name):
    _, _, adapted, _ = case(name)
    key = jax.random.key(5)
    exact = starts.pissa(adapted)
    start = starts.pissa(adapted, method="randomized", niter=8, key=key)
    same_model(start, adapted)
    for w, best in zip(weights(start), weights(exact), strict=True):
        assert (
            norm(flat(w.base, w.layout)) < 1.001 * norm(flat(best.base, w.layout))
        ).all()
    # A matrix of low rank is found at once, however few columns are sketched.
    low = jax.tree.map(lambda w: jnp.ones_like(w), flora.merge(adapted))
    adapted = adapt(MODELS[name][0], low, array(4, 8), dtype=jnp.float64)
    w = weights(starts.pissa(adapted, method="randomized", niter=0, key=key))
    assert all(float(jnp.abs(x.base).max()) < 1e-12 for x in w)


@pytest.mark.parametrize("name", MODELS)
def test_olora_has_orthonormal_rows(x64, name):
    fn, params, adapted, x = case(name)
    start = starts.olora(adapted)
    same_model(start, adapted)
    close(flora.lora(fn)(start, x), fn(params, x), 1e-12)
    for w, old in zip(weights(start), weights(adapted), strict=True):
        a, b = factors(w)
        eye = np.broadcast_to(np.eye(w.rank), (len(b), w.rank, w.rank))
        np.testing.assert_allclose(np.einsum("sro,sqo->srq", b, b), eye, atol=1e-12)
        for row, x in enumerate(flat(old.base, w.layout)):
            q, r = np.linalg.qr(x.T)
            wanted = r[: w.rank].T @ q[:, : w.rank].T  # free of the signs
            np.testing.assert_allclose(a[row] @ b[row], wanted, atol=1e-12)


def loss(fn):
    return lambda p, x: (fn(p, x) ** 2).sum()


@pytest.mark.parametrize(
    ("name", "direction"),
    [*((name, "ArB2r") for name in MODELS), ("dense", "A2rBr"), ("dense", "ArBr")],
)
def test_lora_ga_steps_along_the_best_approximation(x64, name, direction):
    fn, params, adapted, x = case(name)
    grads = starts.base_gradients(loss(fn), adapted, x)
    close(grads, jax.grad(loss(fn))(params, x), 1e-12)
    start = starts.lora_ga(adapted, grads, direction=direction, gamma=2.0)
    same_model(start, adapted)
    close(flora.lora(fn)(start, x), fn(params, x), 1e-11)
    _, of = flora.value_and_grad(flora.lora(loss(fn)))(start, x)
    for path, w in start.items():
        (a, b), (of_a, of_b) = factors(w), factors(of[path])
        # What one step of size lr changes, divided by −lr, as lr goes to 0.
        change = w.scale * (np.matmul(of_a, b) + np.matmul(a, of_b))
        u, s, v = np.linalg.svd(flat(grads[path], w.layout), full_matrices=False)
        n = 2 * w.rank
        best = np.einsum("sir,sr,sro->sio", u[:, :, :n], s[:, :n], v[:, :n])
        wanted = w.scale**2 * b.shape[2] ** 0.5 / 2.0 * best
        np.testing.assert_allclose(
            change, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max()
        )
        lr, full = 1e-9, flat(grads[path], w.layout)
        moved = np.matmul(a - lr * of_a, b - lr * of_b) - np.matmul(a, b)
        cosines = [(x * full).sum() / np.linalg.norm(x) / np.linalg.norm(full)
                   for x in (-moved, best)]  # fmt: skip
        assert cosines[0] == pytest.approx(cosines[1], rel=1e-6)


def test_the_first_step_of_other_scalings(x64):
    fn, _, adapted, x = case("dense")
    grads = starts.base_gradients(loss(fn), adapted, x)
    paper, unit, peft = (starts.lora_ga(adapted, grads, scaling=s)["w"]
                         for s in ("stable", "unit", "peft"))  # fmt: skip
    same_model([peft], [adapted["w"]])
    u, s, v = np.linalg.svd(np.asarray(grads["w"]), full_matrices=False)
    c = 7**0.25 / 4
    for w, of_a, of_b in ((paper, c, c), (unit, 1, 1), (peft, 1, c * s[2:4, None])):
        np.testing.assert_allclose(np.abs(w.a), np.abs(of_a * u[:, :2]), atol=1e-12)
        np.testing.assert_allclose(np.abs(w.b), np.abs(of_b * v[2:4]), atol=1e-12)


def test_gradients_of_few_leaves_at_a_time(x64):
    fn, _, adapted, x = case("dense")
    whole = starts.base_gradients(loss(fn), adapted, x)
    parts = list(starts.each_base_gradient(loss(fn), adapted, x))
    assert [sorted(k for k in p if p[k] is not None) for p in parts] == [["v"], ["w"]]
    close({k: g for p in parts for k, g in p.items() if g is not None}, whole, 1e-12)
    each = starts.each_base_gradient(loss(fn), adapted, x=x)
    close(starts.lora_ga(adapted, each), starts.lora_ga(adapted, whole), 1e-10)
    one = starts.base_gradients(loss(fn), adapted, x, target="w")
    assert one["v"] is None
    start = starts.lora_ga(adapted, one, target="w")
    assert start["v"] is adapted["v"]
    key = jax.random.key(0)
    near = starts.lora_ga(adapted, whole, method="randomized", niter=6, key=key)
    close(flora.merge(near), flora.merge(adapted), 1e-12)
    np.testing.assert_allclose(  # the same spans
        *(np.asarray(t["w"].a @ t["w"].a.T)
          for t in (near, starts.lora_ga(adapted, whole))), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16,) * 2],
)
def test_what_rounding_leaves(dtype, factor):
    """W is back up to half a unit in the last place of the residual."""
    _, params, adapted, _ = case("heads", dtype, factor)
    grads = jax.tree.map(jnp.cos, params)
    for start in (starts.pissa(adapted), starts.olora(adapted),
                  starts.lora_ga(adapted, grads)):  # fmt: skip
        for w, old in zip(weights(start), weights(adapted), strict=True):
            assert (w.base.dtype, w.a.dtype, w.b.dtype) == (dtype, factor, factor)
            rest = flat(w.base, w.layout)
            off = rest + w.scale * np.matmul(*factors(w)) - flat(old.base, w.layout)
            ulp = 2.0 ** np.floor(np.log2(np.abs(rest) + 1e-30)) * float(
                jnp.finfo(dtype).eps
            )
            summed = 0 if dtype == jnp.bfloat16 else 1e-6  # float32 sums round too
            assert (
                np.abs(off) <= 0.51 * ulp + summed + 1e-6 * (dtype == jnp.bfloat16)
            ).all()


def test_trained_factors_are_not_lost(x64):
    fn, _, adapted, x = case("scan")
    trained = randomized(adapted)
    for start in (starts.pissa(trained), starts.olora(trained)):
        same_model(start, trained)
        close(flora.lora(fn)(start, x), flora.lora(fn)(trained, x), 1e-12)


@pytest.mark.parametrize(("name", "stabilized"), SCALED)
def test_export_to_the_original_weights(x64, name, stabilized):
    fn, params, adapted, x = case(name, rank_stabilized=stabilized)
    start = starts.pissa(adapted)
    trained = jax.tree.map(
        lambda w: dataclasses.replace(w, a=1.1 * w.a, b=w.b + 0.1),
        start, is_leaf=is_weight)  # fmt: skip
    plain = starts.to_plain(trained, flora.split(start)[1], params)
    close(flora.lora(fn)(plain, x), flora.lora(fn)(trained, x), 1e-12)
    for path, w in plain.items():
        t, s = trained[path], start[path]
        assert w.base is params[path]
        assert w.rank == 2 * t.rank
        assert w.scale == pytest.approx(t.scale, rel=1e-15)
        a, b = factors(w)
        assert np.array_equal(a, np.concatenate([factors(t)[0], factors(s)[0]], 2))
        assert np.array_equal(b, np.concatenate([factors(t)[1], -factors(s)[1]], 1))
    untrained = starts.to_plain(start, start, adapted)
    close(flora.merge(untrained), params, 1e-14)
    adapter = starts.to_plain(flora.split(trained)[1], start, params)
    close(adapter, plain, 0)


def test_export_in_bfloat16_is_free_of_the_rounded_base():
    _, params, adapted, _ = case("dense", jnp.bfloat16)
    start = starts.olora(adapted)
    plain = starts.to_plain(start, start, params)
    close(flora.merge(plain), params, 0)
    assert plain["w"].a.dtype == jnp.bfloat16
    shapes = jax.eval_shape(lambda t: t, start)
    planned = starts.to_plain(shapes, shapes, params)
    assert planned["w"].a.shape == (8, 4)


def test_bases_can_be_given_up_one_by_one():
    _, params, adapted, _ = case("dense", jnp.float32)
    kept, names = jax.tree.map(jnp.copy, adapted), list(params)
    start = starts.olora(adapted, donate=True)
    assert all(params[k].is_deleted() for k in names)
    close(start, starts.olora(kept), 0)
    starts.pissa(kept, target="w", donate=True)
    assert [kept[k].base.is_deleted() for k in ("w", "v")] == [True, False]


def test_under_jit_and_in_shapes(x64):
    _, _, adapted, _ = case("heads")
    close(jax.jit(starts.pissa)(adapted), starts.pissa(adapted), 1e-12)
    planned = jax.eval_shape(starts.olora, jax.eval_shape(lambda t: t, adapted))
    assert jax.tree.structure(planned) == jax.tree.structure(starts.olora(adapted))


def test_a_residual_base_can_be_stored_in_fewer_bits():
    fn, params, adapted, x = case("dense", jnp.float32)
    start = starts.pissa(adapted)
    quantized = flora.quantize.quantize(start, "int8", target="*", block=1)
    close(flora.lora(fn)(quantized, x), fn(params, x), 2e-2)
    frozen = {
        **adapted,
        "extra": flora.quantize.quantize(
            {"extra": array(8, 4, dtype=jnp.float32)}, "int8", target="*", block=2
        )["extra"],
    }

    def with_frozen(p, x):
        return (fn(p, x) ** 2).sum() + (x @ p["extra"]).sum()

    grads = starts.base_gradients(with_frozen, frozen, x)
    close(grads["w"], jax.grad(loss(fn))(params, x)["w"])
    assert grads["extra"] is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_trees_stay_where_they_lie(kind):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"),
                axis_types=(kind,) * 2)  # fmt: skip
    params = {"stack": array(2, 8, 8, dtype=jnp.float32)}
    x = array(4, 8, dtype=jnp.float32)
    place = {"stack": NamedSharding(mesh, Spec(None, "fsdp", "tp"))}
    whole = adapt(scanned, params, x)
    lies = flora.sharding.shardings(whole, place)
    adapted = jax.device_put(whole, lies)
    grads = jax.device_put(jax.tree.map(jnp.cos, params), place)
    if kind == AxisType.Auto:
        found = starts.base_gradients(loss(scanned), adapted, x)
        assert found["stack"].sharding.is_equivalent_to(place["stack"], 3)
    for start in (
        lambda t, g: starts.pissa(t),
        lambda t, g: starts.pissa(t, method="randomized", key=jax.random.key(0)),
        lambda t, g: starts.olora(t),
        lambda t, g: starts.lora_ga(t, g),
        lambda t, g: starts.to_plain(t, t, t),
    ):
        new = start(adapted, grads)
        for got, want in zip(jax.tree.leaves(new), jax.tree.leaves(lies), strict=True):
            assert got.sharding.is_equivalent_to(want, got.ndim)
        alone = start(whole, jax.tree.map(jnp.cos, params))
        close(jax.device_get(flora.merge(new) if kind == AxisType.Auto else new),
              jax.device_get(flora.merge(alone) if kind == AxisType.Auto else alone),
              1e-5)  # fmt: skip


def test_with_dora_and_back(x64):
    fn, params, adapted, x = case("scan", variant=DoRA())
    for start in (starts.pissa(adapted), starts.olora(adapted)):
        close(flora.lora(fn)(start, x), fn(params, x), 1e-12)
        w = start["stack"]
        assert w.variant == DoRA()
        assert w.extra is adapted["stack"].extra
        trained = {
            "stack": dataclasses.replace(
                w, a=1.1 * w.a, extra={"magnitude": 1.2 * w.extra["magnitude"]}
            )
        }
        plain = starts.to_plain(trained, start, params)
        close(flora.lora(fn)(plain, x), flora.lora(fn)(trained, x), 1e-12)


W = {"w": array(8, 5, dtype=jnp.float32)}


def tree(rank=2, **changes):
    found = adapt(lambda p, x: x @ p["w"], W, jnp.ones((2, 8)), rank=rank)
    return {"w": dataclasses.replace(found["w"], **changes)}


BAD = {
    "pissa: none of the tree's 1 leaves is adapted": lambda: starts.pissa(W),
    "target='k' selects none of the 1 leaves": lambda: starts.pissa(tree(), target="k"),
    "olora: 'w' is a ShapeDtypeStruct, and olora reads values":
        lambda: starts.olora(jax.eval_shape(tree)),
    "olora: 'w' is an adapter without its base": lambda: starts.olora(
        flora.split(tree())[1]),
    "is Quantized(float32[8,5] as int8+float32), and pissa computes with dense weights":
        lambda: starts.pissa(
            flora.quantize.quantize(tree(), "int8", target="*", block=2)),
    "pissa: 'w' is a LoraWeight that holds no arrays": lambda: starts.pissa(
        flora.mask(tree())),
    "method='qr'. Write one of svd, randomized": lambda: starts.pissa(
        tree(), method="qr"),
    "pissa: method='svd' is exact and takes no key": lambda: starts.pissa(
        tree(), key=jax.random.key(0)),
    "pissa: key is a NoneType; expected a PRNG": lambda: starts.pissa(
        tree(), method="randomized"),
    "niter=-1. Write a number": lambda: starts.pissa(tree(), niter=-1),
    "scaling='none'. Write one of stable, unit, peft": lambda: starts.lora_ga(
        tree(), W, scaling="none"),
    "direction='random'. Write one of": lambda: starts.lora_ga(
        tree(), W, direction="random"),
    "gamma=0. Write": lambda: starts.lora_ga(tree(), W, gamma=0),
    "lora_ga: grads has no gradient of 'w'": lambda: starts.lora_ga(tree(), {"v": 1}),
    "lora_ga: grads has float32[5, 8] at 'w'; "
    "expected a dense gradient of shape (8, 5)":
        lambda: starts.lora_ga(tree(), {"w": W["w"].T}),
    "lora_ga: grads has a LoraWeight at 'w'": lambda: starts.lora_ga(tree(), tree()),
    "at_once=0. Write": lambda: list(starts.each_base_gradient(sum, tree(), at_once=0)),
    "loss_fn returned an array of shape (2, 5); expected a scalar": lambda:
        starts.base_gradients(lambda p: jnp.ones((2, 8)) @ p["w"], tree()),
    "pissa: 'w' has variant VeRA(d_initial=0.1, seed=0), of which pissa cannot tell":
        lambda: starts.pissa(tree(variant=VeRA())),
    "to_plain: 'w' has variant VeRA(": lambda: starts.to_plain(
        tree(variant=VeRA()), tree(variant=VeRA()), W),
    "to_plain: none of the tree's 1 leaves is adapted": lambda: starts.to_plain(
        W, tree(), W),
    "to_plain: 'w' has no factors in start": lambda: starts.to_plain(tree(), W, W),
    "to_plain: original has no 'w'": lambda: starts.to_plain(tree(), tree(), {}),
    "to_plain: 'w' has another rank in start": lambda: starts.to_plain(
        tree(), tree(3), W),
    "to_plain: 'w' has another alpha in start": lambda: starts.to_plain(
        tree(), tree(alpha=3.0), W),
    "to_plain: 'w' has shape (5, 8) in original": lambda: starts.to_plain(
        tree(), tree(), {"w": W["w"].T}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_done_is_refused(message):
    with pytest.raises(flora.LoraError) as error:
        BAD[message]()
    assert message in str(error.value)


def test_all_offending_leaves_are_named():
    _, _, adapted, _ = case("dense", jnp.float32)
    planned = jax.eval_shape(lambda: adapted)
    with pytest.raises(flora.LoraError, match=r"(?s)2 problems:.*'v' is.*'w' is"):
        starts.pissa(planned)
    with pytest.raises(flora.LoraError, match=r"olora: target has 'u', which selects"):
        starts.olora(adapted, target=["w", "u"])


@pytest.mark.parametrize("verb", ["pissa", "randomized", "olora"])
def test_ranks_above_both_sides_are_zeros(x64, verb):
    fn, params, adapted, x = case("dense", rank=9)
    options = {"method": verb, "key": jax.random.key(0)} if verb[0] == "r" else {}
    start = getattr(starts, "olora" if verb == "olora" else "pissa")
    start = start(adapted, **options)
    close(flora.lora(fn)(start, x), fn(params, x), 1e-12)
    _, grads = flora.value_and_grad(flora.lora(loss(fn)))(start, x)
    left = (
        1 - 6 / 9 if verb == "olora" else 0.0
    )  # all of W is in the factors, or scaled
    for path, w in start.items():
        g, full = grads[path], min(w.base.shape)
        assert (w.rank, w.scale) == (9, 6 / 9)
        np.testing.assert_allclose(w.base, left * params[path], atol=1e-12)
        for each in (w, g):
            assert not each.a[:, full:].any()
            assert not each.b[full:].any()
        assert g.a[:, :full].any()


@pytest.mark.parametrize("direction", starts.DIRECTIONS)
@pytest.mark.parametrize("rank", [4, 9])  # of 7 and 6 directions of the gradients
def test_lora_ga_with_more_ranks_than_directions(x64, rank, direction):
    fn, params, adapted, x = case("dense", rank=rank)
    grads = starts.base_gradients(loss(fn), adapted, x)
    start = starts.lora_ga(adapted, grads, direction=direction, gamma=2.0)
    close(flora.lora(fn)(start, x), fn(params, x), 1e-11)
    _, of = flora.value_and_grad(flora.lora(loss(fn)))(start, x)
    for path, w in start.items():
        (a, b), (of_a, of_b) = factors(w), factors(of[path])
        change = w.scale * (np.matmul(of_a, b) + np.matmul(a, of_b))
        whole = flat(grads[path], w.layout)
        wanted = w.scale**2 * b.shape[2] ** 0.5 / 2.0 * whole
        np.testing.assert_allclose(change, wanted, atol=1e-11 * np.abs(wanted).max())
