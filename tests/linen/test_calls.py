"""Methods of Linen modules on base and factors, in whatever Flax has around them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import core

import flora
import flora.linen
from tests.support.linen_models import Block, Net, X, close, merged, moved, net

RNGS = {"dropout": jax.random.key(5)}
CONFIG = flora.LoraConfig(rank=2)


def test_a_call_is_the_merged_models():
    model = net(train="head/bias")
    variables = moved(model, X)
    plain = merged(model, variables)
    close(model.apply(variables, X), Net().apply(plain, X))
    assert jnp.abs(model.apply(variables, X) - Net().apply(variables, X)).max() > 0.1


def test_gradients_are_those_of_the_pure_function_and_zero_for_the_base():
    model = net(train="head/bias")
    variables = moved(model, X)
    tree = flora.linen.tree(model, variables)

    def loss(params):
        return (model.apply({**variables, "params": params}, X) ** 2).sum()

    def pure(tree):
        return (flora.lora(Net().apply)(tree, X) ** 2).sum()

    grads = jax.grad(loss)(variables["params"])
    wanted = jax.grad(pure)(tree)["params"]
    for leaf in (("first", "Dense_0", "kernel"), ("head", "kernel")):
        own, want = grads["lora"], wanted
        for name in leaf:
            own, want = own[name], want[name]
        close(own, {"a": want.a, "b": want.b})
    close(grads["lora"]["head"]["bias"]["delta"], wanted["head"]["bias"].value)
    base = {k: x for k, x in grads.items() if k != "lora"}
    assert not any(x.any() for x in jax.tree.leaves(base))
    only = jax.grad(lambda f: loss({**variables["params"], "lora": f}))
    close(only(variables["params"]["lora"]), grads["lora"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_the_models(dtype):
    plain = nn.Dense(3, param_dtype=dtype)
    model = flora.linen.LoRA(model=plain, config=CONFIG)
    x = X.astype(dtype)
    variables = moved(model, x)
    out = model.apply(variables, x)
    assert out.dtype == dtype
    close(out, plain.apply(merged(model, variables), x), 2e-2)


@pytest.mark.parametrize(
    "mutable",
    [["batch_stats"], True, core.DenyList("params"), ["batch_stats", "intermediates"]],
)
def test_collections_change_as_the_models(mutable):
    model = net()
    variables = moved(model, X)
    plain = merged(model, variables)
    kwargs = {"train": True, "rngs": RNGS, "mutable": mutable}
    out, changed = model.apply(variables, X, **kwargs)
    want, wanted = Net().apply(plain, X, **kwargs)
    close(out, want)
    for collection in ("params", "lora"):
        changed.pop(collection, None)
        wanted.pop(collection, None)
    close(changed, wanted)


@pytest.mark.parametrize(
    "capture",
    [
        True,
        lambda module, name: isinstance(module, nn.Dense),
        lambda module, name: name == "encode",
        lambda module, name: True,
    ],
)
def test_captured_intermediates_are_the_models(capture):
    model = net()
    variables = moved(model, X)
    plain = merged(model, variables)
    kwargs = {"capture_intermediates": capture, "mutable": ["intermediates"]}
    _, own = model.apply(variables, X, **kwargs)
    _, wanted = Net().apply(plain, X, **kwargs)
    close(own, wanted)


def test_draws_are_the_plain_models():
    model = net()
    variables = model.init(jax.random.key(1), X)
    plain = merged(model, variables)
    kwargs = {"train": True, "rngs": RNGS, "mutable": ["batch_stats"]}
    assert (
        model.apply(variables, X, **kwargs)[0] == Net().apply(plain, X, **kwargs)[0]
    ).all()


class Twice(nn.Module):
    """In a parent: several models side by side, one of them called twice."""

    wrap: bool
    compact: bool = False

    def _made(self, name):
        plain = Block(8) if self.wrap else Block(8, name=name)
        if not self.wrap:
            return plain
        return flora.linen.LoRA(model=plain, config=CONFIG, name=name)

    def setup(self):
        self.one = self._made(None)
        self.two = self._made(None)

    def __call__(self, x):
        return self.two(self.one(self.one(x, True), True), True)


class Compact(nn.Module):
    wrap: bool

    @nn.compact
    def __call__(self, x):
        one, two = Block(8), Block(8)
        if self.wrap:
            one, two = (flora.linen.LoRA(model=m, config=CONFIG) for m in (one, two))
        return two(one(one(x, True), True), True)


@pytest.mark.parametrize("parent", [Twice, Compact])
def test_within_a_parent_base_and_draws_are_the_plain_parents(parent):
    adapted, plain = parent(wrap=True), parent(wrap=False)
    rngs = {"params": jax.random.key(1), **RNGS}
    variables, wanted = (core.copy(m.init(rngs, X)) for m in (adapted, plain))
    factors = [x.pop("lora") for x in variables["params"].values()]
    assert [sorted(x) for x in factors] == [["Dense_0", "Dense_1"]] * 2
    close(variables, wanted, 0)
    rngs = {"dropout": jax.random.key(6)}
    with_factors = adapted.init({"params": jax.random.key(1), **RNGS}, X)
    kwargs = {"rngs": rngs, "mutable": ["batch_stats"]}
    out, changed = adapted.apply(with_factors, X, **kwargs)
    want, wants = plain.apply(wanted, X, **kwargs)
    assert (out == want).all()
    close(changed, wants, 0)


def test_the_factors_of_a_module_called_twice_are_shared():
    adapted, plain = Twice(wrap=True), Twice(wrap=False)
    rngs = {"params": jax.random.key(1), **RNGS}
    variables = adapted.init(rngs, X)
    params = {}
    for name, own in variables["params"].items():
        own = jax.tree.map(lambda x: x + 0.1, own["lora"])
        block = {k: x for k, x in variables["params"][name].items() if k != "lora"}
        tree = {
            layer: {
                **block[layer],
                "kernel": block[layer]["kernel"] + 8 * ab["a"] @ ab["b"],
            }
            for layer, (ab,) in ((k, tuple(x.values())) for k, x in own.items())
        }
        params[name] = {**block, **tree}
        variables["params"][name] = {**block, "lora": own}
    kwargs = {"rngs": RNGS, "mutable": ["batch_stats"]}
    out, _ = adapted.apply(variables, X, **kwargs)
    want, _ = plain.apply({**variables, "params": params}, X, **kwargs)
    close(out, want, 1e-4)


def layer(cls=nn.Dense, **kwargs):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + cls(8, **kwargs)(x), None

    return Layer


def scanned(cls):
    return nn.scan(
        cls, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )


def test_scan_and_remat_around():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = scanned(nn.remat(flora.linen.LoRA))
            return many(model=layer()(), config=CONFIG)(x, None)[0]

    stack = Stack()
    variables = stack.init(jax.random.key(0), X)
    (name,) = variables["params"]
    own = variables["params"][name]
    assert own["lora"]["Dense_0"]["kernel"]["a"].shape == (3, 8, 2)
    own["lora"] = jax.tree.map(lambda x: x + 0.1, own["lora"])
    dense, ab = own["Dense_0"], own["lora"]["Dense_0"]["kernel"]

    def by_hand(ab, x):
        for i in range(3):
            kernel = dense["kernel"][i] + 8 * ab["a"][i] @ ab["b"][i]
            x = x + x @ kernel + dense["bias"][i]
        return x

    def of_module(ab, x):
        params = {**own, "lora": {"Dense_0": {"kernel": ab}}}
        return stack.apply({"params": {name: params}}, x)

    close(of_module(ab, X), by_hand(ab, X), 1e-4)
    own_grads, wanted = (
        jax.grad(lambda ab, f=f: (f(ab, X) ** 2).mean())(ab)
        for f in (of_module, by_hand)
    )
    close(own_grads, wanted, 1e-4)


def test_scan_and_remat_inside():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(nn.remat(layer()))(name="layers")(x, None)[0]

    model = flora.linen.LoRA(model=Stack(), config=CONFIG)
    variables = moved(model, X)
    assert variables["params"]["lora"]["layers"]["Dense_0"]["kernel"]["a"].shape == (
        3,
        8,
        2,
    )
    close(model.apply(variables, X), Stack().apply(merged(model, variables), X), 1e-4)


@pytest.mark.parametrize("around", [nn.jit, nn.remat])
def test_jit_and_remat_around(around):
    model = around(flora.linen.LoRA)(model=Net(), config=CONFIG)
    variables = moved(model, X)
    kwargs = {"rngs": RNGS, "mutable": ["batch_stats"]}
    # Flax traces a flag that it jits.
    out, _ = model.apply(variables, X, **kwargs)
    close(out, Net().apply(merged(model, variables), X))


def test_vmap_around():
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.vmap(
                flora.linen.LoRA,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return many(model=nn.Dense(3), config=CONFIG, name="many")(x)

    x = jnp.stack([X, X + 1])
    variables = Many().init(jax.random.key(0), x)
    own = variables["params"]
    (name,) = own
    own[name]["lora"] = jax.tree.map(lambda x: x + 0.1, own[name]["lora"])
    ab = own[name]["lora"]["kernel"]
    kernel = own[name]["kernel"] + 8 * ab["a"] @ ab["b"]
    wanted = jnp.einsum("nbi,nio->nbo", x, kernel) + own[name]["bias"][:, None]
    close(Many().apply(variables, x), wanted)


class Loops(nn.Module):
    """Control flow of Flax's, inside or around."""

    inner: nn.Module

    def setup(self):
        self.loop = self.inner

    def __call__(self, x):
        def body(module, carry):
            return carry[0] + 1, module.loop(carry[1])

        self.loop(x)  # creates the parameters
        _, x = nn.while_loop(lambda _, c: c[0] < 3, body, self, (0, x))
        return nn.cond(
            x.sum() > 0, lambda m, x: m.loop(x), lambda m, x: -m.loop(x), self, x
        )


