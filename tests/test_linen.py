"""`flora.linen`: modules, variables and adapted trees, as trainers hold them."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state

import flora
import flora.linen
import flora.peft
import flora.quantize
from tests.support.contract import dense_arrays
from tests.support.linen_models import Net, X, close, moved, net

CONFIG = flora.LoraConfig(rank=2)
KEY = jax.random.key(1)


def plain_variables():
    return Net().init(jax.random.key(0), X)


def test_adapt_is_flora_init_on_pretrained_variables():
    model, variables = net(train="head/bias"), plain_variables()
    adapted = flora.linen.adapt(KEY, model, variables, X)
    assert (model.apply(adapted, X) == Net().apply(variables, X)).all()
    assert adapted["params"]["head"]["kernel"] is variables["params"]["head"]["kernel"]
    tree = flora.linen.tree(model, adapted)
    config = flora.LoraConfig(rank=2, target="params/*", train="params/head/bias")
    wanted = flora.init(KEY, config, Net().apply, variables, X)
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(wanted["params"])
    shapes = jax.eval_shape(lambda v: flora.linen.adapt(KEY, model, v, X), variables)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, adapted)


def test_adapt_takes_one_call_as_apply_does():
    model, variables = net(), plain_variables()
    given = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
    close(
        flora.linen.adapt(KEY, model, variables, X, **given),
        flora.linen.adapt(KEY, model, variables, X),
        0,
    )
    with pytest.raises(flora.LoraError, match="'head/kernel' is targeted, but"):
        flora.linen.adapt(KEY, model, variables, X, method="encode")


def test_variables_is_the_inverse_of_tree():
    model = net()
    variables = moved(model, X)
    close(
        flora.linen.variables(model, flora.linen.tree(model, variables)), variables, 0
    )
    model = net(train="head/bias")
    variables = moved(model, X)
    again = flora.linen.variables(model, flora.linen.tree(model, variables))
    close(model.apply(again, X), model.apply(variables, X))
    assert not again["params"]["lora"]["head"]["bias"]["delta"].any()


def test_a_tree_of_other_settings_is_refused():
    model = net()
    other = flora.linen.LoRA(model=Net(), config=flora.LoraConfig(rank=3))
    tree = flora.linen.tree(other, moved(other, X))
    with pytest.raises(flora.LoraError, match="by the module's config"):
        flora.linen.variables(model, tree, X)
    with pytest.raises(flora.LoraError, match="none of the tree's"):
        flora.linen.variables(model, plain_variables(), X)


def test_what_takes_trees_takes_this_one(tmp_path):
    model = net()
    variables = moved(model, X)
    tree = flora.linen.tree(model, variables)
    assert "params/head/kernel" in str(flora.summary(tree))
    path = tmp_path / "adapter.safetensors"
    flora.save(path, tree)
    plain = {
        **variables,
        "params": {k: x for k, x in variables["params"].items() if k != "lora"},
    }
    loaded = flora.load(path, plain)
    close(flora.linen.variables(model, loaded), variables, 0)
    flora.peft.save(tmp_path / "peft", {"params": tree["params"]})
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    close(Net().apply(flora.merge(tree), X), model.apply(variables, X))


def test_a_checkpoint_of_the_base_after_init():
    model = net()
    variables = model.init(jax.random.key(3), X)
    pretrained = plain_variables()
    params = {**pretrained["params"], "lora": variables["params"]["lora"]}
    out = model.apply({**pretrained, "params": params}, X)
    assert (out == Net().apply(pretrained, X)).all()


def test_the_optimizer_leaves_the_base_as_it_is():
    model = net(train="head/bias")
    variables = model.init(jax.random.key(0), X)
    tx = flora.linen.optimizer(optax.adamw(1e-2, weight_decay=0.5))
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx
    )
    held = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert held == {x.shape for x in jax.tree.leaves(variables["params"]["lora"])}

    traced = []

    @jax.jit
    def step(state):
        traced.append(state)

        def loss(params):
            return (state.apply_fn({**variables, "params": params}, X) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(4):
        state, value = step(state)
        losses.append(value)
    assert losses[-1] < losses[0]
    assert len(traced) == 1
    before, after = (dict(p) for p in (variables["params"], state.params))
    moved_ = jax.tree.map(
        lambda x, y: (x != y).any(), before.pop("lora"), after.pop("lora")
    )
    assert jax.tree.all(moved_)
    close(after, before, 0)


def test_labels_name_what_trains():
    params = net().init(jax.random.key(0), X)["params"]
    labels = flora.linen.labels(params)
    assert set(jax.tree.leaves(labels.pop("lora"))) == {"lora"}
    assert set(jax.tree.leaves(labels)) == {"frozen"}


def test_states_are_saved_as_any(tmp_path):
    model = net()
    variables = moved(model, X)
    tx = flora.linen.optimizer(optax.adam(1e-3))
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=tx
    )
    fresh = jax.tree.map(jnp.zeros_like, state)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    close(restored.params, state.params, 0)
    close(restored.opt_state, state.opt_state, 0)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", {"params": state.params, "opt": state.opt_state})
        saver.wait_until_finished()
        shapes = {"params": fresh.params, "opt": fresh.opt_state}
        restored = saver.restore(tmp_path / "state", shapes)
    close(restored["params"], state.params, 0)


def test_modules_are_values():
    model, same = net(), net()
    assert model == same
    assert hash(model) == hash(same)
    assert model != net(dropout=0.1)
    variables = moved(model, X)
    wanted = model.apply(variables, X)
    for other in (
        model.clone(),
        model.copy(),
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert other == model
        close(other.apply(variables, X), wanted, 0)
    assert "LoRA(" in repr(model)


def test_tabulate_shows_base_and_factors():
    model = net()
    shown = nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 200})(X)
    variables = model.init(jax.random.key(0), X)
    total = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert f"Total Parameters: {total + 64:,}" in shown or f"{total:,}" in shown
    for part in ("first/Dense_0", "rest_0/BatchNorm_0", "head", "lora:"):
        assert part in shown


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_a_quantized_base(qtype):
    model = net()
    variables = moved(model, X)
    tree = flora.quantize.quantize(flora.linen.tree(model, variables), qtype, block=8)
    quantized = flora.linen.variables(model, tree)
    close(quantized["params"]["lora"], variables["params"]["lora"], 0)
    out = model.apply(quantized, X)
    close(out, flora.lora(Net().apply)(tree, X))
    assert jnp.abs(out - model.apply(variables, X)).max() > 0
    again = flora.linen.tree(model, quantized)
    assert jax.tree.structure(again) == jax.tree.structure(tree)

    def loss(lora):
        params = {**quantized["params"], "lora": lora}
        return (model.apply({**quantized, "params": params}, X) ** 2).sum()

    def pure(adapter):
        return (flora.lora(Net().apply)(flora.join(base, adapter), X) ** 2).sum()

    base, adapter = flora.split(tree)
    own = jax.grad(loss)(quantized["params"]["lora"])["head"]["kernel"]
    wanted = jax.grad(pure)(adapter)["params"]["head"]["kernel"]
    close(own, {"a": wanted.a, "b": wanted.b})


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_a_step_costs_what_the_pure_functions_does():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(24)(nn.relu(nn.Dense(48)(x)))

    model = flora.linen.LoRA(model=Wide(), config=CONFIG)
    x = jnp.ones((16, 32))
    variables = moved(model, x)
    tree = flora.linen.tree(model, variables)
    base, adapter = flora.split(tree)
    lora = variables["params"].pop("lora")

    def of_module(lora, variables, x):
        params = {**variables["params"], "lora": lora}
        return (model.apply({"params": params}, x) ** 2).sum()

    def of_function(adapter, base, x):
        return (flora.lora(Wide().apply)(flora.join(base, adapter), x) ** 2).sum()

    own = jax.grad(of_module), lora, variables, x
    assert flops(*own) == flops(jax.grad(of_function), adapter, base, x)
    step, *args = own
    assert not dense_arrays(step, [(32, 48), (48, 24)], *args)


class Own(nn.Module):
    """A model with parameters where the factors belong."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="lora")(x)


