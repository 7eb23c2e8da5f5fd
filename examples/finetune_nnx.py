"""LoRA on an NNX model with batch norm and dropout, in train mode.

Digits are learned upright, then turned by 90 degrees.  `nnx.split` parts the model into
parameters, which flora adapts, and the rest: running statistics, PRNG keys and their
counts.  The rest is an argument of the step that comes back changed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flora


class Net(nnx.Module):
    """A small MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Pixels `[batch, 64]` to logits `[batch, 10]`."""
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(self.dropout(nnx.relu(self.second(x))))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def pretrain(x: jax.Array, y: jax.Array, steps: int) -> Net:
    """The model, built and trained in plain NNX."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: cross_entropy(model(x), y))(model)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
    return model


def changed(before: Any, after: Any) -> list[str]:
    """The leaves of the rest that training changed."""

    def path(keys: Any) -> str:
        return jax.tree_util.keystr(keys[:-1], simple=True, separator="/")

    pairs = jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after)
    return [path(k) for (k, x), y in zip(*pairs, strict=True) if (x != y).any()]


def main(steps: int = 200) -> dict[str, Any]:
    """Pretrains on upright digits, adapts to turned ones, merges."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels / 8 - 1
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    parts = train_test_split(images, turned, labels, random_state=0)
    upright, _, x, x_test, y, y_test = map(jnp.asarray, parts)
    model = pretrain(upright, y, steps)
    model.train()  # the mode is a part of the graph
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        logits = model(x)
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    config = flora.LoraConfig(rank=4, alpha=8, exclude="head/*")
    adapted = flora.init(jax.random.key(1), config, forward, params, rest, x)
    apply, tx = flora.lora(forward), flora.optimizer(optax.adamw(1e-2), adapted)

    @jax.jit
    def step(adapted, rest, opt_state):
        def loss_fn(adapted):
            logits, new_rest = apply(adapted, rest, x)
            return cross_entropy(logits, y), new_rest

        (_, new_rest), grads = flora.value_and_grad(loss_fn, has_aux=True)(adapted)
        updates, opt_state = tx.update(grads, opt_state, adapted)
        return flora.apply_updates(adapted, updates), new_rest, opt_state

    model.eval()
    eval_graphdef = nnx.graphdef(model)

    def evaluate(params, rest, x):
        return nnx.merge(eval_graphdef, params, rest)(x)

    adapted_evaluate = flora.lora(evaluate)
    before, opt_state = adapted_evaluate(adapted, rest, x_test), tx.init(adapted)
    trained, new_rest = adapted, rest
    for _ in range(steps):
        trained, new_rest, opt_state = step(trained, new_rest, opt_state)
    # Accelerators may round float32 products to fewer bits, unless told not to.
    with jax.default_matmul_precision("highest"):
        after = adapted_evaluate(trained, new_rest, x_test)
        merged = nnx.merge(eval_graphdef, flora.merge(trained), new_rest)(x_test)
    error = float(abs(merged - after).max() / abs(after).max())
    if not error <= 1e-5:  # NaN fails too
        raise RuntimeError(f"Merging moves the logits by {error:.1e} of max|y|.")
    old, new = (float((out.argmax(-1) == y_test).mean()) for out in (before, after))
    moved = changed(rest, new_rest)
    print(flora.summary(trained))
    print(f"accuracy on turned digits: {old:.1%} before, {new:.1%} after")
    print(f"changed besides the adapter: {', '.join(moved)}")
    print(f"merging moves the logits by {error:.1e} of max|y|")
    return {"before": old, "after": new, "merge_error": error, "changed": moved}


if __name__ == "__main__":
    main()
