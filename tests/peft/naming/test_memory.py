"""Adapters that are saved as the file had them, with nothing said again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import flora
import flora.multi
import flora.peft
from flora._tree.origin import Origin
from flora.peft import Module
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, linear, values

BF16 = ml_dtypes.bfloat16
TREE = {
    "blocks": {
        "q": {"kernel": jnp.asarray(values(2, 4, 2, 3))},
        "kv": {"kernel": jnp.asarray(values(2, 4, 8, seed=1))},
    }
}
NAMES = {
    "blocks/q": "model.layers.{i}.self_attn.q_proj",
    "blocks/kv": [Module(f"model.layers.{{i}}.self_attn.{n}_proj") for n in "kv"],
}


def folder_of(path, dtype=BF16, prefix="model.layers", **config):
    tensors = {}
    for i in range(2):
        at = f"{prefix}.{i}.self_attn"
        for k, (n, out) in enumerate({"q": 6, "k": 4, "v": 4}.items()):
            tensors |= linear(f"{at}.{n}_proj", 4, out, seed=10 * i + k)
    tensors = {k: x.astype(dtype) for k, x in tensors.items()}
    about = {"base_model_name_or_path": "org/model", "revision": "main"}
    targets = ["q_proj", "k_proj", "v_proj"]
    return files.write(path, tensors, **({"target_modules": targets} | about | config))


def load(folder):
    return flora.peft.load(folder, TREE, names=NAMES)


def check_same(folder, path):
    """The tensors to their last bit, the config in what it says of the base."""
    (had, before), (config, after) = files.read(folder), files.read(path)
    assert {*after} == {*before}
    for key, x in before.items():
        assert after[key].dtype == x.dtype
        np.testing.assert_array_equal(after[key], x)
    for key in ("base_model_name_or_path", "revision", "task_type"):
        assert config.get(key) == had.get(key)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_names_dtype_and_base_are_remembered(tmp_path, dtype):
    folder = folder_of(tmp_path / "a", dtype)
    flora.peft.save(tmp_path / "b", load(folder))
    check_same(folder, tmp_path / "b")


def test_what_is_said_wins(tmp_path):
    loaded = load(folder_of(tmp_path / "a"))
    names = NAMES | {"blocks/q": "other.{i}.q"}
    flora.peft.save(
        tmp_path / "b",
        loaded,
        names=names,
        dtype=jnp.float32,
        base_model_name_or_path="org/other",
        task_type="SEQ_CLS",
    )
    config, tensors = files.read(tmp_path / "b")
    assert f"{PREFIX}other.1.q.lora_A.weight" in tensors
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    said = config["base_model_name_or_path"], config["task_type"], config["revision"]
    assert said == ("org/other", "SEQ_CLS", "main")


def trained(adapted):
    """After one step in a jitted function of the adapter."""
    base, adapter = flora.split(adapted)
    tx = optax.sgd(0.1)

    @jax.jit
    def step(adapter, state):
        grads = jax.tree.map(jnp.ones_like, adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    adapter, _ = step(adapter, tx.init(adapter))
    return flora.join(base, adapter)


def through_flora_files(adapted, tmp_path):
    flora.save(tmp_path / "adapter.safetensors", adapted)
    return flora.load(tmp_path / "adapter.safetensors", TREE)


def test_it_survives(tmp_path):
    folder = folder_of(tmp_path / "a")
    loaded = load(folder)
    step = trained(loaded)
    flora.peft.save(tmp_path / "step", step)
    want = np.asarray(loaded["blocks"]["q"]["kernel"].a[1, :, 0] - 0.1).astype(BF16)
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
    got = files.read(tmp_path / "step")[1]
    assert {*got} == {*files.read(folder)[1]}
    np.testing.assert_array_equal(got[key][0], want)

    zero = jax.tree.map(lambda x: x, loaded)
    moved = {"params": loaded}
    adapter = flora.split(loaded)[1]
    filed = through_flora_files(loaded, tmp_path)
    for i, same in enumerate((zero, moved, adapter, filed)):
        flora.peft.save(tmp_path / str(i), same)
        check_same(folder, tmp_path / str(i))


def test_one_compiled_function_for_several_files(tmp_path):
    """What it gives back knows that it may come from either."""
    half = load(folder_of(tmp_path / "a"))
    whole = load(folder_of(tmp_path / "b", np.float32))
    same = jax.jit(lambda x: x)
    same(half)
    flora.peft.save(tmp_path / "c", same(whole))  # in the wider dtype of both
    check_same(tmp_path / "b", tmp_path / "c")
    renamed = folder_of(tmp_path / "r", prefix="decoder.layers")
    names = {
        "blocks/q": "decoder.layers.{i}.self_attn.q_proj",
        "blocks/kv": [Module(f"decoder.layers.{{i}}.self_attn.{n}_proj") for n in "kv"],
    }
    other = same(flora.peft.load(renamed, TREE, names=names))
    with pytest.raises(flora.LoraError, match=r"'model\..* or 'decoder\..*names="):
        flora.peft.save(tmp_path / "s", other)
    flora.peft.save(tmp_path / "s", other, names=names, dtype=BF16)
    check_same(renamed, tmp_path / "s")
    # Two files that agree, and trees of no file.
    again = load(folder_of(tmp_path / "d", np.float32))
    fresh = files.forgotten(whole)
    other = jax.jit(lambda x: x)
    other(fresh)
    flora.peft.save(tmp_path / "e", jax.tree.map(lambda x, _: x, again, fresh))
    check_same(tmp_path / "d", tmp_path / "e")


def test_a_stack_of_files_that_adapt_and_train_a_leaf(tmp_path):
    """Which agree in its name; what trains whole has no kind of its own."""
    head = {"head.weight": files.values(3, 4), "head.bias": files.values(3)}
    tensors = {f"{PREFIX}{k}": x for k, x in head.items()} | files.up_adapters()
    whole = files.write(tmp_path / "a", tensors, modules_to_save=["head"])
    held = files.linear("head", 4, 3)
    adapts = files.write(tmp_path / "b", held, target_modules=["head"])
    made = [flora.peft.load(x, files.params()) for x in (whole, adapts)]
    made = [flora.split(x)[1] for x in made]
    for order in (made, made[::-1]):
        stacked = flora.multi.stack(order, base=files.params())
        for one, adapter in zip(flora.multi.unstack(stacked), order, strict=True):
            flora.peft.save(tmp_path / "c", one)
            again = flora.peft.load(tmp_path / "c", files.params())
            want = flora.multi.lora(files.fn)
            want = want(files.params(), flora.multi.stack([adapter]), [0] * 5, files.X)
            got = flora.lora(files.fn)(again, files.X)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_leaves_of_one_shape_are_told_apart(tmp_path):
    """One compiled function for each of them gives back the first one's origin."""
    tensors = files.up_adapters()
    folder = files.write(tmp_path / "a", tensors)
    loaded = flora.peft.load(folder, files.params())
    each = jax.jit(lambda x: x)

    def change(x):
        return each(x) if isinstance(x, flora.LoraWeight) else x

    stop = lambda x: isinstance(x, flora.LoraWeight)  # noqa: E731
    flora.peft.save(tmp_path / "b", jax.tree.map(change, loaded, is_leaf=stop))
    check_same(folder, tmp_path / "b")


