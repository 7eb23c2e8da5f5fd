"""A plain NNX loop of a decoder, as in Flax's own lm1b example: all weights train.

`examples/howto/nnx.md` shows the three lines that make it LoRA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Block(nnx.Module):
    """Attention and an MLP, each with its norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=width, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, width]` to the same."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Blocks in a scan, rematerialized, and tied embeddings."""

    def __init__(self, *, vocab: int = 64, width: int = 32, layers: int = 2):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocab, width, rngs=rngs)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(width, rngs=rngs)

        self.blocks = blocks(rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[batch, length]` to logits `[batch, length, vocab]`."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return self.embed.attend(self.norm(run(self.blocks, self.embed(tokens))))


def main(steps: int = 100) -> dict[str, Any]:
    """Trains on sequences in which each token follows from the one before."""
    start = jax.random.randint(jax.random.key(1), (16, 1), 0, 64)
    tokens = jnp.concatenate(
        [(start * 5**i + (5**i - 1) // 4) % 64 for i in range(9)], 1
    )

    model = Decoder()
    wrt = nnx.Param
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=wrt)

    def loss_fn(model, tokens):
        logits, labels = model(tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def train_step(model, optimizer, tokens):
        grad_fn = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))
        loss, grads = grad_fn(model, tokens)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer, tokens)) for _ in range(steps)]
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return {"model": model, "losses": losses}


if __name__ == "__main__":
    main()
