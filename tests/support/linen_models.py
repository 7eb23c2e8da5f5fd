"""Linen models of several styles, and what a module of flora's is compared with."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import flora
import flora.linen


class Block(nn.Module):
    """Compact: batch statistics, dropout and a sown value."""

    d: int

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(2 * self.d)(x)
        h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.Dropout(0.2, deterministic=not train)(h)
        self.sow("intermediates", "hidden", h)
        return x + nn.Dense(self.d)(nn.gelu(h))


class Net(nn.Module):
    """Setup: submodules by name, in lists and in dicts, and several methods."""

    d: int = 8

    def setup(self):
        self.first = Block(self.d)
        self.rest = [Block(self.d)]
        self.heads = {"out": nn.Dense(3, name="head")}

    def encode(self, x, train=False):
        return self.rest[0](self.first(x, train), train)

    def decode(self, z):
        return self.heads["out"](z)

    def __call__(self, x, train=False):
        return self.decode(self.encode(x, train))


X = jax.random.normal(jax.random.key(0), (4, 8))


def off(params, by=0.1):
    """Parameters whose factors are not at their start."""
    moved = jax.tree.map(lambda x: x + by, params["lora"])
    return {**params, "lora": moved}


def moved(model, *args, key=1, **kwargs):
    """The variables of `model.init`, with factors that are not at their start."""
    variables = model.init(jax.random.key(key), *args, **kwargs)
    variables.pop("intermediates", None)
    return {**variables, "params": off(variables["params"])}


def merged(model, variables):
    """The variables of the plain model that computes the same."""
    return flora.merge(flora.linen.tree(model, variables))


def net(**config):
    return flora.linen.LoRA(model=Net(), config=flora.LoraConfig(rank=2, **config))


def close(one, other, atol=1e-5):
    """Asserts that trees are alike in structure, dtypes and, nearly, in values."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        scale = max(1.0, float(jnp.abs(y).max())) if y.size else 1.0
        assert jnp.abs(x - y).max() <= atol * scale, (x, y)
