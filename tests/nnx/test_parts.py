"""Factors beside weights: put there, taken out, and back again."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flora
import flora.nnx
from flora._nnx.parts import detached, found, is_adapted, put, raw, remove, slots_of
from tests.support.nnx_models import CONFIG, KEY, Net, X, adapted, close, still


def test_detached_is_the_plain_module_whose_state_is_the_adapted_tree():
    module = adapted(still(Net(nnx.Rngs(0))))
    plain = detached(module)
    assert type(plain) is Net
    assert not is_adapted(plain)
    assert vars(plain.first).keys() == vars(Net(nnx.Rngs(0)).first).keys()
    node = raw(plain.first.kernel)
    assert isinstance(node, flora.LoraWeight)
    assert node.base is module.first.kernel[...]
    assert node.a is module.first.kernel_lora_a[...]
    assert is_adapted(module)
    assert not hasattr(plain.first, "kernel_lora_a")


def test_a_slot_says_where_the_arrays_lie():
    module = adapted(still(Net(nnx.Rngs(0))))
    (slot,) = slots_of(module.first)
    assert slot.path == ("kernel",)
    assert dict(slot.parts) == {"a": ("kernel_lora_a",), "b": ("kernel_lora_b",)}
    assert jax.tree.leaves(slot.weight) == []
    assert hash(slot) == hash(slots_of(nnx.clone(module).first)[0])


def test_a_name_that_is_taken():
    linear = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    linear.kernel_lora_a = nnx.Param(jnp.ones(3))
    with pytest.raises(flora.LoraError, match="has 'kernel_lora_a' already"):
        flora.nnx.adapt(KEY, CONFIG, linear, X)
    linear = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    linear.lora_dropout = 3
    config = flora.LoraConfig(rank=2, dropout=0.1)
    with pytest.raises(flora.LoraError, match="attribute 'lora_dropout' of its own"):
        flora.nnx.adapt(KEY, config, linear, X)


def test_values_within_containers():
    class Held(nnx.Module):
        def __init__(self):
            self.deep = nnx.data({"t": (nnx.Param(jnp.ones(2)), 3)})
            self.pair = nnx.data((nnx.Param(jnp.ones(2)), 4))

    held = Held()
    new = nnx.Param(jnp.zeros(2))
    put(held, ("deep", "t", 0), new)
    put(held, ("pair", 0), new)
    assert found(held, ("deep", "t", 0)) is new
    assert held.deep["t"][1] == 3
    assert held.pair == (new, 4)
    close(jax.tree.leaves(nnx.state(held))[0], jnp.zeros(2))
    remove(held, ("pair",))
    remove(held, ("pair",))
    assert not hasattr(held, "pair")


def test_a_layout_that_does_not_fit_is_named():
    make = nnx.vmap(
        lambda k: flora.nnx.adapt(k, CONFIG, nnx.Linear(8, 3, rngs=nnx.Rngs(0)), X)
    )
    ensemble = make(jax.random.split(KEY, 2))
    with pytest.raises(
        flora.LoraError, match=r"'kernel' has 3 axes, but its layout is"
    ):
        flora.nnx.tree(ensemble)
