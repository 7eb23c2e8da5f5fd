"""Experiment 7: starts made of W or of a gradient.

PiSSA and OLoRA put a part of W into the factors, LoRA-GA a part of the first gradient;
the base keeps the rest, W - s A B, so that every start is the same function.  One layer
of 64 by 64 with a falling spectrum, exact expected loss, Adam.
"""

import dataclasses
import math
from typing import Any

import _study as study
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _page import COLORS, Result, Text, label, panels

import flora

ARMS = ("standard", "PiSSA", "OLoRA", "LoRA-GA")
SHIFTS = ("inside the top of W", "random, low rank", "random, full rank")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The layer and the grid."""

    width: int = 64
    rank: int = 8
    steps: tuple[int, ...] = (20, 100)
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(1e-4, 1, 17)


FULL = Sizes()
SMOKE = Sizes(8, 2, steps=(2, 4), seeds=2, rates=(1e-3, 1e-2, 1e-1))


def layer(params: Any, x: jax.Array) -> jax.Array:
    """`[n, width]` to the same shape."""
    return x @ params["w"]


def orthogonal(key: Any, n: int) -> jax.Array:
    """A random rotation `[n, n]`."""
    return jnp.linalg.qr(jax.random.normal(key, (n, n)))[0]


def problem(key: Any, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """W, and the three shifts `[3, n, n]`, each half as large as W's top."""
    keys = jax.random.split(key, 7)
    n, r = sizes.width, sizes.rank
    u, v, u2, v2 = (orthogonal(k, n) for k in keys[:4])
    falling = jnp.arange(1, n + 1) ** -0.5
    w = (u * falling) @ v.T * math.sqrt(n) / 2
    core = jax.random.normal(keys[4], (r, r))
    low = [left[:, :r] @ core @ right[:, :r].T for left, right in ((u, v), (u2, v2))]
    shifts = jnp.stack([*low, (u2 * falling) @ v2.T])
    top = study.norm(u[:, :r].T @ w)
    lengths = jnp.sqrt(jnp.square(shifts).sum(axis=(1, 2), keepdims=True))
    return w, shifts / lengths * top / 2


def tail(matrix: jax.Array, rank: int) -> jax.Array:
    """What the best matrix of that rank leaves of |matrix|²."""
    values = jnp.linalg.svd(matrix, compute_uv=False)
    return jnp.square(values[..., rank:]).sum(axis=-1)


def pissa(w: jax.Array, scale: float, r: int) -> tuple[jax.Array, jax.Array]:
    """The r largest singular triples, halves of each value in A and in B."""
    u, s, vt = jnp.linalg.svd(w)
    half = jnp.sqrt(s[:r] / scale)
    return u[:, :r] * half, half[:, None] * vt[:r]


def olora(w: jax.Array, scale: float, r: int) -> tuple[jax.Array, jax.Array]:
    """Wᵀ = Q R (of the paper's orientation): A from R's first rows, B from Q."""
    del scale
    q, upper = jnp.linalg.qr(w.T)
    return upper[:r].T, q[:, :r].T


def lora_ga(g: jax.Array, scale: float, r: int) -> tuple[jax.Array, jax.Array]:
    """A: left singular vectors of the gradient, B: the next r right ones, stable size.

    As PEFT's "ArB2r" with "stable" and gamma = 16.
    """
    u, _, vt = jnp.linalg.svd(g)
    size = g.shape[0] ** 0.25 / math.sqrt(16) / math.sqrt(scale)
    return u[:, :r] * size, vt[r : 2 * r] * size


def trial(key: Any, sizes: Sizes) -> Any:
    """Losses `[shifts, arms, rates, steps]`, the first step's cosines, floors."""
    key, own = jax.random.split(key)
    w, shifts = problem(key, sizes)
    x, r = jnp.eye(sizes.width), sizes.rank
    config = flora.LoraConfig(rank=r, alpha=r, target="w")
    standard = flora.init(own, config, layer, {"w": w}, x)
    node, apply = standard["w"], flora.lora(layer)

    def start(a: jax.Array, b: jax.Array) -> Any:
        base = w - node.scale * a @ b
        return {"w": dataclasses.replace(node, base=base, a=a, b=b)}

    def one_shift(shift: jax.Array) -> Any:
        gradient = -2 * shift  # of the loss below, at W
        trees = [
            standard,
            start(*pissa(w, node.scale, r)),
            start(*olora(w, node.scale, r)),
            start(*lora_ga(gradient, node.scale, r)),
        ]

        def run(tree: Any, rate: Any) -> Any:
            base, adapter = tree

            def loss(adapter: Any, step: Any) -> jax.Array:
                error = apply(flora.join(base, adapter), x) - (w + shift)
                return jnp.square(error).sum() / jnp.square(shift).sum()

            adam = optax.adam(rate)
            losses = study.train(loss, adapter, adam, sizes.steps[-1] + 1)[1]
            moved, _, _ = study.train(loss, adapter, optax.sgd(1e-4), 1)
            change = flora.merge(flora.join(base, moved))["w"] - w
            cosine = (change * shift).sum() / study.norm(change) / study.norm(shift)
            return losses, cosine

        both = study.stacked([flora.split(tree) for tree in trees])
        found = study.grid(run, both, jnp.asarray(sizes.rates))
        # A B must become what the base lacks: its own start and the shift.
        lacking = jnp.stack([w + shift - tree["w"].base for tree in trees])
        floor = tail(lacking, r) / tail(shift, 0)
        share = 1 - jnp.stack([tail(shift, r), tail(shift, 2 * r)]) / tail(shift, 0)
        return *found, jnp.sqrt(share), floor

    return [jnp.stack(x) for x in zip(*map(one_shift, shifts), strict=True)]


