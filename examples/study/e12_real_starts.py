"""Experiment 12: how A and B start, on pretrained weights."""

import _minilm as minilm
from _page import Result, Text

import flora.initializers as init

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    arms = [
        minilm.standard(sizes),
        minilm.lora_arm(sizes, "reversed", init=init.a_zero()),
        minilm.lora_arm(sizes, "both random", init=init.both_random()),
    ]
    founds = [minilm.fit(arm, sizes) for arm in arms]
    tables = {
        "best": minilm.rows_of(founds, first="standard"),
        "rates": minilm.rate_rows(founds),
    }
    return Result(tables, minilm.picture(founds))


TEXT = Text(
    title="12. How A and B start, pretrained weights",
    claim="""
    Those of experiment 1: with A = 0 and B random the model is poorer, both random is
    unsuitable, and the standard start stands larger rates.
    """,
    setup="""
    The last two layers; LoRA of rank 8, alpha 16. Every start has its own rate.
    """,
    captions={
        "best": """
    At the rate that validation chose. "to standard": test loss less that of the
    standard start, seed by seed.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    The toy's order of losses is not seen at this width (384) with three seeds:
    reversed ends [[best | arm=reversed | to_standard]] nats from standard and both
    random [[best | arm=both random | to_standard]], and neither interval excludes
    0. What the toy said of rates holds: the chosen one is [[best | arm=LoRA, rank 8
    | rate]] for standard and [[best | arm=reversed | rate]] for reversed, which at
    the same rate has moved the encoder further. What the toy could not show is the
    old behavior. Standard keeps a similarity of [[best | arm=LoRA, rank 8 |
    similarity]], reversed [[best | arm=reversed | similarity]], both random [[best
    | arm=both random | similarity]]: its first output is not the pretrained
    encoder's, and training on the new task does not bring the old one back. So
    "unsuitable" is right of both random where the pretrained behavior is wanted,
    though the loss on the new task does not show it.
    """,
)
