"""A Llama-style decoder in plain Linen and bfloat16, and its sharding on a mesh.

RMSNorm, rotary positions, grouped-query attention under a causal mask, a gated MLP and
a cross-entropy loss.  It knows nothing of flora.

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Ainslie et al. 2023 (grouped queries). https://arxiv.org/abs/2305.13245
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DTYPES: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

Constrain = Callable[[jax.Array, str], jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the decoder and its input."""

    layers: int = 8
    sequences: int = 2
    tokens: int = 4096
    d: int = 2048
    heads: int = 16
    kv_heads: int = 8
    ff: int = 5632
    vocab: int = 32000
    rank: int = 16
    tied: bool = False

    @property
    def ids(self) -> jax.ShapeDtypeStruct:
        """The tokens, `[sequences, tokens of each]`."""
        shape = self.sequences, self.tokens // self.sequences
        return jax.ShapeDtypeStruct(shape, jnp.int32)


def anywhere(x: jax.Array, kind: str) -> jax.Array:
    """Leaves the sharding of an array to the compiler."""
    return x


def on_mesh(mesh: Mesh, kv_heads: int, *, shard_sequence: bool = False) -> Constrain:
    """How activations and the head's kernel are sharded over 'data', 'fsdp' and 'tp'.

    Sequences are sharded over 'data' and 'fsdp', heads and ff over 'tp'; where 'tp'
    does not divide `kv_heads`, each chip has them all.

    Args:
      mesh: of these axes.
      kv_heads: of the model.
      shard_sequence: whether the tokens between blocks are divided over 'tp'
        (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198).
    """
    batch, sequence = ("data", "fsdp"), "tp" if shard_sequence else None
    specs = {
        "stream": P(batch, sequence, None),
        "normed": P(batch, None, None),
        "heads": P(batch, None, "tp", None),
        "kv_heads": P(batch, None, None if kv_heads % mesh.shape["tp"] else "tp", None),
        "ff": P(batch, None, "tp"),
        "head": P(None, "tp"),  # gathered once, not in each block of tokens
    }

    def constrain(x: jax.Array, kind: str) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[kind]))

    return constrain


def weight_spec(path: tuple[Any, ...], leaf: Any) -> P:
    """The spec of a weight: one of its axes over 'fsdp', another over 'tp'.

    Columns of q, k, v, gate, up and the head go over 'tp', rows of o and down (Shoeybi
    et al. 2019, https://arxiv.org/abs/1909.08053); norms are replicated.
    """
    name = jax.tree_util.keystr(path)
    if leaf.ndim < 2 or "norm" in name:
        return P()
    rows = any(x in name for x in ("o_proj", "down_proj", "embed"))
    stack = (None,) * (leaf.ndim - 2)
    return P(*stack, *(("tp", "fsdp") if rows else ("fsdp", "tp")))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on `[batch, tokens, heads, dim]`."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 1e4 ** (-jnp.arange(half) / half))
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """Causal attention of `[batch, tokens, heads, dim]`; query heads share key heads.

    The scores are written out in float32.  Queries start at position `first`.
    """
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * q.shape[-1] ** -0.5
    position = first + jnp.arange(q.shape[1])
    seen = position[:, None] >= jnp.arange(k.shape[1])
    scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return y.reshape(*y.shape[:2], -1)


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> jax.Array:
    """`attend` with the scores of one block of queries at a time, backward as well.

    Each block meets all keys, those behind the mask too: a flash kernel does half.
    """
    body = jax.checkpoint(lambda x: attend(x[1], k, v, x[0]), prevent_cse=False)
    y = jax.lax.map(body, (jnp.arange(0, q.shape[1], block), _blocks(q, block)))
    return jnp.moveaxis(y, 0, 1).reshape(*q.shape[:2], -1)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """`[batch, tokens, ...]` to `[blocks, batch, block, ...]`."""
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


