"""What the module within a `flora.linen.LoRA` has, seen from outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flora
import flora.linen
from tests.support.linen_models import Net, X, close, merged, moved, net

METHODS = {
    "name": "encode",
    "function": Net.encode,
    "bound method": Net().encode,
    "lambda over a method": lambda model, x: model.encode(x),
    "lambda over submodules": lambda model, x: model.rest[0](model.first(x)),
    "Flax's own call": Net.__call__,
    "a module in a dict": lambda model, x: model.heads["out"](x),
    "several at once": lambda model, x: model.decode(model.rest[0](model.encode(x))),
}


@pytest.mark.parametrize("how", METHODS)
def test_methods_run_on_base_and_factors(how):
    model, method = net(), METHODS[how]
    variables = moved(model, X)
    plain = merged(model, variables)
    out = model.apply(variables, X, method=method)
    wanted = Net().apply(plain, X, method=method)
    close(out, wanted)
    assert jnp.abs(out - Net().apply(variables, X, method=method)).max() > 0.05


def test_bind_shows_the_model():
    model = net()
    variables = moved(model, X)
    bound, plain = model.bind(variables), Net().bind(merged(model, variables))
    close(bound(X), plain(X))
    close(bound.encode(X), plain.encode(X))
    close(bound.first(X), plain.first(X))
    assert bound.d == model.d == 8
    assert bound.first.d == 8
    module, again = bound.unbind()
    assert module == model
    assert jax.tree.structure(again) == jax.tree.structure(variables)


def test_a_compact_models_methods():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.hidden(nn.Dense(8, name="in")(x))

        def hidden(self, x):
            return nn.relu(x)

        def _private(self, x):
            return self(x) + 1

    model = flora.linen.LoRA(model=Compact(), config=flora.LoraConfig(rank=2))
    variables = moved(model, X)
    plain = merged(model, variables)
    for method in ("_private", Compact._private, lambda model, x: model._private(x)):
        out = model.apply(variables, X, method=method)
        close(out, Compact().apply(plain, X, method=method))


def test_an_adapted_weight_that_is_read_outside_is_refused():
    class Reads(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", nn.initializers.ones, (8, 3))
            self.bias = self.param("bias", nn.initializers.ones, (3,))

        def __call__(self, x):
            return x @ self.kernel + self.bias

    model = flora.linen.LoRA(model=Reads(), config=flora.LoraConfig(rank=2))
    variables = moved(model, X)
    assert model.apply(variables, method=lambda model: model.bias).shape == (3,)
    with pytest.raises(flora.LoraError, match="'kernel' was read as an attribute"):
        model.apply(variables, method=lambda model: model.kernel)


@pytest.mark.parametrize("name", ["nothing", "__array__", "_nothing"])
def test_there_is_no_such_attribute(name):
    model = net()
    assert not hasattr(model, name)
    assert not hasattr(model.bind(moved(model, X)), name)
