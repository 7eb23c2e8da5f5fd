"""Between variables and adapted trees: names, boxes, collections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flora
import flora.linen
from tests.support.linen_models import Net, X, close, merged, moved, net, off

CONFIG = flora.LoraConfig(rank=2)


def boxed(with_names):
    kernel = nn.initializers.lecun_normal()
    return nn.Dense(
        8,
        kernel_init=with_names(kernel, ("model", "data")),
        bias_init=with_names(nn.initializers.ones, ("data",)),
    )


@pytest.mark.parametrize(
    "with_names", [nn.with_partitioning, nn.with_logical_partitioning]
)
def test_boxes_name_the_axes_that_factors_share_with_the_weight(with_names):
    config = flora.LoraConfig(rank=2, train="bias")
    plain = boxed(with_names)
    model = flora.linen.LoRA(model=plain, config=config)
    variables = model.init(jax.random.key(0), X)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["lora"] == {
        "kernel": {"a": P("model", None), "b": P(None, "data")},
        "bias": {"delta": P("data")},
    }
    assert specs["kernel"] == P("model", "data")
    variables = {"params": off(variables["params"])}
    close(model.apply(variables, X), plain.apply(merged(model, variables), X))
    adapted = flora.linen.adapt(
        jax.random.key(1), model, plain.init(jax.random.key(0), X), X
    )
    assert jax.tree.structure(adapted) == jax.tree.structure(variables)
    rules = (("model", "x"), ("data", None))
    sharding = nn.logical_to_mesh(specs, rules)["lora"]["kernel"]
    assert sharding == {"a": P("x", None), "b": P(None, None)}


def test_factors_are_made_where_they_belong():
    mesh = jax.make_mesh((4, 2), ("model", "data"))
    model = flora.linen.LoRA(model=boxed(nn.with_partitioning), config=CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    places = nn.get_sharding(shapes, mesh)
    made = jax.jit(model.init, out_shardings=places)(jax.random.key(0), X)
    factors = nn.meta.unbox(made)["params"]["lora"]["kernel"]
    assert factors["a"].sharding == NamedSharding(mesh, P("model", None))
    assert factors["b"].sharding == NamedSharding(mesh, P(None, "data"))
    close(nn.meta.unbox(made), nn.meta.unbox(model.init(jax.random.key(0), X)))


def test_boxes_under_scan_have_the_axis_of_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return boxed(nn.with_partitioning)(x), None

    def stack(cls, **kwargs):
        return nn.scan(
            cls,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**kwargs)

    class Around(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = stack(flora.linen.LoRA, model=Layer(), config=CONFIG, name="many")
            return many(x, None)[0]

    class Inside(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stack(Layer, name="many")(x, None)[0]

    wanted = {"a": P("layers", "model", None), "b": P("layers", None, "data")}
    variables = Around().init(jax.random.key(0), X)
    (own,) = nn.get_partition_spec(variables)["params"].values()
    assert own["lora"]["Dense_0"]["kernel"] == wanted
    model = flora.linen.LoRA(model=Inside(), config=CONFIG)
    specs = nn.get_partition_spec(model.init(jax.random.key(0), X))["params"]["lora"]
    assert specs["many"]["Dense_0"]["kernel"] == wanted


VARIANTS = {
    "dora": flora.variants.DoRA(),
    "vera": flora.variants.VeRA(),
    "adalora": flora.variants.AdaLoRA(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    config = flora.LoraConfig(rank=2, variant=VARIANTS[name])
    model = flora.linen.LoRA(model=Net(), config=config)
    variables = moved(model, X)
    assert ("lora" in variables) == (name == "vera")
    tree = flora.linen.tree(model, variables)
    close(model.apply(variables, X), flora.lora(Net().apply)(tree, X))
    close(model.apply(variables, X), Net().apply(flora.merge(tree), X), 1e-4)
    exact = 1e-6 if name == "dora" else 0  # a difference is taken again
    close(flora.linen.variables(model, tree), variables, exact)

    def loss(params):
        return (model.apply({**variables, "params": params}, X) ** 2).sum()

    def pure(tree):
        return (flora.lora(Net().apply)(tree, X) ** 2).sum()

    own = jax.grad(loss)(variables["params"])["lora"]["head"]["kernel"]
    wanted = jax.grad(pure)(tree)["params"]["head"]["kernel"]
    parts = {"a": wanted.a, "b": wanted.b, **(wanted.extra or {})}
    for part, grad in own.items():
        close(grad, parts[part.removesuffix("_delta")])
        assert part == "a" or jnp.abs(grad).max() > 0
    if name == "vera":
        with pytest.raises(
            flora.LoraError, match=r"'lora/frozen/first/.* is not there"
        ):
            model.apply({k: x for k, x in variables.items() if k != "lora"}, X)


class Holder(nn.Module):
    """Parameters in lists, dicts and tuples."""

    @nn.compact
    def __call__(self, x):
        def many(key):
            draw = jax.random.normal
            return [draw(key, (8, 8)), {"w": draw(key, (8, 8)), "b": (jnp.ones(8),)}]

        first, rest = self.param("many", many)
        return nn.relu(x @ first) @ rest["w"] + rest["b"][0]


def test_parameters_in_containers():
    config = flora.LoraConfig(rank=2, target=["many/0", "many/1/w"], train="many/1/b/0")
    model = flora.linen.LoRA(model=Holder(), config=config)
    variables = moved(model, X)
    assert sorted(variables["params"]["lora"]["many"]) == ["0", "1"]
    close(model.apply(variables, X), Holder().apply(merged(model, variables), X), 1e-4)


def test_frozen_dicts():
    model = net(train="head/bias")
    variables = moved(model, X)
    frozen = core.freeze(variables)
    close(model.apply(frozen, X), model.apply(variables, X), 0)
    close(merged(model, frozen), merged(model, variables), 0)
    plain = core.freeze(Net().init(jax.random.key(0), X))
    adapted = flora.linen.adapt(jax.random.key(1), model, plain, X)
    close(model.apply(adapted, X), Net().apply(plain, X), 0)


@pytest.mark.parametrize("part", ["a", "b"])
def test_factors_of_another_config_are_refused(part):
    model, other = net(), flora.linen.LoRA(model=Net(), config=flora.LoraConfig(rank=3))
    variables = moved(other, X)
    message = rf"params/lora/head/kernel/{part}' has shape .*, and the config asks for"
    with pytest.raises(flora.LoraError, match=message):
        model.apply(variables, X)
    with pytest.raises(flora.LoraError, match=message):
        flora.linen.tree(model, variables, X)


def test_factors_that_are_missing_or_too_many_are_named():
    model = net()
    variables = moved(model, X)
    lora = dict(variables["params"]["lora"])
    head = lora.pop("head")
    less = {**variables, "params": {**variables["params"], "lora": lora}}
    with pytest.raises(flora.LoraError, match="head/kernel/a' is not there"):
        model.apply(less, X)
    more = {**lora, "head": {**head, "bias": {"delta": jnp.zeros(3)}}}
    with pytest.raises(flora.LoraError, match="there is 'params/lora/head/bias'"):
        model.apply({**variables, "params": {**variables["params"], "lora": more}}, X)


def test_a_base_that_comes_after_init_has_a_magnitude_of_its_own():
    config = flora.LoraConfig(rank=2, variant=flora.variants.DoRA())
    model = flora.linen.LoRA(model=nn.Dense(3, use_bias=False), config=config)
    params = model.init(jax.random.key(0), X)["params"]
    assert set(params["lora"]["kernel"]) == {"a", "b", "magnitude_delta"}
    kernel = 7 * params["kernel"]
    loaded = {"params": {**params, "kernel": kernel}}
    assert abs(model.apply(loaded, X) - X @ kernel).max() < 1e-5
    lora = jax.tree.map(lambda x: x + 0.1, params["lora"])
    trained = {"params": {"kernel": kernel, "lora": lora}}
    weight = flora.linen.tree(model, trained)["params"]["kernel"]
    norms = np.linalg.norm(kernel, axis=0)
    assert np.allclose(weight.extra["magnitude"], norms + 0.1, rtol=1e-6)
    back = flora.linen.variables(model, flora.linen.tree(model, trained))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, trained
    )


def test_random_starts_are_kept_as_they_are():
    config = flora.LoraConfig(rank=2, variant=flora.variants.VeRA())
    model = flora.linen.LoRA(model=nn.Dense(3, use_bias=False), config=config)
    params = model.init(jax.random.key(0), X)["params"]["lora"]["kernel"]
    assert not [name for name in params if name.endswith("_delta")]
