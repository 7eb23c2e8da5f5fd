"""Where factors lie: as their weights do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
import flora.sharding
from tests.support.contract import adapt, close, weights
from tests.support.registry import normal

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("fsdp", "tp"))


def place(x, *spec, mesh=MESH):
    return jax.device_put(x, NamedSharding(mesh, Spec(*spec)))


def attention(p, x):
    """Heads in and out, a stack of two under scan, and a table."""
    q = jnp.einsum("bi,ihd->bhd", p["table"][x], p["q"])
    y = jnp.einsum("bhd,hdo->bo", q, p["o"])
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, p["stack"])[0]


SHAPES = {"table": (12, 8), "q": (8, 4, 6), "o": (4, 6, 8), "stack": (2, 8, 8)}
LIKE = {
    "table": Spec("tp", "fsdp"),
    "q": Spec("fsdp", "tp"),
    "o": Spec("tp", None, "fsdp"),
    "stack": Spec(None, "fsdp", "tp"),
}
FACTORS = {
    "table": (Spec("tp", None), Spec(None, "fsdp")),
    "q": (Spec("fsdp", None), Spec(None, "tp", None)),
    "o": (Spec("tp", None, None), Spec(None, "fsdp")),
    "stack": (Spec(None, "fsdp", None), Spec(None, None, "tp")),
}
IDS = jnp.asarray([3, 1, 2])


def params(placed=True):
    made = {k: normal(*shape) for k, shape in SHAPES.items()}
    return {k: place(w, *LIKE[k]) for k, w in made.items()} if placed else made


def lies(x):
    """The spec of an array or of a sharding, without trailing `None`."""
    spec = list(getattr(x, "sharding", x).spec)
    while spec and spec[-1] is None:
        spec.pop()
    return Spec(*spec)


def short(spec):
    return lies(NamedSharding(MESH, spec))


def test_init_puts_factors_where_their_weights_lie():
    sharded = adapt(attention, params(), IDS)
    for name, w in sharded.items():
        assert (lies(w.a), lies(w.b)) == tuple(map(short, FACTORS[name])), name
    alone = adapt(attention, params(placed=False), IDS)
    for one, other in zip(weights(sharded), weights(alone), strict=True):
        assert np.array_equal(one.a, other.a)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params()
    )
    planned = adapt(attention, abstract, IDS)
    for one, other in zip(weights(planned), weights(sharded), strict=True):
        assert one.a.sharding.is_equivalent_to(other.a.sharding, one.a.ndim)
        assert one.b.sharding.is_equivalent_to(other.b.sharding, one.b.ndim)


def test_no_factor_is_made_whole_on_a_device():
    w = place(jnp.ones((4096, 4)), "fsdp")
    tree = adapt(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 4096)), rank=4)
    assert {s.data.shape for s in tree["w"].a.addressable_shards} == {(1024, 4)}

    def init(key, params):
        config = flora.LoraConfig(rank=4, target="w")
        fn = lambda p, x: x @ p["w"]  # noqa: E731
        made = flora.init(key, config, fn, params, jnp.ones((1, 4096)))
        return flora.split(made)[1]

    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key, {"w": w})
    places = flora.sharding.shardings(shapes, {"w": Spec("fsdp")}, mesh=MESH)
    step = jax.jit(init, out_shardings=places).lower(key, {"w": w}).compile()
    text = step.as_text()
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert kind not in text
    assert step.memory_analysis().temp_size_in_bytes < 4096 * 4 * 4
    assert step.memory_analysis().argument_size_in_bytes < 1024  # the base is not read


@pytest.mark.parametrize("given", ["arrays", "specs", "shardings"])
def test_shardings_of_each_array(given):
    tree = adapt(attention, params(placed=given == "arrays"), IDS)
    likes = {"specs": LIKE, "shardings": jax.tree.map(on_mesh, LIKE)}
    mesh = MESH if given == "specs" else None
    places = flora.sharding.shardings(tree, likes.get(given), mesh=mesh)
    assert jax.tree.structure(places) == jax.tree.structure(tree)
    for name, found in places.items():
        assert lies(found.base) == short(LIKE[name])
        assert (lies(found.a), lies(found.b)) == tuple(map(short, FACTORS[name]))
    moved = jax.device_put(tree, places)
    close(moved, tree, 0)
    adapter = flora.split(moved)[1]
    assert lies(flora.sharding.shardings(adapter)["q"].a) == Spec("fsdp")


def test_a_path_of_like_that_the_tree_lacks_is_named():
    tree = adapt(attention, params(), IDS)
    like = LIKE | {"qq": Spec("tp")}
    with pytest.raises(flora.LoraError, match=r"'qq' is no leaf .* Closest: 'q'"):
        flora.sharding.shardings(tree, like, mesh=MESH)
    adapter = flora.split(tree)[1]  # that lacks the frozen leaves
    places = flora.sharding.shardings(adapter, like, mesh=MESH)
    assert lies(places["q"].a) == Spec("fsdp")


def test_python_numbers_are_whole():
    places = flora.sharding.shardings(
        {"rate": 0.5, "w": normal(8, 6)}, Spec(), mesh=MESH
    )
    assert lies(places["rate"]) == Spec()


@pytest.mark.parametrize(
    ("tree", "places"),
    [({}, {}), ({"w": jnp.ones(2)}, {}), ({"w": jnp.ones(2)}, {"w": Spec()})],
)
def test_places_of_another_tree_are_refused(tree, places):
    with pytest.raises(flora.LoraError, match=r"of_state: places has .* Pass the tree"):
        flora.sharding.of_state({"mu": jnp.ones(2)}, tree, places)


def test_what_is_no_mesh_is_refused():
    with pytest.raises(
        flora.LoraError, match=r"mesh is a tuple. Pass a jax.sharding.Mesh"
    ):
        flora.sharding.shardings({"w": normal(8, 6)}, Spec(), mesh=(4, 2))


def on_mesh(spec):
    return NamedSharding(MESH, spec)


def test_one_spec_for_a_module_and_leaves_that_train_whole():
    config = {"target": "kernel", "train": "bias"}
    tree = {"dense": {"kernel": normal(8, 6), "bias": normal(6)}, "norm": normal(6)}

    def fn(p, x):
        return (x @ p["dense"]["kernel"] + p["dense"]["bias"]) * p["norm"]

    tree = adapt(fn, tree, normal(2, 8), **config)
    like = {"dense": {"kernel": Spec("fsdp", "tp"), "bias": Spec("tp")}, "norm": None}
    places = flora.sharding.shardings(tree, like, mesh=MESH)
    assert lies(places["dense"]["bias"].value) == Spec("tp")
    assert lies(places["norm"]) == Spec()
    rows = flora.sharding.shardings(tree, Spec("tp"), mesh=MESH)
    assert lies(rows["dense"]["kernel"].a) == lies(rows["norm"]) == Spec("tp")
    close(jax.device_put(tree, places), tree, 0)


def test_the_rank_can_be_divided_too():
    tree = adapt(attention, params(), IDS, rank=2)
    places = flora.sharding.shardings(tree, rank="tp")
    assert lies(places["q"].a) == short(Spec("fsdp", "tp"))
    assert lies(places["q"].b) == short(Spec(None, "tp"))  # 'tp' is in use there
    assert lies(places["o"].b) == short(Spec("tp", "fsdp"))
    close(jax.device_put(tree, places), tree, 0)
    with pytest.raises(flora.LoraError, match=r"a of 'o' .*axis 2 of size 2.* into 4"):
        flora.sharding.shardings(tree, rank="fsdp")
    with pytest.raises(flora.LoraError, match="rank='model' is no axis of the mesh"):
        flora.sharding.shardings(tree, rank="model")


class Logical(nn.Module):
    """Names for the axes, as Flax's own models have them."""

    @nn.compact
    def __call__(self, x):
        def named(*names):
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        x = nn.Dense(6, kernel_init=named("embed", "mlp"), name="up")(x)
        return nn.Dense(8, kernel_init=named("mlp", "embed"), name="down")(nn.relu(x))


