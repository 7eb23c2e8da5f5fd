"""What experiments 13 and 17 share: alpha/rank against alpha/√rank, over ranks."""

from collections.abc import Callable
from typing import Any

import _study as study
from _page import Row

RANKS = (1, 8, 64)
RULES = {"alpha/rank": 1.0, "alpha/√rank": 0.5}
CAPTIONS = {
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
}


def alpha(rule: str, rank: int) -> float:
    """The alpha of a rank; the scale, alpha/rank, is 2 at rank 8 under both rules."""
    return 2 * (8 / rank) ** RULES[rule] * rank


def exponents(own_best: Callable[[str, int], Any]) -> list[Row]:
    """A row a rule: p of rank^p, of each seed's own best rate `[seeds]` by rank."""
    slopes = {
        rule: study.exponent(RANKS, [own_best(rule, rank) for rank in RANKS])
        for rule in RULES
    }
    return [
        {"rule": rule} | study.cells("best_rate_exponent", slope)
        for rule, slope in slopes.items()
    ]
