"""k trainings at once against k one after the other: equal losses, compared times.

A sweep over learning rates and ranks on one base, a stack of gated MLPs.  "At once" is
`flora.multi.train_step`; "one by one" is the usual jitted step, k times.  A round times
each once, in random order, and the ratio is of one round.  The losses of both must
agree.

    python examples/benchmarks/many.py --runs 2,8
"""

import argparse
import dataclasses
import statistics
from typing import Any

import _report
import _timing
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import flora
import flora.multi


class Gated(nn.Module):
    """Gated MLPs with residuals."""

    ff: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[tokens, d]` to the same."""
        for _ in range(self.layers):
            gate, up = (nn.Dense(self.ff, use_bias=False)(x) for _ in range(2))
            x = x + nn.Dense(x.shape[-1], use_bias=False)(nn.silu(gate) * up)
        return x


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A base, and k adapters with a learning rate each."""

    model: Gated
    base: Any
    adapters: list[Any]
    rates: jax.Array
    x: jax.Array
    y: jax.Array

    def loss(self, adapted: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """The mean squared error."""
        return jnp.mean(jnp.square(flora.lora(self.model.apply)(adapted, x) - y))


def sweep(runs: int, tokens: int, d: int, layers: int) -> Sweep:
    """Ranks 4, 8 and 16 by turns, learning rates from 1e-4 to 1e-2."""
    model = Gated(d * 11 // 4, layers)
    x, y = jax.random.normal(jax.random.key(0), (2, tokens, d))
    params, made = model.init(jax.random.key(1), x), []
    for n in range(runs):
        config = flora.LoraConfig(rank=(4, 8, 16)[n % 3], alpha=16)
        key = jax.random.key(n)
        made.append(flora.split(flora.init(key, config, model.apply, params, x))[1])
    rates = jnp.asarray(np.geomspace(1e-4, 1e-2, runs), jnp.float32)
    return Sweep(model, params, made, rates, x, y)


def arms(s: Sweep) -> dict[str, Any]:
    """Each takes one step of all runs, and returns the k losses before it."""
    at_once = jax.jit(flora.multi.train_step(s.loss, optax.adam))
    held: dict[str, Any] = {"runs": flora.multi.start(s.adapters, optax.adam, s.rates)}
    tx = optax.inject_hyperparams(optax.adam)
    alone = [
        (a, tx(learning_rate=float(r)).init(a))  # pyright: ignore
        for a, r in zip(s.adapters, s.rates, strict=True)
    ]
    held["alone"] = alone

    @jax.jit
    def one(base: Any, adapter: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda a: s.loss(flora.join(base, a), x, y))(
            adapter
        )
        updates, state = tx(learning_rate=0.0).update(grads, state, adapter)  # pyright: ignore
        return optax.apply_updates(adapter, updates), state, value

    def step_at_once() -> list[float]:
        held["runs"], losses = at_once(s.base, held["runs"], s.x, s.y)
        return [float(x) for x in losses]

    def step_one_by_one() -> list[float]:
        done = [one(s.base, *pair, s.x, s.y) for pair in held["alone"]]
        held["alone"] = [(adapter, state) for adapter, state, _ in done]
        return [float(x) for _, _, x in done]

    return {"at once": step_at_once, "one by one": step_one_by_one}


def measure(s: Sweep, rounds: int) -> dict[str, Any]:
    """Seconds, ratios and the largest relative difference of losses."""
    losses: dict[str, list[list[float]]] = {}

    def kept(name: str, call: Any) -> Any:
        return lambda: losses.setdefault(name, []).append(call())

    calls = {name: kept(name, call) for name, call in arms(s).items()}
    seconds = _timing.paired(calls, rounds)
    many, alone = (np.array(losses[name]) for name in ("at once", "one by one"))
    differ = float(np.max(np.abs(many - alone) / np.abs(alone)))
    if not differ <= 1e-4:  # NaN fails too
        raise RuntimeError(f"The losses differ by {differ:.1e}.")
    if not (many[-1] < many[0]).all():
        raise RuntimeError(f"Some loss does not fall: {many[0]} to {many[-1]}.")
    ratio = _timing.ratio(seconds, "one by one", "at once")
    return {"seconds": seconds, "ratio": ratio, "differ": differ}


def main(argv: list[str] | None = None) -> dict[int, dict[str, Any]]:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", default="2,8", help="k, several separated by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(argv)
    found: dict[int, dict[str, Any]] = {}
    for runs in map(int, options.runs.split(",")):
        s = sweep(runs, options.tokens, options.d, options.layers)
        found[runs] = measure(s, options.rounds)

    def row(x: dict[str, Any]) -> list[str]:
        lower, middle, upper = x["ratio"]
        ms = [f"{1e3 * statistics.median(t):.1f}" for t in x["seconds"].values()]
        return [
            *ms,
            f"{middle:.2f}",
            f"{lower:.2f} to {upper:.2f}",
            f"{x['differ']:.0e}",
        ]

    title = (
        f"A step of k runs: {options.layers} gated MLPs, d {options.d}, "
        f"{options.tokens} tokens, ranks 4 to 16"
    )
    columns = (
        "k",
        "at once, ms",
        "one by one, ms",
        "times faster",
        "quartiles",
        "losses differ",
    )
    rows = [(str(k), row(x)) for k, x in found.items()]
    console = Console()
    console.print(_report.table(title, columns, rows))
    console.print(_report.versions("optax"))
    return found


if __name__ == "__main__":
    main()
