"""Trainable tokens: rows of an embedding or a head, between PEFT's files and trees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, linear, values

V, D = 9, 4
TABLE, HEAD = f"{PREFIX}embed_tokens", f"{PREFIX}lm_head"
ROWS = {"embed_tokens": [7, 2], "lm_head": [0, 8, 3]}
IDS = jnp.asarray([[0, 2, 7, 7], [1, 3, 8, 2]])


def params():
    return {
        "embed_tokens": {"embedding": jnp.asarray(values(V, D))},
        "mix": {"kernel": jnp.asarray(values(D, D, seed=1))},
        "lm_head": {"kernel": jnp.asarray(values(D, V, seed=2))},
    }


def fn(p, ids):
    h = jnp.tanh(p["embed_tokens"]["embedding"][ids] @ p["mix"]["kernel"])
    return h @ p["lm_head"]["kernel"]


def tensors(rows=ROWS):
    found = linear("mix", D, D, seed=3)
    for i, (module, some) in enumerate(rows.items()):
        key = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
        found[key] = values(len(some), D, seed=7 + i)
    return found


def write(folder, rows=ROWS, **config):
    config = {"trainable_token_indices": rows, "target_modules": ["mix"]} | config
    return files.write(folder, tensors(), **config)


def wanted():
    """The base with the new rows in it and the change of `mix`."""
    tree, held = params(), tensors()
    new = [held[f"{PREFIX}{m}.token_adapter.trainable_tokens_delta"] for m in ROWS]
    table, head = tree["embed_tokens"]["embedding"], tree["lm_head"]["kernel"]
    tree["embed_tokens"]["embedding"] = table.at[jnp.asarray([7, 2])].set(new[0])
    tree["lm_head"]["kernel"] = head.at[:, jnp.asarray([0, 8, 3])].set(new[1].T)
    tree["mix"]["kernel"] = tree["mix"]["kernel"] + files.delta(held, "mix", 3.0)
    return tree


def close(x, y, rtol=1e-4):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_rows_are_replaced(tmp_path):
    loaded = flora.peft.load(write(tmp_path / "a"), params())
    close(flora.lora(fn)(loaded, IDS), fn(wanted(), IDS))
    jax.tree.map(close, flora.merge(loaded), wanted())
    np.testing.assert_array_equal(  # bit for bit where nothing trains
        flora.merge(loaded)["embed_tokens"]["embedding"][:2],
        params()["embed_tokens"]["embedding"][:2],
    )


def test_what_was_loaded_is_written_again(tmp_path):
    loaded = flora.peft.load(write(tmp_path / "a"), params())
    flora.peft.save(tmp_path / "b", loaded)
    config, held = files.read(tmp_path / "b")
    assert config["trainable_token_indices"] == ROWS
    assert {*held} == {*tensors()}
    for key, x in tensors().items():
        np.testing.assert_array_equal(held[key], x)
    _, adapter = flora.split(loaded)
    flora.peft.save(tmp_path / "c", adapter)
    assert files.read(tmp_path / "c")[0] == config


def test_only_these_rows_train(tmp_path):
    loaded = flora.peft.load(write(tmp_path / "a"), params())
    grad = flora.value_and_grad(lambda t: (flora.lora(fn)(t, IDS) ** 2).sum())
    _, grads = grad(loaded)
    whole = jax.grad(lambda t: (fn(t, IDS) ** 2).sum())(wanted())
    close(
        grads["embed_tokens"]["embedding"].b,
        whole["embed_tokens"]["embedding"][jnp.asarray([7, 2])],
        1e-3,
    )
    close(
        grads["lm_head"]["kernel"].a,
        whole["lm_head"]["kernel"][:, jnp.asarray([0, 8, 3])],
        1e-3,
    )
    tx = flora.optimizer(optax.adamw(0.1, weight_decay=0.5), loaded)
    updates, _ = tx.update(grads, tx.init(loaded), loaded)
    after = flora.merge(optax.apply_updates(loaded, updates))
    old, new = (t["embed_tokens"]["embedding"] for t in (params(), after))
    changed = (np.asarray(old) != np.asarray(new)).any(1)
    assert [*np.flatnonzero(changed)] == [2, 7]


def test_a_list_is_of_whatever_the_file_holds(tmp_path):
    held = {k: v for k, v in tensors().items() if "lm_head" not in k}
    folder = files.write(
        tmp_path / "a", held, trainable_token_indices=[7, 2], target_modules=["mix"]
    )
    loaded = flora.peft.load(folder, params())
    assert loaded["embed_tokens"]["embedding"].variant == flora.variants.Rows((7, 2))


def test_tokens_alone_are_a_kind_of_their_own(tmp_path):
    folder = tmp_path / "a"
    files.write(folder, {f"{TABLE}.trainable_tokens_delta": values(2, D, seed=5)})
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [7, 2]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loaded = flora.peft.load(folder, params())
    new = flora.merge(loaded)["embed_tokens"]["embedding"][jnp.asarray([7, 2])]
    close(new, values(2, D, seed=5))
    flora.peft.save(tmp_path / "b", loaded)
    config, held = files.read(tmp_path / "b")
    assert config["peft_type"] == "TRAINABLE_TOKENS"
    assert (config["token_indices"], config["target_modules"]) == (
        [7, 2],
        ["embed_tokens"],
    )
    assert [*held] == [f"{TABLE}.trainable_tokens_delta"]


def test_they_start_as_the_rows_are(tmp_path):
    config = flora.LoraConfig(
        rank=2, target="embedding", variant=flora.variants.Rows((4, 8)), dropout=0.1
    )
    tree = flora.init(jax.random.key(0), config, fn, params(), IDS)
    np.testing.assert_array_equal(flora.lora(fn)(tree, IDS), fn(params(), IDS))
    node = tree["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(node.b, node.base[jnp.asarray([4, 8])])
    flora.peft.save(tmp_path / "a", tree)
    assert files.read(tmp_path / "a")[0]["token_indices"] == [4, 8]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 3}, "Write rank=2"),
        ({"rank": 2, "variant": flora.variants.Rows((4, 9))}, "row 9 is none of the 9"),
        ({"rank": 2, "variant": flora.variants.Rows((4, 4))}, "each once"),
        ({"rank": 2, "variant": flora.variants.Rows((4, 1), "rows")}, "'in' or 'out'"),
    ],
)
def test_rows_that_do_not_fit(settings, text):
    settings = {"variant": flora.variants.Rows((4, 8))} | settings
    config = flora.LoraConfig(target="embedding", **settings)
    with pytest.raises(flora.LoraError, match=text):
        flora.init(jax.random.key(0), config, fn, params(), IDS)


CASES = {
    "other count": (
        {"rows": {"embed_tokens": [7], "lm_head": [0, 8, 3]}},
        r"\(2, 4\).*names 1 tokens"),
    "one twice": (
        {"rows": {"embed_tokens": [7, 7], "lm_head": [0, 8, 3]}}, "different indices"),
    "negative": ({"rows": {"embed_tokens": [7, -1]}}, "different indices from 0"),
    "beyond the words": (
        {"rows": {"embed_tokens": [7, 9], "lm_head": [0, 8, 3]}}, "row 9 is none of"),
    "not named": ({"rows": {"embed_tokens": [7, 2]}}, "names no 'lm_head'"),
    "not there": (
        {"rows": ROWS | {"shared": [1]}}, "no tensor 'base_model.model.…shared"),
    "off": ({"rows": None}, "names no 'embed_tokens'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_files_that_do_not_fit(tmp_path, name):
    settings, text = CASES[name]
    with pytest.raises(flora.LoraError, match=text):
        flora.peft.load(write(tmp_path / "a", **settings), params())


def test_bases_that_do_not_fit(tmp_path):
    folder = write(tmp_path / "a")
    base = params()
    base["embed_tokens"]["embedding"] = jnp.ones((V, D + 1))
    with pytest.raises(flora.LoraError, match=r"\(9, 5\); expected 4 along axis 1"):
        flora.peft.load(folder, base)
    base = params()
    base["lm_head"]["bias"] = jnp.ones(V)
    with pytest.raises(flora.LoraError, match="'lm_head' has a bias, which PEFT"):
        flora.peft.load(folder, base)
    names = {
        "embedding": [
            flora.peft.Module("embed_tokens"),
            flora.peft.Module("lm_head", tied=True),
        ],
        "mix": "mix",
    }
    base = params()
    del base["lm_head"]
    with pytest.raises(flora.LoraError, match="PEFT ties"):
        flora.peft.load(folder, base, names=names)


def test_what_peft_cannot_hold(tmp_path):
    loaded = flora.peft.load(write(tmp_path / "a"), params())
    with pytest.raises(flora.LoraError, match="'embed_tokens' has rows that train"):
        flora.peft.save(tmp_path / "b", loaded, serving=True)
    rows = {**loaded, "mix": params()["mix"]}
    with pytest.raises(flora.LoraError, match="one list of tokens"):
        flora.peft.save(tmp_path / "b", rows)
    names = {
        "embedding": "tokens", "mix": "mix", "lm_head": "encoder.tokens"
    }  # fmt: skip
    with pytest.raises(flora.LoraError, match="whose name ends so"):
        flora.peft.save(tmp_path / "b", loaded, names=names)
