"""What PyTorch calls a leaf: lists, and numbers that belong to a name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import flora
import flora.peft
from flora._peft.naming.convention import doubts, matched_slots, spelled
from tests.support import peft_files as files
from tests.support.peft_files import linear, values

# Leaves of HF's Flax models and the parameters of the PyTorch models, read off both.
OF_HF = {
    "T5 v1.1": {
        "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel":
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder/block/0/layer/1/DenseReluDense/wi_1/kernel":
            "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "decoder/block/0/layer/2/layer_norm/weight":
            "decoder.block.0.layer.2.layer_norm.weight",
        "shared/embedding": "shared.weight",
    },
    "BERT": {
        "bert/encoder/layer/0/attention/self/query/kernel":
            "bert.encoder.layer.0.attention.self.query.weight",
        "bert/encoder/layer/1/output/LayerNorm/scale":
            "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert/embeddings/token_type_embeddings/embedding":
            "bert.embeddings.token_type_embeddings.weight",
    },
    "GPT-2": {
        "transformer/h/0/attn/c_attn/kernel": "transformer.h.0.attn.c_attn.weight",
        "transformer/h/0/ln_1/scale": "transformer.h.0.ln_1.weight",
        "transformer/h/0/ln_2/bias": "transformer.h.0.ln_2.bias",
        "transformer/ln_f/scale": "transformer.ln_f.weight",
    },
    "Whisper": {
        "model/encoder/conv1/kernel": "model.encoder.conv1.weight",
        "model/decoder/layers/0/encoder_attn/q_proj/kernel":
            "model.decoder.layers.0.encoder_attn.q_proj.weight",
    },
    "ViT of transformers 4": {
        "vit/encoder/layer/0/attention/attention/query/kernel":
            "vit.encoder.layer.0.attention.attention.query.weight",
        "vit/embeddings/cls_token": "vit.embeddings.cls_token",
    },
    "DistilBERT": {
        "distilbert/transformer/layer/0/attention/q_lin/kernel":
            "distilbert.transformer.layer.0.attention.q_lin.weight",
        "distilbert/transformer/layer/0/ffn/lin1/bias":
            "distilbert.transformer.layer.0.ffn.lin1.bias",
        "pre_classifier/kernel": "pre_classifier.weight",
    },
    "Wav2Vec2": {
        "wav2vec2/feature_extractor/conv_layers/0/conv/kernel":
            "wav2vec2.feature_extractor.conv_layers.0.conv.weight",
        "wav2vec2/encoder/layers/0/feed_forward/intermediate_dense/kernel":
            "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight",
    },
    "BART": {
        "model/decoder/layers/0/fc1/kernel": "model.decoder.layers.0.fc1.weight",
        "model/encoder/layernorm_embedding/scale":
            "model.encoder.layernorm_embedding.weight",
    },
    "CLIP": {
        "text_model/encoder/layers/0/self_attn/k_proj/kernel":
            "text_model.encoder.layers.0.self_attn.k_proj.weight",
        "vision_model/pre_layrnorm/scale": "vision_model.pre_layrnorm.weight",
    },
    "ResNet": {
        "params/resnet/encoder/stages/0/layers/0/layer/1/normalization/scale":
            "resnet.encoder.stages.0.layers.0.layer.1.normalization.weight",
        "batch_stats/resnet/encoder/stages/0/layers/0/layer/1/normalization/mean":
            "resnet.encoder.stages.0.layers.0.layer.1.normalization.running_mean",
        "params/classifier/1/kernel": "classifier.1.weight",
    },
}  # fmt: skip


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("model", OF_HF)
def test_names_of_hf(model, partial):
    want = OF_HF[model]
    found = spelled([*want], partial=partial)
    assert {path: x.name for path, x in found.items()} == want
    assert not any(x.other for x in found.values())


def names(*paths, partial=False):
    return {p: x.name for p, x in spelled(paths, partial=partial).items()}


def test_lists_of_linen():
    paths = [f"blocks_{i}/{w}/kernel" for i in range(3) for w in ("wi_0", "up")]
    found = names(*paths)
    assert found["blocks_2/up/kernel"] == "blocks.2.up.weight"
    assert found["blocks_2/wi_0/kernel"] == "blocks.2.wi_0.weight"
    # An adapter may have some layers alone.
    part = names("blocks_2/up/kernel", partial=True)
    assert part == {"blocks_2/up/kernel": "blocks.2.up.weight"}
    # What counts from 1 is no list, and what has numbers of its own neither.
    assert names("ln_1/scale", "ln_2/scale")["ln_2/scale"] == "ln_2.weight"
    assert names("conv_01/kernel")["conv_01/kernel"] == "conv_01.weight"
    assert not doubts(["ln_1/scale", "ln_2/scale"], partial=False)
    assert names("Dense_0/kernel")["Dense_0/kernel"] == "Dense_0.weight"
    assert not doubts(["Dense_0/kernel"], partial=False)


def test_what_may_be_either_is_refused():
    lists = ["a_0/up/kernel", "a_1/down/kernel"]  # branches, or layers that differ
    own = ["mlp/lin_0/kernel", "mlp/lin_1/kernel"]
    for paths in (lists, own):
        assert {*doubts(paths, partial=False)} == {*paths}
    assert "'mlp.lin_0.weight' of PyTorch or 'mlp.lin.0.weight'" in doubts(
        own, partial=False
    )[own[0]]  # fmt: skip


@pytest.mark.parametrize("word", ["wi_{}", "wi.{}"])
def test_a_file_says_which(tmp_path, word):
    """Loaded by either name; saved again by the file's."""
    modules = [f"mlp.{word}".format(i) for i in range(2)]
    tensors = linear(modules[0], 4, 6) | linear(modules[1], 4, 6, seed=3)
    folder = files.write(tmp_path / "a", tensors, target_modules=modules)
    tree = {"mlp": {f"wi_{i}": {"kernel": jnp.asarray(values(4, 6))} for i in range(2)}}
    loaded = flora.peft.load(folder, tree)
    assert loaded["mlp"]["wi_1"]["kernel"].rank == 2
    names = {"mlp/wi_{i}": f"mlp.{word.replace('{}', '{i}')}"}
    flora.peft.save(tmp_path / "b", loaded, names=names)
    assert {*files.read(tmp_path / "b")[1]} == {*tensors}
    plain = flora.peft.load(folder, tree, names=names)
    assert plain["mlp"]["wi_0"]["kernel"].layout.out == (1,)


