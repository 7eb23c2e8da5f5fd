"""One module becomes another in place, and keeps its own objects where it can."""

import jax.numpy as jnp
from flax import nnx

from flora._nnx.carry import become
from tests.support.nnx_models import close


class Node(nnx.Module):
    def __init__(self, value, **others):
        self.w = nnx.Param(jnp.full(2, value))
        for name, x in others.items():
            setattr(self, name, x)


class Other(Node):
    """Another class."""


def test_values_classes_and_attributes_are_the_new_ones():
    old = Node(1.0, inner=Node(1.0), gone=3)
    inner, w = old.inner, old.inner.w
    new = Other(2.0, inner=Node(2.0, more=nnx.Cache(jnp.ones(3))), text="x")
    become(old, new)
    assert type(old) is Other
    assert old.inner is inner
    assert inner.w is w
    assert (old.text, hasattr(old, "gone")) == ("x", False)
    close(nnx.state(old), nnx.state(new), 0)
    assert nnx.graphdef(old) == nnx.graphdef(new)


def test_containers_of_another_length():
    old = Node(
        1.0, items=nnx.List([Node(1.0)]), data=nnx.data([nnx.Param(jnp.ones(2))])
    )
    new = Node(2.0, items=nnx.List([Node(2.0), Node(3.0)]), data=nnx.data([]))
    become(old, new)
    assert len(old.items) == 2
    assert len(old.data) == 0
    close(nnx.state(old), nnx.state(new), 0)


def test_modules_that_contain_themselves():
    old, new = Node(1.0), Node(2.0)
    old.self, new.self = old, new
    become(old, new)
    assert old.self is old
    close(old.w[...], jnp.full(2, 2.0), 0)
