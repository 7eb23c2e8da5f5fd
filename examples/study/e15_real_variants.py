"""Experiment 15: DoRA, PiSSA and LoRA+ at equal parameters, on pretrained weights."""

import functools

import _minilm as minilm
from _page import Result, Text

import flora.recipes
import flora.starts
import flora.variants

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE
# One rank more here is as many numbers as DoRA's magnitudes, at any width.
MORE = ("layer_*/query/kernel", "layer_*/value/kernel", "layer_*/up/kernel")


def arms(sizes: minilm.Sizes) -> list[list[minilm.Arm]]:
    """Two groups of arms with as many trained numbers each, LoRA first."""
    arm = functools.partial(minilm.lora_arm, sizes)
    more = {
        "rank_pattern": dict.fromkeys(MORE, 9),
        "alpha_pattern": dict.fromkeys(MORE, 18.0),  # the same scale
    }
    plus = [
        arm(f"LoRA+, λ = {ratio}", rate=rate, after=flora.recipes.lora_plus(ratio))
        for ratio, rate in ((4, 1), (16, 0))
    ]
    return [
        [minilm.standard(sizes), arm("PiSSA", then=flora.starts.pissa), *plus],
        [
            arm("LoRA, rank 8 or 9", **more),
            arm("DoRA", variant=flora.variants.DoRA()),
        ],
    ]


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    groups = [[minilm.fit(arm, sizes) for arm in group] for group in arms(sizes)]
    founds = [found for group in groups for found in group]
    tables = {
        "best": [r for g in groups for r in minilm.rows_of(g, first="LoRA")],
        "rates": minilm.rate_rows(founds),
    }
    return Result(tables, minilm.picture(founds))


TEXT = Text(
    title="15. DoRA, PiSSA, LoRA+, pretrained weights",
    claim="""
    Those of experiments 7 to 9: PiSSA learns faster, LoRA+ needs a ratio far above 1,
    DoRA is better than LoRA.
    """,
    setup="""
    The last two layers; rank 8, scale 2. DoRA has 2 × 3,456 magnitudes more; LoRA with
    rank 9 in four of a layer's six kernels has 2 × 3,072 numbers more. The rate of
    LoRA+ is that of A.
    """,
    captions={
        "best": """
    At the rate that validation chose. "to LoRA": test loss less that of the first row,
    seed by seed.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    Not run at full size yet: no verdict.
    """,
)