RULES = (("embed", "fsdp"), ("mlp", "tp"))


def test_logical_names_of_linen():
    x = normal(2, 8)
    variables = Logical().init(jax.random.key(0), x)
    tree = adapt(Logical().apply, variables, x, target="kernel")
    places = flora.sharding.shardings(tree, mesh=MESH, rules=RULES)
    with nn.logical_axis_rules(RULES), jax.set_mesh(MESH):
        assert flora.sharding.shardings(tree) == places
    up, down = (places["params"][name]["kernel"].value for name in ("up", "down"))
    assert (lies(up.a), lies(up.b)) == (short(Spec("fsdp")), short(Spec(None, "tp")))
    assert (lies(down.a), lies(down.b)) == (Spec("tp"), short(Spec(None, "fsdp")))
    moved = jax.device_put(tree, places)
    close(jax.jit(flora.lora(Logical().apply))(moved, x), Logical().apply(variables, x))
    with pytest.raises(flora.LoraError, match=r"'params/up/kernel' .*no axis 'embed'"):
        flora.sharding.shardings(tree, mesh=MESH)
    # What one would write for the model without adapters.
    like = nn.get_partition_spec(variables)
    like = nn.logical_to_mesh_sharding(like, MESH, RULES)
    assert flora.sharding.shardings(tree, like) == places


