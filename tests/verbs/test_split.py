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


def test_what_is_in_which_half():
    key = jax.random.key(0)
    made = init(train="scale", dropout=0.5)
    keyed = flora.with_dropout(made, key) | {"none": None, "rate": 0.5}
    base, adapter = flora.split(keyed)
    w, up = keyed["mlp"]["up"]["kernel"], adapter["mlp"]["up"]["kernel"]
    assert up == flora.LoraWeight(
        None, w.a, w.b, layout=w.layout, rank=2, alpha=16.0, dropout=0.5
    )
    assert up.a is w.a
    assert base["mlp"]["up"]["kernel"] is w.base
    assert base["mlp"]["up"]["bias"] is keyed["mlp"]["up"]["bias"]
    assert (base["scale"], base["none"], base["rate"]) == (None, None, 0.5)
    assert (adapter["none"], adapter["rate"]) == (None, None)
    assert adapter["scale"] is keyed["scale"]
    # The keys belonged to one step.
    again = flora.join(base, adapter)
    chex.assert_trees_all_equal(again, made | {"none": None, "rate": 0.5})


def test_what_is_no_adapted_tree_is_refused_by_every_path():
    _, adapter = flora.split(init())
    with pytest.raises(
        flora.LoraError, match=r"2 problems:\n.*split: 'mlp/down/kernel'"
    ):
        flora.split(adapter)
    with pytest.raises(flora.LoraError, match="split: none of the tree's 0 leaves"):
        flora.split({})


def test_halves_that_do_not_belong_together():
    base, adapter = flora.split(init(train="scale"))
    nodes = init(train="scale")
    for wrong, message in (
        ((nodes, adapter), "3 problems:\n.*'mlp/down/kernel' of the base is adapted"),
        ((base | {"more": 1}, adapter), "only the base has 'more'. Pass base and"),
        ((base, adapter | {"x": None}), "only the adapter has 'x'"),
        (([1], (flora.Trained(1),)), "structures: a list and a tuple. Pass"),
    ):  # fmt: skip
        with pytest.raises(flora.LoraError, match=f"(?s){message}"):
            flora.join(*wrong)
    gone = {"mlp": {"up": None, "down": base["mlp"]["down"]}, "scale": None}
    layers = {"up": adapter["mlp"]["up"]["kernel"], "down": adapter["mlp"]["down"]}
    part = {"mlp": layers, "scale": adapter["scale"]}
    with pytest.raises(flora.LoraError, match="'mlp/up' has factors, but no weight in"):
        flora.join(gone, part)


def test_labels_gradients_and_shapes_join_too():
    base, adapter = flora.split(init(train="scale"))
    labels = flora.join(
        jax.tree.map(lambda x: "frozen", base), jax.tree.map(lambda x: "lora", adapter)
    )
    assert labels["mlp"]["up"]["kernel"].base == "frozen"
    assert labels["mlp"]["up"]["kernel"].a == labels["scale"].value == "lora"
    shapes = jax.eval_shape(lambda: (base, adapter))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        flora.join(*shapes), init(train="scale")
    )
    grads = jax.grad(lambda a: flora.join(base, a)["mlp"]["up"]["kernel"].a.sum())(
        adapter
    )
    assert (grads["mlp"]["up"]["kernel"].a == 1).all()
