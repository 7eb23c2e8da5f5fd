"""Experiment 15: DoRA, PiSSA and LoRA+ at equal parameters, on pretrained weights."""

import _minilm as minilm
from _page import Result, Text

import flora.recipes
import flora.starts
import flora.variants

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE
# One rank more where in + out comes nearest to the number of DoRA's magnitudes.
MORE = ("layer_*/query/kernel", "layer_*/key/kernel", "layer_*/value/kernel",
        "layer_*/out/kernel")  # fmt: skip


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    more = dict.fromkeys(MORE, 9)
    alphas = dict.fromkeys(MORE, 18.0)  # the same scale
    arms = [
        minilm.standard(sizes),
        minilm.lora_arm(
            sizes, "LoRA, rank 8 or 9", rank_pattern=more, alpha_pattern=alphas
        ),
        minilm.lora_arm(sizes, "DoRA", variant=flora.variants.DoRA()),
        minilm.lora_arm(sizes, "PiSSA", then=flora.starts.pissa),
        minilm.lora_arm(sizes, "LoRA+, λ = 16", after=flora.recipes.lora_plus(16.0)),
    ]
    founds = [minilm.fit(arm, sizes) for arm in arms]
    tables = {
        "best": minilm.rows_of(founds, first="LoRA"),
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
