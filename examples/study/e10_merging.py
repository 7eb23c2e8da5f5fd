"""Experiment 10: what is lost where W + scale A B is rounded to bfloat16.

First with random factors of a given size, then with factors that were trained on a
bfloat16 weight.
"""

import dataclasses
from typing import Any

import _study as study
import jax
import jax.numpy as jnp
import numpy as np
from _page import COLORS, Result, Text, label, panels

import flora


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The layer, sizes of the change relative to W, and the grid."""

    width: int = 128
    rank: int = 8
    powers: tuple[int, ...] = tuple(range(-14, 1, 2))
    shifts: tuple[float, ...] = (0.001, 0.01, 0.1)
    steps: int = 200
    seeds: int = 5
    rates: tuple[float, ...] = study.rates(1e-6, 3.16e-1, 12)


FULL = Sizes()
SMOKE = Sizes(16, 2, (-12, -2), (0.01,), steps=3, seeds=2, rates=(1e-4, 1e-3, 1e-2))


def layer(params: Any, x: jax.Array) -> jax.Array:
    """`[n, width]` to the same shape."""
    return x @ params["w"]


def rounded(weight: jax.Array) -> jax.Array:
    """In float32, really rounded before: XLA drops a rounding that it sees undone."""
    return jax.lax.optimization_barrier(weight).astype(jnp.float32)


def random_change(key: Any, sizes: Sizes) -> Any:
    """For each power of two |ΔW|/|W|: what arrives of ΔW, `[powers]` each."""
    keys = jax.random.split(key, 2)
    n, r = sizes.width, sizes.rank
    w = (jax.random.normal(keys[0], (n, n)) * n**-0.5).astype(jnp.bfloat16)
    x = jnp.eye(n, dtype=jnp.bfloat16)
    config = flora.LoraConfig(
        rank=r, alpha=r, target="w", init=flora.initializers.both_random()
    )
    base, adapter = flora.split(flora.init(keys[1], config, layer, {"w": w}, x))
    whole = adapter["w"].a @ adapter["w"].b
    unit = study.norm(w.astype(jnp.float32)) / study.norm(whole)
    dithered = flora.lora(layer, form="dithered")

    def run(power: Any) -> Any:
        tree = flora.join(base, study.scaled(adapter, unit * 2.0**power))
        delta = (unit * 2.0**power * whole).astype(jnp.float32)
        arrived = {
            "merged": flora.merge(tree)["w"],
            "dithered": dithered(tree, x),  # x is the identity
        }
        found = {}
        for name, weight in arrived.items():
            got = rounded(weight) - w.astype(jnp.float32)
            found[name] = {
                "error": study.norm(got - delta) / study.norm(delta),
                "along": (got * delta).sum() / jnp.square(delta).sum(),
                "unchanged": (got == 0).mean(),
            }
        return found

    return jax.vmap(run)(jnp.asarray(sizes.powers, jnp.float32))


def trained_change(key: Any, sizes: Sizes) -> Any:
    """`[shifts, rates]`: |ΔW|/|W|, and errors as shares of the shift's own size."""
    keys = jax.random.split(key, 4)
    n, r = sizes.width, sizes.rank
    w = (jax.random.normal(keys[0], (n, n)) * n**-0.5).astype(jnp.bfloat16)
    wide = w.astype(jnp.float32)
    u, v = jax.random.normal(keys[1], (2, n, r))
    shift = u @ v.T
    shift = shift / study.norm(shift) * study.norm(wide)
    x = jax.random.normal(keys[2], (sizes.steps, 32, n))
    config = flora.LoraConfig(rank=r, alpha=r, target="w")
    adapted = flora.init(keys[3], config, layer, {"w": w}, x[0])
    base, adapter = flora.split(adapted)
    apply = flora.lora(layer)

    def run(size: Any, rate: Any) -> Any:
        wanted = wide + size * shift

        def loss(adapter: Any, step: Any) -> jax.Array:
            error = apply(flora.join(base, adapter), x[step]) - x[step] @ wanted
            return jnp.square(error).mean() / size**2

        def error(weight: jax.Array) -> jax.Array:
            return study.norm(weight - wanted) / study.norm(size * shift)

        end, _, _ = study.train(
            loss, adapter, study.adam_to_zero(rate, sizes.steps), sizes.steps
        )
        delta = end["w"].a @ end["w"].b
        merged = rounded(flora.merge(flora.join(base, end))["w"])
        moved = study.norm(delta) / study.norm(wide)
        return moved, error(wide + delta), error(merged)

    return study.grid(run, jnp.asarray(sizes.shifts), jnp.asarray(sizes.rates))