DAMAGED = (
    "{",
    "[]",
    '{"format": "peft"}',
    '{"format": "peft", "path": "w", "slots": 3}',
    '{"format": "peft", "path": "w", "slots": [{}]}',
)


@pytest.mark.parametrize("text", DAMAGED)
def test_damage_is_named(tmp_path, text):
    w = flora.LoraWeight(None, jnp.ones((4, 1)), jnp.ones((1, 3)), origin=Origin(text))
    w = dataclasses.replace(w, layout=flora.Layout((), (0,), (1,)))
    with pytest.raises(flora.LoraError, match="what it remembers"):
        flora.peft.save(tmp_path / "a", {"w": w})
    foreign = dataclasses.replace(w, origin=Origin(json.dumps({"format": "other"})))
    flora.peft.save(
        tmp_path / "a", {"w": foreign}, names={"w": Module("w", kind="linear")}
    )


def embedding_folder(path, table):
    """Adapters of an embedding and of the head with the same weight, and both bases."""
    a, b = values(2, 7, seed=5), values(4, 2, seed=6)
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": a,
        f"{PREFIX}embed.lora_embedding_B": b,
        f"{PREFIX}lm_head.lora_A.weight": b.T,
        f"{PREFIX}lm_head.lora_B.weight": a.T,
    }
    tensors = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
    base = {f"{PREFIX}{n}.base_layer.weight": table for n in ("embed", "lm_head")}
    return files.write(
        path,
        tensors | base,
        target_modules=["embed", "lm_head"],
        ensure_weight_tying=True,
    )


def lookup(p, ids):
    return p["w"]["t"][ids]


def product(p, x):
    return x @ p["w"]["t"].T


def head(p, x):
    return x @ p["w"]["kernel"]


