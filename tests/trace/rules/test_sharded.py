import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as Spec

import flora
from tests.support import contract
from tests.support.registry import normal

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"))


def column(w, x):
    return jnp.tanh(x @ w)


def row(w, x):
    return jax.lax.psum(x @ w, "model")


@jax.custom_jvp
def product(x, w):
    return x @ w


product.defjvp(lambda p, t: (product(*p), t[0] @ p[1] + p[0] @ t[1]))


def custom(w, x):
    return product(x, w)


def gathered(w, x):
    return x @ jax.lax.all_gather(w, "data", axis=0, tiled=True)


INSIDE = {
    "column parallel": (
        column, Spec(None, "model"), Spec("data"), Spec("data", "model")),
    "row parallel": (row, Spec("model", None), Spec("data", "model"), Spec("data")),
    "gathered in": (gathered, Spec("data", None), Spec("data"), Spec("data")),
    "custom derivative": (custom, Spec(), Spec("data"), Spec("data")),
    "two mesh axes": (column, Spec(None, ("model", "data")), Spec(),
                      Spec(None, ("model", "data"))),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_shard_map_inside_the_function(name):
    body, w_spec, x_spec, out_spec = INSIDE[name]

    def fn(p, x):
        return jax.shard_map(
            body, mesh=MESH, in_specs=(w_spec, x_spec), out_specs=out_spec
        )(p["kernel"], x)

    params, x = {"kernel": normal(8, 24)}, normal(16, 8)
    own = (contract.P.all_gather, contract.P.shard_map, contract.P.pvary)
    contract.check(fn, params, x, tolerance=2e-5, views=own)


def test_shard_map_over_a_stack_of_experts():
    def fn(p, x):
        def body(w, x):
            return jax.lax.psum(jnp.einsum("bi,eio->bo", x, w * jnp.float32(2)), "data")

        return jax.shard_map(
            body, mesh=MESH, in_specs=(Spec("data"), Spec()), out_specs=Spec()
        )(p["experts"], x)

    params, x = {"experts": normal(4, 8, 5)}, normal(3, 8)
    layout = {"experts": flora.Layout((0,), (1,), (2,))}
    own = (contract.P.shard_map, contract.P.pvary, contract.P.mul)
    contract.check(fn, params, x, tolerance=2e-5, layouts=layout, views=own)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_explicit_meshes(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w_spec = Spec(None, "model") if kind == "column" else Spec("model", None)
    x_spec = Spec("data", None) if kind == "column" else Spec("data", "model")
    out = Spec("data", "model") if kind == "column" else Spec("data", None)

    def fn(p, x):
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=out)

    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(normal(8, 6), NamedSharding(mesh, w_spec))}
        x = jax.device_put(normal(4, 8), NamedSharding(mesh, x_spec))
        tree = contract.randomized(contract.adapt(fn, params, x))
        got = jax.jit(flora.lora(fn))(tree, x)
        assert jax.typeof(got).sharding.spec == out
        step = jax.jit(flora.value_and_grad(lambda t: flora.lora(fn)(t, x).sum()))
        value, grads = step(tree)
    w = tree["w"]
    want = np.asarray(x) @ (np.asarray(w.base) + w.scale * np.asarray(w.a @ w.b))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, want.sum(), rtol=1e-4)
    db = w.scale * (np.asarray(x) @ np.asarray(w.a)).T @ np.ones_like(want)
    np.testing.assert_allclose(grads["w"].b, db, rtol=1e-4, atol=1e-4)


EXPLICIT = {
    "gathered before use": (
        lambda p, x: x @ reshard(p["w"], Spec(None, None)),
        {"w": Spec("data", "model")}),
    "gathered along in": (
        lambda p, x: x @ reshard(p["w"], Spec(None, "model")),
        {"w": Spec("data", "model")}),
    "rows of a sharded table": (
        lambda p, x: p["e"].at[jnp.arange(8)].get(out_sharding=Spec("data", None)),
        {"e": Spec("model", None)}),
    "columns of a sharded table": (
        lambda p, x: p["e"].at[jnp.arange(8)].get(out_sharding=Spec("data", "model")),
        {"e": Spec(None, "model")}),
    "experts": (
        lambda p, x: jnp.einsum("ebd,edf->ebf", reshard(
            jnp.stack([x, 2 * x]), Spec("model", "data", None)), p["s"]),
        {"s": Spec("model", None, None)}),
    "a scan": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(
            reshard(x @ w[:, :16], Spec("data", None))), None), x, p["s"])[0],
        {"s": Spec(None, None, None)}),
    "normed": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
        {"w": Spec(None, "model")}),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            reshard(jnp.stack([x[:, :4], x[:, 4:8]], 1), Spec("data", None, None)),
            p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            out_sharding=Spec("data", None, "model")),
        {"k": Spec(None, None, "model")}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLICIT)