def test_loops_and_branches_inside():
    model = flora.linen.LoRA(model=Loops(nn.Dense(8)), config=CONFIG)
    variables = moved(model, X, key=3)
    close(
        model.apply(variables, X),
        Loops(nn.Dense(8)).apply(merged(model, variables), X),
        1e-4,
    )


def test_loops_and_branches_around():
    around = Loops(flora.linen.LoRA(model=nn.Dense(8), config=CONFIG))
    variables = around.init(jax.random.key(3), X)
    own = variables["params"]["loop" if "loop" in variables["params"] else "inner"]
    own["lora"] = jax.tree.map(lambda x: x + 0.1, own["lora"])
    ab = own["lora"]["kernel"]
    plain = {"kernel": own["kernel"] + 8 * ab["a"] @ ab["b"], "bias": own["bias"]}
    (name,) = variables["params"]
    wanted = Loops(nn.Dense(8)).apply({"params": {name: plain}}, X)
    close(around.apply(variables, X), wanted, 1e-4)


def test_share_scope():
    class Outer(nn.Module):
        def setup(self):
            self.inner = flora.linen.LoRA(model=nn.Dense(8), config=CONFIG)
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return nn.relu(self.inner(x))

    variables = Outer().init(jax.random.key(0), X)
    assert sorted(variables["params"]) == ["bias", "kernel", "lora"]
    close(Outer().apply(variables, X), nn.relu(nn.Dense(8).apply(variables, X)))