def test_names_as_the_file_writes_them():
    paths = ["mlp/wi_0/kernel", "mlp/wi_1/kernel"]
    for first, second in (("mlp.wi_0", "mlp.wi_1"), ("mlp.wi.0", "mlp.wi.1")):
        slots = matched_slots(paths, [f"{first}.weight"])
        assert [s.name for s in slots] == [f"{first}.weight", f"{second}.weight"]


def test_a_doubtful_name_is_not_saved(tmp_path):
    x, tree = jnp.ones((2, 4)), {"lin_0": {"kernel": jnp.asarray(values(4, 6))}}
    config = flora.LoraConfig(rank=2, target="lin_0/kernel")

    def fn(p, x):
        return x @ p["lin_0"]["kernel"]

    adapted = flora.init(jax.random.key(0), config, fn, tree, x)
    with pytest.raises(flora.LoraError, match=r"'lin_0.weight' of PyTorch or 'lin.0"):
        flora.peft.save(tmp_path / "a", adapted)
    flora.peft.save(tmp_path / "a", adapted, names={"lin_0": "lin_0"})
    assert files.read(tmp_path / "a")[0]["target_modules"] == ["lin_0"]


# --- Names of another version ---------------------------------------------------------


def vit(layers=2, d=4, f=6):
    """As HF's Flax model has it, named as transformers 4 does."""

    def dense(seed, in_, out):
        return {
            "kernel": jnp.asarray(values(in_, out, seed=seed)),
            "bias": jnp.asarray(values(out, seed=seed)),
        }

    def layer(i):
        qkv = {n: dense(10 * i + k, d, d) for k, n in enumerate(("query", "key"))}
        qkv["value"] = dense(10 * i + 2, d, d)
        return {
            "attention": {
                "attention": qkv,
                "output": {"dense": dense(10 * i + 3, d, d)},
            },
            "intermediate": {"dense": dense(10 * i + 4, d, f)},
            "output": {"dense": dense(10 * i + 5, f, d)},
            "layernorm_before": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
        }

    encoder = {"layer": {str(i): layer(i) for i in range(layers)}}
    return {"vit": {"encoder": encoder}, "classifier": dense(99, d, 3)}


NEW = {
    "attention.q_proj": "attention/attention/query",
    "attention.k_proj": "attention/attention/key",
    "attention.v_proj": "attention/attention/value",
    "attention.o_proj": "attention/output/dense",
    "mlp.fc1": "intermediate/dense",
    "mlp.fc2": "output/dense",
}


def renamed_folder(path, words, layers=(0, 1), root="vit.layers", **config):
    sizes = {"mlp.fc1": (4, 6), "mlp.fc2": (6, 4)}
    tensors = {}
    for i in layers:
        for k, word in enumerate(words):
            at, (in_, out) = f"{root}.{i}.{word}", sizes.get(word, (4, 4))
            tensors |= linear(at, in_, out, seed=100 * i + 3 * k)
    return files.write(path, tensors, target_modules=[*words], **config), tensors


@pytest.mark.parametrize("words", [[*NEW], ["attention.q_proj", "attention.v_proj"],
    ["mlp.fc1"], ["mlp.fc2", "attention.o_proj"]])  # fmt: skip
