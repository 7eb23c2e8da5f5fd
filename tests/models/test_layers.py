"""Every layer of `flax.linen` and `flax.nnx` that owns a kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import flora
from flora._trace.compat import P
from tests.support import contract
from tests.support.registry import IDS, Model, filled, linen, nnx_split, normal, of_nnx

ROWS, IMAGE = normal(3, 5), normal(2, 6, 7, 4)
SEQUENCE = normal(2, 4, 5)
# The gradient of a norm of W takes a dense dW.
NORM = {"views": (P.mul, P.div, P.square, P.dot_general, P.conv_general_dilated)}


def hooked(lhs, rhs, dims, precision=None, preferred_element_type=None):
    """A hook that changes how a product is computed, not what is multiplied."""
    y = lax.dot_general(lhs.astype(jnp.float32), rhs * 2.0, dims, "highest")
    return (y / 2).astype(jnp.result_type(lhs, rhs))


def with_state(module, x, **settings):
    """A module whose call changes other collections."""
    variables = filled(lambda: module.init(jax.random.key(0), x, True))
    others = [name for name in variables if name != "params"]

    def fn(variables, x):
        return module.apply(variables, x, True, mutable=others)

    return Model(fn, variables, (x,), settings=settings)


class Spectral(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x, update):
        return nn.SpectralNorm(self.inner)(x, update_stats=update)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(not train)(nn.Conv(6, (3, 2))(x))


class Attend(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(31, 8)
        return embed.attend(nn.Dense(8)(embed(ids)))


def logical():
    names = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    return linen(nn.Dense(11, kernel_init=names), ROWS)


MASK = jnp.array([1.0, 1.0, 0.0])[:, None, None] * jnp.ones((3, 4, 6))

LINEN = {
    "Dense": lambda: linen(nn.Dense(11), ROWS),
    "DenseGeneral": lambda: linen(nn.DenseGeneral((3, 7), axis=(-2, -1)), SEQUENCE),
    "DenseGeneral, batch": lambda: linen(
        nn.DenseGeneral(7, axis=-1, batch_dims=(0,)), SEQUENCE),
    "Dense, hook": lambda: linen(
        nn.Dense(11, dot_general=hooked), ROWS, settings={"views": (P.mul,)}),
    "Einsum": lambda: linen(nn.Einsum((5, 2, 7), "...d,dhk->...hk"), ROWS),
    "Conv": lambda: linen(nn.Conv(11, (3, 3), strides=2), IMAGE),
    "Conv, circular": lambda: linen(nn.Conv(11, (3, 2), padding="CIRCULAR"), IMAGE),
    "Conv, causal": lambda: linen(nn.Conv(6, 3, padding="CAUSAL"), normal(2, 9, 4)),
    "Conv, masked": lambda: linen(
        nn.Conv(6, 3, mask=MASK), normal(2, 9, 4), settings={"views": (P.mul,)}),
    "Conv, one image": lambda: linen(nn.Conv(11, (3, 2)), IMAGE[0]),
    "ConvTranspose": lambda: linen(nn.ConvTranspose(11, (3, 2), strides=(2, 2)), IMAGE),
    "ConvTranspose, transposed": lambda: linen(
        nn.ConvTranspose(11, (3, 2), transpose_kernel=True), IMAGE),
    "ConvLocal": lambda: linen(nn.ConvLocal(11, (3, 2)), IMAGE),
    "Embed": lambda: linen(nn.Embed(31, 8), IDS),
    "Embed and attend": lambda: linen(Attend(), IDS),
    "MultiHeadDotProductAttention": lambda: linen(
        nn.MultiHeadDotProductAttention(2, qkv_features=6), SEQUENCE, SEQUENCE),
    "MultiHeadAttention, normalized": lambda: linen(
        nn.MultiHeadAttention(2, qkv_features=32, normalize_qk=True), SEQUENCE),
    "LSTMCell": lambda: linen(nn.RNN(nn.LSTMCell(6)), SEQUENCE),
    "OptimizedLSTMCell": lambda: linen(nn.RNN(nn.OptimizedLSTMCell(6)), SEQUENCE),
    "GRUCell": lambda: linen(nn.RNN(nn.GRUCell(6)), SEQUENCE),
    "MGUCell": lambda: linen(nn.RNN(nn.MGUCell(6)), SEQUENCE),
    "SimpleCell": lambda: linen(nn.RNN(nn.SimpleCell(6)), SEQUENCE),
    "ConvLSTMCell": lambda: linen(
        nn.RNN(nn.ConvLSTMCell(3, (2, 2))), normal(2, 3, 6, 7, 4)),
    "Bidirectional": lambda: linen(
        nn.Bidirectional(nn.RNN(nn.GRUCell(6)), nn.RNN(nn.SimpleCell(6))), SEQUENCE),
    "WeightNorm": lambda: linen(nn.WeightNorm(nn.Dense(11)), ROWS, settings=NORM),
    "WeightNorm of Conv": lambda: linen(
        nn.WeightNorm(nn.Conv(11, (3, 2))), IMAGE, settings=NORM),
    "SpectralNorm": lambda: with_state(Spectral(nn.Dense(11)), ROWS, **NORM),
    "SpectralNorm of Conv": lambda: with_state(
        Spectral(nn.Conv(11, (3, 2))), IMAGE, **NORM),
    "BatchNorm": lambda: with_state(Normed(), IMAGE),
    "LogicallyPartitioned": logical,
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    adapted = contract.check_model(LINEN[name]())
    if name == "SpectralNorm":  # not as its power iteration reads it
        (w,) = contract.weights(adapted)
        assert w.layout == flora.Layout((), (0,), (1,))


class NnxAttend(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.dense = (
            nnx.Embed(31, 8, rngs=rngs),
            nnx.Linear(8, 8, rngs=rngs),
        )

    def __call__(self, ids):
        return self.embed.attend(self.dense(self.embed(ids)))


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def with_whole_state(build, *args):
    """An NNX module whose call hands back its whole state, changed where it changes."""
    graph, state = nnx_split(build)

    def fn(state, *args):
        module = nnx.merge(graph, state)
        return module(*args), nnx.state(module)

    return Model(fn, state, args)


NNX = {
    "Linear": lambda: of_nnx(lambda r: nnx.Linear(5, 11, rngs=r), ROWS),
    "LinearGeneral": lambda: of_nnx(
        lambda r: nnx.LinearGeneral((4, 5), (3, 7), axis=(-2, -1), rngs=r), SEQUENCE),
    "Einsum": lambda: of_nnx(
        lambda r: nnx.Einsum("...d,dhk->...hk", (5, 2, 7), rngs=r), ROWS),
    "Conv": lambda: of_nnx(lambda r: nnx.Conv(4, 11, (3, 2), rngs=r), IMAGE),
    "ConvTranspose": lambda: of_nnx(
        lambda r: nnx.ConvTranspose(4, 11, (3, 2), strides=(2, 2), rngs=r), IMAGE),
    "Embed and attend": lambda: of_nnx(NnxAttend, IDS),
    "MultiHeadAttention": lambda: of_nnx(
        lambda r: nnx.MultiHeadAttention(2, 5, 6, decode=False, rngs=r), SEQUENCE),
    "LSTMCell": lambda: of_nnx(lambda r: nnx.RNN(nnx.LSTMCell(5, 6, rngs=r)), SEQUENCE),
    "OptimizedLSTMCell": lambda: of_nnx(
        lambda r: nnx.RNN(nnx.OptimizedLSTMCell(5, 6, rngs=r)), SEQUENCE),
    "GRUCell": lambda: of_nnx(lambda r: nnx.RNN(nnx.GRUCell(5, 6, rngs=r)), SEQUENCE),
    "SimpleCell": lambda: of_nnx(
        lambda r: nnx.RNN(nnx.SimpleCell(5, 6, rngs=r)), SEQUENCE),
    "Bidirectional": lambda: of_nnx(
        lambda r: nnx.Bidirectional(nnx.RNN(nnx.GRUCell(5, 6, rngs=r)),
                                    nnx.RNN(nnx.GRUCell(5, 6, rngs=r)), rngs=r),
        SEQUENCE),
    "WeightNorm": lambda: of_nnx(
        lambda r: nnx.WeightNorm(nnx.Linear(5, 11, rngs=r), rngs=r), ROWS,
        settings=NORM),
    "SpectralNorm": lambda: of_nnx(
        lambda r: nnx.SpectralNorm(nnx.Linear(5, 11, rngs=r), rngs=r), ROWS,
        settings=NORM),
    "LoRALinear": lambda: of_nnx(
        lambda r: nnx.LoRALinear(5, 11, lora_rank=2, rngs=r), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    contract.check_model(NNX[name]())


def test_an_nnx_state_comes_back_ready_for_the_next_call():
    model = with_whole_state(NnxNormed, IMAGE)
    adapted = contract.randomized(contract.adapt(model.fn, model.params, IMAGE))
    apply, merged = jax.jit(flora.lora(model.fn)), flora.merge(adapted)
    for _ in range(2):
        y, adapted = apply(adapted, IMAGE)
        expected, merged = model.fn(merged, IMAGE)
        contract.close(y, expected, 2e-5)
        contract.close(flora.merge(adapted), merged, 2e-5)


@pytest.mark.parametrize("hook", ["NANOOFp8DotGeneralOp", "Fp8DirectDotGeneralOp"])
def test_hooks_that_round_the_weight_are_refused_by_name_or_materialized(hook):
    module = nn.Dense(11, dot_general_cls=getattr(nn, hook))
    variables = module.init(jax.random.key(0), ROWS)

    def fn(variables, x):
        return module.apply(variables, x, mutable=["_overwrite_with_gradient"])[0]

    with pytest.raises(
        flora.LoraError, match=r"reads 'params/kernel' and flora has no"
    ):
        contract.adapt(fn, variables, ROWS, target="kernel")
    config = {"target": "kernel", "fallback": "materialize"}
    tree = contract.randomized(contract.adapt(fn, variables, ROWS, **config))
    contract.close(flora.lora(fn)(tree, ROWS), fn(flora.merge(tree), ROWS), 1e-6)