def test_a_cache_is_the_models():
    attention = nn.MultiHeadDotProductAttention(2, decode=True)
    model = flora.linen.LoRA(model=attention, config=CONFIG)
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    variables = moved(model, x)
    plain = merged(model, variables)
    assert (variables["cache"]["cache_index"] == 0).all()
    for i in range(3):
        step = x[:, i : i + 1]
        out, changed = model.apply(variables, step, mutable=["cache"])
        want, wanted = attention.apply(plain, step, mutable=["cache"])
        close(out, want)
        close(changed, wanted)
        variables, plain = {**variables, **changed}, {**plain, **wanted}


def test_an_rnn():
    rnn = nn.RNN(nn.LSTMCell(6), return_carry=True)
    model = flora.linen.LoRA(model=rnn, config=CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = moved(model, x)
    close(model.apply(variables, x), rnn.apply(merged(model, variables), x))


def test_a_weight_that_two_methods_use():
    class Tied(nn.Module):
        def setup(self):
            self.embed, self.dense = nn.Embed(11, 8), nn.Dense(8)

        def encode(self, i):
            return self.dense(self.embed(i))

        def decode(self, h):
            return self.embed.attend(h)

        def __call__(self, i):
            return self.decode(self.encode(i))

    config = flora.LoraConfig(rank=2, target=["embed/embedding", "dense/kernel"])
    model, i = flora.linen.LoRA(model=Tied(), config=config), jnp.arange(6)
    variables = moved(model, i)
    plain = merged(model, variables)
    for method, x in (("__call__", i), ("encode", i), ("decode", X)):
        out = model.apply(variables, x, method=method)
        close(out, Tied().apply(plain, x, method=method))


def test_the_cell_of_an_rnn():
    cell = nn.GRUCell(6)
    adapted = flora.linen.LoRA(model=cell, config=CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    around, rnn = nn.RNN(adapted), nn.RNN(cell)
    variables = around.init(jax.random.key(1), x)
    own = variables["params"]["cell"]
    own["lora"] = jax.tree.map(lambda x: x + 0.1, own["lora"])
    carry = jnp.zeros((2, 6))
    adapted.apply({"params": own}, carry, x[:, 0])
    plain = merged(adapted, {"params": own})["params"]
    close(around.apply(variables, x), rnn.apply({"params": {"cell": plain}}, x))


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_a_model_that_changes_its_weights(norm):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8, name="dense")
            x = nn.Dense(8, name="plain")(x)
            if norm is nn.SpectralNorm:
                return norm(dense)(x, update_stats=False)
            return norm(dense)(x)

    config = flora.LoraConfig(rank=2, target="plain/kernel")
    model = flora.linen.LoRA(model=Normed(), config=config)
    variables = moved(model, X)
    close(model.apply(variables, X), Normed().apply(merged(model, variables), X))


def test_a_module_among_the_arguments_and_attributes_of_the_parents():
    class Head(nn.Module):
        embed: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.embed.attend(nn.Dense(8)(x))

    class Parent(nn.Module):
        wrap: bool

        def setup(self):
            self.embed = nn.Embed(5, 8)
            head = Head(self.embed)
            self.head = (
                flora.linen.LoRA(model=head, config=CONFIG) if self.wrap else head
            )

        def __call__(self, i):
            return self.head(self.embed(i))

    i = jnp.arange(5)
    variables = Parent(wrap=True).init(jax.random.key(0), i)
    head = variables["params"]["head"]
    close(
        Parent(wrap=True).apply(variables, i),
        Parent(wrap=False).apply(
            {"params": {**variables["params"], "head": {"Dense_0": head["Dense_0"]}}}, i
        ),
        0,
    )


def test_dropout_of_the_adapter_draws_none_of_the_models_numbers():
    plain, with_dropout = net(), net(dropout=0.5)
    variables = plain.init(jax.random.key(1), X)
    kwargs = {"train": True, "rngs": RNGS, "mutable": ["batch_stats"]}
    one, other = (m.apply(variables, X, **kwargs)[0] for m in (plain, with_dropout))
    assert (one == other).all()  # B is zero
    moved_ = moved(plain, X)
    dropped = with_dropout.apply(moved_, X, rngs=RNGS)
    close(with_dropout.apply(moved_, X), plain.apply(moved_, X))
    assert jnp.abs(dropped - plain.apply(moved_, X)).max() > 0.1
    assert (dropped == with_dropout.apply(moved_, X, rngs=RNGS)).all()
    with pytest.raises(flora.LoraError, match="rngs"):
        jax.grad(lambda v: with_dropout.apply(v, X).sum())(moved_)


def test_several_calls_at_init_are_one_plan():
    config = flora.LoraConfig(rank=2, target=["first/*/kernel", "head/kernel"])
    model = flora.linen.LoRA(model=Net(), config=config)

    def both(model, x):
        return model.decode(model.encode(x))

    variables = model.init(jax.random.key(0), X, method=both)
    assert sorted(variables["params"]["lora"]) == ["first", "head"]
    wanted = model.init(jax.random.key(0), X)
    close(variables, wanted, 0)


def test_init_is_the_models_beside_the_factors():
    model = net()
    variables = model.init(jax.random.key(0), X)
    variables["params"].pop("lora")
    close(variables, Net().init(jax.random.key(0), X), 0)
    out, again = model.init_with_output(jax.random.key(0), X)
    close(out, Net().init_with_output(jax.random.key(0), X)[0], 0)
    assert "lora" in again["params"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    close(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        jax.tree.map(jnp.zeros_like, again),
    )


def test_init_from_an_old_key():
    model = net()
    close(model.init(jax.random.PRNGKey(0), X), model.init(jax.random.key(0), X), 0)
