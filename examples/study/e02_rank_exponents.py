"""Experiment 2: how the change of a layer's output grows with the rank.

y = x (W + s A B) on four samples.  s = (8/rank)^p with p = 1 (alpha/rank), 1/2
(rank-stabilized) and 0; SGD or Adam; A random or B random.  All scales are 1 at rank 8.
"""

import dataclasses
from typing import Any

import _study as study
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _page import COLORS, Result, Text, label, panels

import flora

STARTS = {
    "standard": flora.initializers.gaussian(),
    "reversed": flora.initializers.a_zero(),
}
SCALES = {"1/r": 1.0, "1/√r": 0.5, "1": 0.0}
# After one step, for rank much below width: how often the scale enters, and what the
# rest contributes to the exponent of |ΔW x| and of its part along the wanted change.
PREDICTED = {
    ("SGD", "standard"): (2, 1.0, 1.0),  # s² |x A|² g
    ("SGD", "reversed"): (2, -0.5, 0.0),  # s² |x|² g Bᵀ B, entries of B ~ 1/√rank
    ("Adam", "standard"): (1, 1.0, 1.0),  # s Σ_k |(x A)_k| sign(g)
    ("Adam", "reversed"): (1, 0.0, 0.5),  # s |x|₁ Σ_k sign((g Bᵀ)_k) B_k
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Ranks, the layer, and a grid of learning rates for each optimizer."""

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    width: int = 128
    samples: int = 4
    steps: int = 40
    seeds: int = 10
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("SGD", study.rates(1e-5, 10, 25)),
        ("Adam", study.rates(1e-5, 1, 21)),
    )


FULL = Sizes()
SMOKE = Sizes(
    (2, 4),
    width=16,
    steps=4,
    seeds=2,
    rates=(("SGD", (1e-3, 1e-2, 1e-1)), ("Adam", (1e-3, 1e-2, 1e-1))),
)
OPTIMIZERS = {"SGD": optax.sgd, "Adam": optax.adam}


def layer(params: Any, x: jax.Array) -> jax.Array:
    """`[n, width]` to the same shape."""
    return x @ params["w"]


def trial(key: Any, rank: int, sizes: Sizes) -> dict[str, Any]:
    """For each optimizer `[starts, scales, rates, ...]`: losses and changes of y."""
    keys = jax.random.split(key, 4)
    width = sizes.width
    params = {"w": jax.random.normal(keys[0], (width, width)) * width**-0.5}
    x = jax.random.normal(keys[1], (sizes.samples, width))
    wanted = jax.random.normal(keys[2], (sizes.samples, width))
    config = flora.LoraConfig(rank=rank, alpha=rank, target="w")
    base, adapters = study.starts(
        keys[3], config, list(STARTS.values()), layer, params, x
    )
    apply = flora.lora(layer)
    scales = jnp.asarray([(8 / rank) ** p for p in SCALES.values()])

    def run(optimizer: str, adapter: Any, scale: Any, rate: Any) -> Any:
        def change(adapter: Any) -> jax.Array:
            return apply(flora.join(base, study.scaled(adapter, scale)), x) - layer(
                params, x
            )

        def loss(adapter: Any, step: Any) -> jax.Array:
            del step
            return jnp.square(change(adapter) - wanted).mean()

        def measure(adapter: Any, grads: Any) -> Any:
            y = change(adapter)
            return study.rms(y), (y * wanted).mean() / study.rms(wanted)

        tx = OPTIMIZERS[optimizer](rate)
        return study.train(loss, adapter, tx, sizes.steps, measure)[1:]

    return {
        name: study.grid(
            lambda *at, name=name: run(name, *at), adapters, scales, jnp.asarray(rates)
        )
        for name, rates in sizes.rates
    }


def rows_of(name: str, rates: Any, runs: list[Any], ranks: Any) -> list[dict]:
    """The rows of one optimizer; runs are one for each rank."""
    rows = []
    for i, start in enumerate(STARTS):
        for j, (scale, p) in enumerate(SCALES.items()):
            # After one step of the smallest rate: [ranks, seeds].
            size = [run[1][0][:, i, j, 0, 1] for run in runs]
            toward = [run[1][1][:, i, j, 0, 1] for run in runs]
            # Means over all steps, which tell fast from slow: [rates, seeds].
            ends = [study.final(run[0][:, i, j], 1.0).T for run in runs]
            at_best = [x[study.best(x)] for x in ends]
            own = np.stack([study.own_best(rates, x) for x in ends])
            times, whole, along = PREDICTED[name, start]
            rows.append(
                {"optimizer": name, "start": start, "scale": scale}
                | {"predicted": whole - times * p}
                | study.cells("change", study.exponent(ranks, size))
                | {"predicted_along": along - times * p}
                | study.cells("change_along", study.exponent(ranks, toward))
                | study.cells("best_rate", study.exponent(ranks, own))
                | {"loss_at_lowest_rank": float(np.exp(np.log(at_best[0]).mean()))}
                | {"loss_at_highest": float(np.exp(np.log(at_best[-1]).mean()))}
            )
    return rows


def picture(sizes: Sizes, runs: list[Any]) -> Any:
    """|ΔW x| after a step over rank, for each optimizer and start."""
    figure, axes = panels(4, width=2.9)
    kinds = [(name, i) for name, _ in sizes.rates for i in range(len(STARTS))]
    for ax, (name, i) in zip(axes, kinds, strict=True):
        for j, (scale, color) in enumerate(zip(SCALES, COLORS, strict=False)):
            size = np.stack([run[name][1][0][:, i, j, 0, 1] for run in runs])
            mean = np.exp(np.log(size).mean(axis=1))
            ax.plot(sizes.ranks, mean / mean[0], color=color, marker=".", label=scale)
        label(ax, f"{name}, {list(STARTS)[i]}", "rank", "|ΔW x| to that of rank 2")
    axes[0].legend(fontsize=7, title="scale", title_fontsize=7)
    return figure


def run(sizes: Sizes) -> Result:
    """The table and the picture."""
    runs = [
        study.over_seeds(lambda k, r=r: trial(k, r, sizes), sizes.seeds)
        for r in sizes.ranks
    ]
    rows = [
        row
        for name, rates in sizes.rates
        for row in rows_of(name, rates, [r[name] for r in runs], sizes.ranks)
    ]
    return Result({"exponents": rows}, picture(sizes, runs))


TEXT = Text(
    title="2. Which scale for which rank",
    claim="""
    Hu et al.: scale = alpha/rank makes the learning rate carry over between ranks.
    rsLoRA (arXiv 2312.03732): it must be alpha/√rank. Both are said of "LoRA", without
    the optimizer.
    """,
    setup="""
    y = x (W + s A B), 128 by 128, four samples, a random change wanted; s = (8/rank)^p
    with p = 1, 1/2, 0; SGD or Adam; A random or B random; ranks 2 to 64, 10 seeds, 25
    (SGD) and 21 (Adam) learning rates, 40 steps. Scales are an axis of the program: B
    is multiplied by s where it is joined, at alpha = rank, which is the same LoRA.
    """,
    captions={
        "exponents": """
    Exponents p of rank^p. "change": of |ΔW x| after one step; "change along": of its
    part along the wanted change; before each what a formula says of rank ≪ width; "best
    rate": of the learning rate with the least mean loss over the 40 steps. A scale for
    which "best rate" is 0 lets a rate carry over. The last columns: that mean loss at
    rank 2 and 64 (1 at the start).
    """,
    },
    verdict="""
    All three are right, of different things, and the formulas give every measured
    exponent to within about 0.2 at 2 ≤ rank ≤ 64. After one step, standard start: with
    SGD the scale that makes |ΔW x| independent of the rank is 1/√r (exponent
    [[exponents | optimizer=SGD; start=standard; scale=1/√r | change]]): rsLoRA. With
    Adam it is 1/r ([[exponents | optimizer=Adam; start=standard; scale=1/r | change]],
    and [[exponents | optimizer=Adam; start=standard; scale=1/r | change_along]] along
    the wanted change): alpha/rank. From the reversed start both ask for more: along the
    wanted change 1 with SGD and 1/√r with Adam (in norm 1, as chance directions are
    added). Over 40 steps the best rate says something else: with SGD it carries over at
    scale 1 ([[exponents | optimizer=SGD; start=standard; scale=1 | best_rate]]), since
    at a balanced solution the curvature goes with s whatever the rank; at 1/√r, where
    the first step is right, the best rate still grows as rank^[[exponents |
    optimizer=SGD; start=standard; scale=1/√r | best_rate]]. With Adam and the standard
    start neither is exact: [[exponents | optimizer=Adam; start=standard; scale=1/r |
    best_rate]] at 1/r, [[exponents | optimizer=Adam; start=standard; scale=1/√r |
    best_rate]] at 1/√r; alpha/rank is the nearer. With Adam each scale at its own best
    rate ends about alike (mean loss at rank 64: [[exponents | optimizer=Adam;
    start=standard; scale=1/r | loss_at_highest]], [[exponents | optimizer=Adam;
    start=standard; scale=1/√r | loss_at_highest]] and [[exponents | optimizer=Adam;
    start=standard; scale=1 | loss_at_highest]]): the scale mainly says which rate to
    write.
    """,
)
