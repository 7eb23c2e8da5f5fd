import re

import jax
import numpy as np

import flora
from tests.support import contract
from tests.verbs.test_init import init, params


def test_merge_and_rank_and_alpha_patterns():
    alphas = {re.compile(".*down.*"): 10}
    adapted = init(rank=2, alpha=4, rank_pattern={"up/kernel": 3}, alpha_pattern=alphas)
    adapted = contract.randomized(adapted)
    up, down = (adapted["mlp"][n]["kernel"] for n in ("up", "down"))
    assert (up.rank, up.alpha, down.rank, down.alpha) == (3, 4.0, 2, 10.0)
    merged = flora.merge(adapted)
    for w, name in ((up, "up"), (down, "down")):
        a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
        want = np.asarray(w.base, np.float64) + w.alpha / w.rank * a @ b
        np.testing.assert_allclose(merged["mlp"][name]["kernel"], want, rtol=1e-5)
    assert merged["mlp"]["up"]["bias"] is adapted["mlp"]["up"]["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(params())
