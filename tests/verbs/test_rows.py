"""`LoraConfig.rows`: words that train beside LoRA on other leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import peft_files as files

V, D = 9, 4
IDS = jnp.asarray([[0, 2, 7], [1, 8, 2]])


def params(tied=False):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    tree = {"embed": {"embedding": draw(V, D)}, "mix": {"kernel": draw(D, D)}}
    return tree if tied else tree | {"head": {"kernel": draw(D, V)}}


def fn(p, ids):
    h = jnp.tanh(p["embed"]["embedding"][ids] @ p["mix"]["kernel"])
    return h @ (p["head"]["kernel"] if "head" in p else p["embed"]["embedding"].T)


def config(**settings):
    settings = {"target": "mix/kernel", "rows": {"embedding": [7, 2]}} | settings
    return flora.LoraConfig(rank=2, **settings)


def trained(tree, steps=3):
    tx = flora.optimizer(optax.adamw(0.1, weight_decay=0.2), tree)
    state = tx.init(tree)
    grad = flora.value_and_grad(lambda t: (flora.lora(fn)(t, IDS) ** 2).sum())
    for _ in range(steps):
        _, grads = grad(tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


@pytest.mark.parametrize("tied", [False, True])
def test_these_words_and_the_targets_train_and_nothing_else(tied):
    base = params(tied)
    tree = flora.init(jax.random.key(0), config(dropout=0.0), fn, base, IDS)
    np.testing.assert_array_equal(flora.lora(fn)(tree, IDS), fn(base, IDS))
    after = trained(tree)
    merged = flora.merge(after)
    np.testing.assert_allclose(
        fn(merged, IDS), flora.lora(fn)(after, IDS), rtol=1e-4, atol=1e-5
    )
    old, new = (np.asarray(t["embed"]["embedding"]) for t in (base, merged))
    assert [*np.flatnonzero((old != new).any(1))] == [2, 7]
    assert (merged["mix"]["kernel"] != base["mix"]["kernel"]).any()
    if not tied:
        np.testing.assert_array_equal(merged["head"]["kernel"], base["head"]["kernel"])


def test_words_of_a_head_are_its_columns():
    settings = config(rows={"head/kernel": (8, 1), "embedding": (3,)})
    tree = flora.init(jax.random.key(0), settings, fn, params(), IDS)
    merged = flora.merge(trained(tree))
    old, new = (np.asarray(t["head"]["kernel"]) for t in (params(), merged))
    assert [*np.flatnonzero((old != new).any(0))] == [1, 8]


def test_abstract_trees_and_adapters_of_peft(tmp_path):
    plan = flora.init(
        jax.random.key(0), config(), fn, jax.eval_shape(params), jnp.zeros((2, 3), int)
    )
    tree = flora.init(jax.random.key(0), config(), fn, params(), IDS)
    assert jax.tree.map(jnp.shape, plan) == jax.tree.map(jnp.shape, tree)
    after = trained(tree)
    flora.peft.save(tmp_path / "a", after)
    written, held = files.read(tmp_path / "a")
    assert written["peft_type"] == "LORA"
    assert written["trainable_token_indices"] == {"embed": [7, 2]}
    key = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(held[key], after["embed"]["embedding"].b)
    again = flora.peft.load(tmp_path / "a", params())
    np.testing.assert_allclose(
        flora.lora(fn)(again, IDS), flora.lora(fn)(after, IDS), rtol=1e-5
    )


def test_words_alone():
    tree = flora.init(jax.random.key(0), config(target=()), fn, params(), IDS)
    assert not isinstance(tree["mix"]["kernel"], flora.LoraWeight)
    assert flora.merge(tree)["mix"]["kernel"].shape == (D, D)


CASES = {
    "no leaf": ({"rows": {"words": [1]}}, "rows: 'words'|'words' selects none"),
    "no list": ({"rows": {"embedding": 3}}, "Write a list of indices"),
    "no index": ({"rows": {"embedding": ["a"]}}, "Write a list of indices"),
    "beyond": ({"rows": {"embedding": [9]}}, "row 9 is none of the 9"),
    "twice": ({"rows": {"embedding": [1, 1]}}, "each once"),
    "none": ({"rows": {"embedding": []}}, "at least one"),
    "target too": ({"rows": {"mix/kernel": [1]}}, "named in rows and in target"),
    "train too": (
        {"rows": {"embedding": [1]}, "train": "embedding"}, "named in rows and in"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named(name):
    settings, text = CASES[name]
    with pytest.raises(flora.LoraError, match=text):
        flora.init(jax.random.key(0), config(**settings), fn, params(), IDS)
