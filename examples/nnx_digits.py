"""A plain NNX loop, as in Flax's own MNIST example: all weights train.

`examples/howto/nnx.md` shows the three lines that make it LoRA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits


class CNN(nnx.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear1 = nnx.Linear(128, 64, rngs=rngs)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv2(x))), (2, 2), strides=(2, 2))
        x = nnx.relu(self.linear1(self.dropout(x.reshape(len(x), -1))))
        return self.linear2(x)


def main(steps: int = 100) -> dict[str, Any]:
    """Trains on scikit-learn's digits."""
    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    labels = jnp.asarray(labels)

    model = CNN(rngs=nnx.Rngs(0))
    wrt = nnx.Param
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=wrt)
    model.train()

    def loss_fn(model, x, y):
        logits = model(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), logits

    @nnx.jit
    def train_step(model, optimizer, x, y):
        grad_fn = nnx.value_and_grad(
            loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=True
        )
        (loss, _), grads = grad_fn(model, x, y)
        optimizer.update(model, grads)
        return loss

    losses = []
    for step in range(steps):
        at = (jnp.arange(128) + 128 * step) % len(images)
        losses.append(float(train_step(model, optimizer, images[at], labels[at])))
    model.eval()
    accuracy = float((model(images).argmax(-1) == labels).mean())
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, accuracy {accuracy:.1%}")
    return {"model": model, "losses": losses, "accuracy": accuracy}


if __name__ == "__main__":
    main()
