"""Training only the adapter: mask, optimizer, value_and_grad.

    tx = flora.optimizer(optax.adamw(1e-4), adapted)
    loss, grads = flora.value_and_grad(loss_fn)(adapted, x)

Three pairs of gradients and optimizers take the same steps:

    flora.value_and_grad(loss)(adapted)     flora.optimizer(tx, adapted)
    jax.grad(loss)(adapted)                 that, or optax.masked(tx, flora.mask)
    jax.grad(lambda adapter: loss(flora.join(base, adapter)))(adapter)     tx
"""

from flora._train.optimizer import mask, optimizer, value_and_grad

__all__ = ["mask", "optimizer", "value_and_grad"]