def run(sizes: Sizes) -> Result:
    """The tables and the picture."""
    losses, cosines, bounds, floors = study.over_seeds(
        lambda k: trial(k, sizes), sizes.seeds
    )
    rows: list[dict] = []
    first: list[dict] = []
    figure, axes = panels(len(SHIFTS))
    for i, (shift, ax) in enumerate(zip(SHIFTS, axes, strict=True)):
        for j, (arm, color) in enumerate(zip(ARMS, COLORS, strict=False)):
            row: dict[str, Any] = {"shift": shift, "start": arm}
            row |= {"floor": round(float(floors[:, i, j].mean()), 6)}
            k = 0
            for steps in sizes.steps:
                ends = losses[:, i, j, :, steps].T.astype(np.float64)  # [rates, seeds]
                ends = np.where(np.isfinite(ends), ends, np.inf)
                k = study.best(ends)
                row |= study.cells(f"loss_{steps}", ends[k], log=True)
                row |= {f"rate_{steps}": float(sizes.rates[k])}
            rows.append(row)
            curve = np.exp(np.log(losses[:, i, j, k]).mean(axis=0))
            ax.plot(curve, color=color, label=arm)
            first.append(
                {"shift": shift, "start": arm}
                | study.cells("cosine", cosines[:, i, j, 0])
                | {"best_of_rank_r": float(bounds[:, i, 0].mean())}
                | {"best_of_rank_2r": float(bounds[:, i, 1].mean())}
            )
        label(ax, f"shift {shift}", "step", "share of the loss left", "linear")
        ax.set_yscale("log")
    axes[0].legend(fontsize=7)
    return Result({"loss": rows, "first_step": first}, figure)


TEXT = Text(
    title="7. PiSSA, OLoRA, LoRA-GA",
    claim="""
    PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775): starting from W's own top
    directions is faster and better than a random start. LoRA-GA (arXiv 2407.05000):
    started from the gradient, the first step is the best approximation of rank 2r to
    full fine-tuning's.
    """,
    setup="""
    y = x (W + s A B), 64 by 64, rank 8, spectrum of W falling as i^(-1/2), exact
    expected loss, Adam, 17 learning rates, 5 seeds. Three shifts of the same size to
    learn: inside the span of W's top 8 singular vectors, random of rank 8, random of
    full rank. Starts are formulas in the file; training runs through flora on the
    residual base.
    """,
    captions={
        "loss": """
    What is left of the loss after 20 and 100 steps, each at its own best rate; "floor"
    is what no A B can go below on that start's base (Eckart-Young).
    """,
        "first_step": """
    The cosine between ΔW after one small step of SGD and the full gradient's step,
    beside that of the best matrices of rank r and 2r.
    """,
    },
    verdict="""
    PiSSA's promise holds where its premise does. Inside the top of W its first step
    points nearly along the gradient (cosine [[first_step | shift=inside the top of W;
    start=PiSSA | cosine]] against [[first_step | shift=inside the top of W;
    start=standard | cosine]]), and after 100 steps it has [[loss | shift=inside the top
    of W; start=PiSSA | loss_100]] of the loss left against [[loss | shift=inside the
    top of W; start=standard | loss_100]], both nearly nothing (the difference after 20
    steps is not resolved). On a random shift it loses by far: [[loss | shift=random,
    low rank; start=PiSSA | loss_100]] against [[loss | shift=random, low rank;
    start=standard | loss_100]]. That is no matter of optimization: what its base lacks
    is W's top and the shift, of rank 2r together, and A B has rank r, so it stops at
    the floor in the table whatever the learning rate. OLoRA pays the same price on
    every shift tried, inside the top of W too ([[loss | shift=inside the top of W;
    start=OLoRA | loss_100]]): W's first rows are not its top. LoRA-GA's first step is
    the best approximation of rank 2r to three digits ([[first_step | shift=random, full
    rank; start=LoRA-GA | cosine]] and [[first_step | shift=random, full rank;
    start=LoRA-GA | best_of_rank_2r]]), as claimed, and on a shift of full rank it ends
    below standard LoRA's floor ([[loss | shift=random, full rank; start=LoRA-GA |
    loss_100]] against [[loss | shift=random, full rank; start=standard | floor]]): what
    it took out of the base counts as rank. Here the gradient is exact and the layer
    linear; a noisy first gradient in a deep model is another matter.
    """,
)
