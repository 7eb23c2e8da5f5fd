"""Layers of other kinds than linear ones: convolutions, embeddings, experts, ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, values

KEY = PREFIX + "m"
WORD = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def close(got, want, tolerance=5e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0
    )


def round_trip(tmp_path, tensors, loaded, **settings):
    """What `save` writes of a loaded adapter is what was loaded, tensor by tensor."""
    flora.peft.save(tmp_path / "saved", loaded, **settings)
    config, written = files.read(tmp_path / "saved")
    assert {*written} == {*tensors}
    for key, x in tensors.items():
        close(written[key], x, 1e-6)
        assert written[key].shape == x.shape
    return config


def conv(window, groups=1):
    n = len(window)
    spec = (f"N{'HW'[:n]}C", f"{'HW'[:n]}IO", f"N{'HW'[:n]}C")

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1,) * n, "SAME", dimension_numbers=spec,
            feature_group_count=groups)  # fmt: skip

    return fn


@pytest.mark.parametrize("window", [(3, 2), (5,)])
def test_convolutions(tmp_path, window):
    n = len(window)
    tensors = {
        f"{PREFIX}conv.lora_A.weight": values(2, 3, *window),
        f"{PREFIX}conv.lora_B.weight": values(8, 2, *(1,) * n),
    }
    folder = files.write(tmp_path / "a", tensors, target_modules=["conv"])
    tree = {"conv": {"kernel": jnp.asarray(values(*window, 3, 8))}}
    loaded = flora.peft.load(folder, tree)
    b = tensors[f"{PREFIX}conv.lora_B.weight"].reshape(8, 2)
    torch_delta = 3.0 * np.einsum(
        "or,ri...->oi...", b, tensors[f"{PREFIX}conv.lora_A.weight"]
    )
    whole = tree["conv"]["kernel"] + np.moveaxis(torch_delta, (0, 1), (-1, -2))
    close(flora.merge(loaded)["conv"]["kernel"], whole)
    x = jnp.asarray(values(2, *(6,) * n, 3, seed=4))
    fn = conv(window)
    close(flora.lora(fn)(loaded, x), fn({"conv": {"kernel": jnp.asarray(whole)}}, x))
    round_trip(tmp_path, tensors, loaded)


def grouped(r=4, groups=2):
    return {
        f"{PREFIX}conv.lora_A.weight": values(r, 6, 3),
        f"{PREFIX}conv.lora_B.weight": values(8, r // groups, 1),
    }


def dense_of_groups(tensors, groups=2):
    """PEFT's delta as a dense kernel `[window, in, out]`; groups read all inputs."""
    a = tensors[f"{PREFIX}conv.lora_A.weight"].astype(np.float64)
    b = tensors[f"{PREFIX}conv.lora_B.weight"][:, :, 0].astype(np.float64)
    r, out = a.shape[0], b.shape[0]
    kernel = np.zeros((3, 6, out))
    for o in range(out):
        k = o // (out // groups)
        mine = a[k * r // groups : (k + 1) * r // groups]
        kernel[:, :, o] = np.einsum("r,rik->ki", b[o], mine)
    return kernel


def test_convolutions_in_groups_read_across_them(tmp_path):
    tensors = grouped()
    folder = files.write(tmp_path / "a", tensors, r=4, target_modules=["conv"])
    tree = {"conv": {"kernel": jnp.asarray(values(3, 3, 8))}}
    loaded = flora.peft.load(folder, tree)
    x = jnp.asarray(values(2, 7, 6, seed=4))
    fn, dense = conv((3,), 2), conv((3,))
    added = dense(
        {"conv": {"kernel": jnp.asarray(dense_of_groups(tensors), jnp.float32)}}, x
    )
    close(flora.lora(fn)(loaded, x), fn(tree, x) + 1.5 * added)
    # Gradients: those of the dense kernel, seen through A and B.
    dy = jnp.asarray(values(2, 7, 8, seed=5))
    _, grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, x) * dy).sum())(loaded)
    zero = {"conv": {"kernel": jnp.zeros((3, 6, 8))}}
    dw = np.asarray(
        jax.grad(lambda p: (dense(p, x) * dy).sum())(zero)["conv"]["kernel"]
    )
    b = tensors[f"{PREFIX}conv.lora_B.weight"][:, :, 0]
    want_a = np.stack(
        [np.einsum("kio,o->ik", dw[:, :, 4 * (p // 2) : 4 * (p // 2) + 4],
                   b[4 * (p // 2) : 4 * (p // 2) + 4, p % 2]) for p in range(4)]
    )  # fmt: skip
    node = loaded["conv"]["kernel"]
    flora.peft.save(tmp_path / "g", {"conv": {"kernel": grads["conv"]["kernel"]}})
    written = files.read(tmp_path / "g")[1]
    close(written[f"{PREFIX}conv.lora_A.weight"], 1.5 * want_a, 1e-5)
    assert node.variant.groups == 2
    round_trip(tmp_path, tensors, loaded)
    with pytest.raises(flora.LoraError, match="puts a function between"):
        flora.merge(loaded)


def test_convolutions_in_groups_of_flora(tmp_path):
    """Written for PEFT with more ranks, and read again as a change of the kernel."""
    tree, fn = {"conv": {"kernel": jnp.asarray(values(3, 3, 8))}}, conv((3,), 2)
    x = jnp.asarray(values(2, 7, 6, seed=4))
    config = flora.LoraConfig(rank=2, alpha=6)
    adapted = flora.init(jax.random.key(0), config, fn, tree, x)
    adapted = jax.tree.map(lambda w: w + 0.1, adapted)
    names = {"conv": flora.peft.Module("conv", groups=2)}
    flora.peft.save(tmp_path / "a", adapted, names=names)
    written = files.read(tmp_path / "a")[1]
    dense = dense_of_groups(written)
    y = fn({"conv": {"kernel": adapted["conv"]["kernel"].base}}, x)
    y += 3.0 * conv((3,))({"conv": {"kernel": jnp.asarray(dense, jnp.float32)}}, x)
    close(flora.lora(fn)(adapted, x), y)
    base = flora.split(adapted)[0]
    loaded = flora.peft.load(tmp_path / "a", base)
    close(flora.merge(loaded)["conv"]["kernel"], flora.merge(adapted)["conv"]["kernel"])


def embedding_files(tmp_path, more=(), **config):
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": values(2, 7),
        f"{PREFIX}embed.lora_embedding_B": values(4, 2),
        **dict(more),
    }
    config = {"target_modules": ["embed"], "task_type": None} | config
    return tensors, files.write(tmp_path / "a", tensors, **config)


LOOKED_UP = {
    "fn": lambda p, x: jnp.take(p["embed"]["embedding"], x, axis=0),
    "args": (jnp.zeros((2, 5), jnp.int32),),
}


def test_embeddings(tmp_path):
    tensors, folder = embedding_files(tmp_path)
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    loaded = flora.peft.load(folder, tree, **LOOKED_UP)
    a, b = (tensors[f"{PREFIX}embed.lora_embedding_{n}"] for n in "AB")
    close(flora.merge(loaded)["embed"]["embedding"], values(7, 4) + 3.0 * (b @ a).T)
    round_trip(tmp_path, tensors, loaded, **LOOKED_UP)


def test_dora_of_embeddings(tmp_path):
    m = {f"{PREFIX}embed.lora_magnitude_vector": np.abs(values(4))}
    tensors, folder = embedding_files(tmp_path, m, use_dora=True)
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    loaded = flora.peft.load(folder, tree, **LOOKED_UP)
    a, b = (tensors[f"{PREFIX}embed.lora_embedding_{n}"] for n in "AB")
    whole = values(7, 4) + 3.0 * (b @ a).T
    want = whole * np.abs(values(4)) / np.linalg.norm(whole, axis=0)
    close(flora.merge(loaded)["embed"]["embedding"], want)
    assert round_trip(tmp_path, tensors, loaded, **LOOKED_UP)["use_dora"] is True


def tied_fn(p, x):
    table = p["embed"]["embedding"]
    return jnp.tanh(jnp.take(table, x, axis=0)) @ table.T


def test_tied_weights(tmp_path):
    tensors, _ = embedding_files(tmp_path)
    a, b = (tensors[f"{PREFIX}embed.lora_embedding_{n}"] for n in "AB")
    twin = {
        f"{PREFIX}head.lora_A.weight": b.T.copy(),
        f"{PREFIX}head.lora_B.weight": a.T.copy(),
    }
    settings = {"target_modules": ["embed", "head"], "ensure_weight_tying": True}
    tensors, folder = embedding_files(tmp_path, twin, **settings)
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    Module = flora.peft.Module
    names = {"embed": [Module("embed"), Module("head", tied=True)]}
    for given in (None, names):
        loaded = flora.peft.load(folder, tree, names=given)
        whole = {"embed": {"embedding": values(7, 4) + 3.0 * (b @ a).T}}
        x = jnp.asarray([[1, 2, 6, 6, 0]])
        close(
            flora.lora(tied_fn)(loaded, x), tied_fn(jax.tree.map(jnp.asarray, whole), x)
        )
    config = round_trip(tmp_path, tensors, loaded, names=names)
    assert config["ensure_weight_tying"] is True


def test_ties_that_do_not_hold(tmp_path):
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    _, folder = embedding_files(tmp_path)
    args = (jnp.zeros((2, 5), jnp.int32),)
    with pytest.raises(flora.LoraError, match="tied weights"):
        flora.peft.load(folder, tree, fn=tied_fn, args=args)
    for config in (
        {},
        {"task_type": "CAUSAL_LM"},
        {"auto_mapping": {"base_model_class": "MistralForCausalLM"}},
        {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
    ):
        files_of = embedding_files(tmp_path, **config)[1]
        with pytest.raises(flora.LoraError, match=r"has the 7 words .* tied weights"):
            flora.peft.load(files_of, tree)
    for config in (
        {"task_type": "FEATURE_EXTRACTION"},
        {"auto_mapping": {"base_model_class": "BertModel"}},
        {"auto_mapping": {"base_model_class": "BertForSequenceClassification"}},
    ):
        flora.peft.load(embedding_files(tmp_path, **config)[1], tree)
    # A bias of logits is no head, a matrix with as many words is one.
    _, folder = embedding_files(tmp_path)
    with pytest.raises(flora.LoraError, match="tied weights"):
        flora.peft.load(folder, tree | {"logits": {"bias": jnp.zeros((1, 7))}})
    flora.peft.load(folder, tree | {"head": {"kernel": jnp.zeros((4, 7))}})
    _, folder = embedding_files(tmp_path)
    Module = flora.peft.Module
    names = {"embed": [Module("embed"), Module("head", tied=True)]}
    with pytest.raises(flora.LoraError, match=r"is not, but both lie in"):
        flora.peft.load(folder, tree, names=names)
    other = {
        f"{PREFIX}head.lora_A.weight": values(2, 4),
        f"{PREFIX}head.lora_B.weight": values(7, 2),
    }
    _, folder = embedding_files(tmp_path, other, target_modules=["embed", "head"])
    with pytest.raises(flora.LoraError, match="not the transpose of the other use"):
        flora.peft.load(folder, tree, names=names)
    with pytest.raises(flora.LoraError, match=r"'head.weight', which none"):
        flora.peft.load(folder, tree)


def test_a_tied_weight_that_trains_whole(tmp_path):
    """PEFT writes it under both names."""
    whole = {f"{PREFIX}{n}.weight": values(7, 4, seed=3) for n in ("embed", "head")}
    tensors = files.linear("mix", 4, 4) | whole
    config = {"target_modules": ["mix"], "ensure_weight_tying": True}
    folder = files.write(tmp_path / "a", tensors, modules_to_save=["embed"], **config)
    tree = {
        "embed": {"embedding": jnp.asarray(values(7, 4))},
        "mix": {"kernel": jnp.asarray(values(4, 4))},
    }
    loaded = flora.peft.load(folder, tree)
    np.testing.assert_array_equal(
        loaded["embed"]["embedding"].value, values(7, 4, seed=3)
    )
    whole[f"{PREFIX}head.weight"] = values(7, 4, seed=4)
    files.write(folder, tensors | whole, modules_to_save=["embed"], **config)
    with pytest.raises(flora.LoraError, match=r"'head.weight', which none"):
        flora.peft.load(folder, tree)


def test_a_whole_weight_for_one_of_two_uses(tmp_path):
    tree = {
        "embed": {"embedding": jnp.asarray(values(7, 4))},
        "mix": {"kernel": jnp.asarray(values(4, 4))},
    }
    Module = flora.peft.Module
    names = {"embed": [Module("embed"), Module("head", tied=True)], "mix": "mix"}
    args = (jnp.zeros((2, 5), jnp.int32),)

    def folder_of(*modules, **config):
        whole = {f"{PREFIX}{n}.weight": values(7, 4, seed=3) for n in modules}
        tensors = files.linear("mix", 4, 4) | whole
        saved = {"modules_to_save": list(modules[:1]), "target_modules": ["mix"]}
        return files.write(tmp_path / "a", tensors, **(saved | config))

    one = folder_of("embed")
    for given in ({}, {"names": names}, {"fn": tied_fn, "args": args}):
        with pytest.raises(flora.LoraError, match="tied weights"):
            flora.peft.load(one, tree, **given)
    with pytest.raises(flora.LoraError, match=r"'head\.weight' is adapted and"):
        flora.peft.load(folder_of("head"), tree, names=names)
    both = folder_of("embed", "head", ensure_weight_tying=True)
    for given in ({}, {"names": names}, {"fn": tied_fn, "args": args}):
        loaded = flora.peft.load(both, tree, **given)
        np.testing.assert_array_equal(
            loaded["embed"]["embedding"].value, values(7, 4, seed=3)
        )
    flora.peft.save(tmp_path / "same", loaded)  # it knows of both
    assert {*files.read(tmp_path / "same")[1]} == {*files.read(both)[1]}
    loaded = files.forgotten(loaded)
    with pytest.raises(flora.LoraError, match=r"tied=\{'embed/embedding': 'lm_head'\}"):
        flora.peft.save(tmp_path / "b", loaded, fn=tied_fn, args=args)
    with pytest.raises(flora.LoraError, match="may be read by a head too"):
        flora.peft.save(tmp_path / "b", loaded)
    assert not (tmp_path / "b").exists()
    flora.peft.save(tmp_path / "b", loaded, tied={"embed/embedding": "head"})
    config, tensors = files.read(tmp_path / "b")
    assert config["ensure_weight_tying"] is True
    assert config["modules_to_save"] == ["embed"]
    for name in ("embed", "head"):
        close(tensors[f"{PREFIX}{name}.weight"], values(7, 4, seed=3))


def test_a_head_in_the_leaf_of_an_embedding(tmp_path):
    """ΔW would reach the lookup too."""
    tensors = files.linear("head", 4, 7)
    folder = files.write(tmp_path / "a", tensors, target_modules=["head"])
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    args = (jnp.zeros((2, 5), jnp.int32),)
    for given in ({}, {"fn": tied_fn, "args": args}):
        with pytest.raises(flora.LoraError, match="tied weights"):
            flora.peft.load(folder, tree, names={"embed": "head"}, **given)


def test_saving_one_of_two_uses(tmp_path):
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    x = jnp.asarray([[1, 2, 6, 6, 0]])
    config = flora.LoraConfig(rank=2, target="embedding")
    adapted = flora.init(jax.random.key(0), config, tied_fn, tree, x)
    for given in ({"fn": tied_fn, "args": (x,)}, {}, {"task_type": "CAUSAL_LM"}):
        with pytest.raises(flora.LoraError, match="tied weights"):
            flora.peft.save(tmp_path / "a", adapted, **given)
    flora.peft.save(tmp_path / "a", adapted, task_type="FEATURE_EXTRACTION")
    flora.peft.save(tmp_path / "a", adapted, tied={})
    for given in ({"fn": tied_fn, "args": (x,)}, {}):
        tied = {"embed/embedding": "head"}
        flora.peft.save(tmp_path / "a", adapted, tied=tied, **given)
    assert files.read(tmp_path / "a")[0]["ensure_weight_tying"] is True
    again = flora.peft.load(tmp_path / "a", tree, fn=tied_fn, args=(x,))
    close(flora.lora(tied_fn)(again, x), flora.lora(tied_fn)(adapted, x))


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        (["embed"], "tied is a list"),
        ({"embed/other": "head"}, "'embed/other' is no leaf"),
        ({"embed/embedding": 3}, "is given 3"),
    ],
)
def test_tied_modules_that_are_wrong(tmp_path, tied, message):
    tree = {"embed": {"embedding": jnp.asarray(values(7, 4))}}
    config = flora.LoraConfig(rank=2, target="embedding")
    x = jnp.asarray([[1, 2, 6, 6, 0]])
    adapted = flora.init(jax.random.key(0), config, tied_fn, tree, x)
    with pytest.raises(flora.LoraError, match=message):
        flora.peft.save(tmp_path / "a", adapted, tied=tied)


E_, R = 3, 2


def experts(depths=("", ".base_layer"), d=4, f=5):
    """Of down_proj outside and of gate_up_proj inside, as PEFT nests them."""
    outer, inner = depths
    return {
        f"{PREFIX}experts{outer}.lora_A.weight": values(R * E_, f, seed=1),
        f"{PREFIX}experts{outer}.lora_B.weight": values(d, R * E_, seed=2),
        f"{PREFIX}experts{inner}.lora_A.weight": values(R * E_, d, seed=3),
        f"{PREFIX}experts{inner}.lora_B.weight": values(2 * f, R * E_, seed=4),
    }


EXPERTS = {
    "target_modules": None,
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def expert_delta(tensors, module, scale):
    """`[expert, in, out]`: the expert axis is outer in A and inner in B."""
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].reshape(E_, R, -1)
    b = tensors[f"{PREFIX}{module}.lora_B.weight"]
    b = b.reshape(len(b), R, E_)
    return scale * np.einsum("ore,eri->eio", b, a)


@pytest.mark.parametrize("d", [4, 10])
def test_experts(tmp_path, d):
    tensors = experts(d=d)
    folder = files.write(tmp_path / "a", tensors, **EXPERTS)
    tree = {
        "experts": {
            "gate_up_proj": jnp.asarray(values(E_, d, 10)),
            "down_proj": jnp.asarray(values(E_, 5, d)),
        }
    }
    loaded = flora.peft.load(folder, tree)
    merged = flora.merge(loaded)["experts"]
    up = expert_delta(tensors, "experts.base_layer", 3.0)
    close(merged["gate_up_proj"], values(E_, d, 10) + up)
    close(merged["down_proj"], values(E_, 5, d) + expert_delta(tensors, "experts", 3.0))
    assert loaded["experts"]["down_proj"].layout == flora.Layout((0,), (1,), (2,))
    config = round_trip(tmp_path, tensors, loaded)
    assert config["target_parameters"] == EXPERTS["target_parameters"]
    assert config["target_modules"] is None


def test_experts_whose_sizes_do_not_tell_them_apart(tmp_path):
    tensors = experts(d=5, f=5)
    for key in [k for k in tensors if "base_layer.lora_B" in k]:
        tensors[key] = values(5, R * E_)
    folder = files.write(tmp_path / "a", tensors, **EXPERTS)
    square = jnp.asarray(values(E_, 5, 5))
    tree = {"experts": {"gate_up_proj": square, "down_proj": square}}
    with pytest.raises(flora.LoraError, match="fit either way"):
        flora.peft.load(folder, tree)

    def in_order(*words):
        return {
            f"experts/{w}": flora.peft.Module("experts", parameter=w) for w in words
        }

    for first, last in (("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")):
        loaded = flora.peft.load(folder, tree, names=in_order(first, last))
        merged = flora.merge(loaded)["experts"]
        close(merged[last] - square, expert_delta(tensors, "experts", 3.0))
        close(merged[first] - square, expert_delta(tensors, "experts.base_layer", 3.0))
        round_trip(tmp_path, tensors, loaded, names=in_order(first, last))


def test_a_raw_matrix(tmp_path):
    """PEFT adds B A to it as it lies, whatever its axes mean."""
    tensors = {
        f"{PREFIX}m.lora_A.weight": values(2, 6),
        f"{PREFIX}m.lora_B.weight": values(4, 2),
    }
    folder = files.write(
        tmp_path / "a", tensors, target_modules=[], target_parameters=["m.w"]
    )
    loaded = flora.peft.load(folder, {"m": {"w": jnp.asarray(values(4, 6))}})
    change = 3.0 * values(4, 2) @ values(2, 6)
    close(flora.merge(loaded)["m"]["w"], values(4, 6) + change)
    round_trip(tmp_path, tensors, loaded)


@pytest.mark.parametrize("out_first", [False, True])
def test_conv1d_of_gpt2(tmp_path, out_first):
    """HF's FlaxConv1D keeps `[out, in]`, which a square kernel does not show."""
    tensors = files.linear("c_attn", 4, 12) | files.linear("c_proj", 4, 4, seed=7)
    folder = files.write(
        tmp_path / "a",
        tensors,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )
    kernels = {"c_attn": values(4, 12), "c_proj": values(4, 4)}
    turn = (lambda k: k.T) if out_first else (lambda k: k)
    tree = {
        n: {"kernel": jnp.asarray(turn(k)), "bias": jnp.zeros(k.shape[1])}
        for n, k in kernels.items()
    }
    merged = flora.merge(flora.peft.load(folder, tree))
    for name, kernel in kernels.items():
        want = turn(kernel + files.delta(tensors, name, 3.0))
        close(merged[name]["kernel"], want)


def test_trees_with_the_names_and_axes_of_pytorch(tmp_path):
    tensors, _ = files.linear("a.lin", 4, 4), None
    folder = files.write(tmp_path / "a", tensors, target_modules=["lin"])
    tree = {"a.lin.weight": jnp.asarray(values(4, 4))}
    merged = flora.merge(flora.peft.load(folder, tree))
    close(merged["a.lin.weight"], values(4, 4) + files.delta(tensors, "a.lin", 3.0).T)


def test_whole_convolutions_are_saved_as_they_came(tmp_path):
    """Whose kernel of three axes may as well be that of split heads."""
    tree = files.params() | {"conv": {"kernel": jnp.asarray(values(3, 4, 6))}}
    whole = values(6, 4, 3)
    tensors = files.up_adapters() | {f"{PREFIX}conv.weight": whole}
    folder = files.write(tmp_path / "a", tensors, modules_to_save=["conv"])
    loaded = flora.peft.load(folder, tree)
    np.testing.assert_array_equal(loaded["conv"]["kernel"].value, whole.T)
    round_trip(tmp_path, tensors, loaded)


@pytest.mark.parametrize("name", ["lora_A", "lora_magnitude_vector", "default"])
def test_layers_that_are_called_as_what_peft_adds(tmp_path, name):
    tensors = files.linear(f"x.{name}", 4, 6)
    folder = files.write(tmp_path / "a", tensors, target_modules=[name])
    tree = {"x": {name: {"kernel": jnp.asarray(values(4, 6))}}}
    loaded = flora.peft.load(folder, tree)
    want = values(4, 6) + files.delta(tensors, f"x.{name}", 3.0)
    close(flora.merge(loaded)["x"][name]["kernel"], want)
    round_trip(tmp_path, tensors, loaded)


def test_whole_layers_of_gpt2_lie_as_in_pytorch(tmp_path):
    """Their weights are `[in, out]`: the shape tells, or the base's own values."""
    tree = files.params() | {"wide": {"kernel": jnp.asarray(values(4, 6, seed=7))}}
    tree |= {n: {"kernel": jnp.asarray(values(4, 4, seed=8))} for n in ("same", "free")}
    square = np.asarray(tree["same"]["kernel"]) + 0.1
    whole = {"wide": values(4, 6), "same": square, "free": values(4, 4, seed=3)}
    tensors = files.up_adapters() | {f"{PREFIX}{n}.weight": x for n, x in whole.items()}
    folder = files.write(tmp_path / "a", tensors, modules_to_save=[*whole])
    loaded = flora.peft.load(folder, tree)
    want = whole | {"free": whole["free"].T}  # far from the base: a linear layer
    for name, x in want.items():
        np.testing.assert_array_equal(loaded[name]["kernel"].value, x)
    flora.peft.save(tmp_path / "b", loaded)
    again = files.read(tmp_path / "b")[1]
    for name, x in whole.items():
        np.testing.assert_array_equal(again[f"{PREFIX}{name}.weight"], x)
