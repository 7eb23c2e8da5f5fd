"""The figure of `flora.monitor.plot`; the only module that draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flora._monitor.alarm import alarm
from flora._tree.errors import LoraError

PANELS = {
    "norms": {"norm_a": "‖A‖", "norm_b": "‖B‖", "norm_delta": "‖ΔW‖"},
    "gradients": {"grad_a": "‖g_A‖", "grad_b": "‖g_B‖", "grad_delta": "of ΔW"},
    "rank of ΔW": {"effective_rank": "effective", "stable_rank": "stable"},
    "ΔW against W": {
        "relative": "‖ΔW‖/‖W‖",
        "overlap_in": "overlap, in",
        "overlap_out": "overlap, out",
    },
}
LOGARITHMIC = ("norms", "gradients")
COLORS = ("#0072B2", "#D55E00", "#009E73")


def draw(leaves: Mapping[str, Any], losses: Any, steps: Any) -> Any:
    """A panel for each group of measures that there is, and one for the loss."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoraError(
            "plot needs matplotlib. Write pip install 'flora-jax[examples]'."
        ) from error
    lines = {
        title: {label: _values(leaves, name) for name, label in names.items()}
        for title, names in PANELS.items()
    }
    lines = {
        title: {label: y for label, y in found.items() if y is not None}
        for title, found in lines.items()
    }
    titles = [title for title, found in lines.items() if found]
    count = len(titles) + (losses is not None)
    figure = Figure(figsize=(3.6 * count, 3.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=False):
        _panel(axis, title, lines[title], steps)
    if losses is not None:
        axes[-1].plot(np.asarray(losses), color=COLORS[0], linewidth=1)
        axes[-1].set(title="loss", xlabel="step")
        if len(losses) >= 11:
            first = str(alarm(np.asarray(losses)[:100])).split(" (")[0]
            axes[-1].set_title(f"loss, first 100 steps:\n{first}", fontsize=9)
    return figure


def _values(leaves: Mapping[str, Any], name: str) -> Any:
    """A measure of all leaves and stacked layers, `[time, n]`, or None."""
    found = [getattr(leaf, name) for leaf in leaves.values()]
    if any(x is None for x in found):
        return None
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in found], axis=1)


def _panel(axis: Any, title: str, lines: Mapping[str, Any], steps: Any) -> None:
    for color, (label, y) in zip(COLORS, lines.items(), strict=False):
        x = np.arange(len(y)) if steps is None else np.asarray(steps)
        axis.plot(x, np.median(y, axis=1), color=color, label=label)
        axis.fill_between(x, y.min(axis=1), y.max(axis=1), color=color, alpha=0.2)
    if title in LOGARITHMIC and all((y > 0).any() for y in lines.values()):
        axis.set_yscale("log")
    axis.set(title=title, xlabel="step")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
