"""One base, eight adapters, and a stream of requests for different adapters.

A small decoder with a cache (random weights; only speed and correctness are looked at)
answers a stream of requests: a prompt each, from which tokens are generated greedily.
Every request names an adapter or the base.  Four ways to serve the same stream:

- mixed: rows of one batch meet different adapters (`flora.multi.lora`);
- one adapter at a time: the requests of each adapter are a batch of their own;
- merged per request: W + scale A B is formed for each request, which then runs alone;
- base alone: one batch without adapters, the lower bound for every way to serve.

What "mixed" generates is then checked, token by token, against the plain model on the
weights that `flora.merge` makes for each request.

    python examples/serve_many.py
"""

import argparse
import functools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import flora
import flora.multi

ADAPTERS, BASE = 8, -1
Cache = tuple[jax.Array, jax.Array]


class Layer(nn.Module):
    """Attention over a cache and a gated MLP, each after an RMSNorm."""

    heads: int
    ff: int

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, at: jax.Array):
        """`x` is `[batch, tokens, d]`, from position `at`.

        The caches are `[batch, length, heads, dim]`.
        """
        d, length = x.shape[-1], keys.shape[1]
        dim = d // self.heads

        def heads(h: jax.Array, name: str) -> jax.Array:
            y = nn.Dense(d, use_bias=False, name=name)(h)
            return y.reshape(*h.shape[:2], self.heads, dim)

        h = nn.RMSNorm()(x)
        q = heads(h, "q")
        keys = jax.lax.dynamic_update_slice(keys, heads(h, "k"), (0, at, 0, 0))
        values = jax.lax.dynamic_update_slice(values, heads(h, "v"), (0, at, 0, 0))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys) * dim**-0.5
        seen = at + jnp.arange(x.shape[1])[:, None] >= jnp.arange(length)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(x.shape)
        x = x + nn.Dense(d, use_bias=False, name="o")(y)
        h = nn.RMSNorm()(x)
        gate, up = (
            nn.Dense(self.ff, use_bias=False, name=n)(h) for n in ("gate", "up")
        )
        down = nn.Dense(d, use_bias=False, name="down")(nn.silu(gate) * up)
        return x + down, (keys, values)


class Decoder(nn.Module):
    """Learned positions, scanned layers, a head."""

    d: int = 512
    ff: int = 1408
    layers: int = 3
    heads: int = 8
    vocab: int = 512
    length: int = 24

    @nn.compact
    def __call__(self, ids: jax.Array, cache: Cache, at: jax.Array):
        """`ids` `[batch, tokens]` from position `at` on; returns logits and the cache.

        The caches are `[batch, layers, length, heads, dim]`.
        """
        position = self.param(
            "position", nn.initializers.normal(0.02), (self.length, self.d)
        )
        rows = jax.lax.dynamic_slice_in_dim(position, at, ids.shape[1])
        x = nn.Embed(self.vocab, self.d)(ids) + rows
        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(1, 1, nn.broadcast),  # pyright: ignore
            out_axes=1,
            length=self.layers,
        )
        x, cache = stack(self.heads, self.ff, name="layers")(x, *cache, at)
        return nn.Dense(self.vocab, name="head")(nn.RMSNorm()(x)), cache

    def empty(self, batch: int) -> Cache:
        """A cache with nothing in it."""
        shape = batch, self.layers, self.length, self.heads, self.d // self.heads
        return jnp.zeros(shape), jnp.zeros(shape)


def generate(run: Callable, model: Decoder, prompts: jax.Array) -> tuple[Any, Any]:
    """Greedy tokens `[batch, steps]` and their logits `[batch, steps, vocab]`."""
    batch, start = prompts.shape
    logits, cache = run(prompts, model.empty(batch), jnp.int32(0))

    def step(carry: Any, at: jax.Array) -> Any:
        logits, cache = carry
        token = logits.argmax(-1)
        new, cache = run(token[:, None], cache, at)
        return (new[:, 0], cache), (token, logits)

    steps = jnp.arange(start, model.length)
    _, (tokens, logits) = jax.lax.scan(step, (logits[:, -1], cache), steps)
    return tokens.swapaxes(0, 1), logits.swapaxes(0, 1)


def make_adapters(model: Decoder, params: Any, seed: int) -> list[Any]:
    """Adapters of ranks 2, 4 and 8, with B random as if they were trained."""
    call = jnp.zeros((1, 2), jnp.int32), model.empty(1), jnp.int32(0)
    made = []
    for n in range(ADAPTERS):
        config = flora.LoraConfig(rank=(2, 4, 8)[n % 3], alpha=8, exclude="head/*")
        key = jax.random.fold_in(jax.random.key(seed), n)
        adapted = flora.init(key, config, model.apply, params, *call)
        _, adapter = flora.split(adapted)
        made.append(jax.tree.map(functools.partial(_drawn, key), adapter))
    return made


def _drawn(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape) / 16


