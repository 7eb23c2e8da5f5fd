"""Measurements of the factors while they train, and an alarm for the loss.

    subspaces = flora.monitor.reference(adapted)    # once, before training
    report = flora.monitor.measure(adapted, grads, reference=subspaces)    # in the step
    log(report.floats())                            # {'q/kernel/norm_delta': 0.3}
    print(flora.monitor.alarm(losses[:100]))
    flora.monitor.plot(reports, losses).savefig("run.png")

All but `reference`, `merge_error` and `plot` are meant for use inside `jax.jit`.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from flora._algebra.dense import delta, materialize
from flora._monitor.alarm import Alarm, alarm
from flora._monitor.measures import (
    Measures,
    Report,
    Subspace,
    factors_of,
    measure,
    ratio,
)
from flora._monitor.plot import draw
from flora._tree.arrays import compute_dtype
from flora._tree.checks import weight_problems
from flora._tree.errors import LoraTypeError, fail
from flora._tree.matrices import matrices
from flora._tree.quantized import dequantized
from flora._tree.weight import LoraWeight

__all__ = [
    "Alarm",
    "Measures",
    "Report",
    "Subspace",
    "alarm",
    "measure",
    "merge_error",
    "plot",
    "reference",
]


def reference(adapted: Any, k: int = 8) -> dict[str, Subspace]:
    """The norm and k leading singular directions of each adapted weight.

    Decomposes every W in full, one leaf at a time.  Call it once, outside of the step,
    and again after a `flora.recipes.restart`.

    Args:
      adapted: an adapted tree with its base.
      k: how many directions; at most the smaller side of the smallest matrix.

    Returns:
      `{path: Subspace}`.

    Raises:
      LoraError: no leaf has factors, a leaf has no base, or k is out of range.

    Example:
      >>> import jax.numpy as jnp, flora, flora.monitor
      >>> q = flora.LoraWeight(jnp.eye(4), jnp.ones((4, 1)), jnp.ones((1, 4)))
      >>> found = flora.monitor.reference({"q": q}, k=2)
      >>> float(found["q"].norm), found["q"].in_.shape
      (2.0, (4, 2))
    """
    factors = _with_bases(adapted, "reference")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise LoraTypeError(f"reference: k={k!r}. Write an int of at least 1.")
    sizes = {path: x.layout.matrix(x.base.shape)[1:] for path, x in factors.items()}
    smallest = min(map(min, sizes.values()))
    fail(
        f"reference: '{path}' is a matrix of {in_}×{out}; k={k} is above "
        f"{min(in_, out)}. Write k={smallest}."
        for path, (in_, out) in sizes.items()
        if k > min(in_, out)
    )
    return {path: _subspace(x, k) for path, x in factors.items()}


def _with_bases(adapted: Any, verb: str) -> dict[str, LoraWeight]:
    factors = factors_of(adapted, verb)
    fail(
        f"{verb}: {p}" for path, x in factors.items() for p in weight_problems(path, x)
    )
    return factors


def _subspace(x: LoraWeight, k: int) -> Subspace:
    stack = x.layout.sizes(x.base.shape)[0]
    w = matrices(dequantized(x.base), x.layout)
    w = w.reshape(*stack, *w.shape[1:])
    u, s, vt = jnp.linalg.svd(w.astype(compute_dtype(w.dtype)), full_matrices=False)
    norm = jnp.linalg.norm(s, axis=-1)
    return Subspace(norm, u[..., :k], jnp.swapaxes(vt, -1, -2)[..., :k])


def merge_error(adapted: Any) -> dict[str, jax.Array]:
    """What `flora.merge` and `flora.recipes.restart` lose by rounding, for each leaf.

    ‖(round(W + ΔW) - W) - ΔW‖_F/‖ΔW‖_F: 0 means that nothing
    is lost, 1 that as much is lost as ΔW has.  Forms the dense ΔW.

    Raises:
      LoraError: no leaf has factors, or one has no base.

    Example:
      In bfloat16, 1 + 2⁻¹⁰ is 1:

      >>> import jax.numpy as jnp, flora, flora.monitor
      >>> w = jnp.ones((4, 4), jnp.bfloat16)
      >>> q = flora.LoraWeight(w, jnp.full((4, 1), 2.0**-10), jnp.ones((1, 4)))
      >>> float(flora.monitor.merge_error({"q": q})["q"])
      1.0
    """

    def error(x: LoraWeight) -> jax.Array:
        change = delta(x)
        before, after = dequantized(x.base), materialize(x)
        kept = after.astype(change.dtype) - before.astype(change.dtype)
        return ratio(jnp.linalg.norm(kept - change), jnp.linalg.norm(change))

    return {path: error(x) for path, x in _with_bases(adapted, "merge_error").items()}


def plot(
    reports: Report | Sequence[Report],
    losses: chex.Array | Sequence[float] | None = None,
    *,
    steps: chex.Array | Sequence[float] | None = None,
) -> Any:
    """A figure of a run: norms, gradients, ranks, overlaps and the loss over time.

    Each line is the median over leaves and stacked layers, the band around it their
    range.

    Args:
      reports: one for each time, or one `Report` of arrays `[time, *stack]`, as
        `jax.lax.scan` stacks them.
      losses: `[steps]`, drawn in a panel of its own with its `alarm` as title.
      steps: `[time]`, the step of each report; 0, 1, 2, … by default.

    Returns:
      A `matplotlib.figure.Figure`, to be saved by its `savefig`.

    Raises:
      LoraError: matplotlib is not installed, or there is no report.

    Example:
      >>> import jax.numpy as jnp, flora, flora.monitor
      >>> adapter = {"q": flora.LoraWeight(None, jnp.ones((4, 1)), jnp.ones((1, 9)))}
      >>> figure = flora.monitor.plot([flora.monitor.measure(adapter)] * 3)
      >>> [axis.get_title() for axis in figure.axes]
      ['norms', 'rank of ΔW']
    """
    if not isinstance(reports, Report):
        reports = list(reports)
        if not reports or not all(isinstance(r, Report) for r in reports):
            raise LoraTypeError(
                "plot: expected reports that flora.monitor.measure returned, at least "
                "one."
            )
        reports = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(reports))
    return draw(jax.device_get(reports).leaves, losses, steps)
