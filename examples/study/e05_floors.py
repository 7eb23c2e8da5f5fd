"""Experiment 5: linear regression down to the Eckart-Young floor.

min over A, B of |Y - s X A B|² is the sum of the squares of Y's singular values after
the rank-th, where Y = X Δ.  With A frozen it is |Y|² less its projection on the columns
of X A; with B frozen, on the rows of B.
"""

import dataclasses
import functools
from typing import Any

import _study as study
import jax
import jax.numpy as jnp
import numpy as np
from _page import COLORS, Result, Text, label, panels

import flora

# Which factors train, and how they start.
ARMS = {
    "LoRA": ((1.0, 1.0), flora.initializers.gaussian()),
    "LoRA-FA (A frozen)": ((0.0, 1.0), flora.initializers.gaussian()),
    "B frozen": ((1.0, 0.0), flora.initializers.a_zero()),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Ranks, the regression, and the grid."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    samples: int = 64
    inputs: int = 24
    outputs: int = 16
    steps: int = 1500
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(1e-3, 1, 7)


FULL = Sizes()
SMOKE = Sizes(
    (2,), samples=8, inputs=6, outputs=4, steps=50, seeds=2, rates=(0.01, 0.1)
)


def layer(params: Any, x: jax.Array) -> jax.Array:
    """`[n, in]` to `[n, out]`."""
    return x @ params["w"]


def problem(key: Any, sizes: Sizes) -> tuple[Any, jax.Array, jax.Array]:
    """W, X with columns of falling size, and Y = X Δ with Δ of falling spectrum."""
    keys = jax.random.split(key, 4)
    n, m = sizes.inputs, sizes.outputs
    params = {"w": jax.random.normal(keys[0], (n, m)) * n**-0.5}
    sizes_of_columns = jnp.arange(1, n + 1) ** -0.5
    x = jax.random.normal(keys[1], (sizes.samples, n)) * sizes_of_columns
    u = jnp.linalg.qr(jax.random.normal(keys[2], (n, n)))[0][:, :m]
    v = jnp.linalg.qr(jax.random.normal(keys[3], (m, m)))[0]
    delta = (u / jnp.arange(1, m + 1)) @ v.T * n**0.5
    return params, x, x @ delta


def floors(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The least error of each arm, as a share of |Y|²."""
    values = jnp.linalg.svd(y, compute_uv=False)
    total = jnp.square(y).sum()
    lora = jnp.square(values[a.shape[1] :]).sum()
    columns = jnp.linalg.qr(x @ a)[0]
    rows = jnp.linalg.qr(b.T)[0]
    a_frozen = jnp.square(y - columns @ (columns.T @ y)).sum()
    b_frozen = jnp.square(y - (y @ rows) @ rows.T).sum()
    return jnp.stack([lora, a_frozen, b_frozen]) / total


def trial(key: Any, rank: int, sizes: Sizes) -> Any:
    """Errors `[arms, rates, steps]` and floors `[arms]`, both as shares of |Y|²."""
    key, own = jax.random.split(key)
    params, x, y = problem(key, sizes)
    config = flora.LoraConfig(rank=rank, alpha=rank, target="w")
    inits = [init for _, init in ARMS.values()]
    base, adapters = study.starts(own, config, inits, layer, params, x)
    apply = flora.lora(layer)
    factors = jnp.asarray([f for f, _ in ARMS.values()])
    target, total = layer(params, x) + y, jnp.square(y).sum()

    def loss(adapter: Any, step: Any) -> jax.Array:
        del step
        error = apply(flora.join(base, adapter), x) - target
        return jnp.square(error).sum() / total

    def run(arm: Any, rate: Any) -> Any:
        adapter, (of_a, of_b) = arm

        adam = functools.partial(study.adam_to_zero, steps=sizes.steps)
        tx = study.two_rates(adam, of_a * rate, of_b * rate)
        return study.train(loss, adapter, tx, sizes.steps)[1]

    start = adapters["w"]
    least = floors(y, x, start.a[1], start.b[2])
    return study.grid(run, (adapters, factors), jnp.asarray(sizes.rates)), least


def run(sizes: Sizes) -> Result:
    """The table and the picture."""
    rows: list[dict] = []
    figure, (curves, over_rank) = panels(2, width=4)
    reached: dict[str, list] = {arm: [] for arm in ARMS}
    for rank in sizes.ranks:
        losses, least = study.over_seeds(
            lambda k, rank=rank: trial(k, rank, sizes), sizes.seeds
        )
        for i, (arm, color) in enumerate(zip(ARMS, COLORS, strict=False)):
            ends = study.final(losses[:, i], 0.01).T  # [rates, seeds]
            k, floor = study.best(ends), least[:, i]
            rows.append(
                {"rank": rank, "arm": arm}
                | study.cells("floor", floor)
                | study.cells("error", ends[k])
                | study.rate_cells(sizes.rates, k)
                | study.cells("error/floor - 1", ends[k] / floor - 1)
            )
            reached[arm].append((floor.mean(), ends[k].mean()))
            if rank == sizes.ranks[len(sizes.ranks) // 2]:
                curves.plot(losses[:, i, k].mean(axis=0), color=color, label=arm)
                curves.axhline(floor.mean(), color=color, linestyle=":")
    label(curves, "error and floor (dotted)", "step", "share of |Y|²")
    for (arm, values), color in zip(reached.items(), COLORS, strict=False):
        floor, error = np.transpose(values)
        over_rank.plot(sizes.ranks, floor, color=color, linestyle=":")
        over_rank.plot(sizes.ranks, error, color=color, marker="o", ls="", label=arm)
    label(over_rank, "reached (dots) and floor", "rank", "share of |Y|²")
    over_rank.legend(fontsize=7)
    return Result({"floors": rows}, figure)


TEXT = Text(
    title="5. Down to the floor",
    claim="""
    Linear regression with LoRA of rank r comes down to what the best rank-r matrix
    leaves (Eckart-Young), and with A frozen (LoRA-FA, arXiv 2308.03303) to the floor of
    A's random columns.
    """,
    setup="""
    64 samples of 24 correlated inputs, 16 outputs, Y = X Δ with Δ of falling spectrum;
    1,500 steps of Adam with a cosine to zero, 7 peak rates, 5 seeds. A frozen factor is
    one of rate 0 in `optax.multi_transform`. "B frozen" starts with A = 0 and B random.
    Floors are computed by SVD and QR, apart from training.
    """,
    captions={
        "floors": """
    Errors and floors as shares of |Y|²; the last column should be 0.
    """,
    },
    verdict="""
    Holds to float32's last digits: both come down to their floors, which were computed
    apart from training, at every rank. What LoRA-FA gives up is large on data like
    these: at rank 4 its floor is [[floors | rank=4; arm=LoRA-FA (A frozen) | floor]] of
    |Y|² against [[floors | rank=4; arm=LoRA | floor]] for LoRA, since A's random
    columns see only a part of the inputs that matter. Freezing B costs more still
    ([[floors | rank=4; arm=B frozen | floor]]): with few outputs that matter, random
    rows of B miss them. That is linear regression to the bottom; LoRA-FA's own claim is
    of memory, at a higher rank.
    """,
)