def test_names_of_transformers_5(tmp_path, words):
    """Found by words and sizes, and written again as they came."""
    folder, tensors = renamed_folder(tmp_path / "a", words)
    tree = vit()
    loaded = flora.peft.load(folder, tree)
    merged = flora.merge(loaded)["vit"]["encoder"]["layer"]
    for i in (0, 1):
        for word in words:
            got, had = merged[str(i)], tree["vit"]["encoder"]["layer"][str(i)]
            for step in NEW[word].split("/"):
                got, had = got[step], had[step]
            change = files.delta(tensors, f"vit.layers.{i}.{word}", 3.0)
            want = had["kernel"] + change
            assert jnp.allclose(got["kernel"], want, rtol=1e-5, atol=1e-5)
    flora.peft.save(tmp_path / "b", flora.split(loaded)[1])
    config, written = files.read(tmp_path / "b")
    assert {*written} == {*tensors}
    assert {*config["target_modules"]} == {
        f"vit.layers.{i}.{w}" for i in (0, 1) for w in words
    }


def test_biases_and_heads_of_transformers_5(tmp_path):
    words = ["attention.q_proj", "mlp.fc2"]
    folder, tensors = renamed_folder(
        tmp_path / "a", words, bias="lora_only", modules_to_save=["classifier"]
    )
    tensors |= {
        f"base_model.model.vit.layers.{i}.{w}.base_layer.bias": values(n, seed=5)
        for i in (0, 1)
        for w, n in zip(words, (4, 4), strict=True)
    }
    tensors |= {
        f"base_model.model.classifier.{n}": values(*shape, seed=6)
        for n, shape in (("weight", (3, 4)), ("bias", (3,)))
    }
    config, _ = files.read(folder)
    files.write(folder, tensors, **config)
    loaded = flora.peft.load(folder, vit())
    layer = loaded["vit"]["encoder"]["layer"]["1"]
    bias = layer["attention"]["attention"]["query"]["bias"]
    assert jnp.array_equal(bias.value, values(4, seed=5))
    flora.peft.save(tmp_path / "b", loaded)
    assert {*files.read(tmp_path / "b")[1]} == {*tensors}


def test_what_is_renamed_is_complete_or_refused(tmp_path):
    tree = vit()
    words = ["attention.q_proj"]
    # A module that the config selects, by its new name, and the file lacks.
    folder, _ = renamed_folder(tmp_path / "a", words, layers=(0,))
    with pytest.raises(
        flora.LoraError, match=r"vit.layers.1.attention.q_proj.*missing"
    ):
        flora.peft.load(folder, tree)
    for root, some in (
        ("deit.layers", words),  # another model
        ("vit.layers", ["attention.w"]),  # any of four
        ("vit.layers", ["attention.q_proj", "attn.query"]),  # one for two
    ):
        folder, _ = renamed_folder(tmp_path / "b", some, root=root)
        with pytest.raises(flora.LoraError, match="which none of the base's"):
            flora.peft.load(folder, tree)
    folder, _ = renamed_folder(tmp_path / "c", words, layers=(0, 1, 2))
    with pytest.raises(flora.LoraError, match=r"vit.layers.2.attention.*none of the"):
        flora.peft.load(folder, tree)


def test_kernels_of_conv1d(tmp_path):
    """HF's FlaxConv1D has `[out, in]`: square ones too are read so again."""
    tree = {
        "h": {
            "0": {
                "c_attn": {"kernel": jnp.asarray(values(12, 4)), "bias": jnp.zeros(12)},
                "c_proj": {"kernel": jnp.asarray(values(4, 4)), "bias": jnp.zeros(4)},
            }
        }
    }

    def fn(p, x):
        q = p["h"]["0"]
        return (x @ q["c_attn"]["kernel"].T)[:, :4] @ q["c_proj"]["kernel"].T

    x, config = jnp.ones((2, 4)), flora.LoraConfig(rank=2, target="c_*/kernel")
    adapted = flora.init(jax.random.key(0), config, fn, tree, x)
    for name in ("c_attn", "c_proj"):
        node = adapted["h"]["0"][name]["kernel"]
        b = jnp.asarray(values(*node.b.shape, seed=3))
        adapted["h"]["0"][name]["kernel"] = dataclasses.replace(node, b=b)
    flora.peft.save(tmp_path / "a", adapted)
    assert files.read(tmp_path / "a")[0]["fan_in_fan_out"] is True
    again = flora.peft.load(tmp_path / "a", tree)
    want = flora.lora(fn)(adapted, x)
    assert jnp.allclose(flora.lora(fn)(again, x), want, rtol=1e-5)
    flora.peft.save(tmp_path / "b", again)
    assert files.read(tmp_path / "b")[0]["fan_in_fan_out"] is True
