"""Which axes of a weight are stacked, contracted and produced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora import Layout

EXPERTS = Layout((2,), (3, 0), (1,))


def test_the_default_is_a_dense_kernel():
    assert Layout() == Layout((), (0,), (1,))
    assert str(Layout()) == "in=0 out=1"


def test_what_it_says_of_a_shape():
    shape = (5, 7, 3, 2)
    assert EXPERTS.sizes(shape) == ((3,), (2, 5), (7,))
    assert EXPERTS.factor_shapes(shape, 4) == ((3, 2, 5, 4), (3, 4, 7))
    assert [EXPERTS.role(i) for i in range(4)] == ["in", "out", "stack", "in"]
    assert str(EXPERTS) == "stack=2 in=3,0 out=1"
    assert EXPERTS.sizes((0, 7, 3, 1)) == ((3,), (1, 0), (7,))


@pytest.mark.parametrize(
    ("layout", "ndim", "fits"),
    [
        (EXPERTS, 4, True),
        (EXPERTS, 3, False),  # an axis too many
        (EXPERTS, 5, False),  # an axis that is not named
        (Layout((0,), (1,), (1,)), 3, False),  # one twice
        (Layout((0,), (1,), (1,)), 2, False),
        (Layout((), (0, 1), ()), 2, False),
        (Layout((0, 1), (), ()), 2, False),
        (Layout((), (-2,), (-1,)), 2, False),
        (Layout((), (), ()), 0, False),
    ],
)
def test_whether_it_names_each_axis_once(layout, ndim, fits):
    assert layout.fits(ndim) is fits


@pytest.mark.parametrize("field", ["stack", "in_", "out"])
@pytest.mark.parametrize("axes", [0, None, "01", (0.0,), (True,), (None,), {0: 1}])
def test_axes_of_the_wrong_kind(field, axes):
    with pytest.raises(flora.LoraError, match=rf"Layout: {field}=.*Write a tuple of"):
        Layout(**{field: axes})
    with pytest.raises(TypeError):
        Layout(**{field: np.array([0])})


def test_a_layout_of_lists_is_hashable_and_the_same():
    made = Layout([2], [3, 0], [1])
    assert made == EXPERTS
    assert hash(made) == hash(EXPERTS)
    assert made != Layout((2,), (0, 3), (1,))  # the order is that of A's axes


def test_a_layout_is_part_of_a_tree_s_structure():
    def node(layout):
        return flora.LoraWeight(*map(jnp.ones, ((4, 4), (4, 2), (2, 4))), layout=layout)

    one, other = node(Layout()), node(Layout((), (1,), (0,)))
    assert jax.tree.structure(one) == jax.tree.structure(node(Layout([], [0], [1])))
    assert jax.tree.structure(one) != jax.tree.structure(other)
