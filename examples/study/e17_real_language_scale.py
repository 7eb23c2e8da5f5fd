"""Experiment 17: alpha/rank against alpha/√rank, in a language model."""

import _minilm as minilm
import _smollm2 as smollm2
import _study as study
from _page import Result, Text

FULL, SMOKE = smollm2.FULL, smollm2.SMOKE
RANKS = (1, 8, 64)
# The scale is 2 at rank 8 under both.  Where the search of the rate begins, by rank.
RULES = {"alpha/rank": (1.0, (2, 2, 2)), "alpha/√rank": (0.5, (2, 2, 1))}


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    eight = smollm2.fit(smollm2.arm(sizes, "rank 8"), sizes)  # the same for both
    founds, rows = [eight], []
    for rule, (power, begin) in RULES.items():
        own = []
        for rank, rate in zip(RANKS, begin, strict=True):
            found = eight
            if rank != 8:
                name, alpha = f"rank {rank}, {rule}", 2 * (8 / rank) ** power * rank
                arm = smollm2.arm(sizes, name, rank=rank, alpha=alpha, rate=rate)
                found = smollm2.fit(arm, sizes)
                founds.append(found)
            own.append(study.own_best(found.rates, found.validation))
        slope = study.exponent(RANKS, own)
        rows.append({"rule": rule} | study.cells("best_rate_exponent", slope))
    tables = smollm2.rows_of(founds, "arm") | {"exponents": rows}
    return Result(tables, smollm2.picture(founds))


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