class Server:
    """The ways to serve, each compiled once."""

    def __init__(self, model: Decoder, params: Any, adapters: list[Any], method: str):
        self.model, self.params = model, params
        self.stacked = flora.multi.stack(adapters)
        mixed = flora.multi.lora(model.apply, method=method)
        single, plain = flora.lora(model.apply), model.apply

        @jax.jit
        def of_rows(params: Any, stacked: Any, ids: Any, prompts: Any) -> Any:
            return generate(
                functools.partial(mixed, params, stacked, ids), model, prompts
            )

        @jax.jit
        def of_one(params: Any, stacked: Any, i: Any, prompts: Any) -> Any:
            tree = flora.join(params, flora.multi.select(stacked, i))
            return generate(functools.partial(single, tree), model, prompts)

        @jax.jit
        def of_plain(params: Any, prompts: Any) -> Any:
            return generate(functools.partial(plain, params), model, prompts)

        @jax.jit
        def merge(params: Any, stacked: Any, i: Any) -> Any:
            return flora.merge(flora.join(params, flora.multi.select(stacked, i)))

        self.of_rows, self.of_one, self.of_plain = of_rows, of_one, of_plain
        self.merge = merge

    def mixed(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """All requests in one batch."""
        return self.of_rows(self.params, self.stacked, jnp.asarray(ids), prompts)

    def grouped(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """A batch for each adapter, padded to one size, so that nothing recompiles."""
        groups = [np.flatnonzero(ids == i) for i in range(BASE, ADAPTERS)]
        size = max(map(len, groups))
        done = []
        for i, rows in zip(range(BASE, ADAPTERS), groups, strict=True):
            if len(rows):
                padded = np.resize(rows, size)
                done.append(self.of_one(self.params, self.stacked, i, prompts[padded]))
        return done

    def merged(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """One request after the other."""
        return [
            self.of_plain(self.tree(i), prompts[n : n + 1]) for n, i in enumerate(ids)
        ]

    def base(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """One batch, without adapters."""
        return self.of_plain(self.params, prompts)

    def tree(self, i: int) -> Any:
        """The plain weights of a request."""
        return self.params if i == BASE else self.merge(self.params, self.stacked, i)


def check(server: Server, ids: np.ndarray, prompts: jax.Array) -> float:
    """The largest error against the merged model, on prompt and answer at once."""
    model, (tokens, logits) = server.model, server.mixed(ids, prompts)
    whole = jnp.concatenate([prompts, tokens], 1)

    @jax.jit
    def full(tree: Any, row: jax.Array) -> jax.Array:
        return model.apply(tree, row[None], model.empty(1), jnp.int32(0))[0][0]  # pyright: ignore

    worst, start = 0.0, prompts.shape[1]
    for n, i in enumerate(ids):
        wanted = full(server.tree(int(i)), whole[n])[start - 1 : -1]
        worst = max(worst, float(abs(wanted - logits[n]).max() / abs(wanted).max()))
        # A greedy token may differ only where two logits are equal within rounding.
        best = jnp.take_along_axis(wanted, tokens[n][:, None], 1)[:, 0]
        worst = max(worst, float((wanted.max(-1) - best).max() / abs(wanted).max()))
    if not worst <= 1e-4:  # NaN fails too
        raise RuntimeError(
            f"A mixed batch differs from the merged model by {worst:.1e}."
        )
    return worst


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way by round, in random order, after one round to compile."""
    order, generator = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: x[1:] for name, x in seconds.items()}


def table(seconds: dict[str, list[float]], tokens: int, title: str) -> Table:
    """Medians, and ratios within a round."""
    result = Table(title=title, title_justify="left")
    result.add_column("how")
    for name in ("s", "tokens/s", "to merged", "to base alone"):
        result.add_column(name, justify="right")
    for name, x in seconds.items():
        middle = statistics.median(x)
        ratios = [
            statistics.median(b / a for a, b in zip(x, seconds[other], strict=True))
            for other in ("merged per request", "base alone")
        ]
        cells = (
            f"{middle:.2f}",
            f"{tokens / middle:,.0f}",
            *(f"{r:.2f}" for r in ratios),
        )
        result.add_row(name, *cells)
    result.caption = (
        "Tokens/s as multiples of those of another row: medians over rounds."
    )
    result.caption_justify = "left"
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Serves, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--requests", type=int, default=27)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--method", default="auto", help="of flora.multi.lora")
    options = parser.parse_args(argv)
    model = Decoder(d=options.d, ff=options.d * 11 // 4, layers=options.layers)
    call = jnp.zeros((1, 2), jnp.int32), model.empty(1), jnp.int32(0)
    params = jax.jit(model.init)(jax.random.key(0), *call)
    adapters = make_adapters(model, params, 1)
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(options.requests) % (ADAPTERS + 1)) + BASE
    shape = options.requests, model.length // 3
    prompts = jnp.asarray(rng.integers(0, model.vocab, shape))
    server = Server(model, params, adapters, options.method)
    error = check(server, ids, prompts)
    arms = {
        "mixed": server.mixed,
        "one adapter at a time": server.grouped,
        "merged per request": server.merged,
        "base alone": server.base,
    }
    calls = {name: functools.partial(arm, ids, prompts) for name, arm in arms.items()}
    seconds = measure(calls, options.rounds)
    tokens = options.requests * (model.length - shape[1])
    count = sum(x.size for x in jax.tree.leaves(params))
    title = (
        f"{options.requests} requests for {ADAPTERS} adapters and the base, {shape[1]} "
        f"tokens in and {model.length - shape[1]} out each; "
        f"{count / 1e6:.1f} M parameters"
    )
    console = Console()
    console.print(table(seconds, tokens, title))
    console.print(f"mixed against flora.merge: {error:.1e} of max|logits|")
    versions = ", ".join(
        f"{x} {metadata.version(x)}" for x in ("jax", "jaxlib", "flax")
    )
    console.print(
        f"{versions} on {jax.default_backend()}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
    return {"error": error, "seconds": seconds}


if __name__ == "__main__":
    main()
