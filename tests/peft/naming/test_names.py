"""Names: split heads, RoPE's order, fused and stacked leaves; found by values too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from flora.peft import Module
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, linear, values

D, H, K = 6, 2, 4  # features, heads, features of a head


def close(got, want, tolerance=5e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0
    )


def round_trip(tmp_path, tensors, loaded, names, tolerance=1e-6):
    flora.peft.save(tmp_path / "saved", loaded, names=names)
    config, written = files.read(tmp_path / "saved")
    assert {*written} == {*tensors}
    for key, x in tensors.items():
        close(written[key], x, tolerance)
    return config


def kernel(seed, *shape):
    return jnp.asarray(values(*shape, seed=seed))


def test_heads(tmp_path):
    tensors = linear("l.0.q_proj", D, H * K) | linear("l.0.o_proj", H * K, D, seed=5)
    folder = files.write(tmp_path / "a", tensors, target_modules=["q_proj", "o_proj"])
    tree = {"l_0": {"attn": {"q": {"kernel": kernel(0, D, H, K)},
                             "o": {"kernel": kernel(1, H, K, D)}}}}  # fmt: skip
    names = {"l_{i}/attn/q/kernel": "l.{i}.q_proj", "l_{i}/attn/o": "l.{i}.o_proj"}
    loaded = flora.peft.load(folder, tree, names=names)
    merged = flora.merge(loaded)["l_0"]["attn"]
    q, o = (files.delta(tensors, f"l.0.{n}_proj", 3.0) for n in "qo")
    close(merged["q"]["kernel"], values(D, H, K) + q.reshape(D, H, K))
    close(merged["o"]["kernel"], values(H, K, D, seed=1) + o.reshape(H, K, D))
    config = round_trip(tmp_path, tensors, loaded, names)
    assert {*config["target_modules"]} == {"l.0.o_proj", "l.0.q_proj"}


def test_a_callable_and_an_order_of_rows(tmp_path):
    """RoPE's halves in PyTorch, neighbors in the leaf."""
    tensors = linear("q_proj", D, H * K)
    folder = files.write(tmp_path / "a", tensors, target_modules=["q_proj"])
    rows = np.arange(H * K).reshape(H, 2, K // 2).swapaxes(1, 2).reshape(-1)
    columns = np.roll(np.arange(D), 2)

    def names(path):
        return Module("q_proj", rows=rows, columns=columns) if "query" in path else None

    tree = {"query": {"kernel": kernel(0, D, H, K)}}
    loaded = flora.peft.load(folder, tree, names=names)
    change = files.delta(tensors, "q_proj", 3.0)[columns][:, rows].reshape(D, H, K)
    close(flora.merge(loaded)["query"]["kernel"], values(D, H, K) + change)
    round_trip(tmp_path, tensors, loaded, names)


def test_one_leaf_for_several_modules(tmp_path):
    tensors = (
        linear("q", D, 4) | linear("k", D, 2, r=3, seed=3) | linear("v", D, 2, seed=5)
    )
    folder = files.write(
        tmp_path / "a",
        tensors,
        target_modules=["q", "k", "v"],
        rank_pattern={"k": 3},
        alpha_pattern={"v": 2},
    )
    tree = {"qkv": {"kernel": kernel(0, D, 8)}}
    names = {"qkv": [Module("q", rows=4), Module("k", rows=2), Module("v", rows=2)]}
    loaded = flora.peft.load(folder, tree, names=names)
    assert loaded["qkv"]["kernel"].rank == 7
    parts = [files.delta(tensors, n, s) for n, s in (("q", 3), ("k", 2), ("v", 1))]
    change = np.concatenate(parts, 1)
    close(flora.merge(loaded)["qkv"]["kernel"], values(D, 8) + change)
    # Written, each has all ranks of the leaf, of which the others' are zero in B.
    flora.peft.save(tmp_path / "b", loaded, names=names)
    config, written = files.read(tmp_path / "b")
    for n, part in zip("qkv", parts, strict=True):
        rank = written[f"{PREFIX}{n}.lora_A.weight"].shape[0]
        alpha = config["alpha_pattern"].get(n, config["lora_alpha"])
        close(files.delta(written, n, alpha / rank), part)


def test_several_leaves_for_one_module(tmp_path):
    tensors = linear("qkv", D, 3 * H)
    folder = files.write(tmp_path / "a", tensors, target_modules=["qkv"])
    tree = {n: {"kernel": kernel(i, D, H)} for i, n in enumerate("qkv")}
    # interleaved, head by head
    names = {n: Module("qkv", rows=range(i, 3 * H, 3)) for i, n in enumerate("qkv")}
    loaded = flora.peft.load(folder, tree, names=names)
    change = files.delta(tensors, "qkv", 3.0)
    for i, n in enumerate("qkv"):
        close(flora.merge(loaded)[n]["kernel"], values(D, H, seed=i) + change[:, i::3])
    round_trip(tmp_path, tensors, loaded, names)
    # Trained, each has an A of its own.
    q = loaded["q"]["kernel"]
    loaded["q"]["kernel"] = dataclasses.replace(q, a=q.a + values(D, 2, seed=9))
    flora.peft.save(tmp_path / "b", loaded, names=names)
    config, written = files.read(tmp_path / "b")
    assert written[f"{PREFIX}qkv.lora_A.weight"].shape == (6, D)
    change[:, ::3] += 3 * values(D, 2, seed=9) @ q.b
    close(files.delta(written, "qkv", config["lora_alpha"] / config["r"]), change)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers(tmp_path, axis):
    """Of other ranks and alphas, and one of them not adapted."""
    tensors = linear("m.h.0.up", D, 5, seed=1) | linear("m.h.2.up", D, 5, r=3, seed=2)
    config = {
        "target_modules": ["m.h.0.up", "m.h.2.up"],
        "rank_pattern": {"2.up": 3},
        "alpha_pattern": {"2.up": 1},
    }
    folder = files.write(tmp_path / "a", tensors, **config)
    tree = {"m": {"h": {"up": {"kernel": jnp.moveaxis(kernel(0, 3, D, 5), 0, axis)}}}}
    loaded = flora.peft.load(folder, tree)
    change = np.zeros((3, D, 5))
    change[0] = files.delta(tensors, "m.h.0.up", 3.0)
    change[2] = files.delta(tensors, "m.h.2.up", 1 / 3)
    got = jnp.moveaxis(flora.merge(loaded)["m"]["h"]["up"]["kernel"], axis, 0)
    close(got, values(3, D, 5) + change)
    with pytest.raises(flora.LoraError, match="has 1 stacked axes and its name"):
        flora.peft.save(tmp_path / "none", files.forgotten(loaded))
    flora.peft.save(tmp_path / "same", loaded)  # it knows
    assert {*files.read(tmp_path / "same")[1]} == {*tensors}
    names = {"m/h/up": "m.h.{i}.up"}
    flora.peft.save(tmp_path / "b", loaded, names=names)
    config, written = files.read(tmp_path / "b")
    assert config["target_modules"] == ["m.h.0.up", "m.h.2.up"]
    assert {*written} == {*tensors}  # nothing of the layer that is not adapted
    for i, rank in ((0, 2), (2, 3)):
        name = f"m.h.{i}.up"
        assert config["rank_pattern"].get(name, config["r"]) == rank
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        close(files.delta(written, name, alpha / rank), change[i])


def test_stacked_by_names(tmp_path):
    tensors = linear("q", D, 4) | linear("k", D, 4, seed=3) | linear("v", D, 4, seed=5)
    folder = files.write(tmp_path / "a", tensors, target_modules=["q", "k", "v"])
    names = {"qkv": "{q|k|v}"}
    loaded = flora.peft.load(
        folder, {"qkv": {"kernel": kernel(0, 3, D, 4)}}, names=names
    )
    change = np.stack([files.delta(tensors, n, 3.0) for n in "qkv"])
    close(flora.merge(loaded)["qkv"]["kernel"], values(3, D, 4) + change)
    round_trip(tmp_path, tensors, loaded, names)


def test_layers_that_the_base_lacks(tmp_path):
    tensors = linear("h.0.up", D, 5) | linear("h.3.up", D, 5)
    folder = files.write(tmp_path / "a", tensors, target_modules=["up"])
    tree = {"h": {"up": {"kernel": kernel(0, 3, D, 5)}}}
    with pytest.raises(flora.LoraError, match=r"index \(3,\) of the stack"):
        flora.peft.load(folder, tree)
    short = {k: v for k, v in tensors.items() if "3.up" not in k}
    files.write(folder, short, target_modules=["up"])
    with pytest.raises(
        flora.LoraError, match=r"h.1.up.lora_A.weight' is missing"
    ) as caught:
        flora.peft.load(folder, tree)
    assert "2 problems" in str(caught.value)


def test_prefixes(tmp_path):
    """The tree may be of the model without its head, or in a collection."""
    tensors = linear("model.layers.0.up", D, 5)
    folder = files.write(tmp_path / "a", tensors, target_modules=["up"])
    up = {"up": {"kernel": kernel(0, D, 5)}}
    for tree in (
        {"layers_0": up},
        {"params": {"model": {"layers": {"0": up}}}},
        {"wrapped": {"model": {"layers": {"0": up}}}},
    ):
        loaded = flora.peft.load(folder, tree)
        leaf = jax.tree.leaves(
            loaded, is_leaf=lambda x: isinstance(x, flora.LoraWeight)
        )
        assert isinstance(leaf[0], flora.LoraWeight)


def test_an_ambiguous_shape_is_refused_or_followed(tmp_path):
    """[heads, in, per head]: no convention has it, and sizes fit in two ways."""
    tensors = linear("q", 4, 8)
    folder = files.write(tmp_path / "a", tensors, target_modules=["q"])
    tree = {"q": {"w": kernel(0, 4, 4, 2)}}
    names = {"q/w": "q"}

    def fn(p, x):
        return jnp.einsum("bd,hdk->bhk", x, p["q"]["w"])

    x = jnp.asarray(values(3, 4, seed=2))
    loaded = flora.peft.load(folder, tree, names=names, fn=fn, args=(x,))
    assert loaded["q"]["w"].layout == flora.Layout((), (1,), (0, 2))
    change = files.delta(tensors, "q", 3.0).reshape(4, 4, 2).swapaxes(0, 1)
    close(flora.merge(loaded)["q"]["w"], values(4, 4, 2) + change)
    odd = {"q": {"w": kernel(0, 4, 2, 4)}}  # in could be axis 0 or 2
    flora.peft.load(folder, odd, names=names)  # Flax's order: in first
    both = {"q": {"w": jnp.ones((2, 4, 4))}}
    with pytest.raises(flora.LoraError, match="can lie in 2 ways"):
        flora.peft.load(folder, both, names=names)


def test_names_of_two_leaves(tmp_path):
    tensors = linear("q", D, 4)
    folder = files.write(tmp_path / "a", tensors, target_modules=["q"])
    tree = {"q": {"kernel": kernel(0, D, 4), "weight": kernel(0, 4, D)}}
    with pytest.raises(flora.LoraError, match="may be 'q/kernel' or 'q/weight'"):
        flora.peft.load(folder, tree)


def torch_weights():
    weights = {"norm.weight": values(D, seed=90), "embed.weight": values(9, D, seed=91)}
    for i in range(2):
        at = f"model.layers.{i}"
        weights |= {
            f"{at}.q_proj.weight": values(H * K, D, seed=10 + i),
            f"{at}.q_proj.bias": values(H * K, seed=10 + i),
            f"{at}.k_proj.weight": values(4, D, seed=20 + i),
            f"{at}.v_proj.weight": values(4, D, seed=30 + i),
            f"{at}.o_proj.weight": values(D, H * K, seed=40 + i),
            f"{at}.ln.weight": values(D, seed=50 + i),
        }
    return weights


def flax_weights(w):
    def layers(name):
        return np.stack([w[f"model.layers.{i}.{name}.weight"].T for i in range(2)])

    rows = np.arange(H * K).reshape(H, 2, K // 2).swapaxes(1, 2).reshape(-1)
    bias = np.stack([w[f"model.layers.{i}.q_proj.bias"][rows] for i in range(2)])
    scale = np.stack([w[f"model.layers.{i}.ln.weight"] for i in range(2)])
    kv = np.concatenate([layers("k_proj"), layers("v_proj")], -1)
    tree = {
        "Embed_0": {"embedding": w["embed.weight"]},
        "final": {"scale": w["norm.weight"]},
        "blocks": {
            "wq": {
                "kernel": layers("q_proj")[..., rows].reshape(2, D, H, K),
                "bias": bias.reshape(2, H, K),
            },
            "wkv": {"kernel": kv},
            "wo": {"kernel": layers("o_proj").reshape(2, H, K, D)},
            "pre": {"scale": scale},
        },
    }
    return jax.tree.map(jnp.asarray, tree)


def test_names_found_by_values(tmp_path):
    weights = torch_weights()
    tree = flax_weights(weights)
    names = flora.peft.match_names(weights, tree)
    tensors = {}
    for i in range(2):
        for n, (in_, out) in {"q": (D, H * K), "k": (D, 4), "o": (H * K, D)}.items():
            tensors |= linear(f"model.layers.{i}.{n}_proj", in_, out, seed=i)
        tensors[f"{PREFIX}model.layers.{i}.ln.weight"] = values(D, seed=60 + i)
    folder = files.write(
        tmp_path / "a",
        tensors,
        modules_to_save=["ln"],
        target_modules=["q_proj", "k_proj", "o_proj"],
    )
    loaded = flora.peft.load(folder, tree, names=names)
    changed = dict(weights)
    for i in range(2):
        at = f"model.layers.{i}"
        for n in "qko":
            delta = files.delta(tensors, f"{at}.{n}_proj", 3.0).T
            changed[f"{at}.{n}_proj.weight"] = weights[f"{at}.{n}_proj.weight"] + delta
        changed[f"{at}.ln.weight"] = values(D, seed=60 + i)
    want = flax_weights({k: v.astype(np.float32) for k, v in changed.items()})
    jax.tree.map(close, flora.merge(loaded), want)
    flora.peft.save(tmp_path / "b", loaded, names=names)
    written = files.read(tmp_path / "b")[1]
    assert {*tensors} <= {*written}
    flora.peft.save(tmp_path / "c", loaded)  # it knows
    again = files.read(tmp_path / "c")[1]
    assert {*again} == {*written}
    for key, x in tensors.items():
        np.testing.assert_array_equal(again[key], x)
    assert "blocks/wq/kernel <- model.layers.{i}.q_proj.weight" in repr(names)


def test_parameters_of_their_own_are_found(tmp_path):
    """Tokens and positions, which are no module's weight; experts too."""
    weights = {
        "vit.embeddings.cls_token": values(1, 1, D),
        "vit.embeddings.mask_token": values(1, 1, D),
        "vit.embeddings.position_embeddings": values(1, 5, D, seed=1),
        "mlp.experts.gate_up_proj": values(3, 8, D, seed=2),
        "vit.layers.0.attention.q_proj.weight": values(4, D, seed=3),
    }
    tree = {
        "embeddings": {n: weights[f"vit.embeddings.{n}"]
                       for n in ("cls_token", "position_embeddings")},
        "gate_up_proj": weights["mlp.experts.gate_up_proj"],
        "layer": {"0": {"query": {"kernel": values(4, D, seed=3).T}}},
    }  # fmt: skip
    names = flora.peft.match_names(weights, jax.tree.map(jnp.asarray, tree))
    assert {s.path: s.name for s in names.slots} == {
        "embeddings/cls_token": "vit.embeddings.cls_token",
        "embeddings/position_embeddings": "vit.embeddings.position_embeddings",
        "gate_up_proj": "mlp.experts.gate_up_proj",
        "layer/0/query/kernel": "vit.layers.0.attention.q_proj.weight",
    }


def test_values_that_do_not_tell(tmp_path):
    same = {
        "a.weight": values(4, D),
        "b.weight": values(4, D),
        "c.weight": values(3, D),
    }
    tree = {"x": {"kernel": jnp.asarray(values(4, D).T)}}
    with pytest.raises(flora.LoraError, match=r"'x/kernel'.*each row in several"):
        flora.peft.match_names(same, tree)
    with pytest.raises(flora.LoraError, match="'x/kernel'"):
        flora.peft.match_names({"c.weight": values(3, D)}, tree)
    with pytest.raises(flora.LoraError, match="ShapeDtypeStruct"):
        flora.peft.match_names(same, jax.eval_shape(lambda: tree))
    with pytest.raises(flora.LoraError, match="holds no array of two axes"):
        flora.peft.match_names({}, tree)
