"""How factors start.  An initializer maps `(key, a_shape, b_shape, dtype)` to (A, B).

It draws one pair of matrices, `a` `[in, rank]` and `b` `[rank, out]`; `flora.init` maps
it over the stack axes and reshapes to the weight's in and out axes.

Libraries draw A with different variances, so the same learning rate trains different
models.  In flora's names:

    loralib, PEFT's default     uniform("peft")       1/(3·in)
    flora's default             gaussian("peft")      1/(3·in)
    qwix                        uniform("qwix")       2/in, 2.45 times the std of PEFT
    PEFT's "gaussian"           by_rank()             1/rank², independent of in
    PEFT's "orthogonal"         orthogonal()          1/200, of A and of B
    PEFT's embeddings           embedding()           A = 0 and 1, of B

`peft()` is PEFT's start for every kind of leaf, embeddings too: with it a learning rate
found with PEFT is one for the same start.
"""

from flora._tree.initializers import (
    VARIANCES,
    Initializer,
    a_zero,
    both_random,
    both_zero,
    by_rank,
    embedding,
    gaussian,
    orthogonal,
    peft,
    uniform,
)

__all__ = [
    "VARIANCES",
    "Initializer",
    "a_zero",
    "both_random",
    "both_zero",
    "by_rank",
    "embedding",
    "gaussian",
    "orthogonal",
    "peft",
    "uniform",
]
