"""The network and the task of experiments 1 and 8, at any width.

y = relu(relu(x V) (W + scale A B)) u, of which A and B train.  The task is the same at
every width: the network's own output plus a fixed smaller network's.
"""

from typing import Any

import _study as study
import jax
import jax.numpy as jnp

INPUTS = 16


def network(params: Any, x: jax.Array) -> jax.Array:
    """`[n, 16]` to `[n]`."""
    h = jax.nn.relu(x @ params["in"])
    return jax.nn.relu(h @ params["hidden"]) @ params["out"]


def problem(key: Any, width: int, batch: int) -> tuple[Any, Any]:
    """Weights, and `sample(step)`: fresh inputs `[batch, 16]` and wanted outputs."""
    keys = jax.random.split(key, 6)

    def normal(k: Any, shape: tuple[int, ...], variance: float) -> jax.Array:
        return jax.random.normal(k, shape) * variance**0.5

    params = {
        "in": normal(keys[0], (INPUTS, width), 2 / INPUTS),
        "hidden": normal(keys[1], (width, width), 2 / width),
        "out": normal(keys[2], (width,), 1 / width),
    }
    inner, outer = normal(keys[3], (INPUTS, 8), 1 / INPUTS), normal(keys[4], (8,), 1)

    def change(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ inner) @ outer

    size = study.rms(change(normal(keys[5], (1024, INPUTS), 1)))

    def sample(step: Any) -> tuple[jax.Array, jax.Array]:
        x = normal(jax.random.fold_in(keys[5], step), (batch, INPUTS), 1)
        return x, network(params, x) + change(x) / size

    return params, sample
