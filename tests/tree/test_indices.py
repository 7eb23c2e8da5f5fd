"""Globs that name indices of a stack."""

import numpy as np
import pytest

import flora
from flora._tree.indices import Indexed, with_indices

LEAVES = [
    ("layers/attn/kernel", np.zeros((4, 3, 3))),
    ("layers/experts/kernel", np.zeros((4, 2, 3, 3))),
    ("tail/0/kernel", np.zeros((3, 3))),
    ("layers/norm/scale", np.zeros((4, 3))),
]


def chosen(glob, path="layers/attn/kernel", stack=(4,)):
    return np.argwhere(Indexed(glob).named(path, stack)).tolist()


@pytest.mark.parametrize(
    ("glob", "indices"),
    [
        ("layers/1/attn/kernel", [[1]]),
        ("layers/1/*", [[1]]),
        ("1/*", [[1]]),
        ("/layers/1/attn/kernel", [[1]]),
        ("layers/attn/kernel/1", [[1]]),
        ("layers/[02]/*", [[0], [2]]),
        ("layers/[!0]/attn/kernel", [[1], [2], [3]]),
        ("layers/11/*", []),
        ("layers/1/mlp/*", []),
        ("other/1/*", []),
    ],
)
def test_one_stacked_axis(glob, indices):
    assert chosen(glob) == indices


def test_numbers_of_two_digits():
    stack = (24,)
    assert chosen("layers/1[0-2]/*", stack=stack) == [[10], [11], [12]]
    assert chosen("layers/[0-9]/*", stack=stack) == [[i] for i in range(10)]


@pytest.mark.parametrize(
    ("glob", "indices"),
    [
        ("layers/1/experts/0/kernel", [[1, 0]]),
        ("layers/*/experts/1/kernel", [[0, 1], [1, 1], [2, 1], [3, 1]]),
        ("layers/1/experts/*/kernel", [[1, 0], [1, 1]]),
        ("layers/1/*", [[1, 0], [1, 1]]),
        ("*/experts/0/kernel", [[0, 0], [1, 0], [2, 0], [3, 0]]),
    ],
)
def test_two_stacked_axes(glob, indices):
    assert chosen(glob, "layers/experts/kernel", (4, 2)) == indices


def test_one_number_for_two_axes():
    with pytest.raises(flora.LoraError) as error:
        chosen("layers/1/experts/kernel", "layers/experts/kernel", (4, 2))
    assert "Write 'layers/1/*/experts/kernel' for the first, or" in str(error.value)
    assert "'layers/*/1/experts/kernel' for the last" in str(error.value)
    path, stack = "layers/experts/kernel", (4, 2)
    first = chosen("layers/1/*/experts/kernel", path, stack)
    assert first == [[1, 0], [1, 1]]
    last = chosen("layers/*/1/experts/kernel", path, stack)
    assert last == [[0, 1], [1, 1], [2, 1], [3, 1]]


def test_only_globs_that_match_no_leaf_are_read_again():
    given = ["layers/1/*", "tail/0/kernel", "layers/*/kernel", "nothing/1/*", "1"]
    found = with_indices(given, LEAVES)
    assert [isinstance(x, Indexed) for x in found] == [True, *[False] * 4]
    assert repr(found[0]) == "'layers/1/*'"
    assert with_indices("layers/1/*", LEAVES) == Indexed("layers/1/*")
    keep = (len, "kernel")
    assert with_indices(keep, LEAVES) == list(keep)


def test_a_leaf_without_room_for_a_stack_is_not_meant():
    assert Indexed("layers/1/*")(*LEAVES[0])
    assert not Indexed("layers/1/*")(*LEAVES[3])
    assert not Indexed("tail/1/kernel")("tail/kernel", np.zeros((3, 3)))
