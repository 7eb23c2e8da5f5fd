"""From a call to a jaxpr: arrays become inputs, everything else stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora._trace.stage import filled, stage
from flora._tree.arrays import shown

W, B = jnp.ones((4, 3)), jnp.ones(3)


def staged(fn, tree, *args, **kwargs):
    leaves, treedef = jax.tree.flatten(tree)
    return stage(fn, leaves, treedef, args, kwargs, verb="test")


def inputs_of(found):
    return [shown(v.aval) for v in found.jaxpr.jaxpr.invars]


def test_arrays_become_inputs_and_the_rest_reaches_the_function():
    seen = {}

    def fn(tree, x, flag, names, *, scale, table):
        seen.update(tree=tree, flag=flag, names=names, scale=scale, table=table)
        return {"y": x @ tree["w"] * scale, "names": names}

    table = np.arange(3)
    tree = {"label": "abc", "n": 2, "w": W, "z": np.ones(2, np.float32)}
    found = staged(
        fn, tree, jnp.ones((2, 4)), True, ("a", None), scale=jnp.float32(2), table=table
    )
    # Of the tree NumPy's arrays too; of the other arguments JAX's alone.
    assert inputs_of(found) == [
        "float32[4,3]",
        "float32[2]",
        "float32[2,4]",
        "float32[]",
    ]
    assert found.tree_inputs == [None, None, 0, 1]
    assert [x.shape for x in found.args] == [(2, 4), ()]
    assert isinstance(seen["tree"]["w"], jax.core.Tracer)
    assert seen["tree"] | {"w": 0, "z": 0} == {"label": "abc", "n": 2, "w": 0, "z": 0}
    assert (seen["flag"], seen["names"]) == (True, ("a", None))
    assert seen["table"] is table
    assert isinstance(seen["scale"], jax.core.Tracer)
    assert found.outputs == ["['y']"]
    done = found.finish(["y"])
    assert done == {"y": "y", "names": ("a", None)}


def test_outputs_keep_their_structure_and_what_is_no_array():
    def fn(tree, x):
        return {
            "y": (x @ tree, [x]),
            "n": 3,
            "none": None,
            "np": np.float32(1),
            "w": tree,
        }

    found = staged(fn, W, jnp.ones((2, 4)))
    assert found.outputs == ["['w']", "['y'][0]", "['y'][1][0]"]
    done = found.finish(["w", "y0", "y1"])
    assert done == {
        "y": ("y0", ["y1"]), "n": 3, "none": None, "np": np.float32(1), "w": "w",
    }  # fmt: skip
    assert type(done["np"]) is np.float32


def test_outputs_that_are_inputs_are_the_same_variables():
    found = staged(lambda tree, x: (tree["w"], x, tree["w"]), {"w": W, "b": B}, B)
    jaxpr = found.jaxpr.jaxpr
    assert found.tree_inputs == [0, 1]
    w, x, again = jaxpr.outvars
    assert w is again is jaxpr.invars[1]
    assert x is jaxpr.invars[2]


def test_the_function_runs_once_and_abstractly():
    calls = []

    def fn(tree, x):
        calls.append(isinstance(x, jax.core.Tracer))
        return x @ tree

    shapes = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    found = staged(fn, jax.ShapeDtypeStruct((4, 3), jnp.float32), shapes)
    assert calls == [True]
    assert inputs_of(found) == ["float32[4,3]", "float32[2,4]"]
    assert found.args == [shapes]


@pytest.mark.parametrize("tree", [{}, None, [], {"label": "abc"}])
def test_trees_without_arrays(tree):
    found = staged(lambda tree, x: (tree, x + 1), tree, B)
    assert [k for k in found.tree_inputs if k is not None] == []
    assert inputs_of(found) == ["float32[3]"]
    assert found.finish([4]) == (tree, 4)


def test_functions_of_no_array_and_zero_sizes():
    found = staged(lambda tree: (tree, "out"), 3)
    assert found.jaxpr.jaxpr.eqns == []
    assert found.outputs == []
    assert found.finish([]) == (3, "out")
    found = staged(lambda tree: tree.sum(0), jnp.ones((0, 3)))
    assert inputs_of(found) == ["float32[0,3]"]


def test_tracers_and_closures_are_constants_of_the_jaxpr():
    def outer(w, x):
        found = staged(lambda tree: tree @ w, x)
        assert len(found.jaxpr.jaxpr.invars) == 1
        return jax.core.eval_jaxpr(found.jaxpr.jaxpr, found.jaxpr.consts, x)

    (got,) = jax.jit(outer)(W, jnp.ones((2, 4)))
    assert (got == 4).all()


def test_filled():
    assert filled("abcd", [3, 1], [1, 2]) == ["a", 2, "c", 1]
    assert filled([], [], []) == []
    values = [1, 2]
    assert filled(values, [0], [9]) == [9, 2]
    assert values == [1, 2]
    with pytest.raises(ValueError, match="zip"):
        filled("abcd", [3, 1], [1])
