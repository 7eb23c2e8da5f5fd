"""NNX models, factors that are not zero, and what an adapted module must equal."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flora
import flora.nnx

KEY = jax.random.key(0)
CONFIG = flora.LoraConfig(rank=2)
LORA = nnx.DiffState(0, nnx.LoRAParam)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.first(x)))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.dropout(self.norm(self.linear(x))))


class Stack(nnx.Module):
    """Three blocks in a scan."""

    def __init__(self, rngs, *, remat=False):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        return self.head(layers(self.blocks, x, remat=self.remat))


def layers(blocks, x, *, remat=False):
    call = nnx.remat(lambda b, x: b(x)) if remat else lambda b, x: b(x)
    return nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


def still(model):
    model.eval()
    return model


def drawn(model, seed=1):
    """The module, with values of NumPy's in all that trains."""
    rng = np.random.default_rng(seed)

    def draw(path, variable):
        shape, dtype = variable.shape, variable.dtype
        return variable.replace(jnp.asarray(0.3 * rng.normal(size=shape), dtype))

    nnx.update(model, nnx.map_state(draw, nnx.state(model, nnx.LoRAParam)))
    return model


def adapted(model, *args, config=CONFIG, **kwargs):
    return drawn(flora.nnx.adapt(KEY, config, model, *(args or (X,)), **kwargs))


def pure(model):
    """The adapted tree of a module, and the pure function that runs on it."""
    graphdef = nnx.graphdef(flora.nnx.merge(model))
    return flora.nnx.tree(model), flora.lora(
        lambda tree, *args, **kwargs: nnx.merge(graphdef, tree)(*args, **kwargs)
    )


def close(x, y, tolerance=1e-5):
    """Both trees alike, relative to the largest of each array."""
    xs, ys = jax.tree.leaves(x), jax.tree.leaves(y)
    assert len(xs) == len(ys)
    for x, y in zip(map(plain, xs), map(plain, ys), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        wide = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(wide[0] - wide[1]).max(initial=0)
        assert error <= tolerance * max(np.abs(wide[1]).max(initial=0), 1e-6)


def plain(x):
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if key else x


def as_merged(model, call, *, steps=2, tolerance=1e-5):
    """Calls the module and its merged one; what they return and become is the same."""
    merged = flora.nnx.merge(model)
    for _ in range(steps):
        close(call(model), call(merged), tolerance)
    after = flora.nnx.merge(model)
    assert nnx.graphdef(after) == nnx.graphdef(merged)
    close(nnx.state(after), nnx.state(merged), 10 * tolerance)


def paths(state):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def gradients(state):
    """Arrays by path."""
    return {
        "/".join(map(str, path)): x.get_raw_value()
        for path, x in nnx.to_flat_state(state)
    }


def of_pure(tree, *names):
    """Gradients of a tree, by the names that they have in a module."""
    found = {}
    for path, x in nnx.to_flat_state(tree):
        node = x.get_raw_value()
        if isinstance(node, flora.LoraWeight):
            parts = {"a": node.a, "b": node.b} | (node.extra or {})
            at = "/".join(map(str, path))
            found |= {f"{at}_lora_{name}": part for name, part in parts.items()}
        elif isinstance(node, flora.Trained):
            found["/".join(map(str, path))] = node.value
    return {name: found[name] for name in names}
