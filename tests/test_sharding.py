import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as Spec

import flora
from tests.support import contract
from tests.support.registry import Decoder, linen, normal

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "model"))


def batch():
    return jax.random.randint(jax.random.key(5), (8, 6), 0, 31)


def train(adapted, ids, apply, steps=6):
    """Losses of a few whole-tree steps, and the last tree."""
    tx = flora.optimizer(optax.adamw(1e-2, weight_decay=0.1), adapted)

    def loss(tree):
        logits = apply(tree, ids)
        labels = jnp.roll(ids, 1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(tree, state):
        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, losses = tx.init(adapted), []
    for _ in range(steps):
        adapted, state, value = step(adapted, state)
        losses.append(float(value))
    return losses, adapted


def spec_of(weight):
    """FSDP on in axes over 'data', tensor parallel on out axes over 'model'."""
    layout, shape = weight.layout, weight.base.shape
    axes = [None] * len(shape)
    for name, size, chosen in (("data", 4, layout.in_), ("model", 2, layout.out)):
        for i in chosen:
            if shape[i] % size == 0 and name not in axes:
                axes[i] = name
    return Spec(*axes)


@pytest.fixture(scope="module")
def one_device():
    """An adapted decoder, the function, and what training gives on one device."""
    model = linen(Decoder(), batch())
    adapted = contract.adapt(
        model.fn, model.params, batch(), target=model.target, alpha=4.0
    )
    apply = flora.lora(model.fn)
    return adapted, apply, *train(adapted, batch(), apply)


@pytest.mark.parametrize("where", ["base", "base and factors"])
def test_sharded_training_has_the_losses_of_one_device(where, one_device):
    adapted, apply, expected, trained = one_device
    assert expected[-1] < expected[0] - 0.1

    def place(x):
        if not contract.is_weight(x):
            return jax.device_put(x, NamedSharding(MESH, Spec()))
        spec = spec_of(x)
        base = jax.device_put(x.base, NamedSharding(MESH, spec))
        a, b = Spec(), Spec()
        if where == "base and factors":
            roles = x.layout
            a = Spec(*(spec[i] for i in (*roles.stack, *roles.in_)), None)
            b = Spec(
                *(spec[i] for i in roles.stack), None, *(spec[i] for i in roles.out)
            )
        a, b = (
            jax.device_put(f, NamedSharding(MESH, s)) for f, s in ((x.a, a), (x.b, b))
        )
        return flora.LoraWeight(base, a, b, layout=x.layout, rank=x.rank, alpha=x.alpha)

    sharded = jax.tree.map(place, adapted, is_leaf=contract.is_weight)
    specs = {w.base.sharding.spec for w in contract.weights(sharded)}
    assert len(specs - {Spec()}) >= 3, "nothing is sharded"
    ids = jax.device_put(batch(), NamedSharding(MESH, Spec("data")))
    losses, after = train(sharded, ids, apply)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for w, old in zip(contract.weights(after), contract.weights(sharded), strict=True):
        assert w.base.sharding.is_equivalent_to(old.base.sharding, w.base.ndim)
        assert np.array_equal(w.base, old.base)
    for w, one in zip(contract.weights(after), contract.weights(trained), strict=True):
        contract.close((w.a, w.b), (one.a, one.b), 2e-3)


def test_init_under_jit_with_shardings_of_the_base():
    rows = NamedSharding(MESH, Spec("data", "model"))
    params = {"kernel": jax.device_put(normal(8, 6), rows)}

    def fn(p, x):
        return x @ p["kernel"]

    def init(params):
        config = flora.LoraConfig(rank=2)
        return flora.init(jax.random.key(0), config, fn, params, normal(4, 8))

    adapted = jax.jit(init)(params)
    assert adapted["kernel"].base.sharding.is_equivalent_to(rows, 2)
    contract.close(adapted["kernel"].a, init(params)["kernel"].a)


def test_shard_map_over_the_batch():
    def fn(p, x):
        return jnp.tanh(x @ p["kernel"])

    params, x = {"kernel": normal(7, 5)}, normal(8, 7)
    adapted = contract.randomized(contract.adapt(fn, params, x))
    sharded = jax.shard_map(
        flora.lora(fn),
        mesh=MESH,
        in_specs=(Spec(), Spec("data")),
        out_specs=Spec("data"),
    )
    contract.close(jax.jit(sharded)(adapted, x), fn(flora.merge(adapted), x))


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
    views = (contract.P.all_gather, contract.P.shard_map, contract.P.pvary)
    contract.check(fn, params, x, tolerance=2e-5, views=views)


def test_shard_map_over_a_stack_of_experts():
    def fn(p, x):
        def body(w, x):
            return jax.lax.psum(jnp.einsum("bi,eio->bo", x, w * jnp.float32(2)), "data")

        return jax.shard_map(
            body, mesh=MESH, in_specs=(Spec("data"), Spec()), out_specs=Spec()
        )(p["experts"], x)

    params, x = {"experts": normal(4, 8, 5)}, normal(3, 8)
    layout = {"experts": flora.Layout((0,), (1,), (2,))}
    views = (contract.P.shard_map, contract.P.pvary, contract.P.mul)
    contract.check(fn, params, x, tolerance=2e-5, layouts=layout, views=views)


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


def by_pallas(w, x):
    def kernel(w_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(w, x)


def by_callback(w, x):
    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), shape, w, x)


@pytest.mark.parametrize(
    ("call", "name"), [(by_pallas, "pallas_call"), (by_callback, "pure_callback")]
)
def test_weights_in_kernels_and_callbacks_are_refused_by_name(call, name):
    def fn(p, x):
        return call(p["w"], x)

    params, x = {"w": normal(7, 5)}, normal(3, 7)
    with pytest.raises(flora.LoraError, match=rf"'{name}' at test_sharding.py:\d+"):
        contract.adapt(fn, params, x)
    tree = contract.randomized(contract.adapt(fn, params, x, fallback="materialize"))
    contract.close(flora.lora(fn)(tree, x), fn(flora.merge(tree), x))
