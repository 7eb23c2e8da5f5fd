"""Experiment 14: LoRA on a base in fewer bits, on pretrained weights."""

import functools
from typing import Any

import _minilm as minilm
from _page import Result, Text

import flora.quantize

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE
KINDS = {"int8": None, "nf4": 64}  # neighbors that share a scale; an output else


def rounded(sizes: minilm.Sizes, kind: str) -> dict[str, Any]:
    """What rounding alone does, before anything trains."""
    quantize = quantizer(sizes, kind)
    variables = minilm.world(sizes).variables
    found = minilm.embedding(sizes)(quantize(variables))
    kept = minilm.similarity(minilm.before_training(sizes), found)
    near = minilm.neighbors(found, minilm.world(sizes).other.labels)
    return {"base": kind, "similarity": kept, "same_editorial": near}


def quantizer(sizes: minilm.Sizes, kind: str) -> Any:
    """Codes the kernels of the layers."""
    block = 16 if sizes.random and KINDS[kind] else KINDS[kind]
    return functools.partial(
        flora.quantize.quantize, qtype=kind, target=minilm.KERNELS, block=block
    )


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    arms = [minilm.standard(sizes)]
    arms += [
        minilm.lora_arm(
            sizes, f"LoRA on {kind}", before=quantizer(sizes, kind), form="direct"
        )
        for kind in KINDS
    ]
    founds = [minilm.fit(arm, sizes) for arm in arms]
    tables = {
        "best": minilm.rows_of(founds, first="float32"),
        "rounding": [rounded(sizes, kind) for kind in KINDS],
        "rates": minilm.rate_rows(founds),
    }
    return Result(tables, minilm.picture(founds))


TEXT = Text(
    title="14. A base in fewer bits, pretrained weights",
    claim="""
    QLoRA (arXiv 2305.14314): LoRA on a base of four bits ends where LoRA on the whole
    weights does.
    """,
    setup="""
    The last two layers; rank 8, alpha 16. The kernels of these layers are in int8, one
    scale an output, or in nf4, one scale for 64 neighbors along in; the layers below
    stay in float32.
    """,
    captions={
        "best": """
    At the rate that validation chose. "to float32": test loss less that of LoRA on
    float32, seed by seed.
    """,
        "rounding": """
    Before anything trains.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    Nothing is lost that this can resolve: LoRA on int8 ends [[best | arm=LoRA on int8 |
    to_float32]] nats from LoRA on float32 and on nf4 [[best | arm=LoRA on nf4 |
    to_float32]]. Rounding alone, before anything trains, keeps a similarity of
    [[rounding | base=int8 | similarity]] and [[rounding | base=nf4 | similarity]];
    after training [[best | arm=LoRA on int8 | similarity]] and [[best | arm=LoRA on nf4
    | similarity]] are left, of float32 [[best | arm=LoRA, rank 8 | similarity]]. Only
    two of six layers are in fewer bits here, and the model is small: of how four bits
    do throughout a large one this says little. The toys had no experiment of this.
    """,
)
