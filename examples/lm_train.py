"""The training step and the evaluation of a language model's adapter.

    loss = Σ weights · cross-entropy / Σ weights, over all micro-batches of a step

The base is a separate argument: it is neither donated nor differentiated, and the
optimizer has no state for it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from language_models.llama import Llama, nats_of

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
    model: Llama,
    tx: Any,
    places: tuple[Any, Any],
    *,
    dropout: bool,
    block: int,
    most: int = 0,
) -> Callable[..., Any]:
    """The step `(base, adapter, state, batches, key) -> adapter, state, loss, norm`.

    Batches are `{name: [accumulate, batch, tokens]}`; their gradients are summed in the
    adapter's dtype, one micro-batch at a time.  `places` is of `started`, and `most`
    of `most_trained`.
    """

    def summed(tree: Any, batch: Any) -> Any:
        return model.apply(tree, batch, block, most, method="loss")

    loss_of = flora.lora(summed)

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


class Scores(NamedTuple):
    """What held-out answers say of a model.

    Attributes:
      nats: the mean loss of a token that is trained on.
      exact: the share of answers that greedy decoding gives token by token, up to the
        token that ends them.
      choice: the share where, of the choices' first tokens, the right one is the
        likeliest; `None` without choices.
    """

    nats: float
    exact: float
    choice: float | None

    def __str__(self) -> str:
        choice = "" if self.choice is None else f"  choice {self.choice:.1%}"
        return f"{self.nats:.4f} nats  exact {self.exact:.1%}{choice}"


def evaluation(
    model: Llama,
    block: int,
    mesh: Mesh,
    *,
    stop: Sequence[int] = (),
    choices: Sequence[int] = (),
) -> Callable[..., Scores]:
    """`(base, adapter, rows, batch) -> Scores`, `batch` rows at a time.

    A segment is an answer; where an example is longer than a row, each part is one.

    Args:
      model: the decoder.
      block: as of `Llama.loss`.
      mesh: with the axis 'fsdp'.
      stop: tokens that end an answer.
      choices: the first tokens of the answers between which a chat is to decide.
    """
    among = jnp.array(choices or (0,))

    def guesses(logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        return {
            "nats": nats_of(logits, targets),
            "likeliest": jnp.argmax(logits, axis=-1),
            "choice": among[jnp.argmax(logits[..., among], axis=-1)],
        }

    def told(tree: Any, batch: Any, most: int) -> Any:
        args = guesses, batch, block, most
        return model.apply(tree, *args, method="of_logits")

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def summed(base: Any, adapter: Any, batch: Any, most: int, segments: int) -> Any:
        tree = flora.join(base, adapter)
        found, at = flora.lora(lambda tree, x: told(tree, x, most))(tree, batch)
        counts = _counts(found, at, segments, stop, choices)
        return jnp.sum(found["nats"] * at["weights"]), counts

    def evaluate(base: Any, adapter: Any, rows: Any, batch: int) -> Scores:
        most, segments = most_trained(rows), int(rows["segments"].max())
        nats, counts = 0.0, np.zeros(4)
        for part in _in_batches(rows, batch):
            found = summed(base, adapter, put(part, mesh), most, segments)
            nats, counts = nats + float(found[0]), counts + np.asarray(found[1])
        exact, answers, chosen, asked = (float(x) for x in counts)
        share = chosen / asked if asked else None
        return Scores(nats / float(rows["weights"].sum()), exact / answers, share)

    return evaluate


def _counts(
    found: Mapping[str, jax.Array],
    at: Mapping[str, jax.Array],
    segments: int,
    stop: Sequence[int],
    choices: Sequence[int],
) -> jax.Array:
    """How many answers are exact, of how many; how many choices are right, of these."""
    wanted = at["targets"]
    # After the token that ends an answer nothing more is decoded.
    counted = (at["weights"] > 0) & ~jnp.isin(at["ids"], jnp.array([-1, *stop]))
    wrong = counted & (found["likeliest"] != wanted)
    own = at["segments"][..., None] == jnp.arange(1, segments + 1)
    answers = jnp.any(own & counted[..., None], axis=1)
    exact = answers & ~jnp.any(own & wrong[..., None], axis=1)
    asked = counted & jnp.isin(wanted, jnp.array([-1, *choices]))
    right = asked & (found["choice"] == wanted)
    return jnp.stack([jnp.sum(x) for x in (exact, answers, right, asked)])


def most_trained(rows: Mapping[str, np.ndarray]) -> int:
    """A bound on the trained tokens of a row; 0 where few tokens would be left out."""
    most, length = int((rows["weights"] > 0).sum(axis=1).max()), rows["ids"].shape[1]
    most = -(-most // 8) * 8  # data of like kinds share a program
    return most if 2 * most <= length else 0


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
