"""Training only the adapter: mask, optimizer, value_and_grad.

tx = flora.optimizer(optax.adamw(1e-4), adapted)
loss, grads = flora.value_and_grad(loss_fn)(adapted, x)
"""

from flora._train.optimizer import mask, optimizer, value_and_grad

__all__ = ["mask", "optimizer", "value_and_grad"]
