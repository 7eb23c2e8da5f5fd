"""`flora.nnx`: an adapted module is what the pure function is, in any NNX trainer."""

import copy
import dataclasses
import functools
import inspect
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import PartitionSpec as P

import flora
import flora.nnx
import flora.peft
import flora.quantize
import flora.starts
import flora.variants
from tests.support.nnx_models import (
    CONFIG,
    KEY,
    LORA,
    Net,
    Stack,
    X,
    adapted,
    as_merged,
    close,
    drawn,
    gradients,
    layers,
    of_pure,
    paths,
    pure,
    still,
)

OUTSIDE = "ignore:(?s).*outside of 'nnx.capture:DeprecationWarning"


def net():
    return still(Net(nnx.Rngs(0)))


def loss(model, x=X):
    return (model(x) ** 2).mean()


def trained(model, tx=None, steps=3):
    """Some steps, traced once, that move what trains and nothing else."""
    tx = tx or optax.adamw(1e-2, weight_decay=0.1)
    optimizer, traces = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), []
    frozen = nnx.Not(nnx.Any(nnx.LoRAParam, nnx.RngState))
    before = jax.tree.map(np.asarray, nnx.state(model, frozen))
    start = jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        value, grads = nnx.value_and_grad(loss, argnums=LORA)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    after = nnx.state(model, frozen)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    after = nnx.state(model, nnx.LoRAParam)
    moved = zip(*map(jax.tree.leaves, (start, after)), strict=True)
    assert all((x != y).any() for x, y in moved)
    assert len(traces) == 1
    assert losses[-1] < losses[0]


def test_it_starts_as_flora_init_does_and_shares_the_base():
    model = net()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    fn = lambda params, rest, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    tree = flora.init(KEY, CONFIG, fn, params, rest, X)
    module = flora.nnx.adapt(KEY, CONFIG, model, X)
    assert isinstance(module, Net)
    assert type(module).__name__ == "Net"
    assert paths(nnx.state(module, nnx.LoRAParam)) == {
        f"{n}/kernel_lora_{p}" for n in ("first", "head") for p in "ab"
    }
    node = tree["first"]["kernel"].get_raw_value()
    np.testing.assert_array_equal(module.first.kernel_lora_a[...], node.a)
    assert module.first.kernel[...] is model.first.kernel[...]
    assert type(module.first.kernel) is nnx.Param
    np.testing.assert_array_equal(module(X), model(X))
    assert not hasattr(model.first, "kernel_lora_a")
    assert type(model) is Net


