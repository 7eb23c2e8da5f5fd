"""One registry of small models: name -> `(fn, params, args)`, all in plain JAX or Flax.

Widths are chosen so that no activation has a weight's shape.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flora._tree.paths import path_of

IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of a parameter tree, one call of it, and which leaves to target."""

    fn: Callable
    params: Any
    args: tuple
    target: Any = re.compile(r"(.*/)?(kernel|embedding)")
    settings: dict = dataclasses.field(default_factory=dict)


def normal(*shape, seed=7, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(make):
    """What `make()` returns, but drawn by NumPy, which compiles nothing.

    Scales and variances are near 1, all biases near 0; counters and keys are 0.
    """
    seeds = itertools.count()

    def fill(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(np.zeros((*x.shape, 2), np.uint32))
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros(x.shape, x.dtype)
        drawn = np.random.default_rng(next(seeds)).normal(size=x.shape)
        if re.search(r"\b(scale|var|sigma)\b", jax.tree_util.keystr(path)):
            drawn = 1 + 0.1 * np.tanh(drawn)
        elif len(x.shape) < 2 or path_of(path).endswith("bias"):
            drawn = 0.1 * drawn  # or attention is flat, and its gradients rounding
        else:
            drawn = drawn / math.sqrt(math.prod(x.shape[:-1]))
        return jnp.asarray(drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(make))


def linen(module, *args, settings=None, **options):
    """A Linen module on `args`."""
    variables = filled(lambda: module.init(jax.random.key(0), *args))
    return Model(module.apply, variables, args, settings=settings or {}, **options)


def nnx_split(build):
    """The graph and the state of an NNX module."""
    graphs = []

    def state():
        graph, state = nnx.split(build(nnx.Rngs(0)))
        graphs.append(graph)
        return state

    state = filled(state)
    return graphs[0], state


def of_nnx(build, *args, **options):
    """An NNX module; its state is the parameter tree."""
    graph, state = nnx_split(build)

    def fn(state, *args):
        return nnx.merge(graph, state)(*args)

    return Model(fn, state, args, **options)


class MLP(nn.Module):
    widths: tuple = (11, 7)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for n in self.widths[:-1]:
            x = nn.gelu(nn.Dense(n, dtype=self.dtype, param_dtype=self.param_dtype)(x))
        n = self.widths[-1]
        return nn.Dense(n, dtype=self.dtype, param_dtype=self.param_dtype)(x)


class Block(nn.Module):
    dim: int = 8

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12)(y, y)
        return x + MLP((22, self.dim))(nn.LayerNorm()(x))


class ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.remat(Block)()(x), None


class Decoder(nn.Module):
    """Embedding, scanned and rematerialized blocks, tied head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(31, 8)
        layers = nn.scan(
            ScanBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(embed(ids), None)
        return embed.attend(nn.LayerNorm()(x))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(12, (3, 2), feature_group_count=3, padding="VALID")(x))
        x = nn.Conv(5, (2, 2), kernel_dilation=2)(x)
        return nn.ConvTranspose(7, (3, 3), strides=(2, 2))(x).mean((1, 2))


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=None, out_axes=0, axis_size=3,
        )  # fmt: skip
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        return jnp.einsum("ebo,be->bo", experts()(x), gates)


class Normed(nn.Module):
    """BatchNorm: its call returns changed statistics too."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(11)(x))
        return nn.Dense(7)(x)


def batch_norm():
    module, x = Normed(), normal(3, 5)
    variables = filled(lambda: module.init(jax.random.key(0), x, False))

    def fn(variables, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    return Model(fn, variables, (x,))


def boxed():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    return linen(nn.Dense(11, kernel_init=kernel_init), normal(3, 5))


def plain_function():
    def fn(p, x):
        q, k = (jnp.einsum("btd,dhk->bhtk", x, p[n]) for n in "qk")
        scores = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k))
        return jnp.einsum("bhts,bsd,hdo->bto", scores, x, p["o"])

    params = {
        "q": normal(7, 2, 5),
        "k": normal(7, 2, 5, seed=1),
        "o": normal(2, 7, 11, seed=2),
    }
    return Model(fn, params, (normal(2, 3, 7),), target="*")


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 11, rngs=rngs)
        self.norm = nnx.LayerNorm(11, rngs=rngs)
        self.second = nnx.Linear(11, 7, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.gelu(self.norm(self.first(x))))


class NnxDecoder(nnx.Module):
    """Layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(31, 8, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = build(rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, qkv_features=12, decode=False, rngs=rngs
        )

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.tanh(layer(x))

        x = self.attention(run(self.embed(ids), self.layers))
        return self.embed.attend(x)


class NnxConvNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.second = nnx.Conv(6, 7, (2, 2), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x))).mean((1, 2))


MODELS = {
    "mlp": lambda: linen(MLP(), normal(3, 5)),
    "bfloat16 mlp": lambda: linen(
        MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        normal(3, 5),
        settings={"tolerance": 2e-2},
    ),
    "bfloat16 compute": lambda: linen(
        MLP(dtype=jnp.bfloat16), normal(3, 5), settings={"tolerance": 2e-2}
    ),
    "transformer block": lambda: linen(Block(), normal(2, 3, 8)),
    "scanned decoder": lambda: linen(Decoder(), IDS),
    "convolutions": lambda: linen(ConvNet(), normal(2, 9, 8, 3)),
    "vmapped experts": lambda: linen(Experts(), normal(4, 5)),
    "batch norm": batch_norm,
    "partitioned": boxed,
    "lstm": lambda: linen(nn.RNN(nn.OptimizedLSTMCell(6)), normal(2, 4, 5)),
    "gru": lambda: linen(nn.RNN(nn.GRUCell(6)), normal(2, 4, 5)),
    "plain einsums": plain_function,
    "nnx mlp": lambda: of_nnx(TwoLayers, normal(3, 5)),
    "nnx decoder": lambda: of_nnx(NnxDecoder, IDS),
    "nnx convolutions": lambda: of_nnx(NnxConvNet, normal(2, 5, 6, 3)),
}


# --- Functions of a few plain weights -------------------------------------------------


def dense(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"].T


def heads(p, x):
    q = jnp.einsum("bi,ihd->bhd", x, p["q"])
    return jnp.einsum("bhd,hdo->bo", jnp.tanh(q), p["o"])


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
