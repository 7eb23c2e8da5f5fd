import chex
import jax
import jax.numpy as jnp
import pytest

import flora
from tests.verbs.test_init import init, params


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
