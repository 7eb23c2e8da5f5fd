"""The training step and the evaluation of a language model's adapter.

    loss = Σ weights · cross-entropy / Σ weights, over all micro-batches of a step

The base is a separate argument: it is neither donated nor differentiated, and the
optimizer has no state for it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from language_models.llama import Llama

import flora
import flora.sharding


def optimizer(
    *, peak: float, steps: int, warmup: int, clip: float, weight_decay: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipped gradients, a linear warm-up and a cosine down to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), peak / 10
    )
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw), schedule


def started(tx: optax.GradientTransformation, adapter: Any) -> tuple[Any, Any]:
    """The optimizer's state and all shardings; moments are sharded as A and B are."""
    places = flora.sharding.shardings(adapter)
    state = jax.eval_shape(tx.init, adapter)
    of_state = flora.sharding.of_state(state, adapter, places)
    return jax.jit(tx.init, out_shardings=of_state)(adapter), (places, of_state)


def step_function(
    model: Llama, tx: Any, places: tuple[Any, Any], *, dropout: bool, block: int
) -> Callable[..., Any]:
    """The step `(base, adapter, state, batches, key) -> adapter, state, loss, norm`.

    Batches are `{name: [accumulate, batch, tokens]}`; their gradients are summed in the
    adapter's dtype, one micro-batch at a time.  `places` is of `started`.
    """
    loss_of = _loss_function(model, block)

    def step(base: Any, adapter: Any, state: Any, batches: Any, key: Any) -> Any:
        total = jnp.maximum(jnp.sum(batches["weights"]), 1)
        count = len(batches["weights"])

        def micro(summed: Any, inputs: Any) -> Any:
            batch, own = inputs

            def loss(adapter: Any) -> jax.Array:
                tree = flora.join(base, adapter)
                tree = flora.with_dropout(tree, own) if dropout else tree
                return loss_of(tree, batch) / total

            value, grads = jax.value_and_grad(loss)(adapter)
            return jax.tree.map(jnp.add, summed, grads), value

        zeros = jax.tree.map(jnp.zeros_like, adapter)
        keys = jax.random.split(key, count)
        grads, values = jax.lax.scan(micro, zeros, (batches, keys))
        updates, state = tx.update(grads, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return adapter, state, jnp.sum(values), optax.tree.norm(grads)

    return jax.jit(step, donate_argnums=(1, 2), out_shardings=(*places, None, None))


def evaluation(model: Llama, block: int, mesh: Mesh) -> Callable[..., float]:
    """`(base, adapter, rows) -> the mean loss a token`, some rows at a time."""
    loss_of = _loss_function(model, block)

    @jax.jit
    def summed(base: Any, adapter: Any, batch: Any) -> jax.Array:
        return loss_of(flora.join(base, adapter), batch)

    def evaluate(base: Any, adapter: Any, rows: Any, batch: int) -> float:
        parts = [summed(base, adapter, put(x, mesh)) for x in _in_batches(rows, batch)]
        return float(sum(parts)) / float(rows["weights"].sum())

    return evaluate


def _loss_function(model: Llama, block: int) -> Callable[..., jax.Array]:
    return flora.lora(
        lambda tree, batch: model.apply(tree, batch, block, method="loss")
    )


def _in_batches(rows: Mapping[str, np.ndarray], batch: int) -> Iterator[Any]:
    """Batches of one size; rows that fill up the last one have weight 0."""
    for at in range(0, len(rows["ids"]), batch):
        part = {k: x[at : at + batch] for k, x in rows.items()}
        short = batch - len(part["ids"])
        yield {k: np.pad(x, ((0, short), (0, 0))) for k, x in part.items()}


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the mesh, its rows sharded over 'fsdp'."""
    ndim = next(iter(batch.values())).ndim
    place = NamedSharding(mesh, Spec(*[None] * (ndim - 2), "fsdp"))
    return {k: jax.device_put(x, place) for k, x in batch.items()}