def test_weights_on_explicit_meshes(name):
    fn, specs = EXPLICIT[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    shapes = {"w": (16, 32), "e": (10, 12), "s": (2, 16, 20), "k": (3, 4, 6)}
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(8, 16), NamedSharding(mesh, Spec("data", None)))
        params = {
            k: jax.device_put(normal(*shapes[k]), NamedSharding(mesh, spec))
            for k, spec in specs.items()
        }
        tree = contract.adapt(fn, params, x)
        start, plain = jax.jit(flora.lora(fn))(tree, x), jax.jit(fn)(params, x)
        assert jax.typeof(start) == jax.typeof(plain)
        contract.close(start, plain, contract.COMPILED)
        tree = contract.randomized(tree)
        run = jax.jit(lambda t, x: contract.gradients(fn, t, x))
        contract.close_to_formula(tree, *run(tree, x), tolerance=2e-5)
        got, want = jax.jit(flora.lora(fn))(tree, x), jax.jit(fn)(flora.merge(tree), x)
        contract.close(got, want)


@pytest.mark.parametrize("mapped", [None, 0])
def test_pmap_inside_the_function(mapped):
    def one(w, x):
        return lax.psum(jnp.tanh(x @ w), "i")

    def fn(p, x):
        run = jax.pmap(one, "i", in_axes=(mapped, 0), devices=jax.devices()[:4])
        return run(p["w"], x)

    w = normal(7, 5) if mapped is None else normal(4, 7, 5)
    x = normal(4, 3, 7)
    tree = contract.randomized(contract.adapt(fn, {"w": w}, x))
    assert tree["w"].layout.stack == (() if mapped is None else (0,))
    contract.close(flora.lora(fn)(tree, x), fn(flora.merge(tree), x))
    contract.close_to_formula(tree, *contract.gradients(fn, tree, x))


def lone(p, body, **specs):
    return jax.shard_map(body, mesh=MESH, out_specs=specs.pop("out", Spec()), **specs)(
        p
    )


SHARDED_REFUSALS = {
    "a gather of shards that adds an axis": lambda w, x: lone(
        w, lambda w: lax.psum(lax.all_gather(w, "data")[0], "data"),
        in_specs=Spec("data"), check_vma=False),
    "a weight as a shard's result": lambda w, x: x @ lone(
        w, lambda w: w.T, in_specs=Spec("data", None), out=Spec(None, "data")).T,
}  # fmt: skip


@pytest.mark.parametrize("reason", SHARDED_REFUSALS)
def test_what_shards_cannot_factor_is_named(reason):
    def fn(p, x):
        return SHARDED_REFUSALS[reason](p["w"], x)

    params, x = {"w": normal(8, 6)}, normal(3, 8)
    with pytest.raises(
        flora.LoraError, match=rf"at test_sharded.py:\d+ .*'w' .*{reason}"
    ):
        contract.adapt(fn, params, x)
    tree = contract.randomized(contract.adapt(fn, params, x, fallback="materialize"))
    got, want = (jax.jit(f)(t, x) for f, t in
                 ((flora.lora(fn), tree), (fn, flora.merge(tree))))  # fmt: skip
    contract.close(got, want)


def test_a_stack_is_gathered_with_both_factors():
    def fn(p, x):
        def body(w, x):
            w = lax.all_gather(w, "data", axis=0, tiled=True)
            return jnp.einsum("bi,eio->beo", x, w)

        specs = Spec("data", None, None), Spec("data")
        run = jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=Spec("data"))
        return run(p["w"], x)

    layouts = {"w": flora.Layout((0,), (1,), (2,))}
    tree = contract.adapt(fn, {"w": normal(4, 8, 5)}, normal(4, 8), layouts=layouts)
    tree = contract.randomized(tree)
    both = jax.jit(lambda t, x: (flora.lora(fn)(t, x), fn(flora.merge(t), x)))
    contract.close(*both(tree, normal(4, 8)))