@pytest.mark.parametrize("use", ["lookup", "product", "head"])
def test_both_uses_of_a_tied_weight(tmp_path, use):
    """Whichever use the leaf's axes are of, and whichever comes first in names."""
    table = values(7, 4, seed=1)
    folder = embedding_folder(tmp_path / "a", table)
    embed = Module("embed", kind="embedding")
    if use == "head":  # [features, words]
        leaf, fn, x = table.T, head, jnp.ones((1, 4))
        one = [Module("lm_head", kind="linear"), dataclasses.replace(embed, tied=True)]
    else:
        leaf, one = table, [embed, Module("lm_head", tied=True)]
        fn, x = (lookup, jnp.arange(2)) if use == "lookup" else (product, jnp.ones(4))
    word = "kernel" if use == "head" else "t"
    tree, names = {"w": {word: jnp.asarray(leaf)}}, {f"w/{word}": one}
    loaded = flora.peft.load(folder, tree, names=names, fn=fn, args=(x,))
    merged = np.asarray(flora.merge(loaded)["w"][word])
    want = table + 3 * values(2, 7, seed=5).T @ values(4, 2, seed=6).T
    np.testing.assert_allclose(merged.T if use == "head" else merged, want, rtol=1e-5)
    for i, given in enumerate(({}, {"names": names})):
        flora.peft.save(tmp_path / str(i), loaded, **given)
        check_same(folder, tmp_path / str(i))
    other = embedding_folder(tmp_path / "b", table + 1)
    with pytest.raises(flora.LoraError, match=r"differs from 'w/.*' of the base"):
        flora.peft.load(other, tree, names=names, fn=fn, args=(x,))
    flora.peft.save(tmp_path / "bare", flora.split(loaded)[1])
    left = {k for k in files.read(folder)[1] if "base_layer" not in k}
    assert {*files.read(tmp_path / "bare")[1]} == left


KINDS = {
    "tokens": {"trainable_token_indices": {"net.words": [6, 1]}},
    "tokens alone": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [6, 1]},
    "lora_bias": {"lora_bias": True},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": {"beta": 0.5, "gamma": 0.25}},
    "activated": {"alora_invocation_tokens": [4, 2]},
    "diagonal": {
        "use_bdlora": {
            "nblocks": 2,
            "target_modules_bd_a": ["net.h.0.mix", "net.h.1.mix"],
            "target_modules_bd_b": None,
            "match_strict": True,
        }
    },
    "replicated": {"layer_replication": [[0, 1], [0, 1]]},
}


def folder_of_kind(path, kind):
    tensors = {}
    for i in range(2):
        module = f"net.h.{i}.mix"
        at = f"{PREFIX}{module}"
        tensors |= linear(module, 4, 6, seed=i)
        if kind == "lora_bias":
            tensors[f"{at}.lora_B.bias"] = values(6, seed=i + 5)
        if kind == "kasa":
            tensors[f"{at}.lora_diag"] = values(2, seed=i + 5)
        if kind == "diagonal":
            tensors[f"{at}.lora_A.weight"] = values(2, 2, seed=i + 5)
    config = {"target_modules": ["mix"], "task_type": "CAUSAL_LM", **KINDS[kind]}
    if kind == "tokens":
        key = f"{PREFIX}net.words.token_adapter.trainable_tokens_delta"
        tensors[key] = values(2, 4, seed=9)
    if kind == "tokens alone":
        tensors = {f"{PREFIX}net.words.trainable_tokens_delta": values(2, 4, seed=9)}
        config["target_modules"] = ["words"]
    about = {"base_model_name_or_path": "org/model"}
    tensors = {k: x.astype(BF16) for k, x in tensors.items()}
    return files.write(path, tensors, **config, **about)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_remembered(tmp_path, kind):
    layers = {
        str(i): {
            "x": {
                "kernel": jnp.asarray(values(4, 6, seed=0 if "repl" in kind else i)),
                "bias": jnp.zeros(6),
            }
        }
        for i in range(2)
    }
    tree = {"table": {"embedding": jnp.asarray(values(7, 4, seed=3))}, "layers": layers}
    names = {"table/embedding": "net.words"} | {
        f"layers/{i}/x/{leaf}": Module(f"net.h.{i}.mix", parameter=word)
        for i in range(2)
        for leaf, word in (("kernel", "weight"), ("bias", "bias"))
    }
    folder = folder_of_kind(tmp_path / "a", kind)
    flora.peft.save(tmp_path / "b", flora.peft.load(folder, tree, names=names))
    check_same(folder, tmp_path / "b")
    config = files.read(tmp_path / "b")[0]
    for key, want in KINDS[kind].items():
        assert config[key] == want