def run(sizes: Sizes) -> Result:
    """The two tables and the picture."""
    arrived, trained = study.over_seeds(
        lambda k: (random_change(k, sizes), trained_change(k, sizes)), sizes.seeds
    )
    rows: list[dict] = []
    for i, power in enumerate(sizes.powers):
        row: dict[str, Any] = {"size_to_W": f"2^{power}"}
        for name, found in arrived.items():
            row |= study.cells(f"{name}_error", found["error"][:, i])
            row |= study.cells(f"{name}_along", found["along"][:, i])
        row |= {"merged_unchanged": float(arrived["merged"]["unchanged"][:, i].mean())}
        rows.append(row)
    figure, (errors, along, after) = panels(3)
    sizes_of = 2.0 ** np.asarray(sizes.powers)
    for (name, found), color in zip(arrived.items(), COLORS, strict=False):
        errors.plot(
            sizes_of, found["error"].mean(axis=0), color=color, marker=".", label=name
        )
        along.plot(sizes_of, found["along"].mean(axis=0), color=color, marker=".")
    errors.plot(sizes_of, np.minimum(1, 2.0**-9 / sizes_of), "k:", label="2⁻⁹ |W|/|ΔW|")
    label(errors, "what rounding does", "|ΔW| / |W|", "error to |ΔW|")
    label(along, "how much of ΔW arrives", "|ΔW| / |W|", "along ΔW", "log")
    along.set_yscale("linear")
    errors.legend(fontsize=7)
    moved, factored, merged = trained  # [seeds, shifts, rates]
    ends: list[dict] = []
    for i, (shift, color) in enumerate(zip(sizes.shifts, COLORS, strict=False)):
        finite = np.where(np.isfinite(factored[:, i]), factored[:, i], np.inf).T
        k = study.best(finite)
        ends.append(
            {"shift_to_W": shift}
            | study.rate_cells(sizes.rates, k)
            | study.cells("change_to_W", moved[:, i, k], log=True)
            | study.cells("factored_error", factored[:, i, k], log=True)
            | study.cells("merged_error", merged[:, i, k], log=True)
        )
        for values, style in ((factored, "-"), (merged, "--")):
            line = np.where(np.isfinite(x := values[:, i].mean(axis=0)), x, np.nan)
            name = f"shift {shift:g}" if style == "-" else None
            after.plot(sizes.rates, line, style, color=color, marker=".", label=name)
    label(after, "after training (dashed: merged)", "learning rate", "error to shift")
    after.set_ylim(top=3)
    after.legend(fontsize=7)
    return Result({"rounding": rows, "trained": ends}, figure)


TEXT = Text(
    title="10. What merging in bfloat16 loses",
    claim="""
    flora's pages: merging into bfloat16 rounds small changes away (below half a unit
    in the last place); form="dithered" is right on average.
    """,
    setup="""
    A 128 by 128 weight in bfloat16. First a random ΔW of rank 8 with |ΔW|/|W| from
    2^-14 to 1, by `flora.merge` and, on the identity, by form="dithered". Then ΔW
    trained in float32 on the bfloat16 weight (200 steps of Adam with a cosine, 12
    rates) to learn a shift of 0.001, 0.01 and 0.1 of |W|, used as factors and
    merged. 5 seeds.
    """,
    captions={
        "rounding": """
    "error": |what arrives - ΔW| / |ΔW|; "along": how much of ΔW arrives along ΔW (1 is
    right); "merged unchanged": entries of W that stay.
    """,
        "trained": """
    Errors to the shift's own size at the best rate; the merged one is of the same
    factors.
    """,
    },
    verdict="""
    Holds. Merging keeps a change that is 2^-8 of W or larger nearly whole in direction
    ([[rounding | size_to_W=2^-8 | merged_along]] of it arrives, with an error of
    [[rounding | size_to_W=2^-8 | merged_error]]), half of it at 2^-10 and [[rounding |
    size_to_W=2^-14 | merged_along]] at 2^-14, where [[rounding | size_to_W=2^-14 |
    merged_unchanged]] of the entries do not move. The error is about 2^-9 |W|/|ΔW| and
    never above 1: bfloat16 merges of large changes are harmless, of small ones they
    undo the training. Dithering is right on average at every size, and its own noise is
    1.4 times larger where both work and many times ΔW where ΔW is small: it is for sums
    over many weights, not to read one. After training, factors reach [[trained |
    shift_to_W=0.01 | factored_error]] of a shift of 1 % of W and the merged weight
    [[trained | shift_to_W=0.01 | merged_error]]; at 0.1 % merging loses most of what
    little was learned ([[trained | shift_to_W=0.001 | merged_error]] against [[trained
    | shift_to_W=0.001 | factored_error]]). Serve such adapters as factors, or merge
    into float32. Beware when measuring this: inside one jitted function XLA may drop a
    rounding to bfloat16 that is widened again right away; the experiment puts a barrier
    between.
    """,
)
