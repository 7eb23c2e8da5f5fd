"""Generates tokens for prompts of several lengths at once, over one cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from language_models.llama import Llama, empty_cache


def generator(
    model: Llama,
    transform: Callable[[Callable], Callable] = lambda fn: fn,
    *,
    new: int,
    stop: Sequence[int],
    temperature: float = 0.0,
    rounded: int = 64,
) -> Callable[..., list[list[int]]]:
    """A function `(params, prompts, key) -> tokens` that compiles once for its sizes.

    Args:
      model: the decoder.
      transform: around its `apply`, such as `flora.lora`.
      new: how many tokens at most.
      stop: tokens that end an answer; they are not in it.
      temperature: of the draw; 0 takes the likeliest token.
      rounded: prompts are padded to a multiple of that.
    """

    def decode(params: Any, *args: Any) -> Any:
        return model.apply(params, *args, method="decode")

    apply, ends = transform(decode), jnp.array([-1, *stop])

    def pick(logits: jax.Array, key: jax.Array) -> jax.Array:
        if not temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    @jax.jit
    def run(
        params: Any, ids: jax.Array, lengths: jax.Array, key: jax.Array
    ) -> jax.Array:
        batch, slots = ids.shape
        cache = empty_cache(model.config, batch, slots + new, model.dtype)
        places = jnp.broadcast_to(jnp.arange(slots), ids.shape)
        own = (places < lengths[:, None]).astype(jnp.int32)  # padding is segment 0
        logits, cache = apply(params, ids, places, own, cache)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        out = jnp.full((batch, new), -1, jnp.int32)

        def more(carry: Any) -> jax.Array:
            n, *_, done = carry
            return (n < new) & ~jnp.all(done)

        def step(carry: Any) -> Any:
            n, logits, cache, out, done = carry
            token = pick(logits, jax.random.fold_in(key, n))
            done |= jnp.isin(token, ends)
            out = out.at[:, n].set(jnp.where(done, -1, token))
            at = (lengths + n)[:, None]
            logits, cache = apply(params, token[:, None], at, jnp.ones_like(at), cache)
            return n + 1, logits[:, 0], cache, out, done

        done = jnp.zeros(batch, bool)
        return jax.lax.while_loop(more, step, (0, last, cache, out, done))[3]

    def generate(
        params: Any, prompts: Sequence[Sequence[int]], key: Any = None
    ) -> list[list[int]]:
        lengths = np.array([len(p) for p in prompts], np.int32)
        ids = np.zeros((len(prompts), -(-max(lengths) // rounded) * rounded), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        key = jax.random.key(0) if key is None else key
        out = np.asarray(run(params, jnp.asarray(ids), jnp.asarray(lengths), key))
        return [[int(t) for t in row if t >= 0] for row in out]

    return generate
