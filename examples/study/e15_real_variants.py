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
    Those of experiments 7 to 9: PiSSA learns faster than LoRA, LoRA+ needs a ratio λ
    far above 1, DoRA is better at equal parameters.
    """,
    setup="""
    The last two layers; rank 8, scale 2. PiSSA and LoRA+ train as many numbers as LoRA
    of rank 8. DoRA has a magnitude an output more, and is compared with LoRA that
    spends exactly as many on rank 9 in three of a layer's six kernels. The rate of
    LoRA+ is that of A and of the head; that of B is λ times as high.
    """,
    captions={
        "best": """
    At the rate that validation chose. "to LoRA": test loss less that of the LoRA with
    as many trained numbers, seed by seed.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    No variant ends better than LoRA with as many trained numbers, and none is told
    apart from it: PiSSA is [[best | arm=PiSSA | to_LoRA]] nats from it, LoRA+ [[best |
    arm=LoRA+, λ = 4 | to_LoRA]] (λ = 4) and [[best | arm=LoRA+, λ = 16 | to_LoRA]]
    (16), DoRA [[best | arm=DoRA | to_LoRA]], and every interval has 0 in it. DoRA: as
    in the toy. Up to the rate 0.003 it does what LoRA of rank 8 does, to within 0.001
    nats at each rate; that it stands larger rates, as the toy's did, is not resolved
    (at 0.01 [[rates | arm=DoRA; rate=0.01 | test_loss]] against [[rates | arm=LoRA,
    rank 8; rate=0.01 | test_loss]]). LoRA+: no gain, as in the toy. What is kept of the
    encoder follows the rate of B, whatever that of A: at 0.001 for B LoRA keeps a
    similarity of [[rates | arm=LoRA, rank 8; rate=0.001 | similarity]], at 0.0012 (λ =
    4) LoRA+ [[rates | arm=LoRA+, λ = 4; rate=0.0003 | similarity]], at 0.0016 (λ = 16)
    [[rates | arm=LoRA+, λ = 16; rate=0.0001 | similarity]]. So a ratio above 1 comes to
    a lower rate of A, which neither helps nor harms in 24 steps. PiSSA: its best rate
    is lower, [[best | arm=PiSSA | rate]] against [[best | arm=LoRA, rank 8 | rate]]. At
    0.0003 it is ahead (validation loss [[rates | arm=PiSSA; rate=0.0003 |
    validation_loss]] against [[rates | arm=LoRA, rank 8; rate=0.0003 |
    validation_loss]]), which is faster in a sense, but LoRA with a larger rate makes up
    for it. At one rate PiSSA also forgets more (similarity at 0.003: [[rates |
    arm=PiSSA; rate=0.003 | similarity]] against [[rates | arm=LoRA, rank 8; rate=0.003
    | similarity]]): its factors start large, so the same step moves the weight further.
    The toy's PiSSA won by far where the shift lies inside the top of W and lost by far
    on random ones, in one linear layer with exact gradients; here neither is seen, and
    where this task's shift lies is not known.
    """,
)
