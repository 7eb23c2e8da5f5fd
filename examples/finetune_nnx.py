"""LoRA on an NNX model: digits learned upright, then turned by 90 degrees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flora


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def pretrain(x: jax.Array, y: jax.Array, steps: int) -> nnx.Module:
    """A small MLP, built and trained in plain NNX."""
    sizes, rngs = ((64, 128), (128, 128), (128, 10)), nnx.Rngs(0)
    first, second, head = (nnx.Linear(*size, rngs=rngs) for size in sizes)
    model = nnx.Sequential(first, nnx.relu, second, nnx.relu, head)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: cross_entropy(model(x), y))(model)
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)
    return model


def main(steps: int = 200) -> dict[str, float]:
    """Pretrains on upright digits, adapts to turned ones, merges."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels / 8 - 1
    turned = np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    parts = train_test_split(images, turned, labels, random_state=0)
    upright, _, x, x_test, y, y_test = map(jnp.asarray, parts)
    graphdef, state = nnx.split(pretrain(upright, y, steps))

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    config = flora.LoraConfig(rank=4, alpha=8, exclude="layers/4/*")  # the head
    adapted = flora.init(jax.random.key(1), config, fn, state, x)
    apply, tx = flora.lora(fn), flora.optimizer(optax.adam(1e-2), adapted)
    before, opt_state = apply(adapted, x_test), tx.init(adapted)

    @jax.jit
    def step(adapted, opt_state):
        loss = flora.value_and_grad(lambda a: cross_entropy(apply(a, x), y))
        _, grads = loss(adapted)
        updates, opt_state = tx.update(grads, opt_state, adapted)
        return optax.apply_updates(adapted, updates), opt_state

    for _ in range(steps):
        adapted, opt_state = step(adapted, opt_state)
    # Accelerators may round float32 products to fewer bits, unless told not to.
    with jax.default_matmul_precision("highest"):
        after, merged = apply(adapted, x_test), fn(flora.merge(adapted), x_test)
    error = float(abs(merged - after).max() / abs(after).max())
    if not error <= 1e-5:  # NaN fails too
        raise RuntimeError(f"Merging moves the logits by {error:.1e} of max|y|.")
    old, new = (float((out.argmax(-1) == y_test).mean()) for out in (before, after))
    print(flora.summary(adapted))
    print(f"accuracy on turned digits: {old:.1%} before, {new:.1%} after")
    print(f"merging moves the logits by {error:.1e} of max|y|")
    return {"before": old, "after": new, "merge_error": error}


if __name__ == "__main__":
    main()
