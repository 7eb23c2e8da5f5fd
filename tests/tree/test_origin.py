"""Origins: the same structure whatever file a leaf came from."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np

import flora
from flora._tree.origin import Origin


def node(text="", value=1.0):
    a, b = jnp.full((4, 1), value), jnp.ones((1, 3))
    return flora.LoraWeight(None, a, b, origin=Origin(text))


def test_trees_of_several_files_have_one_structure():
    one, two, none = node("one"), node("two", 2.0), node()
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(none))
    total = jax.tree.map(jnp.add, none, two)
    np.testing.assert_array_equal(total.a, np.full((4, 1), 3.0))
    traces = []

    @jax.jit
    def step(x):
        traces.append(x)
        return jax.tree.map(lambda y: 2 * y, x)

    assert step(one).origin.text == "one"
    step(none)
    assert len(traces) == 1
    # The function gives the first one's; that it was taken for another is known.
    assert step(two).origin.texts == ("one", "two")
    assert two.origin.texts == ("two", "one")
    assert node().origin.texts == ()


def test_it_is_kept():
    adapter = {"w": node("here"), "v": flora.Trained(jnp.ones(2), Origin("there"))}
    for same in (
        jax.tree.map(lambda x: x + 1, adapter),
        flora.split(flora.join({"w": jnp.ones((4, 3)), "v": None}, adapter))[1],
        copy.deepcopy(adapter),
        pickle.loads(pickle.dumps(adapter)),
        jax.eval_shape(lambda x: x, adapter),
        jax.grad(lambda x: (x["w"].a ** 2).sum() + x["v"].value.sum())(adapter),
    ):
        assert same["w"].origin.text == "here"
        assert same["v"].origin.text == "there"


def test_it_is_in_files(tmp_path):
    base = {"w": jnp.ones((4, 3)), "v": jnp.ones(2)}
    adapter = {"w": node("here"), "v": flora.Trained(jnp.ones(2), Origin("there"))}
    adapted = flora.join(base | {"v": None}, adapter)
    flora.save(tmp_path / "a.safetensors", adapted)
    loaded = flora.load(tmp_path / "a.safetensors", base)
    assert loaded["w"].origin.text == "here"
    assert loaded["v"].origin.text == "there"
