"""What the experiments share: grids in one program, training, intervals, exponents.

A trial is one seed: it makes its own weights, data and start, and runs every arm and
learning rate of the grid at once.  Trials are mapped over seeds, so an experiment is
one compiled program per shape.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import flora


def seeds(count: int) -> jax.Array:
    """The keys of the repetitions; "rbg" compiles in a third of threefry's time."""
    return jax.random.split(jax.random.key(2106_09685, impl="rbg"), count)


def rates(low: float, high: float, count: int) -> tuple[float, ...]:
    """Learning rates from low to high, evenly in logarithms."""
    steps = np.linspace(np.log10(low), np.log10(high), count)
    return tuple(float(f"{10**x:.6g}") for x in steps)


def over_seeds(trial: Callable, count: int, *, at_once: int | None = None) -> Any:
    """`trial(key)` for each seed, compiled once; arrays `[seeds, ...]`.

    Args:
      trial: one repetition.
      count: how many.
      at_once: how many of them are vmapped together; all by default.  Fewer take less
        memory.
    """
    if at_once is None:
        mapped = jax.vmap(trial)
    else:
        batch = at_once if at_once > 1 else None
        mapped = functools.partial(jax.lax.map, trial, batch_size=batch)
    return jax.tree.map(np.asarray, jax.jit(mapped)(seeds(count)))


def grid(fn: Callable, *axes: Any) -> Any:
    """`fn` at every combination of the axes (trees of arrays), the first outermost."""
    for i in reversed(range(len(axes))):
        fn = jax.vmap(fn, [0 if j == i else None for j in range(len(axes))])
    return fn(*axes)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of the same structure as one, an axis of arms in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def starts(
    key: Any, config: flora.LoraConfig, inits: Sequence[Any], fn: Callable, *args: Any
) -> tuple[Any, Any]:
    """The base, and the adapters of the initialisers stacked along their first axis.

    Args:
      key: as `flora.init` takes it.
      config: all but how factors start.
      inits: the initialisers.
      fn: the function to adapt.
      *args: the parameter tree and the function's other arguments.
    """
    configs = [dataclasses.replace(config, init=init) for init in inits]
    parts = [flora.split(flora.init(key, c, fn, *args)) for c in configs]
    return parts[0][0], stacked([adapter for _, adapter in parts])


def on_factors(fn: Callable, adapter: Any) -> Any:
    """`fn(node)` on each `LoraWeight` of an adapter; other leaves stay."""

    def is_weight(x: Any) -> bool:
        return isinstance(x, flora.LoraWeight)

    return jax.tree.map(
        lambda x: fn(x) if is_weight(x) else x, adapter, is_leaf=is_weight
    )


def scaled(adapter: Any, scale: Any) -> Any:
    """The adapter whose B is `scale` times as large.

    Where it is joined inside the loss, with alpha = rank, this is LoRA of that scale:
    the gradients of A and of the unscaled B are those of W + scale A B.  It makes
    scales an axis of one program, since `alpha` is static.
    """
    return on_factors(lambda w: dataclasses.replace(w, b=scale * w.b), adapter)


def two_rates(inner: Callable, lr_a: Any, lr_b: Any) -> optax.GradientTransformation:
    """`inner(lr_a)` on A and `inner(lr_b)` on B: a rate of 0 freezes a factor."""

    def labels(adapter: Any) -> Any:
        return on_factors(lambda w: dataclasses.replace(w, a="a", b="b"), adapter)

    return optax.multi_transform({"a": inner(lr_a), "b": inner(lr_b)}, labels)


def adam_to_zero(peak: Any, steps: int) -> optax.GradientTransformation:
    """Adam whose rate falls from its peak to zero along a cosine."""
    falls = optax.cosine_decay_schedule(1.0, steps)
    return optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(falls), optax.scale(-peak)
    )


