import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flora._tree.paths import check_pattern, matches, named_leaves
from flora._tree.selection import nothing_selected

PATHS = [
    "params/layers_0/attention/query/kernel",
    "params/layers_0/attention/query/bias",
    "params/layers_0/mlp/up/kernel",
    "params/layers_1/mlp/up/kernel",
    "params/head/kernel",
]
QUERY, BIAS, UP_0, UP_1, HEAD = PATHS


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("kernel", [QUERY, UP_0, UP_1, HEAD]),
        ("*/kernel", [QUERY, UP_0, UP_1, HEAD]),
        ("attention/*/kernel", [QUERY]),
        ("attention/*", [QUERY, BIAS]),
        ("layers_[01]/mlp/*", [UP_0, UP_1]),
        ("params/head/kernel", [HEAD]),
        ("*", PATHS),
        ("ernel", []),
        ("up", []),
        (re.compile(r".*layers_\d/mlp/up/kernel"), [UP_0, UP_1]),
        (re.compile("kernel"), []),
        (["head/*", re.compile(".*bias")], [BIAS, HEAD]),
        (lambda path, leaf: leaf > 3, [HEAD]),
        ((), []),
    ],
)
def test_matches(pattern, selected):
    leaves = dict(zip(PATHS, np.arange(5.0), strict=True))
    assert [p for p, x in leaves.items() if matches(pattern, p, x)] == selected
    check_pattern("target", pattern)


def test_nothing_selected_names_the_nearest():
    message = nothing_selected("target", "layers_0/attn/query/kernel", PATHS)
    assert f"Closest: '{QUERY}'" in message
    message = nothing_selected("target", re.compile(".*q_proj/weight"), PATHS)
    assert "target='.*q_proj/weight' selects none of the 5 leaves." in message
    assert "Flax names linear weights 'kernel'." in message


def test_a_folder_of_leaves():
    message = nothing_selected("train", "head", PATHS)
    assert "To select what is below, write 'head/*'." in message


def test_boxes_are_not_part_of_the_path():
    boxed = {"kernel": nn.Partitioned(jnp.ones(2), ("x",)), "value": jnp.ones(3)}
    assert [p for p, _ in named_leaves(boxed)[0]] == ["kernel", "value"]
    _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert [p for p, _ in named_leaves(state)[0]] == ["bias", "kernel"]
    listed = {"layers": [jnp.ones(2), (jnp.ones(3),)]}
    assert [p for p, _ in named_leaves(listed)[0]] == ["layers/0", "layers/1/0"]
    assert jax.tree.leaves(named_leaves(listed)[1].unflatten([1, 2])) == [1, 2]
