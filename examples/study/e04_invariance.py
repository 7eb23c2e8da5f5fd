"""Experiment 4: which four settings are really two.

Adam with eps = 0 does not see a factor of its gradients, so that
(alpha, std of A, lr_A, lr_B) -> (alpha/(p q), p std, p lr_A, q lr_B) leaves
W + scale A B as it is at every step.  With SGD the rates take p² and q².  In float64.
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

ALPHA, RANK = 4.0, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network, the pairs (p, q), and the grid."""

    width: int = 16
    samples: int = 32
    steps: int = 200
    seeds: int = 5
    pairs: tuple[tuple[float, float], ...] = ((2, 0.25), (3, 0.7), (0.1, 10), (7, 5))
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)


FULL = Sizes()
SMOKE = Sizes(seeds=2, pairs=((3, 0.7),))


def network(params: Any, x: jax.Array) -> jax.Array:
    """`[n, width]` to the same shape."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def adam(eps: float) -> Any:
    """Rate -> Adam; 0/0, where a gradient has been zero from the start, is no step."""

    def make(rate: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(eps=eps),
            optax.stateless(lambda u, _: jax.tree.map(jnp.nan_to_num, u)),
            optax.scale(-rate),
        )

    return make


# How a rate changes with the p or q of its factor.
OPTIMIZERS = {
    "Adam, eps = 0": (adam(0.0), 1),
    "Adam, eps = 1e-8": (adam(1e-8), 1),
    "SGD": (optax.sgd, 2),
    "SGD, the rates of Adam": (optax.sgd, 1),
}


def trial(key: Any, p: float, q: float, sizes: Sizes) -> Any:
    """For each optimizer ΔW of both layers at every step, `[rates, steps, ...]`."""
    keys = jax.random.split(key, 4)
    n = sizes.width
    params = {
        name: jax.random.normal(k, (n, n)) * n**-0.5
        for name, k in zip(("up", "down"), keys, strict=False)
    }
    x = jax.random.normal(keys[2], (sizes.samples, n))
    wanted = jnp.sin(3 * x) @ params["down"]  # cannot be reached: gradients stay
    config = flora.LoraConfig(
        rank=RANK,
        alpha=ALPHA / (p * q),
        target=("up", "down"),
        dtype=x.dtype,
        init=flora.initializers.gaussian(p**2 / 3),
    )
    base, adapter = flora.split(flora.init(keys[3], config, network, params, x))
    apply = flora.lora(network)

    def loss(adapter: Any, step: Any) -> jax.Array:
        del step
        return jnp.square(apply(flora.join(base, adapter), x) - wanted).mean()

    def deltas(adapter: Any, grads: Any) -> Any:
        nodes = [adapter[name] for name in ("up", "down")]
        return jnp.stack([node.scale * node.a @ node.b for node in nodes])

    def run(name: str, rate: Any) -> Any:
        inner, power = OPTIMIZERS[name]
        tx = study.two_rates(inner, p**power * rate, q**power * rate)
        return study.train(loss, adapter, tx, sizes.steps + 1, deltas)[1:]

    rates = jnp.asarray(sizes.rates)
    return {
        name: jax.vmap(lambda rate, name=name: run(name, rate))(rates)
        for name in OPTIMIZERS
    }


def size(deltas: np.ndarray) -> np.ndarray:
    """The Frobenius norm over layers, `[seeds, rates, steps, layers, in, out]`."""
    return np.sqrt(np.square(deltas).sum(axis=(3, 4, 5)))


def compare(sizes: Sizes) -> dict[tuple[str, float, float], np.ndarray]:
    """By optimizer, p, q: |ΔW - ΔW'| to |ΔW| at each step, `[seeds, rates, t]`."""
    with jax.enable_x64(True):
        runs = {
            (p, q): study.over_seeds(
                lambda k, p=p, q=q: trial(k, p, q, sizes), sizes.seeds
            )
            for p, q in ((1.0, 1.0), *sizes.pairs)
        }
    found = {}
    for name in OPTIMIZERS:
        own = runs[1.0, 1.0][name][1][:, :, 1:]  # [seeds, rates, steps, layers, ...]
        for p, q in sizes.pairs:
            other = runs[p, q][name][1][:, :, 1:]
            found[name, p, q] = size(own - other) / size(own)
    return found


def run(sizes: Sizes) -> Result:
    """The table and the picture."""
    found = compare(sizes)
    rows: list[dict] = []
    for (name, p, q), apart in found.items():
        worst = apart.max(axis=2)  # [seeds, rates]
        rows.append(
            {"optimizer": name, "p": p, "q": q}
            | {
                f"rate_{r:g}": float(worst[:, k].max())
                for k, r in enumerate(sizes.rates)
            }
            | {"worst_seed": float(worst.max()), "mean": float(worst.mean())}
        )
    figure, (ax,) = panels(1, width=5)
    p, q = sizes.pairs[min(1, len(sizes.pairs) - 1)]
    for color, name in zip(COLORS, OPTIMIZERS, strict=False):
        curve = found[name, p, q].max(axis=(0, 1))
        ax.plot(np.maximum(curve, 1e-17), color=color, label=name)
    label(ax, f"p = {p}, q = {q}", "step", "|ΔW - ΔW'| to |ΔW|", "linear")
    ax.set_yscale("log")
    ax.legend(fontsize=7)
    return Result({"apart": rows}, figure)


TEXT = Text(
    title="4. An exact invariance",
    claim="""
    Under Adam with eps = 0 the settings (alpha, std of A, lr_A, lr_B) and (alpha/(p q),
    p std, p lr_A, q lr_B) are one: W + s A B is the same at every step. So two of the
    four are enough to search. With SGD the rates take p² and q².
    """,
    setup="""
    A network of two adapted layers, 16 by 16, rank 4, 200 steps, float64, 5 seeds,
    three learning rates, pairs (p, q) that are no powers of two among them. alpha, the
    start's variance and both rates are changed through flora and optax; only 0/0 (A's
    first gradient is zero) is made 0.
    """,
    captions={
        "apart": """
    The largest |ΔW - ΔW'| / |ΔW| (Frobenius, both layers) over the 200 steps and the
    seeds, by learning rate.
    """,
    },
    verdict="""
    Holds, to rounding. With eps = 0 the paths agree to 1e-14 at every step at the two
    smaller rates and to a few 1e-15 on average; at 1e-2 the worst seed and step of
    three pairs come to a few 1e-14, so the bound of 1e-14 that was asked for is held at
    the rates up to 1e-3 only (the test holds it there). Optax's default eps = 1e-8
    breaks the invariance at the third digit on this small problem, where some gradients
    are tiny. SGD has one of its own, with p² and q²; with Adam's rule it is broken at
    once. What this is good for: under Adam, alpha at a fixed ratio of the rates is the
    rate and the std of A by other names, so one may fix alpha and sweep the rate.
    """,
)
