"""Experiment 3: alpha 8 to 64, alpha/rank 1 to 8, rank 1 to 256.

y = x (W + s A B), 256 by 256, fresh samples each step, Adam.  The change to learn has
rank 4 (easy) or 64 (hard), singular values all alike.
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

ALPHAS = (8, 16, 64)
RATIOS = (1, 2, 8)
RULES = [f"alpha {a}" for a in ALPHAS] + [f"alpha/rank {a}" for a in RATIOS]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Ranks, the layer, and the grid."""

    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    width: int = 256
    wanted_ranks: tuple[int, ...] = (4, 64)
    steps: int = 100
    batch: int = 32
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(1e-4, 1e-1, 7)


FULL = Sizes()
SMOKE = Sizes((1, 4), 8, (1, 4), steps=4, batch=4, seeds=2, rates=(1e-3, 1e-2, 1e-1))
SHARED_RATE = 1e-3  # at which changes of different ranks are compared
EARLY = 10  # steps


def layer(params: Any, x: jax.Array) -> jax.Array:
    """`[n, width]` to the same shape."""
    return x @ params["w"]


def scales(rank: int) -> list[float]:
    """S by each rule."""
    return [a / rank for a in ALPHAS] + [float(a) for a in RATIOS]


def wanted_changes(key: Any, sizes: Sizes) -> jax.Array:
    """Changes of each rank `[ranks, width, width]`, all of Frobenius norm √width."""
    found, n = [], sizes.width
    for rank, k in zip(sizes.wanted_ranks, jax.random.split(key, 9), strict=False):
        u, v = (jnp.linalg.qr(jax.random.normal(k, (2, n, n)))[0])[:, :, :rank]
        found.append(u @ v.T * (n / rank) ** 0.5)
    return jnp.stack(found)


def trial(key: Any, rank: int, sizes: Sizes) -> Any:
    """`[tasks, rules, rates, ...]`: the error left, |ΔW| early and at the end."""
    keys = jax.random.split(key, 4)
    n = sizes.width
    params = {"w": jax.random.normal(keys[0], (n, n)) * n**-0.5}
    wanted = wanted_changes(keys[1], sizes)
    x = jax.random.normal(keys[2], (sizes.steps, sizes.batch, n))
    config = flora.LoraConfig(rank=rank, alpha=rank, target="w")
    adapted = flora.init(keys[3], config, layer, params, x[0])
    base, adapter = flora.split(adapted)
    apply = flora.lora(layer)

    def run(wanted: Any, scale: Any, rate: Any) -> Any:
        def tree(adapter: Any) -> Any:
            return flora.join(base, study.scaled(adapter, scale))

        def loss(adapter: Any, step: Any) -> jax.Array:
            error = apply(tree(adapter), x[step]) - x[step] @ (params["w"] + wanted)
            return jnp.square(error).mean()

        def delta(adapter: Any) -> jax.Array:
            node = adapter["w"]
            return scale * node.a @ node.b

        tx = optax.adam(rate)
        early, _, _ = study.train(loss, adapter, tx, EARLY)
        end, _, _ = study.train(loss, adapter, tx, sizes.steps)
        left = jnp.square(delta(end) - wanted).sum() / jnp.square(wanted).sum()
        return left, study.norm(delta(early)), study.norm(delta(end))

    return study.grid(run, wanted, jnp.asarray(scales(rank)), jnp.asarray(sizes.rates))


def loss_rows(sizes: Sizes, runs: list[Any]) -> list[dict]:
    """The error left by each rule at its own best rate."""
    rows = []
    for t, task in enumerate(sizes.wanted_ranks):
        for rank, (left, _, _) in zip(sizes.ranks, runs, strict=True):
            ends = np.where(np.isfinite(left), left, np.inf)[
                :, t
            ]  # seeds, rules, rates
            ks = [study.best(ends[:, j].T) for j in range(len(RULES))]
            means = [
                float(np.exp(np.log(ends[:, j, k]).mean())) for j, k in enumerate(ks)
            ]
            j = int(np.argmin(means))
            floor = max(0.0, 1 - rank / task)
            rows.append(
                {"rank_to_learn": task, "rank": rank, "floor": floor}
                | dict(zip(RULES, means, strict=True))
                | {"best_rule": RULES[j]}
                | study.cells("best", ends[:, j, ks[j]], log=True)
                | {"rates": f"{sizes.rates[min(ks)]:.0e} to {sizes.rates[max(ks)]:.0e}"}
            )
    return rows


