"""A small vision transformer on scikit-learn's digits, pretrained and then moved.

The old task is digits as they are; the new one is the same digits turned by 90 degrees.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import _study as study
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import flora

ATTENTION, MLP = "attention/*/kernel", "mlp_*/kernel"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model, how it is pretrained, and the grid of the new task."""

    width: int = 32
    depth: int = 2
    pretrain_steps: int = 400
    pretrain_rate: float = 3e-3
    steps: int = 150
    batch: int = 64
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(3e-4, 1e-1, 8)


class Transformer(nn.Module):
    """Patches of 4 by 4 pixels, pre-norm blocks of four heads, mean, head."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[n, 8, 8]` to logits `[n, 10]`."""
        x = images.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16)
        x = nn.Dense(self.width, name="patch")(x)
        x = x + self.param("position", nn.initializers.normal(0.02), (4, self.width))
        for i in range(self.depth):
            h = nn.LayerNorm(name=f"norm_{i}a")(x)
            x = x + nn.MultiHeadDotProductAttention(4, name=f"block_{i}/attention")(h)
            h = nn.LayerNorm(name=f"norm_{i}b")(x)
            h = nn.gelu(nn.Dense(4 * self.width, name=f"block_{i}/mlp_up")(h))
            x = x + nn.Dense(self.width, name=f"block_{i}/mlp_down")(h)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


@dataclasses.dataclass(frozen=True)
class Task:
    """Images `[n, 8, 8]` and labels `[n]`, to train on and held out."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


@functools.cache
def tasks() -> tuple[Task, Task]:
    """Upright digits and turned ones: 1,197 to train on, 600 held out."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray((digits.images[order] / 8 - 1).astype(np.float32))
    y = jnp.asarray(digits.target[order].astype(np.int32))
    turned = jnp.rot90(x, axes=(1, 2))
    cut = 1197
    return (
        Task(x[:cut], y[:cut], x[cut:], y[cut:]),
        Task(turned[:cut], y[:cut], turned[cut:], y[cut:]),
    )


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The share that is right."""
    return (logits.argmax(-1) == y).mean()


def loss_on(logits: Callable, task: Task, key: Any, batch: int) -> Callable:
    """`loss(params, step)` on the minibatch of that step; `logits(params, x)`."""

    def loss(params: Any, step: Any) -> jax.Array:
        own = jax.random.fold_in(key, step)
        chosen = jax.random.randint(own, (batch,), 0, len(task.y))
        return cross_entropy(logits(params, task.x[chosen]), task.y[chosen])

    return loss


def pretrained(sizes: Sizes) -> Any:
    """Variables of a model for each seed, `[seeds, ...]`, trained upright."""
    model, (upright, _) = Transformer(sizes.width, sizes.depth), tasks()

    def one(key: Any) -> Any:
        key, own = jax.random.split(key)
        loss = loss_on(model.apply, upright, own, sizes.batch)
        tx = study.adam_to_zero(sizes.pretrain_rate, sizes.pretrain_steps)
        variables = model.init(key, upright.x[:1])
        return study.train(loss, variables, tx, sizes.pretrain_steps)[0]

    return jax.jit(jax.vmap(one))(study.seeds(sizes.seeds))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune: `start(key, variables) -> (trained, logits)`.

    `logits(trained, x)` closes over what is frozen.
    """

    name: str
    start: Callable[[Any, Any], tuple[Any, Callable]]


def lora_arm(name: str, model: nn.Module, config: flora.LoraConfig) -> Arm:
    """A and B of flora."""

    def start(key: Any, variables: Any) -> tuple[Any, Callable]:
        x = jnp.zeros((1, 8, 8))
        adapted = flora.init(key, config, model.apply, variables, x)
        base, adapter = flora.split(adapted)
        apply = flora.lora(model.apply)
        return adapter, lambda adapter, x: apply(flora.join(base, adapter), x)

    return Arm(name, start)


def full_arm(model: nn.Module) -> Arm:
    """Everything."""
    return Arm("full", lambda key, variables: (variables, model.apply))


def fine_tune(arm: Arm, variables: Any, sizes: Sizes) -> dict[str, np.ndarray]:
    """Each measure `[rates, seeds]` after training on the turned digits."""
    upright, turned = tasks()

    def run(rate: Any, pair: Any) -> Any:
        key, variables = pair
        key, own = jax.random.split(key)
        trained, logits = arm.start(key, variables)
        loss = loss_on(logits, turned, own, sizes.batch)
        tx = study.adam_to_zero(rate, sizes.steps)
        trained, losses, _ = study.train(loss, trained, tx, sizes.steps)
        new = logits(trained, turned.x_test)
        old = logits(trained, upright.x_test)
        return {
            "training_loss": losses[-max(1, sizes.steps // 10) :].mean(),
            "test_loss": cross_entropy(new, turned.y_test),
            "new_accuracy": accuracy(new, turned.y_test),
            "old_accuracy": accuracy(old, upright.y_test),
        }

    pairs = study.seeds(sizes.seeds), variables
    grid = jax.jit(lambda pairs, rates: study.grid(run, rates, pairs))
    found = grid(pairs, jnp.asarray(sizes.rates))
    found = jax.tree.map(np.asarray, found)
    return found | {
        k: np.where(np.isfinite(found[k]), found[k], np.inf)
        for k in ("training_loss", "test_loss")
    }


def parameters(arm: Arm, variables: Any) -> int:
    """How many numbers it trains."""
    one = jax.tree.map(lambda x: x[0], variables)
    trained = jax.eval_shape(lambda v: arm.start(jax.random.key(0), v)[0], one)
    return sum(x.size for x in jax.tree.leaves(trained))
