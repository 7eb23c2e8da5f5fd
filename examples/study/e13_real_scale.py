"""Experiment 13: alpha/rank against alpha/√rank, on pretrained weights."""

import math

import _minilm as minilm
import _study as study
import numpy as np
from _page import Result, Text

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE
RANKS = (1, 8, 64)
# The scale is 2 at rank 8 under both.
RULES = {"alpha/rank": 1.0, "alpha/√rank": 0.5}


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    founds = {}
    for rule, power in RULES.items():
        for rank in RANKS:
            scale = 2 * (8 / rank) ** power
            name = f"rank {rank}, {rule}"
            if rank == 8:  # the same for both
                founds[rule, rank] = minilm.fit(minilm.standard(sizes), sizes)
                continue
            arm = minilm.lora_arm(sizes, name, rank=rank, alpha=scale * rank)
            founds[rule, rank] = minilm.fit(arm, sizes)
    rows = []
    for rule in RULES:
        own = np.stack([minilm.own_best(founds[rule, rank]) for rank in RANKS])
        slope = study.exponent(RANKS, own)
        rows.append({"rule": rule} | study.cells("best_rate_exponent", slope))
    each = list({id(f): f for f in founds.values()}.values())
    order = sorted(each, key=lambda f: not math.isclose(f.trained, each[1].trained))
    tables = {
        "best": minilm.rows_of(order, first="rank_8"),
        "exponents": rows,
        "rates": minilm.rate_rows(each),
    }
    return Result(tables, minilm.picture(each))


TEXT = Text(
    title="13. alpha/rank or alpha/√rank, pretrained weights",
    claim="""
    Those of experiment 2: alpha/rank, or alpha/√rank, makes the learning rate carry
    over between ranks.
    """,
    setup="""
    The last two layers, Adam. The scale is 2 at rank 8 and follows one rule or the
    other to rank 1 (16 or 5.7) and 64 (0.25 or 0.71).
    """,
    captions={
        "best": """
    At the rate that validation chose. "to rank 8": test loss less that of rank 8, seed
    by seed.
    """,
        "exponents": """
    p of rank^p for each seed's own best rate, between grid points; 0 lets a rate carry
    over.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    With Adam it is alpha/rank, as in the toy (its exponents are 0.118 and -0.16):
    under alpha/rank the best rate goes as rank^[[exponents | rule=alpha/rank |
    best_rate_exponent]], under alpha/√rank as rank^[[exponents | rule=alpha/√rank |
    best_rate_exponent]]. With three seeds neither interval excludes 0, but what a rate
    does to the encoder says it clearly: at rate 0.001 the similarity kept at rank 1, 8
    and 64 is [[rates | arm=rank 1, alpha/rank; rate=0.001 | similarity]], [[rates |
    arm=LoRA, rank 8; rate=0.001 | similarity]] and [[rates | arm=rank 64, alpha/rank;
    rate=0.001 | similarity]] under alpha/rank, and [[rates | arm=rank 1, alpha/√rank;
    rate=0.001 | similarity]], [[rates | arm=LoRA, rank 8; rate=0.001 | similarity]] and
    [[rates | arm=rank 64, alpha/√rank; rate=0.001 | similarity]] under alpha/√rank. At
    the chosen rates no rank and no rule is told apart by its loss: rank 1 is enough
    for this task and so few sentences, and rsLoRA's claim that high ranks need
    alpha/√rank to be of use cannot show here.
    """,
)