def size_rows(sizes: Sizes, runs: list[Any]) -> list[dict]:
    """|ΔW| at one rate under each rule, and its exponent of the rank."""
    k = sizes.rates.index(SHARED_RATE)
    rows = []
    for j, rule in enumerate(RULES):
        early = np.stack([run[1][:, -1, j, k] for run in runs])  # [ranks, seeds]
        row = {"rule": rule} | {
            f"rank_{r}": float(x.mean())
            for r, x in zip(sizes.ranks, early, strict=True)
        }
        rows.append(row | study.cells("exponent", study.exponent(sizes.ranks, early)))
    return rows


def picture(sizes: Sizes, runs: list[Any]) -> Any:
    """Error over rate at each rank for two rules, and |ΔW| over rank."""
    figure, axes = panels(3)
    for ax, rule in zip(axes, ("alpha 16", "alpha/rank 2"), strict=False):
        j = RULES.index(rule)
        for color, rank, run in zip(COLORS, sizes.ranks, runs, strict=False):
            ends = np.where(np.isfinite(run[0]), run[0], np.nan)[:, -1, j]
            mean = np.exp(np.log(ends).mean(axis=0))
            ax.plot(sizes.rates, mean, color=color, marker=".", label=f"rank {rank}")
        label(ax, f"{rule}, hard task", "learning rate", "error left")
        ax.set_ylim(top=3)
    axes[0].legend(fontsize=7)
    k = sizes.rates.index(SHARED_RATE)
    for color, rule in zip(COLORS, ("alpha 16", "alpha/rank 2"), strict=False):
        sized = [run[1][:, -1, RULES.index(rule), k].mean() for run in runs]
        axes[2].plot(sizes.ranks, sized, color=color, marker=".", label=rule)
    label(axes[2], f"after {EARLY} steps at {SHARED_RATE:g}", "rank", "|ΔW|")
    axes[2].legend(fontsize=7)
    return figure


def run(sizes: Sizes) -> Result:
    """The two tables and the picture."""
    runs = [
        study.over_seeds(lambda k, r=r: trial(k, r, sizes), sizes.seeds, at_once=1)
        for r in sizes.ranks
    ]
    tables = {"loss": loss_rows(sizes, runs), "size": size_rows(sizes, runs)}
    return Result(tables, picture(sizes, runs))


TEXT = Text(
    title="3. alpha, alpha/rank, rank",
    claim="""
    The founding text: alpha between 8 and 64, alpha/rank between 1 and 8, a higher rank
    for harder tasks with a fitting alpha; alpha/rank keeps the range of ΔW steady.
    """,
    setup="""
    y = x (W + s A B), 256 by 256, 32 fresh samples a step, 100 steps of Adam. The
    change to learn has rank 4 or rank 64, singular values alike, and W's size. Ranks 1
    to 256, s by six rules, 7 learning rates, 5 seeds.
    """,
    captions={
        "loss": """
    What is left of |Δ - s A B|² / |Δ|² under each rule at that rule's own best rate;
    "floor" is what no matrix of that rank can go below; "best" is the best rule with
    its 95 % interval; "rates" the span of the rules' best rates.
    """,
        "size": """
    |ΔW| after 10 steps at rate 1e-3 (hard task), and its exponent of the rank, by rule.
    """,
    },
    verdict="""
    Once the rate is swept, alpha hardly matters: inside and outside the advised ranges
    (alpha/rank goes from 1/32 to 64 here) the rules lie close together at low rank, and
    where they differ they follow no order (the grid's rates are a factor of 3 apart,
    and so are the best rates of the rules). So the advised ranges are safe, not needed.
    The rank is what matters, and harder tasks do need more: the task of rank 64 stays
    at [[loss | rank_to_learn=64; rank=16 | best]] with rank 16, near the floor [[loss |
    rank_to_learn=64; rank=16 | floor]], and falls to [[loss | rank_to_learn=64; rank=64
    | best]] with rank 64; more rank than the task has never hurt, and at 256 the hard
    task ended lower still ([[loss | rank_to_learn=64; rank=256 | best]]). That
    alpha/rank keeps the range of ΔW steady is not so for |ΔW|: at one rate it falls as
    rank^[[size | rule=alpha 16 | exponent]] with alpha fixed and grows as rank^[[size |
    rule=alpha/rank 2 | exponent]] with alpha/rank fixed, so alpha/√rank comes nearest.
    (Experiment 2 looks at |ΔW x| on few samples instead, where under Adam alpha/rank is
    right.)
    """,
)
