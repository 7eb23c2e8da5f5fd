"""How factors start.  An initializer maps `(key, a_shape, b_shape, dtype)` to (A, B).

It draws one matrix pair, `a` `[in, rank]` and `b` `[rank, out]`; `flora.init` maps it
over stack axes and folds the in and out axes back.

Libraries that all say "LoRA" draw A with other variances, and so train other models at
one learning rate.  In flora's names:

    loralib, PEFT's default     uniform("peft")       1/(3·in)
    flora's default             gaussian("peft")      1/(3·in)
    qwix                        uniform("qwix")       2/in, 2.45 times the std of PEFT
    PEFT's "gaussian"           by_rank()             1/rank², whatever in is
    PEFT's "orthogonal"         orthogonal()          1/200, of A and of B
"""

from flora._tree.initializers import (
    VARIANCES,
    Initializer,
    a_zero,
    both_random,
    both_zero,
    by_rank,
    gaussian,
    orthogonal,
    uniform,
)

__all__ = [
    "VARIANCES",
    "Initializer",
    "a_zero",
    "both_random",
    "both_zero",
    "by_rank",
    "gaussian",
    "orthogonal",
    "uniform",
]
