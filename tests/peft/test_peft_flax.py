"""HF's own Flax models: their leaves are found by name, with no map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, linear, values

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 12}
IDS = jnp.asarray([[1, 5, 2, 9]])


def gpt2():
    import transformers as hf

    config = hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=16)
    at = "transformer.h.{}.attn.c_"
    shapes = {"attn": (8, 24), "proj": (8, 8)}
    return hf.FlaxGPT2LMHeadModel(config, seed=0), at, shapes


def bert():
    import transformers as hf

    model = hf.FlaxBertModel(hf.BertConfig(**SIZES, max_position_embeddings=16), seed=0)
    at = "encoder.layer.{}.attention.self."
    return model, at, {"query": (8, 8), "value": (8, 8)}


def llama():
    import transformers as hf

    config = hf.LlamaConfig(**SIZES, max_position_embeddings=16)
    at = "model.layers.{}.self_attn."
    return (
        hf.FlaxLlamaForCausalLM(config, seed=0),
        at,
        {"q_proj": (8, 8), "v_proj": (8, 8)},
    )


@pytest.mark.parametrize("build", [gpt2, bert, llama])
def test_leaves_are_found_by_name(tmp_path, build):
    model, at, shapes = build()
    tensors = {}
    for i in range(2):
        for k, (name, shape) in enumerate(shapes.items()):
            tensors |= linear(at.format(i) + name, *shape, seed=10 * i + k)
    last = [f"{at.split('.')[-2]}.c_{n}" if build is gpt2 else n for n in shapes]
    config = {"target_modules": last, "fan_in_fan_out": build is gpt2}
    folder = files.write(tmp_path / "a", tensors, **config)

    def fn(params, ids):
        return model(ids, params=params)[0]

    loaded = flora.peft.load(folder, model.params)
    followed = flora.peft.load(folder, model.params, fn=fn, args=(IDS,))
    assert jax.tree.structure(loaded) == jax.tree.structure(followed)
    jax.tree.map(np.testing.assert_array_equal, loaded, followed)
    merged = flora.merge(loaded)
    for name in shapes:
        path = (at.format(1) + name).split(".")
        got, base = merged, model.params
        for word in [*path, "kernel"]:
            got, base = got[word], base[word]
        change = files.delta(tensors, ".".join(path), 3.0)
        # FlaxConv1D holds PyTorch's [in, out] transposed, as all kernels
        np.testing.assert_allclose(
            got - base, change.T if build is gpt2 else change, atol=2e-6
        )
    flora.peft.save(tmp_path / "b", loaded)
    _, written = files.read(tmp_path / "b")
    for key, x in tensors.items():
        np.testing.assert_array_equal(written[key], x)


def test_a_head_that_trains_whole(tmp_path):
    import transformers as hf

    config = hf.BertConfig(**SIZES, max_position_embeddings=16)
    model = hf.FlaxBertForSequenceClassification(config, seed=0)
    head = {"classifier.weight": values(2, 8), "classifier.bias": values(2)}
    tensors = {PREFIX + k: v for k, v in head.items()}
    for i in range(2):
        tensors |= linear(f"bert.encoder.layer.{i}.attention.self.query", 8, 8)
    folder = files.write(
        tmp_path / "a",
        tensors,
        target_modules=["query"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "score"],  # as PEFT writes it
    )
    loaded = flora.peft.load(folder, model.params)
    np.testing.assert_array_equal(loaded["classifier"]["kernel"].value, values(2, 8).T)
