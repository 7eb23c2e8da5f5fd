import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from tests.support import contract
from tests.verbs.test_init import X, fn, init, params


def test_split_and_join():
    adapted = init(train="scale")
    base, adapter = flora.split(adapted)
    assert base["scale"] is None
    assert base["mlp"]["up"]["kernel"] is adapted["mlp"]["up"]["kernel"].base
    assert adapter["mlp"]["up"]["bias"] is None
    assert len(jax.tree.leaves(adapter)) == 5
    chex.assert_trees_all_equal(flora.join(base, adapter), adapted)
    with pytest.raises(
        flora.LoraError, match=r"other structures.*only the base has 'scale'"
    ):
        flora.join(base, {k: v for k, v in adapter.items() if k != "scale"})
    with pytest.raises(flora.LoraError, match="holds no trained leaf"):
        flora.join(adapter, jax.tree.map(lambda x: None, base))
    wrong = params() | {"scale": None}
    wrong["mlp"]["up"]["kernel"] = jnp.ones((8, 11))
    with pytest.raises(flora.LoraError, match="'mlp/up/kernel' has base"):
        flora.join(wrong, adapter)
    with pytest.raises(flora.LoraError, match="'scale' trains whole"):
        flora.join(params(), adapter)


def test_merge_and_rank_and_alpha_patterns():
    adapted = contract.randomized(init(
        rank=2,
        alpha=4,
        rank_pattern={"up/kernel": 3},
        alpha_pattern={re.compile(".*down.*"): 10},
    ))  # fmt: skip
    up, down = (adapted["mlp"][n]["kernel"] for n in ("up", "down"))
    assert (up.rank, up.alpha, down.rank, down.alpha) == (3, 4.0, 2, 10.0)
    merged = flora.merge(adapted)
    for w, name in ((up, "up"), (down, "down")):
        a, b = np.asarray(w.a, np.float64), np.asarray(w.b, np.float64)
        want = np.asarray(w.base, np.float64) + w.alpha / w.rank * a @ b
        np.testing.assert_allclose(merged["mlp"][name]["kernel"], want, rtol=1e-5)
    assert merged["mlp"]["up"]["bias"] is adapted["mlp"]["up"]["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(params())


def test_trees_of_another_shape_than_at_init():
    adapted = init()
    up = adapted["mlp"]["up"]
    wider = up["kernel"].__class__(**(vars(up["kernel"]) | {"base": jnp.ones((7, 12))}))
    tree = adapted | {"mlp": adapted["mlp"] | {"up": up | {"kernel": wider}}}
    with pytest.raises(
        flora.LoraError, match=re.escape("base (7, 12), a (7, 2) and b (2, 11)")
    ):
        flora.lora(fn)(tree, X)
    deeper = up["kernel"].__class__(
        **(vars(up["kernel"]) | {"base": jnp.ones((1, 7, 11))})
    )
    tree = adapted | {"mlp": adapted["mlp"] | {"up": up | {"kernel": deeper}}}
    with pytest.raises(flora.LoraError, match="layout is for 2 axes"):
        flora.lora(fn)(tree, X)
