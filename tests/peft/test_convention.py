"""What PyTorch calls a leaf: lists, and numbers that belong to a name."""

import jax
import jax.numpy as jnp
import pytest

import flora
import flora.peft
from flora._peft.convention import doubts, matched_slots, spelled
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
