"""Training only the adapter: value_and_grad, optimizer, apply_updates, mask.

    tx = flora.optimizer(optax.adamw(1e-4), adapted)
    loss, grads = flora.value_and_grad(loss_fn)(adapted, x)
    updates, state = tx.update(grads, state, adapted)
    adapted = flora.apply_updates(adapted, updates)

Three pairs of gradients and optimizers take the same steps:

    flora.value_and_grad(loss)(adapted)     flora.optimizer(tx, adapted)
    jax.grad(loss)(adapted)                 that, or optax.masked(tx, flora.mask)
    jax.grad(lambda adapter: loss(flora.join(base, adapter)))(adapter)     tx
"""

from flora._train.apply import apply_updates
from flora._train.optimizer import eval_params, mask, optimizer, value_and_grad

__all__ = ["apply_updates", "eval_params", "mask", "optimizer", "value_and_grad"]