VARIANTS = {
    "lora": {},
    "trained": {"train": ("norm/*", "head/bias")},
    "dora": {"variant": flora.variants.DoRA()},
    "vera": {"variant": flora.variants.VeRA()},
    "adalora": {"variant": flora.variants.AdaLoRA()},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_values_and_gradients_are_those_of_the_pure_function(settings):
    module = adapted(net(), config=flora.LoraConfig(rank=2, **settings))
    tree, fn = pure(module)
    close(module(X), fn(tree, X))
    close(nnx.jit(lambda m: m(X))(module), fn(tree, X))
    close(flora.nnx.merge(module)(X), fn(tree, X))
    found = gradients(nnx.jit(nnx.grad(loss, argnums=LORA))(module))
    grads = flora.value_and_grad(lambda t: (fn(t, X) ** 2).mean())(tree)[1]
    close(found, of_pure(grads, *found))
    assert paths(nnx.state(module, nnx.LoRAParam)) == set(found)
    frozen = paths(nnx.state(module, flora.nnx.FrozenLoRA))
    assert len(frozen) == (4 if "VeRA" in str(settings) else 0)
    trained(module)


def test_a_step_costs_what_the_pure_function_costs_and_forms_no_second_weight():
    module = adapted(nnx.Linear(8, 24, rngs=nnx.Rngs(0)))
    graphdef, factors, rest = nnx.split(module, nnx.LoRAParam, ...)
    step = jax.value_and_grad(lambda f, r, x: loss(nnx.merge(graphdef, f, r), x))
    tree, fn = pure(module)
    base, adapter = flora.split(tree)
    other = jax.value_and_grad(lambda a, b, x: (fn(flora.join(b, a), x) ** 2).mean())
    flops = [
        jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        for f, args in ((step, (factors, rest, X)), (other, (adapter, base, X)))
    ]
    assert flops[0] == flops[1]
    jaxpr = jax.make_jaxpr(step)(factors, rest, X).jaxpr
    made = [e.primitive.name for e in jaxpr.eqns if e.outvars[0].aval.shape == (8, 24)]
    assert made == ["custom_jvp_call", "stop_gradient"]  # W itself


def test_full_fine_tuning_is_refused_and_moves_nothing():
    module = adapted(net())
    kernel = np.asarray(module.first.kernel[...])
    with pytest.raises(flora.LoraError, match="frozen weight, was differentiated"):
        nnx.grad(loss)(module)
    grads = nnx.grad(loss, argnums=LORA)(module)
    for tx in (optax.adamw(0.1, weight_decay=0.1), optax.sgd(0.1)):
        optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
        with pytest.raises(ValueError, match=r"structure|keys|mismatch"):
            optimizer.update(module, grads)
    np.testing.assert_array_equal(module.first.kernel[...], kernel)


def test_model_and_optimizer_and_donation():
    module = adapted(net())
    optimizer = nnx.ModelAndOptimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=LORA)(optimizer.model)
        optimizer.update(grads)
        return value

    kernel = np.asarray(module.first.kernel[...])
    losses = [float(step(optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(module.first.kernel[...], kernel)


def test_rates_by_the_names_of_the_factors():
    def labels(state):
        return nnx.map_state(lambda p, _: str(p[-1])[-1], state)

    rates = {"a": optax.sgd(0.0), "b": optax.sgd(0.01)}
    module = adapted(net())
    a, b = module.head.kernel_lora_a[...], module.head.kernel_lora_b[...]
    tx = optax.multi_transform(rates, labels)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)
    optimizer.update(module, nnx.grad(loss, argnums=LORA)(module))
    np.testing.assert_array_equal(module.head.kernel_lora_a[...], a)
    assert (module.head.kernel_lora_b[...] != b).any()


def test_what_changes_in_a_call_changes_as_in_the_plain_model():
    module = adapted(Net(nnx.Rngs(0)))
    as_merged(module, lambda m: m(X))
    as_merged(module, nnx.jit(lambda m: m(X)))
    assert module.dropout.rngs.count[...] == 4
    assert (module.norm.mean[...] != 0).any()


class Called(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs, cache=None):
        if cache is not None:
            cache[...] += 1
        return self.dropout(self.linear(x), rngs=rngs)


def test_rngs_and_variables_among_the_arguments():
    given = nnx.Rngs(dropout=1)
    module = adapted(Called(nnx.Rngs(0)), X, given)
    assert given.dropout.count[...] == 0
    merged, both = flora.nnx.merge(module), (nnx.Rngs(dropout=1), nnx.Rngs(dropout=1))
    caches = nnx.Cache(jnp.zeros(())), nnx.Cache(jnp.zeros(()))
    for _ in range(2):
        close(module(X, both[0]), merged(X, both[1]))
        close(module(X, rngs=both[0], cache=caches[0]), merged(X, both[1], caches[1]))
    assert [r.dropout.count[...] for r in both] == [4, 4]
    assert [c[...] for c in caches] == [2, 2]


def test_decoding_fills_the_cache():
    attention = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=8, decode=True, rngs=nnx.Rngs(0)
    )
    attention.init_cache((4, 5, 8))
    module = adapted(attention, X[:, None])
    as_merged(module, lambda m: m(X[:, None]), steps=3)
    assert module.cache_index[...] == 3
    module.init_cache((4, 5, 8))
    assert module.cache_index[...] == 0


def test_dropout_of_the_adapter():
    config = flora.LoraConfig(rank=2, dropout=0.5)
    module = adapted(net(), config=config)
    module.lora_dropout.deterministic = False
    tree, fn = pure(module)
    key = nnx.clone(module).lora_dropout.rngs()
    call = nnx.jit(lambda m: m(X))
    first = call(module)
    close(first, fn(flora.with_dropout(tree, key), X))
    assert (call(module) != first).any()
    module.eval()
    close(call(module), fn(tree, X))
    np.testing.assert_array_equal(call(module), call(module))
    with pytest.raises(flora.LoraError, match=r"^'kernel' of Linear trains without"):
        nnx.grad(loss, argnums=LORA)(module.first, X)


def test_keys_for_a_tree_with_dropout():
    rate = flora.LoraConfig(rank=2, dropout=0.5)
    tree = flora.nnx.tree(adapted(net(), config=rate))
    keyless = flora.nnx.module(net(), tree)
    close(keyless(X), flora.nnx.merge(keyless)(X))
    with pytest.raises(flora.LoraError, match=r"give flora\.nnx\.module a key"):
        nnx.grad(loss, argnums=LORA)(keyless)
    keyed = flora.nnx.module(net(), tree, key=jax.random.key(3))
    keyed.lora_dropout.deterministic = False
    assert (keyed(X) != keyed(X)).any()
    flora.nnx.update(keyed, flora.nnx.tree(adapted(net())))
    np.testing.assert_array_equal(keyed(X), keyed(X))  # the rate is the tree's: 0


TRANSFORMS = {
    "scan over the blocks": lambda m: layers(m.blocks, X),
    "scan and remat": lambda m: layers(m.blocks, X, remat=True),
    "vmap over the blocks": lambda m: nnx.vmap(lambda b, x: b(x), in_axes=(0, None))(
        m.blocks, X
    ),
    "remat": lambda m: nnx.remat(lambda m: m(X))(m),
    "vmap over inputs": lambda m: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(
        still(nnx.clone(m)), X[:, None]
    ),
    "scan over inputs": lambda m: nnx.scan(
        lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(m, X[None])[1],
    "cond": lambda m: nnx.cond(True, lambda m: m(X), lambda m: 2 * m(X), m),
}


@pytest.mark.parametrize("call", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("remat", [False, True])
def test_transforms_around_a_stack(call, remat):
    module = adapted(Stack(nnx.Rngs(0), remat=remat))
    assert module.blocks.linear.kernel_lora_a.shape == (3, 8, 2)
    as_merged(module, lambda m: m(X))
    as_merged(module, call)


def test_gradients_through_a_scan_of_the_users():
    module = adapted(still(Stack(nnx.Rngs(0))))
    mine = lambda m: (m.head(layers(m.blocks, X, remat=True)) ** 2).mean()  # noqa: E731
    found = [nnx.jit(nnx.grad(f, argnums=LORA))(module) for f in (mine, loss)]
    close(*found)


def test_loops_around_a_module():
    module = adapted(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    step = lambda _, c: (c[0], nnx.tanh(c[0](c[1])))  # noqa: E731
    as_merged(module, lambda m: nnx.fori_loop(0, 3, step, (m, X))[1])
    more, step2 = lambda c: c[2] < 2, lambda c: (c[0], nnx.tanh(c[0](c[1])), c[2] + 1)
    as_merged(module, lambda m: nnx.while_loop(more, step2, (m, X, 0))[1])


def test_layers_of_a_stack_that_differ():
    pattern = {"blocks/linear/kernel/0": 4}
    config = flora.LoraConfig(rank=2, rank_pattern=pattern)
    module = adapted(still(Stack(nnx.Rngs(0))), config=config)
    tree, fn = pure(module)
    assert tree["blocks"]["linear"]["kernel"].get_raw_value().blocks
    close(module(X), fn(tree, X))
    trained(module)
    with pytest.raises(
        flora.LoraError, match=r"Call the module that flora\.nnx\.adapt"
    ):
        layers(module.blocks, X)


def test_an_ensemble_of_adapters():
    make = nnx.vmap(
        lambda key, m: flora.nnx.adapt(key, CONFIG, m, X), in_axes=(0, None)
    )
    ensemble = drawn(make(jax.random.split(KEY, 3), net()))
    found = nnx.vmap(lambda m: m(X))(ensemble)
    graphdef, state = nnx.split(ensemble)
    for i in range(3):
        one = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))
        close(found[i], flora.nnx.merge(one)(X))


def test_clones_copies_and_pickles():
    module = adapted(net())
    for other in (
        nnx.clone(module),
        nnx.merge(*nnx.split(module)),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        nnx.merge(*pickle.loads(pickle.dumps(nnx.split(module)))),
    ):
        assert type(other) is type(module)
        close(other(X), module(X))
        close(flora.nnx.merge(other)(X), module(X))


def test_a_clone_trains_by_itself():
    module = adapted(net())
    other = drawn(nnx.clone(module), seed=5)
    assert (other(X) != module(X)).any()
    close(other(X), flora.nnx.merge(other)(X))


def test_two_adapters_of_one_base():
    model = net()
    one, two = adapted(model), adapted(model, config=flora.LoraConfig(rank=3))
    assert one.first.kernel[...] is two.first.kernel[...]
    close(one(X), flora.nnx.merge(one)(X))
    close(two(X), flora.nnx.merge(two)(X))


def test_files_and_other_trees(tmp_path):
    module = adapted(net())
    flora.save(tmp_path / "a.safetensors", flora.nnx.tree(module))
    plain = nnx.state(net())
    loaded = flora.nnx.module(net(), flora.load(tmp_path / "a.safetensors", plain))
    close(loaded(X), module(X), 0)
    other = flora.nnx.adapt(jax.random.key(1), CONFIG, net(), X)
    flora.nnx.update(other, flora.split(flora.nnx.tree(module))[1])
    close(other(X), module(X), 0)
    statistics = ["/norm/mean", "/norm/var"]
    flora.peft.save(tmp_path / "peft", flora.nnx.tree(module), ignore=statistics)
    close(
        flora.nnx.module(net(), flora.peft.load(tmp_path / "peft", plain))(X), loaded(X)
    )
    assert "first/kernel" in str(flora.summary(flora.nnx.tree(module)))


def test_orbax_keeps_the_factors(tmp_path):
    module, other = adapted(net()), flora.nnx.adapt(KEY, CONFIG, net(), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", nnx.state(module, nnx.LoRAParam))
        checkpointer.wait_until_finished()
        target = nnx.state(other, nnx.LoRAParam)
        nnx.update(other, checkpointer.restore(tmp_path / "c", target))
    close(other(X), module(X), 0)


def test_update_puts_in_other_ranks_starts_and_quantized_bases():
    module, wide = adapted(net()), adapted(net(), config=flora.LoraConfig(rank=5))
    first = module.first
    flora.nnx.update(module, flora.nnx.tree(wide))
    close(module(X), wide(X), 0)
    assert module.first is first
    fresh = flora.nnx.tree(flora.nnx.adapt(KEY, CONFIG, net(), X))
    started = flora.starts.pissa(fresh)
    flora.nnx.update(module, started)
    close(module(X), net()(X), 1e-4)
    assert (module.first.kernel[...] != net().first.kernel[...]).any()
    trained(flora.nnx.module(net(), started))
    small = flora.quantize.quantize(fresh, "int8", block=8)
    module = drawn(flora.nnx.module(net(), small))
    tree, fn = pure_quantized(module)
    close(module(X), fn(tree, X))
    trained(module)
    flora.nnx.update(wide, flora.nnx.tree(module))
    close(wide(X), module(X), 0)


def pure_quantized(module):
    graphdef = nnx.graphdef(net())
    return flora.nnx.tree(module), flora.lora(lambda t, x: nnx.merge(graphdef, t)(x))


class Held(nnx.Module):
    """Weights in lists, dicts, tuples and arrays of no variable."""

    def __init__(self, rngs):
        weight = lambda: nnx.Param(jax.random.normal(rngs.params(), (8, 8)) / 3)  # noqa: E731
        linear = lambda: nnx.Linear(8, 8, rngs=rngs)  # noqa: E731
        self.list = nnx.List([linear(), weight()])
        self.dict = nnx.Dict(a=linear(), b=weight())
        self.chain = nnx.Sequential(linear(), nnx.relu, linear())
        self.plain = nnx.data([weight()])
        self.deep = nnx.data({"k": weight(), "t": (weight(),)})
        self.offset = jnp.arange(8.0)

    def __call__(self, x):
        x = self.list[0](x) @ self.list[1]
        x = self.chain(self.dict["a"](x) @ self.dict["b"])
        return x @ self.plain[0] @ self.deep["k"] @ self.deep["t"][0] + self.offset


def test_weights_in_containers():
    target = re.compile(r".*(kernel|list/1|dict/b|plain/0|deep/.*)")
    module = adapted(Held(nnx.Rngs(0)), config=flora.LoraConfig(rank=2, target=target))
    assert len(paths(nnx.state(module, nnx.LoRAParam))) == 18
    as_merged(module, lambda m: m(X), tolerance=1e-4)
    flora.nnx.update(module, flora.nnx.tree(drawn(nnx.clone(module), 5)))
    as_merged(module, lambda m: m(X), tolerance=1e-4)


class Weight(nnx.Param):
    """A type of somebody's own."""


class Counter(nnx.Variable):
    """Another, which is no weight."""


class Counting(nnx.Module):
    def __init__(self, kind):
        self.w, self.calls = kind(jnp.ones((8, 8))), Counter(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return x @ self.w


def test_types_of_somebodys_own():
    module = adapted(Counting(Weight), config=flora.LoraConfig(rank=2, target="w"))
    as_merged(module, lambda m: m(X))
    assert type(module.w) is Weight
    assert module.calls[...] == 2
    with pytest.raises(flora.LoraError, match=r"holds no nnx\.Param"):
        adapted(Counting(Counter))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.b.kernel, self.c = self.a.kernel, self.a

    def __call__(self, x):
        return self.c(nnx.tanh(self.b(nnx.tanh(self.a(x)))))


def test_tied_weights_stay_tied():
    module = adapted(Tied(nnx.Rngs(0)))
    tree, fn = pure(module)
    for _ in range(2):
        assert module.b.kernel_lora_a is module.a.kernel_lora_a
        assert module.b.kernel is module.a.kernel
        assert module.c is module.a
        as_merged(module, lambda m: m(X))
        as_merged(module, lambda m: m.b(X))
        flora.nnx.update(module, flora.nnx.tree(drawn(nnx.clone(module), 7)))
    trained(module)
    assert (module(X) != fn(tree, X)).any()


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = self.a(x)
        self.sow(nnx.Intermediate, "h", x)
        return self.b(self.perturb("p", x))


@pytest.mark.filterwarnings(OUTSIDE)
def test_what_a_call_sows():
    config = flora.LoraConfig(rank=2, dropout=0.5)
    module = adapted(still(Sowing(nnx.Rngs(0))), config=config)
    module.eval()
    assert not nnx.state(module, nnx.Intermediate)
    inner, merged = module.a, flora.nnx.merge(module)
    for m in (module, merged):
        m(X), m(X)
    sown = [nnx.pop(m, nnx.Intermediate) for m in (module, merged)]
    close(*sown)
    assert len(sown[0]["h"].get_raw_value()) == 2
    assert module.a is inner
    node = flora.nnx.tree(module)["a"]["kernel"].get_raw_value()
    assert node.dropout == 0.5
    module.train()
    assert (module(X) != module(X)).any()


@pytest.mark.filterwarnings(OUTSIDE)
def test_perturbations_have_the_plain_models_gradients():
    model = Sowing(nnx.Rngs(0))
    model(X)
    module = adapted(model)
    wrt = nnx.DiffState(0, nnx.Perturbation)
    close(*(nnx.grad(loss, argnums=wrt)(m) for m in (module, flora.nnx.merge(module))))


def test_captures():
    if not hasattr(nnx, "capture"):  # of Flax 0.12.8 and later
        assert not hasattr(nnx, "view")
        return
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    class Around(nnx.Module):
        def __init__(self):
            self.inner = model

        def __call__(self, x):
            x = self.inner(x)
            self.sow(nnx.Intermediate, "h", x)
            return x

    module = flora.nnx.module(Around(), {"inner": flora.nnx.tree(adapted(model))})
    close(
        *(
            nnx.capture(m, nnx.Intermediate)(X)
            for m in (module, flora.nnx.merge(module))
        )
    )
    seen = nnx.view(adapted(Net(nnx.Rngs(0))), deterministic=True)
    assert seen.dropout.deterministic
    with nnx.set_graph_mode(False):
        as_merged(adapted(still(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))), lambda m: m(X))


class Autoencoder(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Linear(8, 4, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.calls = 0

    def encode(self, x):
        return self.down(x)

    def decode(self, z, *, gain=1.0):
        return gain * self.up(z)

    def sample(self, z):
        return self.decode(z, gain=2.0) + 1

    def grow(self, x):
        self.calls += 1
        self.last = nnx.Cache(x)
        self.more = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        return self.more(self.up(self.down(x)))

    def parts(self, x):
        return self.down, self.last, self.down(x), "text", None, {"calls": self.calls}


def test_several_methods():
    model, z = Autoencoder(nnx.Rngs(0)), jnp.ones((2, 4))
    module = drawn(
        flora.nnx.adapt(KEY, CONFIG, model, methods={"encode": (X,), "decode": (z,)})
    )
    as_merged(module, lambda m: m.encode(X))
    as_merged(module, lambda m: m.decode(z, gain=3.0))
    as_merged(module, lambda m: m.sample(z))
    assert inspect.signature(module.decode) == inspect.signature(model.decode)


def test_a_method_that_makes_the_module_grow():
    module = drawn(
        flora.nnx.adapt(
            KEY, CONFIG, Autoencoder(nnx.Rngs(0)), X, methods=("grow", "parts")
        )
    )
    assert module.calls == 0
    down, kernel = module.down, module.down.kernel
    as_merged(module, lambda m: m.grow(X))
    as_merged(module, lambda m: m.more(X))
    assert module.calls == 2
    assert (module.down, module.down.kernel) == (down, kernel)
    found = module.parts(X)
    assert found[0] is module.down
    assert found[1] is module.last
    close(found[2], flora.nnx.merge(module).down(X))
    assert found[3:] == ("text", None, {"calls": 2})


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_factors_are_sharded_as_their_weight_is(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=types)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("d", "m"))
    make = lambda: nnx.Linear(8, 16, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))  # noqa: E731
    with jax.set_mesh(mesh):
        x = jax.device_put(X, P()) if kind == "Explicit" else X
        module = flora.nnx.adapt(KEY, CONFIG, make(), x)
        jitted = nnx.jit(lambda: flora.nnx.adapt(KEY, CONFIG, make(), x))()
        for m in (module, jitted):
            specs = nnx.get_partition_spec(nnx.state(m))
            assert {k: x.get_raw_value() for k, x in specs.items()} == {
                "kernel": P("d", "m"),
                "kernel_lora_a": P("d", None),
                "kernel_lora_b": P(None, "m"),
            }
            named = nnx.get_named_sharding(nnx.state(m), mesh)
            for name, sharding in named.items():
                array = m.__dict__[name][...]
                wanted = sharding.get_raw_value()
                assert array.sharding.is_equivalent_to(wanted, array.ndim)
        y = nnx.jit(lambda m, x: m(x))(drawn(module) if kind == "Auto" else module, x)
        close(y, flora.nnx.merge(module)(x))


def test_shapes_alone():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    module = flora.nnx.adapt(KEY, CONFIG, model, jax.ShapeDtypeStruct((4, 8), X.dtype))
    assert module.first.kernel_lora_a.get_raw_value() == jax.ShapeDtypeStruct(
        (8, 2), X.dtype
    )
    assert nnx.eval_shape(lambda m: m(X), module).shape == (4, 3)
    made = nnx.eval_shape(lambda: flora.nnx.adapt(KEY, CONFIG, Net(nnx.Rngs(0)), X))
    assert paths(nnx.state(made)) == paths(nnx.state(module))


def test_tables_and_pictures():
    module = adapted(net())
    assert "kernel_lora_a" in repr(module)
    assert "LoRAParam" in nnx.tabulate(module, X, console_kwargs={"width": 200})
    close(module(np.asarray(X)), module(X), 0)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(x))

    @nn.compact
    def encode(self, x):
        return nn.Dense(16, name="Dense_0")(x)


def test_a_bridge_of_a_linen_module():
    module = adapted(bridge.ToNNX(Dense(), rngs=nnx.Rngs(0)).lazy_init(X))
    as_merged(module, lambda m: m(X))
    as_merged(module, lambda m: m(X, method="encode"))
    as_merged(module, lambda m: m.encode(X))
    merged, both = flora.nnx.merge(module), (nnx.Rngs(dropout=1), nnx.Rngs(dropout=1))
    for m, rngs in zip((module, merged), both, strict=True):
        m(X, train=True, rngs=rngs, mutable=["batch_stats"])
    after = [nnx.state(m, nnx.BatchStat) for m in (flora.nnx.merge(module), merged)]
    close(*after)
    assert jax.tree.leaves(after[0])[0].any()

    class Around(nnx.Module):
        def __init__(self):
            self.inner = bridge.ToNNX(Dense(), rngs=nnx.Rngs(0)).lazy_init(X)

        def __call__(self, x):
            return self.inner(x)

        def encode(self, x):
            return self.inner(x, method="encode")

    module = adapted(Around())
    as_merged(module, lambda m: m(X))
    as_merged(module, lambda m: m.encode(X))


def test_a_module_within_linen():
    module = bridge.ToLinen(
        lambda rngs: flora.nnx.adapt(KEY, CONFIG, nnx.Linear(8, 3, rngs=rngs), X)
    )
    variables = module.init(KEY, X)
    assert set(variables) == {"params", "LoRAParam"}
    factors = variables["LoRAParam"]
    moved = variables | {"LoRAParam": jax.tree.map(jnp.ones_like, factors)}
    w = variables["params"]["kernel"] + CONFIG.alpha / 2 * jnp.full((8, 3), 2.0)
    close(module.apply(moved, X), X @ w + variables["params"]["bias"])


def refused():
    model, module = net(), adapted(net())
    other = adapted(nnx.Sequential(nnx.Linear(8, 3, rngs=nnx.Rngs(0))))
    foreign = nnx.LoRALinear(8, 3, lora_rank=2, rngs=nnx.Rngs(0))
    adapt = functools.partial(flora.nnx.adapt, KEY, CONFIG)
    unselected = flora.LoraConfig(target="nothing")
    tree = flora.nnx.tree(module)
    node = tree["first"]["kernel"].get_raw_value()
    return {
        "adapted": (lambda: adapt(module, X), "adapted already"),
        "no method": (lambda: adapt(model, X, methods=("encode",)), "'__call__'"),
        "no call": (lambda: adapt(nnx.List([model]), X), "no method '__call__'"),
        "methods=3": (lambda: adapt(model, X, methods=3), "Write the names"),
        "methods='x'": (lambda: adapt(model, X, methods="__call__"), "Write the names"),
        "no tuple": (lambda: adapt(model, methods={"__call__": X}), "Write the tuple"),
        "nothing": (
            lambda: flora.nnx.adapt(KEY, unselected, model, X),
            "selects none of the 6",
        ),
        "linen": (lambda: adapt(Dense(), X), r"see flora\.linen"),
        "function": (lambda: adapt(lambda x: x, X), r"flora\.init"),
        "list": (lambda: adapt([model], X), "is a list"),
        "class": (lambda: adapt(Net, X), "expected an NNX module"),
        "factors of others": (lambda: adapt(foreign, X), "'lora/lora_a' is an nnx.Lo"),
        "key": (lambda: flora.nnx.adapt(0, CONFIG, model, X), "PRNG key"),
        "config": (lambda: flora.nnx.adapt(KEY, 8, model, X), "LoraConfig"),
        "tree of plain": (lambda: flora.nnx.tree(model), "not an adapted module"),
        "merge of plain": (lambda: flora.nnx.merge(model), "not an adapted module"),
        "update of plain": (lambda: flora.nnx.update(model, tree), "not an adapted"),
        "update with 3": (lambda: flora.nnx.update(module, 3), "is a int"),
        "update with plain": (
            lambda: flora.nnx.update(module, nnx.state(model)),
            "is adapted",
        ),
        "another model's": (
            lambda: flora.nnx.update(module, flora.nnx.tree(other)),
            "'layers/0/kernel'",
        ),
        "another shape": (
            lambda: flora.nnx.update(module, {"head": {"kernel": node}}),
            r"'head/kernel' has shape \(8, 16\)",
        ),
        "another rank": (
            lambda: flora.nnx.update(
                module, {"first": {"kernel": dataclasses.replace(node, rank=3)}}
            ),
            "'first/kernel' has base",
        ),
    }


@pytest.mark.parametrize("name", refused())
def test_bad_input(name):
    call, message = refused()[name]
    with pytest.raises(flora.LoraError, match=message):
        call()


def test_a_refused_update_changes_nothing():
    module = adapted(net())
    before, graphdef = nnx.state(module), nnx.graphdef(module)
    tree = flora.nnx.tree(drawn(nnx.clone(module), 9))
    tree["norm"]["other"] = nnx.Param(jnp.ones(3))
    with pytest.raises(flora.LoraError, match="'norm/other', and Net does not"):
        flora.nnx.update(module, tree)
    assert nnx.graphdef(module) == graphdef
    close(nnx.state(module), before, 0)


def test_nan_is_not_merged():
    module = adapted(net())
    module.first.kernel_lora_a[...] = module.first.kernel_lora_a[...] * jnp.nan
    with pytest.raises(flora.LoraError, match="'first/kernel' holds NaN"):
        flora.nnx.merge(module)
    assert jnp.isnan(
        flora.nnx.merge(module, allow_nonfinite=True).first.kernel[...]
    ).all()
