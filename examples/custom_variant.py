"""A variant of your own in twenty lines: LoRA-XS, whose only trained part is r x r.

ΔW = scale A R B: A and B come from the largest singular values of W and are frozen; R
`[r, r]` is zero at the start and trains.  A layer of any width has r² trained
parameters.

    python examples/custom_variant.py

References: Bałazy et al. 2024. https://arxiv.org/abs/2405.17604
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flora
from flora.variants import Product


@dataclasses.dataclass(frozen=True)
class LoraXS:
    """ΔW = scale A R B, of which R alone trains."""

    frozen = ("a", "b")

    def start(self, key: Any, weight: flora.LoraWeight) -> flora.LoraWeight:
        layout, rank = weight.layout, weight.rank
        w = weight.base.transpose(layout.order)
        w = w.reshape(layout.matrix(weight.base.shape))
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        a = (u[..., :rank] * s[:, None, :rank]).reshape(weight.a.shape)
        b = v[:, :rank].reshape(weight.b.shape)
        zero = jnp.zeros((*weight.a.shape[: len(layout.stack)], rank, rank))
        return dataclasses.replace(weight, a=a, b=b, extra={"r": zero})

    def product(self, weight: flora.LoraWeight) -> Product:
        stack, a = len(weight.layout.stack), weight.a
        flat = a.reshape(*a.shape[:stack], -1, weight.rank)
        return Product((flat @ weight.extra["r"]).reshape(a.shape), weight.b)


def main(steps: int = 200) -> dict[str, Any]:
    """Fits a shifted task with 2 x 16 numbers; returns the losses and the table."""
    model = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(10)])
    x = jax.random.normal(jax.random.key(0), (256, 16))
    params = model.init(jax.random.key(1), x)
    y = model.apply(params, x @ (jnp.eye(16) + 0.3 * jnp.eye(16, k=1)))

    config = flora.LoraConfig(rank=4, alpha=4, target="kernel", variant=LoraXS())
    adapted = flora.init(jax.random.key(2), config, model.apply, params, x)
    apply, tx = flora.lora(model.apply), flora.optimizer(optax.adam(1e-2), adapted)

    @jax.jit
    def step(adapted: Any, state: Any) -> Any:
        def loss(tree: Any) -> jax.Array:
            return jnp.mean((apply(tree, x) - y) ** 2)

        value, grads = flora.value_and_grad(loss)(adapted)
        updates, state = tx.update(grads, state, adapted)
        return flora.apply_updates(adapted, updates), state, value

    state, losses = tx.init(adapted), []
    for _ in range(steps):
        adapted, state, value = step(adapted, state)
        losses.append(float(value))
    gap = apply(adapted, x) - model.apply(flora.merge(adapted), x)
    return {
        "losses": losses,
        "trained": flora.summary(adapted).trained,
        "merge_error": float(jnp.abs(gap).max()),
    }


if __name__ == "__main__":
    results = main()
    first, last = results["losses"][0], results["losses"][-1]
    print(f"{results['trained']} trained parameters: loss {first:.4f} -> {last:.4f}")
    print(f"merged model differs by {results['merge_error']:.1e}")
