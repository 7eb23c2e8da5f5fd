"""Wall-clock of calls that share a machine with others."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]


def paired(
    calls: dict[str, Call], rounds: int, *, warmup: int = 3, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call, by round; a round is one of each, in random order.

    Other work on the machine slows all arms of a round alike, so the ratios within a
    round hold even where its times do not.

    Args:
      calls: what to time.  Each waits for its own result.
      rounds: how many are kept.
      warmup: rounds that are thrown away first.
      seed: of the order.
    """
    order, generator = list(calls), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: x[warmup:] for name, x in seconds.items()}


def ratio(seconds: dict[str, list[float]], arm: str, baseline: str) -> list[float]:
    """Quartiles over the rounds of the ratio of two arms: lower, median, upper."""
    pairs = zip(seconds[arm], seconds[baseline], strict=True)
    return statistics.quantiles((x / y for x, y in pairs), n=4, method="inclusive")


def blocking(fn: Callable, *args: Any) -> Call:
    """A call of a JAX function that waits for its outputs."""
    return lambda: jax.block_until_ready(fn(*args))


def summary(
    calls: dict[str, Call], rounds: int, baselines: Mapping[str, str]
) -> dict[str, Any]:
    """`{arm: {"ms", "to_frozen", "lower", "upper"}}`: medians, and quartiles of ratios.

    Args:
      calls: what to time, as `paired` takes it.
      rounds: of `paired`.
      baselines: for each arm the frozen one that its ratio is to.
    """
    seconds, found = paired(calls, rounds), {}
    for name, x in seconds.items():
        lower, median, upper = ratio(seconds, name, baselines[name])
        found[name] = {
            "ms": 1e3 * statistics.median(x),
            "to_frozen": median,
            "lower": lower,
            "upper": upper,
        }
    return found
