"""10,000 steps: one trace, one compiled program, and a base that keeps every bit.

Weight decay is on.  The base has weights of several dtypes with zeros of both signs,
subnormal numbers and NaN among them, integers, a count and a PRNG key.

    python examples/benchmarks/long_run.py --steps 10000
"""

from typing import Any

import _report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import monitoring
from rich.table import Table

import flora

ADAMW = optax.adamw(1e-2, weight_decay=0.1)
ARMS = {"adamw": ADAMW, "MultiSteps of 4": optax.MultiSteps(ADAMW, 4)}
COMPILED = "/jax/core/compile/backend_compile_duration"


def base(d: int) -> dict[str, Any]:
    """A model's leaves, and some that it never reads."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(4, d, d)) / d**0.5).astype(np.float32)
    w[:, 0, :4] = -0.0, 0.0, 1e-45, -1e-45
    odd = np.arange(2**16, dtype=np.uint16)  # every bit pattern there is
    return {
        "layers": [jnp.asarray(w[0]), jnp.asarray(w[1], jnp.bfloat16)],
        "half": jnp.asarray(w[2], jnp.float16),
        "codes": jnp.asarray(np.clip(40 * w[3], -127, 127), jnp.int8),
        "head": jnp.zeros((d, 8)),
        "odd": [jnp.asarray(odd.view(t)) for t in (jnp.bfloat16, jnp.float16)],
        "float8": jnp.asarray(odd[:256].astype(np.uint8).view(jnp.float8_e4m3fn)),
        "count": jnp.uint32(3),
        "key": jax.random.key(0),
    }


def model(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """`[tokens, d]` to `[tokens, 8]`."""
    for w in params["layers"]:
        x = jnp.tanh(x @ w.astype(jnp.float32))
    x = jnp.tanh(x.astype(jnp.float16) @ params["half"]).astype(jnp.float32)
    return (x + x @ (params["codes"] / 40.0)) @ params["head"]


def bits(tree: Any) -> list[bytes]:
    """The bytes of each leaf."""

    def data(x: Any) -> Any:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return [np.asarray(data(x)).tobytes() for x in jax.tree.leaves(tree)]


def differ(a: bytes, b: bytes) -> int:
    """How many bytes are others."""
    return sum(x != y for x, y in zip(a, b, strict=True))


def train(tx: Any, steps: int, d: int) -> dict[str, float]:
    """Takes the steps; what was traced, compiled and changed meanwhile."""
    config = flora.LoraConfig(rank=4, target=["layers/*", "half"], train="head")
    x = jax.random.normal(jax.random.key(1), (16, d))
    adapted = flora.init(jax.random.key(2), config, model, base(d), x)
    before = bits(flora.split(adapted)[0])
    apply, tx = flora.lora(model), flora.optimizer(tx, adapted)
    wanted, traces = jnp.sin(jnp.arange(8.0)), []

    @jax.jit
    def step(adapted, state, count):
        traces.append(1)
        x = jax.random.normal(jax.random.key(count), (16, d))
        loss = flora.value_and_grad(
            lambda tree: jnp.mean((apply(tree, x) - wanted * x[:, :1]) ** 2)
        )
        value, grads = loss(adapted)
        updates, state = tx.update(grads, state, adapted)
        return flora.apply_updates(adapted, updates), state, count + 1, value

    state, count, losses = tx.init(adapted), jnp.int32(0), []
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        compiled.extend([event] * (event == COMPILED))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(steps):
            adapted, state, count, value = step(adapted, state, count)
            losses.append(value)
    finally:
        monitoring.unregister_event_duration_listener(listen)
    after = bits(flora.split(adapted)[0])
    return {
        "steps": steps,
        "traces": len(traces),
        "programs": len(compiled),
        "base_bytes": sum(map(len, before)),
        "changed_bytes": sum(map(differ, before, after)),
        "first": float(np.mean([float(x) for x in losses[: steps // 10]])),
        "last": float(np.mean([float(x) for x in losses[-steps // 10 :]])),
    }


def measure(steps: int = 10_000, d: int = 32) -> dict[str, dict[str, float]]:
    """Each arm's run."""
    return {name: train(tx, steps, d) for name, tx in ARMS.items()}


def table(results: dict[str, dict[str, float]]) -> Table:
    """One row an arm."""
    names = ("steps", "traces", "programs", "base_bytes", "changed_bytes")
    columns = ("arm", "steps", "traces", "programs", "base, bytes", "changed", "loss")
    rows = [
        (arm, [*(f"{x[k]:,}" for k in names), f"{x['first']:.3f} → {x['last']:.3f}"])
        for arm, x in results.items()
    ]
    return _report.table("Many steps, weight decay on", columns, rows)


if __name__ == "__main__":
    _report.run(__doc__ or "", {"steps": 10_000, "d": 32}, measure, table)
