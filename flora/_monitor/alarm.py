"""Whether a loss oscillates at the start of a run, and whether it falls fast."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.errors import LoraError


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What `alarm` found: a pytree of arrays `[]`; `str` makes it a sentence.

    Attributes:
      fall: (start - end)/|start|, the share of the loss that has gone.
      oscillation: the loss's roughness over |start - end|.
      oscillates: whether oscillation is above its threshold.
      slow: whether fall is below its threshold.
      rises: whether the end is above the start by more than the roughness.
      finite: whether all losses are finite numbers.
    """

    fall: Any
    oscillation: Any
    oscillates: Any
    slow: Any
    rises: Any
    finite: Any

    @property
    def any(self) -> Any:
        """Whether anything is wrong."""
        return self.oscillates | self.slow | self.rises | ~self.finite

    def __str__(self) -> str:
        if not self.finite:
            return "The loss is not finite: lower the learning rate, or warm up."
        numbers = f"fall {self.fall:.2g}, oscillation {self.oscillation:.2g}"
        if self.rises:
            return f"The loss rises ({numbers}): lower the learning rate, or warm up."
        if self.oscillates:
            also = "" if self.slow else ", though it falls"
            return (
                f"The loss oscillates{also} ({numbers}): lower the learning rate or "
                "alpha, warm up, or use larger batches."
            )
        if self.slow:
            return (
                f"The loss falls slowly ({numbers}): raise the learning rate, alpha or "
                "rank."
            )
        return f"No alarm ({numbers})."


jax.tree_util.register_dataclass(
    Alarm, [field.name for field in dataclasses.fields(Alarm)], []
)


def alarm(
    losses: Any,
    *,
    window: int = 5,
    max_oscillation: float = 0.3,
    min_fall: float = 0.1,
) -> Alarm:
    """Whether a loss oscillates at the start of training, and whether it falls fast.

    fall = (start - end)/|start| and oscillation = roughness/|start - end|, where
    start is the first loss or the mean of the first `window`, whichever is lower; end
    is the mean of the last `window`; and roughness is √(mean (ℓₜ₊₁ - 2ℓₜ + ℓₜ₋₁)²/6),
    which is the standard deviation of white noise and 0 for a straight line.

    The thresholds are for the first 100 steps.  They were set on a small classifier
    with LoRA and Adam on full batches, at learning rates from 1e-4 to 10 (a test
    repeats it): from 1e-3 to 1e-1, around the best one of 3e-2, the loss fell by 0.27
    or more and oscillated by 0.03 or less; below it fell by 0.06 or less, above it
    oscillated by 0.4 or more.  Noise of small batches counts as oscillation, and a loss
    that starts near its floor falls slowly: measure both on one fixed batch, or choose
    other thresholds.

    Args:
      losses: `[steps]`, at least 2 · window + 1; map over more runs with `jax.vmap`.
      window: steps to average at both ends.
      max_oscillation: above it, the loss oscillates.
      min_fall: below it, the loss falls slowly.

    Returns:
      An `Alarm`; prints as what was seen and what to change.

    Raises:
      LoraError: losses are not `[steps]` or too few, or window is no int of at least 1.

    Example:
      >>> import jax.numpy as jnp, flora.monitor
      >>> t = jnp.arange(100.0)
      >>> print(flora.monitor.alarm(2 * 0.98**t))
      No alarm (fall 0.85, oscillation 0.0001).
      >>> print(flora.monitor.alarm(2 * 0.98**t + (-1) ** t))
      ... # doctest: +NORMALIZE_WHITESPACE
      The loss oscillates, though it falls (fall 0.96, oscillation 0.8): lower the
      learning rate or alpha, warm up, or use larger batches.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise LoraError(f"alarm: window={window!r}. Write an int of at least 1.")
    x = jnp.asarray(losses)
    if x.ndim != 1 or x.shape[0] < 2 * window + 1:
        raise LoraError(
            f"alarm: losses have shape {tuple(x.shape)}; expected (steps,) with at "
            f"least {2 * window + 1} steps for window={window}. Pass a longer history, "
            "or map over runs with jax.vmap."
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start = jnp.minimum(x[0], x[:window].mean())
    net = start - x[-window:].mean()
    bends = x[2:] - 2 * x[1:-1] + x[:-2]
    rough = jnp.sqrt(jnp.mean(bends**2) / 6)
    size = jnp.abs(net)
    oscillation = jnp.where(rough > 0, rough / size, 0)
    fall = jnp.where(net == 0, 0, net / jnp.abs(start))
    return Alarm(
        fall=fall,
        oscillation=oscillation,
        oscillates=oscillation > max_oscillation,
        slow=fall < min_fall,
        rises=-net > rough,
        finite=jnp.isfinite(x).all(),
    )
