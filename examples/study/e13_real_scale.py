"""Experiment 13: alpha/rank against alpha/√rank, on pretrained weights."""

import math

import _minilm as minilm
import _scale as scale
from _page import Result, Text

FULL, SMOKE = minilm.Sizes(), minilm.SMOKE


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    founds = {}
    for rule in scale.RULES:
        for rank in scale.RANKS:
            if rank == 8:  # the same for both
                arm = minilm.standard(sizes)
            else:
                name, alpha = f"rank {rank}, {rule}", scale.alpha(rule, rank)
                arm = minilm.lora_arm(sizes, name, rank=rank, alpha=alpha)
            founds[rule, rank] = minilm.fit(arm, sizes)
    each = list({id(f): f for f in founds.values()}.values())
    order = sorted(each, key=lambda f: not math.isclose(f.trained, each[1].trained))
    tables = {
        "best": minilm.rows_of(order, first="rank_8"),
        "exponents": scale.exponents(lambda *key: minilm.own_best(founds[key])),
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
    captions=scale.CAPTIONS,
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
