"""The node: a pytree that holds anything, and says nothing until it is used."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.weight import (
    Product,
    base_of,
    is_leaf,
    is_node,
    on_parts,
    parts_of,
    product_of,
    trained_parts,
)
from flora.quantize import Quantized
from flora.variants import DoRA, VeRA

STRUCT = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)


def node(base=None, **fields):
    """A weight of 4×3 and rank 2."""
    base = jnp.ones((4, 3)) if base is None else base
    settings = {"rank": 2, "alpha": 6.0} | fields
    return flora.LoraWeight(base, jnp.ones((4, 2)), 2 * jnp.ones((2, 3)), **settings)


def test_leaves_come_in_the_order_of_the_fields_and_settings_are_structure():
    key, extra = jax.random.key(0), {"m": jnp.ones(3), "e": jnp.ones(2)}
    w = node(key=key, extra=extra)
    leaves, treedef = jax.tree.flatten(w)
    wanted = [w.base, w.a, w.b, key, extra["e"], extra["m"]]
    assert all(x is y for x, y in zip(leaves, wanted, strict=True))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(w)]
    assert paths == [".base", ".a", ".b", ".key", ".extra['e']", ".extra['m']"]
    assert treedef.unflatten(leaves) == w
    changed = {
        "layout": flora.Layout((), (1,), (0,)), "rank": 3, "alpha": 1.0,
        "rank_stabilized": True, "dropout": 0.5, "fallback": "materialize",
        "form": "concat", "start": "flora.starts.pissa", "variant": DoRA(),
        "blocks": (flora.Block((), 0, 1, 2.0),),
    }  # fmt: skip
    settings = {f.name for f in dataclasses.fields(w)}
    apart = {"base", "a", "b", "key", "extra", "origin"}
    assert settings - apart == set(changed)
    for name, value in changed.items():
        other = dataclasses.replace(w, **{name: value})
        assert jax.tree.structure(other) != treedef, name
        assert jax.tree.map(lambda x: x, other) == other


HELD = {
    "None": None,
    "labels": "frozen",
    "numbers": 0.5,
    "NumPy": np.zeros((9, 9)),
    "shapes": STRUCT,
    "objects": object(),
    "tuples": (1, (2, 3)),
}


@pytest.mark.parametrize("name", HELD)
def test_it_holds_whatever_stands_for_an_array(name):
    held = HELD[name]
    w = flora.LoraWeight(held, held, held, key=held, extra={"d": held})
    again = jax.tree.map(lambda x: x, w, is_leaf=lambda x: x is held)
    for x in (again.base, again.a, again.b, again.key, again.extra["d"]):
        assert x is held
    assert repr(w).startswith("LoraWeight(")
    assert jax.tree.map(lambda _: 1, node(extra=None)).b == 1


def test_tracers_pass_through_transformations():
    w = node()
    got = jax.jit(lambda w: dataclasses.replace(w, a=2 * w.a))(w)
    assert (got.a == 2).all()
    assert (got.layout, got.rank) == (w.layout, w.rank)
    stacked = jax.vmap(lambda a: dataclasses.replace(w, a=a))(jnp.zeros((5, 4, 2)))
    assert stacked.a.shape == (5, 4, 2)
    assert stacked.base.shape == (5, 4, 3)
    assert jax.eval_shape(lambda: w).base == jax.ShapeDtypeStruct((4, 3), jnp.float32)


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilized", "scale"),
    [(8, 16.0, False, 2.0), (8, 16.0, True, 16 / math.sqrt(8)), (1, 0.5, True, 0.5)],
)
def test_scale(rank, alpha, stabilized, scale):
    assert node(rank=rank, alpha=alpha, rank_stabilized=stabilized).scale == scale


def test_how_it_prints():
    assert repr(node()) == "LoraWeight(float32[4,3], in=0 out=1, rank=2, scale=3)"
    adapter = dataclasses.replace(node(), base=None, variant=DoRA())
    assert repr(adapter) == "LoraWeight(adapter, in=0 out=1, rank=2, scale=3, DoRA())"
    # In a tree of labels, the settings need not be numbers.
    labels = flora.LoraWeight("frozen", "a", "b", rank="r", alpha="x")
    assert repr(labels) == "LoraWeight('frozen', in=0 out=1, rank=r, alpha=x)"
    assert "bfloat16[4,3]" in repr(node(STRUCT))


@pytest.mark.parametrize("kind", ["array", "struct", "quantized", "whole"])
def test_lists_of_parameters_find_what_they_ask_an_array_for(kind):
    array = jnp.ones((4, 3))
    x = {
        "array": node(array),
        "struct": node(jax.ShapeDtypeStruct((4, 3), jnp.float32)),
        "quantized": node(Quantized(array, lambda x: x)),
        "whole": flora.Trained(array),
    }[kind]
    assert (x.shape, x.dtype, x.ndim, x.size) == ((4, 3), jnp.float32, 2, 12)
    assert x.sharding == (None if kind == "struct" else array.sharding)
    # Their statistics go through every array of the node, and W's is printed.
    assert kind == "struct" or float(jax.tree.map(jnp.sum, node(array))) == 12
    assert "float32[4,3]" in repr(x)


def test_an_adapter_has_no_shape():
    adapter = dataclasses.replace(node(), base=None)
    for name in ("shape", "dtype", "ndim", "size", "sharding"):
        assert not hasattr(adapter, name)
    assert jnp.shape(node()) == (4, 3)


USED = {
    "jnp": lambda w: jnp.asarray(w),
    "product": lambda w: jnp.ones((2, 4)) @ w,
    "function": lambda w: jnp.tanh(w),
    "index": lambda w: w[0],
    "slice": lambda w: w[..., None],
}


@pytest.mark.parametrize("name", USED)
def test_used_as_an_array_it_says_what_to_write(name):
    with pytest.raises(
        flora.LoraError,
        match=r"LoraWeight\(float32\[4,3\].*flora.lora\(fn\), or on flora.merge",
    ) as error:
        USED[name](node())
    assert isinstance(error.value, TypeError)


def test_what_counts_as_a_node_and_as_a_leaf():
    quantized = Quantized(jnp.ones((4, 3)), lambda x: x)
    trained = flora.Trained(jnp.ones(3))
    for x, as_node, as_leaf in (
        (node(), True, True), (trained, True, True), (quantized, False, True),
        (jnp.ones(3), False, False), (None, False, False), ({}, False, False),
    ):  # fmt: skip
        assert (is_node(x), is_leaf(x)) == (as_node, as_leaf), x
    w = node()
    assert base_of(w) is w.base
    assert base_of(trained) is trained.value
    assert base_of(quantized) is quantized
    assert base_of(None) is None
    assert jax.tree.leaves(trained) == [trained.value]


def test_parts_and_what_of_them_trains():
    w = node()
    assert parts_of(w) == trained_parts(w) == {"a": w.a, "b": w.b}
    d, v = jnp.ones(2), jnp.ones(3)
    vera = dataclasses.replace(w, extra={"d": d, "v": v}, variant=VeRA())
    assert list(parts_of(vera)) == ["a", "b", "d", "v"]
    assert list(trained_parts(vera)) == ["d", "v"]
    assert trained_parts(vera)["v"] is v


def test_on_parts_leaves_the_base_and_the_key():
    key = jax.random.key(0)
    w = node(key=key, extra={"m": jnp.ones(3)})
    named = on_parts(lambda name, x: f"{name}{list(x.shape)}", w)
    assert (named.a, named.b, named.extra) == ("a[4, 2]", "b[2, 3]", {"m": "m[3]"})
    assert named.base is w.base
    assert named.key is key
    assert on_parts(lambda name, x: name, node()).extra is None
    assert on_parts(lambda name, x: name, node(extra={})).extra == {}


def test_the_product_is_the_factors_or_what_the_variant_makes():
    w = node()
    plain = product_of(w)
    assert plain.a is w.a
    assert plain.b is w.b
    assert plain.columns is None
    assert plain.between is None

    @dataclasses.dataclass(frozen=True)
    class Halved:
        frozen = ()

        def product(self, weight):
            return Product(weight.a / 2, weight.b)

    assert (product_of(dataclasses.replace(w, variant=Halved())).a == 0.5).all()