def lora(model, config=CONFIG):
    return flora.linen.LoRA(model=model, config=config)


INITIAL = {
    "a model that is none": (lambda: lora(len), "expected a Linen"),
    "a class": (lambda: lora(Net), "expected a Linen"),
    "adapted already": (lambda: lora(net()), "already"),
    "no config": (lambda: lora(Net(), {"rank": 2}), "LoraConfig"),
    "nothing selected": (lambda: moved(net(target="q_proj/*"), X), "selects none"),
    "one of two selects nothing": (
        lambda: moved(net(target=["head/kernel", "q_proj/*"]), X),
        r"'q_proj/\*', which selects none of the 14 leaves",
    ),
    "no such method at init": (
        lambda: net().init(KEY, X, method="run"),
        "Net has no method 'run'; it has '__call__', 'decode', 'encode'",
    ),
    "parameters named lora": (lambda: moved(lora(Own()), X), "'lora/kernel' of Own"),
    "adapted within": (
        lambda: moved(lora(nn.Sequential([lora(nn.Dense(3))])), X),
        "'layers_0/lora/kernel/a' of Sequential has the name 'lora'",
    ),
    "no parameters": (
        lambda: moved(lora(nn.Dropout(0.1, deterministic=True)), X),
        "is empty",
    ),
}


@pytest.mark.parametrize("name", INITIAL)
def test_what_cannot_begin_is_refused(name):
    begin, message = INITIAL[name]
    with pytest.raises(flora.LoraError, match=message):
        begin()


def refused(model, variables):
    plain = plain_variables()
    adapt, tree = flora.linen.adapt, flora.linen.tree
    yield lambda: model.apply(plain, X), "Write variables = flora.linen.adapt"
    yield lambda: model.apply(variables, X, method="run"), "it has '__call__', 'decode'"
    yield lambda: adapt(KEY, model, variables, X), "have 'params/lora' already"
    yield lambda: adapt(KEY, Net(), plain, X), r"adapt\(key, model, \.\.\.\)"
    yield lambda: adapt(KEY, model, plain["params"], X), 'such as {"params": params}'
    yield lambda: adapt(0, model, plain, X), "key"
    yield lambda: tree(variables), r"tree\(model, \.\.\.\)"
    yield lambda: tree(model), "Pass variables"
    yield lambda: tree(model, plain), "have no 'params/lora'"
    yield lambda: flora.linen.variables(model), "Pass variables"
    yield lambda: flora.linen.variables(variables), r"variables\(model, \.\.\.\)"


@pytest.mark.parametrize("number", range(11))
def test_wrong_calls_are_refused(number):
    model = net()
    call, message = list(refused(model, moved(model, X)))[number]
    with pytest.raises(flora.LoraError, match=message):
        call()