def train(
    loss: Callable,
    params: Any,
    tx: optax.GradientTransformation,
    steps: int,
    measure: Callable[[Any, Any], Any] = lambda params, grads: (),
) -> tuple[Any, jax.Array, Any]:
    """Trains by one scan.

    Args:
      loss: `loss(params, step)`, a scalar.
      params: where it starts.
      tx: the optimizer.
      steps: how many.
      measure: `measure(params, grads)` before each step.

    Returns:
      The trained params, losses `[steps]` before each step, measurements
      `[steps, ...]`.
    """

    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, i)
        updates, state = tx.update(grads, state, params)
        seen = value, measure(params, grads)
        return (optax.apply_updates(params, updates), state), seen

    start = params, tx.init(params)
    (params, _), (losses, seen) = jax.lax.scan(step, start, jnp.arange(steps))
    return params, losses, seen


def norm(tree: Any) -> jax.Array:
    """The root of the sum of all squares."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def rms(x: Any) -> jax.Array:
    """The root of the mean square."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (Student's t over seeds)."""

    mean: float
    low: float
    high: float


def interval(values: Any, *, log: bool = False) -> Interval:
    """Over the seeds `[seeds]`; of logarithms, as losses need it, with `log`."""
    x = np.asarray(values, np.float64)
    if log:
        x = np.log(np.maximum(x, 1e-300))
    if not np.isfinite(x).all():
        return Interval(math.nan, math.nan, math.nan)
    half = stats.sem(x) * stats.t.ppf(0.975, len(x) - 1) if np.ptp(x) else 0.0
    ends = (x.mean(), x.mean() - half, x.mean() + half)
    return Interval(*(float(np.exp(v) if log else v) for v in ends))


def cells(name: str, values: Any, *, log: bool = False) -> dict[str, float]:
    """Three columns of a row: the mean over seeds and the ends of its interval."""
    got = interval(values, log=log)
    return {name: got.mean, f"{name}_low": got.low, f"{name}_high": got.high}


def exponent(sizes: Sequence[float], values: Any) -> np.ndarray:
    """P of values ~ size^p by least squares, for each seed: `[sizes, seeds]`."""
    logs = np.log(np.maximum(np.asarray(values, np.float64), 1e-300))
    return np.polyfit(np.log(np.asarray(sizes, np.float64)), logs, 1)[0]


def final(losses: Any, share: float = 0.1) -> np.ndarray:
    """The mean of the last steps, `[..., steps]`; infinite where it diverged."""
    tail = np.asarray(losses)[..., -max(1, int(share * losses.shape[-1])) :]
    with np.errstate(over="ignore", invalid="ignore"):
        mean = tail.mean(axis=-1, dtype=np.float64)
    return np.where(np.isfinite(mean), mean, np.inf)


def best(losses: Any) -> int:
    """Which learning rate has the least geometric mean over seeds: `[rates, seeds]`."""
    with np.errstate(divide="ignore"):
        return int(np.argmin(np.log(np.maximum(losses, 1e-300)).mean(axis=1)))


def rate_cells(grid: Any, k: int) -> dict[str, Any]:
    """The columns that say which rate was best, and whether the grid ends there."""
    return {"rate": float(grid[k]), "edge": "edge" if k in (0, len(grid) - 1) else ""}


def own_best(grid: Any, losses: Any) -> np.ndarray:
    """Each seed's own best rate `[seeds]`, between grid points: `[rates, seeds]`.

    The minimum of the parabola through the best point and its neighbours, in
    logarithms.
    """
    x, found = np.log(np.asarray(grid, np.float64)), []
    for y in np.log(np.maximum(np.asarray(losses, np.float64), 1e-300)).T:
        k = int(np.argmin(y))
        shift = 0.0
        if 0 < k < len(x) - 1 and np.isfinite(y[k - 1 : k + 2]).all():
            left, mid, right = y[k - 1 : k + 2]
            bend = left - 2 * mid + right
            shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
        found.append(np.exp(x[k] + shift * (x[1] - x[0])))
    return np.asarray(found)
