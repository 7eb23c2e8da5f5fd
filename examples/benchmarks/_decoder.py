"""A Llama-style decoder in plain Linen and bfloat16, and its sharding on a mesh.

RMSNorm, rotary positions, grouped-query attention under a causal mask, a gated MLP and
a cross-entropy loss.  It knows nothing of flora.

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Ainslie et al. 2023 (grouped queries). https://arxiv.org/abs/2305.13245
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DTYPES: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

Constrain = Callable[[jax.Array, str], jax.Array]


ATTENTION = ("written", "flash", "cudnn", "none")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the decoder and its input."""

    layers: int = 8
    sequences: int = 2
    tokens: int = 4096
    d: int = 2048
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 0  # 0 is d / heads
    ff: int = 5632
    vocab: int = 32000
    rank: int = 16
    tied: bool = False

    @property
    def dim(self) -> int:
        """Of a head."""
        return self.head_dim or self.d // self.heads

    @property
    def ids(self) -> jax.ShapeDtypeStruct:
        """The tokens, `[sequences, tokens of each]`."""
        shape = self.sequences, self.tokens // self.sequences
        return jax.ShapeDtypeStruct(shape, jnp.int32)


# Widths of models that people train.  Five of six layers of Gemma 4 have these heads,
# the sixth 4 key heads of 512 (https://github.com/google-deepmind/gemma, 4.0.1).
LIKE = {
    "8b": Sizes(32, d=4096, heads=32, kv_heads=8, ff=14336, vocab=128256),
    "70b": Sizes(80, d=8192, heads=64, kv_heads=8, ff=28672, vocab=128256),
    "gemma4-31b": Sizes(
        60, d=5376, heads=32, kv_heads=16, head_dim=256, ff=21504, vocab=262144
    ),
}


def sizes_like(name: str, **more: Any) -> Sizes:
    """Four layers of that width on 2 x 4096 tokens."""
    return dataclasses.replace(LIKE[name], **{"layers": 4, "tokens": 8192, **more})


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
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array | int = 0,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of `[batch, tokens, heads, dim]`; query heads share key heads.

    The scores are written out in float32.  Queries start at position `first`.  Where
    there are `segments` `[batch, tokens]`, a token sees its own alone.
    """
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * q.shape[-1] ** -0.5
    position = first + jnp.arange(q.shape[1])
    seen = position[:, None] >= jnp.arange(k.shape[1])
    if segments is not None:
        same = segments[:, :, None] == segments[:, None]
        seen = (seen & same)[:, None, None]
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


def attend_by_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by JAX's Pallas kernel for TPUs, which keeps no scores."""
    groups, dim = q.shape[2] // k.shape[2], q.shape[3]
    k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    y = flash_attention.flash_attention(q, k, v, causal=True, sm_scale=dim**-0.5)
    return jnp.moveaxis(y, 1, 2).reshape(*y.shape[::2], -1)


def attend_by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by cuDNN's kernel for NVIDIA GPUs, which keeps no scores."""
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return y.reshape(*y.shape[:2], -1)


def no_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Q sigmoid(k) + v, which reads and writes what a flash kernel does."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    return (q * nn.sigmoid(k) + v).reshape(*q.shape[:2], -1)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """`[batch, tokens, ...]` to `[blocks, batch, block, ...]`."""
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


class Layer(nn.Module):
    """Attention, `block` queries at a time, and a gated MLP, each after an RMSNorm."""

    sizes: Sizes
    constrain: Constrain = anywhere
    block: int = 0
    attention: str = "written"

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """`[batch, tokens, d]` to the same shape, and nothing to stack."""
        sizes, at, dim = self.sizes, self.constrain, self.sizes.dim

        def dense(x: jax.Array, out: int, name: str) -> jax.Array:
            return nn.Dense(out, use_bias=False, name=name, **DTYPES)(x)

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            y = dense(x, count * dim, name).reshape(*x.shape[:2], count, dim)
            return at(y, "heads" if name == "q_proj" else "kv_heads")

        h = at(nn.RMSNorm(name="attention_norm", **DTYPES)(x), "normed")
        q, k = heads(h, sizes.heads, "q_proj"), heads(h, sizes.kv_heads, "k_proj")
        v = heads(h, sizes.kv_heads, "v_proj")
        if self.attention == "none":
            y = no_attention(q, k, v)
        elif self.attention == "flash":
            y = attend_by_flash(rotate(q), rotate(k), v)
        elif self.attention == "cudnn":
            y = attend_by_cudnn(rotate(q), rotate(k), v)
        elif self.block:
            y = attend_in_blocks(rotate(q), rotate(k), v, self.block)
        else:
            y = attend(rotate(q), rotate(k), v, segments=segments)
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
      block: how many queries are computed at a time; 0 for all.
      attention: of `ATTENTION`.
      head: whether there are a norm, a head and a cross-entropy; else the loss is the
        mean of the squares of what the last layer returns.
      head_block: how many tokens of the head are computed at a time; 0 for all.
      policy: what remat keeps, of `jax.checkpoint_policies`.
      packed: whether token 0 begins another example, which sees none before it.
    """

    sizes: Sizes
    variant: str = "unrolled"
    constrain: Constrain = anywhere
    block: int = 0
    attention: str = "written"
    head: bool = True
    head_block: int = 0
    policy: Any = None
    packed: bool = False

    def setup(self) -> None:
        sizes, layer = self.sizes, Layer
        if "remat" in self.variant:
            once = "scan" not in self.variant
            layer = nn.remat(Layer, prevent_cse=once, policy=self.policy)
        args = sizes, self.constrain, self.block, self.attention
        if "scan" in self.variant:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            ins = {"in_axes": nn.broadcast, "length": sizes.layers}
            self.layers = [nn.scan(layer, **axes, **ins)(*args)]
        else:
            self.layers = [layer(*args) for _ in range(sizes.layers)]
        self.embed = nn.Embed(sizes.vocab, sizes.d, **DTYPES)
        self.norm = nn.RMSNorm(**DTYPES)
        if not sizes.tied:
            self.lm_head = Head(sizes, self.constrain)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[batch, tokens]` to the loss."""
        return self.loss(self.constrain(self.embed(ids), "stream"), ids)

    def loss(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """The next tokens' cross-entropy, from embedded tokens `[batch, tokens, d]`."""
        segments = jnp.cumsum(ids == 0, axis=1) if self.packed else None
        for layer in self.layers:
            x, _ = layer(x, segments)
        if not self.head:
            return jnp.mean(jnp.square(x.astype(jnp.float32)))
        x = self.constrain(self.norm(x), "normed")
        if self.head_block and not self.sizes.tied:
            return self.lm_head.loss_in_blocks(x, ids, self.head_block)
        logits = self.embed.attend(x) if self.sizes.tied else self.lm_head(x)
        return next_token_loss(logits, ids)
