"""The class of an adapted module, and what one call of it does."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flora
import flora.nnx
from flora._nnx.calls import adapted_class, methods_of
from tests.support.nnx_models import CONFIG, Net, X, adapted, close, still


def test_classes_are_made_once_and_pickled_as_what_they_were_made_of():
    one, two = adapted(Net(nnx.Rngs(0))), adapted(Net(nnx.Rngs(1)))
    assert type(one) is type(two)
    assert type(one).__mro__[1] is Net
    assert pickle.loads(pickle.dumps(type(one))) is type(one)
    names = frozenset({"kernel"})
    assert adapted_class(nnx.Linear, (), names, names) is adapted_class(
        nnx.Linear, (), names, names
    )
    assert methods_of(one) == ("__call__",)
    assert type(one.norm) is nnx.BatchNorm


def test_nothing_but_the_returned_module_changes():
    before = dict(vars(nnx.Linear)), dict(vars(Net))
    adapted(Net(nnx.Rngs(0)))(X)
    assert before == (dict(vars(nnx.Linear)), dict(vars(Net)))


class Setting(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.other = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.linear(x)

    def reset(self):
        self.linear.kernel[...] = jnp.zeros((8, 8))

    def untouched(self):
        self.other.kernel[...] = jnp.zeros((8, 8))


def test_a_method_may_change_other_weights_only():
    config = flora.LoraConfig(rank=2, target="linear/kernel")
    module = adapted(Setting(), config=config)
    with pytest.raises(flora.LoraError, match="changes 'linear/kernel', which is adap"):
        module.reset()
    module.untouched()
    assert not module.other.kernel[...].any()


def test_a_weight_that_trains_whole_comes_through_a_jit():
    class Jitted(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        @nnx.jit
        def __call__(self, x):
            return self.linear(x)

    config = flora.LoraConfig(rank=2, train="linear/bias")
    module = adapted(Jitted(), config=config)
    merged = flora.nnx.merge(module)
    for _ in range(2):
        close(module(X), merged(X))
    assert type(module.linear.bias) is nnx.LoRAParam
    assert isinstance(module.linear.bias[...], jax.Array)


def test_what_is_frozen_has_no_gradient():
    module = adapted(still(Net(nnx.Rngs(0))))
    wrt = nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("bias")))
    with pytest.raises(flora.LoraError, match=r"^'(first|head|norm)/bias', a frozen"):
        nnx.grad(lambda m: m(X).sum(), argnums=wrt)(module)


def test_text_and_arrays_among_the_arguments():
    class Scaled(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x, how, *, scales):
            return scales["by"] * self.linear(x) if how == "scaled" else None

    module = adapted(Scaled(), X, "scaled", scales={"by": 2.0}, config=CONFIG)
    merged = flora.nnx.merge(module)
    scales = {"by": jnp.float32(3)}
    close(module(X, "scaled", scales=scales), merged(X, "scaled", scales=scales))
    assert module(X, "no", scales=scales) is None


def test_keys_that_cannot_move_on_are_an_error():
    module = adapted(Net(nnx.Rngs(0)), config=flora.LoraConfig(rank=2, dropout=0.5))
    module.eval()
    module.lora_dropout.deterministic = False
    with pytest.raises(
        flora.LoraError, match=r"Net is in train mode .* model.eval\(\)"
    ):
        jax.jit(lambda x: module(x))(X)
    module.lora_dropout.deterministic = True
    jax.jit(lambda x: module(x))(X)