class Layer(nn.Module):
    """Attention, `block` queries at a time, and a gated MLP, each after an RMSNorm."""

    sizes: Sizes
    constrain: Constrain = anywhere
    block: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """`[batch, tokens, d]` to the same shape, and nothing to stack."""
        sizes, at, dim = self.sizes, self.constrain, self.sizes.d // self.sizes.heads

        def dense(x: jax.Array, out: int, name: str) -> jax.Array:
            return nn.Dense(out, use_bias=False, name=name, **DTYPES)(x)

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            y = dense(x, count * dim, name).reshape(*x.shape[:2], count, dim)
            return at(y, "heads" if name == "q_proj" else "kv_heads")

        h = at(nn.RMSNorm(name="attention_norm", **DTYPES)(x), "normed")
        q = rotate(heads(h, sizes.heads, "q_proj"))
        k = rotate(heads(h, sizes.kv_heads, "k_proj"))
        v = heads(h, sizes.kv_heads, "v_proj")
        in_blocks = functools.partial(attend_in_blocks, block=self.block)
        y = (in_blocks if self.block else attend)(q, k, v)
        x = at(x + dense(at(y, "ff"), sizes.d, "o_proj"), "stream")
        h = at(nn.RMSNorm(name="mlp_norm", **DTYPES)(x), "normed")
        gate, up = dense(h, sizes.ff, "gate_proj"), dense(h, sizes.ff, "up_proj")
        h = nn.silu(at(gate, "ff")) * at(up, "ff")
        return at(x + dense(h, sizes.d, "down_proj"), "stream"), None


class Head(nn.Module):
    """Logits, or the loss without ever having all logits at once."""

    sizes: Sizes
    constrain: Constrain = anywhere

    def setup(self) -> None:
        shape, init = (self.sizes.d, self.sizes.vocab), nn.initializers.lecun_normal()
        self.kernel = self.param("kernel", init, shape, DTYPES["param_dtype"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., d]` to `[..., vocab]`."""
        return x @ self.kernel

    def loss_in_blocks(self, x: jax.Array, ids: jax.Array, block: int) -> jax.Array:
        """`next_token_loss` by blocks of each sequence, the logits computed twice."""
        kernel = self.constrain(self.kernel, "head")
        labels = jnp.roll(ids, -1, axis=1)
        counts = jnp.ones(ids.shape, jnp.float32).at[:, -1].set(0)  # has no next token

        def body(inputs: Any) -> jax.Array:
            x, labels, counts = inputs
            logits = (x @ kernel).astype(jnp.float32)
            return jnp.sum(_entropy(logits, labels) * counts)

        body = jax.checkpoint(body, prevent_cse=False)
        blocks = (_blocks(value, block) for value in (x, labels, counts))
        return jnp.sum(jax.lax.map(body, tuple(blocks))) / jnp.sum(counts)


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy of `[batch, tokens, vocab]`."""
    return _entropy(logits[:, :-1].astype(jnp.float32), ids[:, 1:]).mean()


_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Llama(nn.Module):
    """The decoder.

    Attributes:
      sizes: of the model.
      variant: 'unrolled' or 'scan', with ', remat' or without.
      constrain: shards the activations.
      block: how many queries, or tokens of the head, are computed at a time; 0 for all.
    """

    sizes: Sizes
    variant: str = "unrolled"
    constrain: Constrain = anywhere
    block: int = 0

    def setup(self) -> None:
        sizes, layer = self.sizes, Layer
        if "remat" in self.variant:
            layer = nn.remat(Layer, prevent_cse="scan" not in self.variant)
        if "scan" in self.variant:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            stack = nn.scan(layer, length=sizes.layers, **axes)
            self.layers = [stack(sizes, self.constrain, self.block)]
        else:
            layer = functools.partial(layer, sizes, self.constrain, self.block)
            self.layers = [layer() for _ in range(sizes.layers)]
        self.embed = nn.Embed(sizes.vocab, sizes.d, **DTYPES)
        self.norm = nn.RMSNorm(**DTYPES)
        if not sizes.tied:
            self.lm_head = Head(sizes, self.constrain)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[batch, tokens]` to the loss."""
        return self.loss(self.constrain(self.embed(ids), "stream"), ids)

    def loss(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """The next tokens' cross-entropy, from embedded tokens `[batch, tokens, d]`."""
        for layer in self.layers:
            x, _ = layer(x, None)
        x = self.constrain(self.norm(x), "normed")
        if self.block and not self.sizes.tied:
            return self.lm_head.loss_in_blocks(x, ids, self.block)
        logits = self.embed.attend(x) if self.sizes.tied else self.lm_head(x)
        return next_token_loss(logits, ids)
