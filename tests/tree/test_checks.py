import re

import jax.numpy as jnp
import pytest

import flora
from tests.verbs.test_init import X, fn, init


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
