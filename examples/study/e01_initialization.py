"""Experiment 1: how A and B start, from width 128 to 8192.

Reversed, both random, both zero, against A random and B = 0: the gradients of the first
steps, and losses at each start's own best rate.  The network and its task:
`_teacher.py`.
"""

import dataclasses
import functools
from typing import Any

import _study as study
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _page import COLORS, Result, Text, label, panels
from _teacher import network, problem

import flora

ARMS = {
    "standard": flora.initializers.gaussian(),
    "reversed": flora.initializers.a_zero(),
    "both random": flora.initializers.both_random(),
    "both random, 0.1 std": flora.initializers.both_random(1 / 300),
    "both zero": flora.initializers.both_zero(),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths that train, widths whose first steps are looked at, and the grid."""

    trained: tuple[int, ...] = (128, 512, 2048)
    looked_at: tuple[int, ...] = (128, 512, 2048, 8192)
    steps: int = 150
    batch: int = 64
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(1e-5, 1e-1, 13)


FULL = Sizes()
SMOKE = Sizes((8, 16), (8, 16), steps=6, batch=8, seeds=2, rates=(1e-4, 1e-2, 1e-1))
FIRST_RATE = 1e-4  # at which the first steps are looked at
CONFIG = flora.LoraConfig(rank=4, alpha=4, target="hidden")


def trial(key: Any, width: int, steps: int, batch: int, rates: Any) -> Any:
    """Losses and what was measured before each step, `[rates, arms, steps]`."""
    key, own = jax.random.split(key)
    params, sample = problem(key, width, batch)
    x, _ = sample(0)
    base, adapters = study.starts(own, CONFIG, list(ARMS.values()), network, params, x)
    apply = flora.lora(network)

    def loss(adapter: Any, step: Any) -> jax.Array:
        x, wanted = sample(step)
        return jnp.mean(jnp.square(apply(flora.join(base, adapter), x) - wanted))

    def measure(adapter: Any, grads: Any) -> Any:
        node = grads["hidden"]
        return study.norm(node.a), study.norm(node.b)

    def run(rate: Any, adapter: Any) -> Any:
        moved = apply(flora.join(base, adapter), x) - network(params, x)
        _, losses, seen = study.train(loss, adapter, optax.adam(rate), steps, measure)
        return losses, study.rms(moved), *seen

    return study.grid(run, rates, adapters)


def first_steps(sizes: Sizes, runs: dict[int, Any]) -> list[dict]:
    """Gradients at steps 0, 1, 2 and how they grow with width."""
    grown: dict[str, list] = {}
    for n in sizes.looked_at:
        rates = list(sizes.rates) if n in sizes.trained else [FIRST_RATE]
        of_rate = rates.index(FIRST_RATE)
        _, moved, of_a, of_b = (x[:, of_rate] for x in runs[n])  # [seeds, arms, ...]
        grown.setdefault("output_moved", []).append(moved)
        for i in range(3):
            grown.setdefault(f"gradient_A_{i}", []).append(of_a[..., i])
            grown.setdefault(f"gradient_B_{i}", []).append(of_b[..., i])
    rows = []
    for i, arm in enumerate(ARMS):
        values = {k: np.stack(v)[..., i] for k, v in grown.items()}  # [widths, seeds]
        row: dict[str, Any] = {"start": arm, "width": sizes.looked_at[-1]}
        rows.append(row | {k: float(v[-1].mean()) for k, v in values.items()})
        slopes = {
            k: float(study.exponent(sizes.looked_at, v).mean()) if v.all() else ""
            for k, v in values.items()
        }
        rows.append({"start": arm, "width": "exponent"} | slopes)
    return rows


def train_all(sizes: Sizes) -> dict[int, Any]:
    """`trial` over the seeds at each width; three steps where it is not trained."""
    runs = {}
    for n in sizes.looked_at:
        whole = n in sizes.trained
        rates = jnp.asarray(sizes.rates if whole else (FIRST_RATE,))
        steps = sizes.steps if whole else 3
        one = functools.partial(
            trial, width=n, steps=steps, batch=sizes.batch, rates=rates
        )
        at_once = 1 if n > 1000 else None
        runs[n] = study.over_seeds(one, sizes.seeds, at_once=at_once)
    return runs


def trained(sizes: Sizes, curves: dict[int, np.ndarray]) -> list[dict]:
    """Best rates and losses at each width; losses are `[seeds, rates, arms, steps]`."""
    rows = []
    for n in sizes.trained:
        ends = study.final(curves[n])  # [seeds, rates, arms]
        reference = ends[..., 0].T[study.best(ends[..., 0].T)]
        for i, arm in enumerate(ARMS):
            losses = ends[..., i].T
            k = study.best(losses)
            curve = curves[n][:, k, i]
            learns = np.asarray((losses < 0.9 * curve[:, 0]).all(axis=1))
            usable = [r for r, good in zip(sizes.rates, learns, strict=True) if good]
            rows.append(
                {"width": n, "start": arm}
                | study.rate_cells(sizes.rates, k)
                | {"largest_rate_that_learns": max(usable, default=float("nan"))}
                | study.cells("loss", losses[k], log=True)
                | study.cells("to_standard", losses[k] / reference, log=True)
                | {"peak": float((curve / curve[:, :1]).max(axis=1).mean())}
            )
    return rows


def exponents(sizes: Sizes, curves: dict[int, np.ndarray]) -> list[dict]:
    """How the best learning rate changes with width."""
    rows = []
    for i, arm in enumerate(ARMS):
        ends = [study.final(curves[n])[..., i].T for n in sizes.trained]
        own = np.stack([study.own_best(sizes.rates, x) for x in ends])
        slope = study.exponent(sizes.trained, own)
        if arm != "both zero":
            rows.append({"start": arm} | study.cells("best_rate_exponent", slope))
    return rows


def picture(sizes: Sizes, curves: dict[int, np.ndarray]) -> Any:
    """Loss over learning rate at each width, and the curves of the largest."""
    figure, axes = panels(len(sizes.trained) + 1)
    for ax, n in zip(axes, sizes.trained, strict=False):
        ends = np.where(np.isfinite(x := study.final(curves[n])), x, np.nan)
        for color, (i, arm) in zip(COLORS, enumerate(ARMS), strict=False):
            mean = np.exp(np.log(ends[..., i]).mean(axis=0))
            ax.plot(sizes.rates, mean, color=color, marker=".", label=arm)
        label(ax, f"width {n}", "learning rate", "final loss")
        ax.set_ylim(top=3)
    axes[0].legend(fontsize=7)
    n = sizes.trained[-1]
    for color, (i, arm) in zip(COLORS, enumerate(ARMS), strict=False):
        k = study.best(study.final(curves[n])[..., i].T)
        curve = np.exp(np.log(curves[n][:, k, i]).mean(axis=0))
        axes[-1].plot(curve, color=color, label=arm)
    label(axes[-1], f"width {n}, best rate", "step", "loss", "linear")
    axes[-1].set_yscale("log")
    return figure


def run(sizes: Sizes) -> Result:
    """The three tables and the picture."""
    runs = train_all(sizes)
    curves = {n: runs[n][0] for n in sizes.trained}
    tables = {
        "steps": first_steps(sizes, runs),
        "trained": trained(sizes, curves),
        "rates": exponents(sizes, curves),
    }
    return Result(tables, picture(sizes, curves))


TEXT = Text(
    title="1. How A and B start",
    claim="""
    The founding text: with A random and B = 0 the first output is the pretrained
    model's, ∂L/∂A = 0 and ∂L/∂B ≠ 0; with A = 0 and B random B cannot update, A's
    updates are ill-directed and the model is poorer; both random disturbs the output
    and is unsuitable; both zero never moves. Hayou et al. 2024 (arXiv 2406.08447): with
    A random larger learning rates are stable, as width^(-1/2) and not width^(-1). arXiv
    2505.23194: B need not be zero.
    """,
    setup="""
    relu(relu(x V) (W + s A B)) u, LoRA of rank 4 (scale 1) on W by flora, 64 fresh
    samples a step, 150 steps of Adam; wanted is the network's own output plus a fixed
    smaller network's, of rms 1. 5 seeds (each its own weights, task and data), 13
    learning rates, the starts of `flora.initializers` at their default variance, and
    both random with a tenth of the std. All starts and rates of a width are one
    program. Width 8192 is followed for three steps only.
    """,
    captions={
        "trained": """
    Loss (mean of the last 15 steps, each before it trains on its samples) at the
    learning rate that is best for each start; "to standard" divides it by the standard
    start's, seed by seed; "peak" is the largest loss on the way to the first one; 95 %
    intervals.
    """,
        "rates": """
    How each seed's own best learning rate changes with width: p of width^p.
    """,
        "steps": """
    Norms of the gradients before steps 0, 1, 2 (Adam at 1e-4), and the rms of what the
    start adds to the output (the task's change has rms 1); below each, the exponent of
    width.
    """,
    },
    verdict="""
    The gradients at step 0 are as claimed, exactly. That A = 0 leaves B unable to
    update is true of step 0 only: at step 1 its gradient is there. Reversed does train,
    and its loss peaks no higher, but it falls behind as the width grows: its best loss
    is [[trained | width=128; start=reversed | to_standard]] times the standard one's at
    width 128 (not resolved), [[trained | width=512; start=reversed | to_standard]] at
    512, [[trained | width=2048; start=reversed | to_standard]] at 2048 (a toy elsewhere
    saw 2 to 41). The reason is Hayou et al.'s: the best rate goes as width^[[rates |
    start=standard | best_rate_exponent]] for standard and width^[[rates |
    start=reversed | best_rate_exponent]] for reversed (theory: -0.5, -1). "Unsuitable"
    is too strong for both random: at the default variance it disturbs the output by
    [[steps | start=both random; width=8192 | output_moved]] and ends [[trained |
    width=2048; start=both random | to_standard]] times as high at width 2048; with a
    tenth of the std it disturbs it by [[steps | start=both random, 0.1 std; width=8192
    | output_moved]] and is not told apart from standard at any width. What harms is B's
    size, not that it is not zero, as arXiv 2505.23194 says. Both zero never moves.
    """,
)
