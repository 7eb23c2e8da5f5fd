"""A decoder of the Llama family in Flax Linen, as HF's config.json describes it.

Llama 2 and 3, Mistral, Qwen 2 and Qwen 3: RMSNorm, rotary positions (HF's halves),
grouped queries, a gated MLP.  Parameters have HF's names, so that a checkpoint needs
transposing and nothing else.  It knows nothing of flora.

    model = Llama(LlamaConfig.from_hf(parsed), scan=True, remat="full")
    params = hf_llama.load(folder, model)

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Su et al. 2021 (rotary positions). https://arxiv.org/abs/2104.09864
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from language_models.llama_config import LlamaConfig, frequencies


class Cache(NamedTuple):
    """Keys and values `[layers, batch, slots, kv_heads, head_dim]`, and their tokens.

    `positions` and `segments` are `[batch, slots]`; segment -1 is an empty slot.
    `used` counts the slots that hold something.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array
    used: jax.Array


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache for so many tokens."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    kv = jnp.zeros((layers, batch, slots, heads, config.head_dim), dtype)
    none = jnp.full((batch, slots), -1, jnp.int32)
    return Cache(kv, kv, none, none, jnp.int32(0))


class Norm(nn.Module):
    """x / √(mean x² + eps) · weight, in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., dim]` to the same shape."""
        weight = self.param(
            "weight", nn.initializers.ones, x.shape[-1:], self.param_dtype
        )
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * weight.astype(self.dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`[batch, tokens, heads, dim]` turned by `[batch, tokens, dim/2]`, in float32."""
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return turned.astype(x.dtype)


class Step(NamedTuple):
    """What all layers share: angles `[batch, tokens, dim/2]`, mask, first free slot.

    The mask `[batch, tokens, slots]` says which keys each token sees.
    """

    angles: jax.Array
    mask: jax.Array
    used: jax.Array


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """`[batch, tokens, d]` to the same shape, and the layer's cache."""
        config, shape = self.config, (*x.shape[:2], -1, self.config.head_dim)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, count: int) -> jax.Array:
            size, bias = count * config.head_dim, config.qkv_bias
            y = nn.Dense(size, use_bias=bias, name=f"{name}_proj", **dtypes)(x)
            y = y.reshape(shape)
            if config.qk_norm and name != "v":
                y = Norm(config.rms_norm_eps, name=f"{name}_norm", **dtypes)(y)
            return y if name == "v" else rotate(y, step.angles)

        q = heads("q", config.num_attention_heads)
        k, v = (heads(name, config.num_key_value_heads) for name in "kv")
        if cache is not None:
            at = (0, step.used, 0, 0)
            k, v = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        y = jax.nn.dot_product_attention(q, k, v, mask=step.mask[:, None])
        y = y.reshape(*x.shape[:2], -1)
        out = nn.Dense(x.shape[-1], use_bias=config.o_bias, name="o_proj", **dtypes)
        return out(y), cache


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, tokens, d]` to the same shape."""

        def dense(size: int, name: str) -> nn.Dense:
            return nn.Dense(
                size,
                use_bias=self.config.mlp_bias,
                name=name,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

        size = self.config.intermediate_size
        h = nn.silu(dense(size, "gate_proj")(x)) * dense(size, "up_proj")(x)
        return dense(x.shape[-1], "down_proj")(h)


class Layer(nn.Module):
    """Attention and the MLP, each after a norm."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """`[batch, tokens, d]` to the same shape, and the layer's cache."""
        parts = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"eps": self.config.rms_norm_eps, **parts}
        h = Norm(name="input_layernorm", **norm)(x)
        y, cache = Attention(self.config, name="self_attn", **parts)(h, step, cache)
        x = x + y
        h = Norm(name="post_attention_layernorm", **norm)(x)
        return x + MLP(self.config, name="mlp", **parts)(h), cache


class Layers(nn.Module):
    """The layers, one by one; `nn.scan` runs `Layer` instead."""

    config: LlamaConfig
    layer: Any
    parts: Any

    @nn.compact
    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """As `Layer`; the caches are stacked."""
        new = []
        for i in range(self.config.num_hidden_layers):
            own = jax.tree.map(lambda c, i=i: c[i], cache)
            x, own = self.layer(self.config, name=str(i), **self.parts)(x, step, own)
            new.append(own)
        return x, jax.tree.map(lambda *c: jnp.stack(c), *new)


REMAT: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Body(nn.Module):
    """Embedding, layers, norm."""

    config: LlamaConfig
    scan: bool
    remat: str
    dtype: Any
    param_dtype: Any

    def setup(self) -> None:
        config, layer = self.config, Layer
        parts = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.remat != "none":
            policy = REMAT[self.remat]
            layer = nn.remat(Layer, prevent_cse=not self.scan, policy=policy)
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            ins = {"in_axes": (nn.broadcast, 0), "length": config.num_hidden_layers}
            self.layers = nn.scan(layer, **axes, **ins)(config, **parts)
        else:
            self.layers = Layers(config, layer, parts)
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, **parts)
        self.norm = Norm(config.rms_norm_eps, **parts)

    def __call__(
        self, ids: jax.Array, positions: Any, segments: Any, cache: Cache | None
    ) -> tuple[jax.Array, Any]:
        """Tokens `[batch, tokens]` to `[batch, tokens, d]`, and the cache with them."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if segments is None:
            segments = jnp.ones_like(ids)
        keys, used = (positions, segments), jnp.int32(0)
        if cache is not None:
            used, held = cache.used, (cache.positions, cache.segments)
            put = jax.lax.dynamic_update_slice
            keys = put(held[0], positions, (0, used)), put(held[1], segments, (0, used))
        angles = positions[..., None] * frequencies(self.config)
        step = Step(angles, self.visible(positions, segments, *keys), used)
        kv = None if cache is None else (cache.k, cache.v)
        x, kv = self.layers(self.embed_tokens(ids), step, kv)
        if kv is not None:
            cache = Cache(kv[0], kv[1], *keys, used + ids.shape[1])
        return self.norm(x), cache

    def visible(self, positions, segments, key_positions, key_segments) -> jax.Array:
        """Which keys a token sees: those of its own segment, and none after it."""
        ahead = positions[:, :, None] - key_positions[:, None]
        seen = (ahead >= 0) & (segments[:, :, None] == key_segments[:, None])
        if self.config.sliding_window is not None:
            seen &= ahead < self.config.sliding_window
        return seen


class Head(nn.Module):
    """The kernel that makes logits `[d, vocab]`."""

    config: LlamaConfig
    param_dtype: Any

    def setup(self) -> None:
        shape = self.config.hidden_size, self.config.vocab_size
        start = nn.initializers.lecun_normal()
        self.kernel = self.param("kernel", start, shape, self.param_dtype)


class Llama(nn.Module):
    """The decoder.

    Attributes:
      config: what it is.
      scan: whether the layers run in one `nn.scan`, over stacked weights.
      remat: 'none', 'full', or 'dots' (keeps the products of weights).
      dtype: of the computation; logits and losses are float32.
      param_dtype: of the weights.
    """

    config: LlamaConfig
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16

    def setup(self) -> None:
        parts = (self.scan, self.remat, self.dtype, self.param_dtype)
        self.model = Body(self.config, *parts)
        if not self.config.tie_word_embeddings:
            self.lm_head = Head(self.config, self.param_dtype)

    def __call__(
        self, ids: jax.Array, positions: Any = None, segments: Any = None
    ) -> jax.Array:
        """Tokens `[batch, tokens]` to logits `[batch, tokens, vocab]`.

        Args:
          ids: the tokens.
          positions: of each in its segment; 0, 1, ... unless told.
          segments: tokens see their own segment alone; all are one unless told.
        """
        return self._logits(self.model(ids, positions, segments, None)[0])

    def decode(
        self, ids: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """As a call, after the tokens that the cache holds; returns the cache too."""
        x, new = self.model(ids, positions, segments, cache)
        return self._logits(x), new

    def loss(
        self, batch: Mapping[str, jax.Array], block: int = 0, most: int = 0
    ) -> jax.Array:
        """The sum of weights · cross-entropy of the targets, in nats.

        Arguments as for `of_logits`.
        """
        nats, at = self.of_logits(nats_of, batch, block, most)
        return jnp.sum(nats * at["weights"])

    def of_logits(
        self,
        fn: Callable[[jax.Array, jax.Array], Any],
        batch: Mapping[str, jax.Array],
        block: int = 0,
        most: int = 0,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """`fn(logits, targets)`, token by token, and the batch of these tokens.

        Args:
          fn: gives trees of arrays `[batch, tokens]`.
          batch: 'ids', 'positions', 'segments', 'targets' and 'weights', each
            `[batch, tokens]`.
          block: how many tokens of each row have logits at a time; 0 for all.
          most: no row has more tokens of a weight, and the others have no logits; 0 for
            no such bound.
        """
        x, _ = self.model(batch["ids"], batch["positions"], batch["segments"], None)
        batch = dict(batch)
        if block:
            most = -(-most // block) * block
        if 0 < most < x.shape[1]:  # those with a weight come first
            at = jnp.argsort(batch["weights"] == 0, axis=1, stable=True)[:, :most]
            pick = jax.vmap(lambda y, i: y[i])
            x, batch = pick(x, at), {k: pick(y, at) for k, y in batch.items()}
        if not block or block >= x.shape[1]:
            return fn(self._logits(x), batch["targets"]), batch
        parts = jax.tree.map(lambda y: _blocks(y, block), (x, batch["targets"]))
        one = jax.checkpoint(
            lambda part: fn(self._logits(part[0]), part[1]), prevent_cse=False
        )
        found = jax.lax.map(one, parts)
        whole = jax.tree.map(
            lambda y: jnp.moveaxis(y, 0, 1).reshape(*x.shape[:2]), found
        )
        return whole, batch

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.config.tie_word_embeddings:
            kernel = self.model.embed_tokens.embedding.T
        else:
            kernel = self.lm_head.kernel
        kernel = kernel.astype(self.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def nats_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy of each token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """`[batch, tokens, ...]` to `[blocks, batch, block, ...]`."""
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)