def test_names_of_nnx():
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2)):
        start = nnx.initializers.lecun_normal()  # metadata as each Flax calls it
        init = nnx.with_partitioning(start, ("fsdp", "tp"))
        model = nnx.Linear(8, 6, rngs=nnx.Rngs(0), kernel_init=init)
        graph, state = nnx.split(model)
        tree = adapt(lambda s, x: nnx.merge(graph, s)(x), state, normal(2, 8))
        places = flora.sharding.shardings(tree)
        (kernel,) = weights(places)
        assert (lies(kernel.a), lies(kernel.b)) == (Spec("fsdp"), Spec(None, "tp"))
        close(jax.device_put(tree, places), tree, 0)


def test_the_optimizer_s_state_lies_with_what_it_belongs_to():
    tree = adapt(attention, params(), IDS)
    places = flora.sharding.shardings(tree)
    tx = flora.optimizer(optax.adamw(1e-2), tree)
    shapes = jax.eval_shape(tx.init, tree)
    found = flora.sharding.of_state(shapes, tree, places)
    state = jax.jit(tx.init, out_shardings=found)(tree)
    adapter, base = flora.split(tree)[1], flora.split(places)[1]
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(adapter))
    pairs = zip(jax.tree.leaves(adapter), jax.tree.leaves(base), strict=True)
    wanted = {(x.shape, lies(p)) for x, p in pairs}
    assert {(x.shape, lies(x)) for x in moments} == wanted


BAD = {
    "too long": ({"w": Spec("fsdp", "tp", None)}, r"'w' has shape \(8, 6\).*3 entries"),
    "no such axis": ({"w": Spec("model")}, r"'w' .*no axis 'model', only 'fsdp', 'tp'"),
    "twice": ({"w": Spec("tp", "tp")}, "'w' .*can divide one axis only"),
    "does not divide": (
        {"w": Spec(None, "fsdp")}, r"axis 1 of size 6 .* into 4 \('fsdp'\)"),
    "lacks the leaf": ({"v": Spec("fsdp")}, "like has no sharding for 'w'"),
    "no spec": ({"w": "fsdp"}, "like: 'w' is 'fsdp'. Write a NamedSharding"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    like, message = BAD[name]
    tree = adapt(lambda p, x: x @ p["w"], {"w": normal(8, 6)}, normal(2, 8))
    with pytest.raises(flora.LoraError, match=message):
        flora.sharding.shardings(tree, like, mesh=MESH)


def test_no_mesh_is_refused():
    tree = adapt(lambda p, x: x @ p["w"], {"w": normal(8, 6)}, normal(2, 8))
    with pytest.raises(flora.LoraError, match="Pass mesh="):
        flora.sharding.shardings(tree)


def test_explicit_meshes():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        w, x = place(normal(8, 6), "fsdp", "tp", mesh=mesh), normal(2, 8)

        def fn(p, x):
            return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=Spec(None, "tp"))

        config = flora.LoraConfig(rank=2, target="w")
        key = jax.random.key(0)
        init = lambda p: flora.init(key, config, fn, p, x)  # noqa: E731
        for tree in (init({"w": w}), jax.jit(init)({"w": w})):
            assert (lies(tree["w"].a), lies(tree["w"].b)) == (
                Spec("fsdp"), Spec(None, "tp"))  # fmt: skip
