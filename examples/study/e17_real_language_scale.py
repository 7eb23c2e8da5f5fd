"""Experiment 17: alpha/rank against alpha/√rank, in a language model."""

from typing import Any

import _minilm as minilm
import _scale as scale
import _smollm2 as smollm2
import _study as study
from _page import Result, Text

FULL, SMOKE = smollm2.FULL, smollm2.SMOKE
BEGIN = {("alpha/√rank", 64): 1}  # where the search of the rate begins, if not at 2


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    eight = smollm2.fit(smollm2.arm(sizes, "rank 8"), sizes)  # the same for both
    founds = {(rule, 8): eight for rule in scale.RULES}
    for rule in scale.RULES:
        for rank in scale.RANKS:
            if rank != 8:
                more = {
                    "alpha": scale.alpha(rule, rank),
                    "rate": BEGIN.get((rule, rank), 2),
                }
                arm = smollm2.arm(sizes, f"rank {rank}, {rule}", rank=rank, **more)
                founds[rule, rank] = smollm2.fit(arm, sizes)

    def own_best(*key: Any) -> Any:
        return study.own_best(founds[key].rates, founds[key].validation)

    each = [eight, *(found for found in founds.values() if found is not eight)]
    tables = smollm2.rows_of(each, "arm") | {"exponents": scale.exponents(own_best)}
    return Result(tables, smollm2.picture(each))


TEXT = Text(
    title="17. alpha/rank or alpha/√rank, a language model",
    claim="""
    Those of experiments 2 and 13: alpha/rank, or alpha/√rank, makes the learning rate
    carry over between ranks; and of rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): high
    ranks need alpha/√rank to be of use.
    """,
    setup="""
    Model, chats and training of experiment 16, started as is standard. The scale is 2
    at rank 8 and follows one rule or the other to rank 1 (16 or 5.7) and 64 (0.25 or
    0.71).
    """,
    captions=scale.CAPTIONS,
    verdict="""
    alpha/rank, as in experiments 2 and 13: the best rate goes as rank^[[exponents |
    rule=alpha/rank | best_rate_exponent]] under alpha/rank, whose interval is narrow
    about 0, and as rank^[[exponents | rule=alpha/√rank | best_rate_exponent]] under
    alpha/√rank, where three seeds do not exclude 0. What a rate does to the other text
    says it clearly. At 0.003 its perplexity at rank 1, 8 and 64 is [[rates | arm=rank
    1, alpha/rank; rate=0.003 | perplexity]], [[rates | arm=rank 8; rate=0.003 |
    perplexity]] and [[rates | arm=rank 64, alpha/rank; rate=0.003 | perplexity]] under
    alpha/rank, and [[rates | arm=rank 1, alpha/√rank; rate=0.003 | perplexity]],
    [[rates | arm=rank 8; rate=0.003 | perplexity]] and [[rates | arm=rank 64,
    alpha/√rank; rate=0.003 | perplexity]] under alpha/√rank. rsLoRA's claim does not
    show: under alpha/√rank rank 64 ends [[best | arm=rank 64, alpha/√rank |
    to_rank_8]] nats from rank 8, and rank 1 [[best | arm=rank 1, alpha/√rank |
    to_rank_8]]; both intervals have 0 in them, and what either gains it pays for in the
    other text ([[best | arm=rank 64, alpha/√rank | perplexity]] and [[best | arm=rank
    1, alpha/√rank | perplexity]], after [[best | arm=rank 8 | perplexity]] at rank 8).
    Rank 1 is enough for 128 chats and 16 steps; a task that needs a high rank could
    tell more.
    """,
)
