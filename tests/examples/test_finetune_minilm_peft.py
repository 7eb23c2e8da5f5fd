"""examples/minilm.py and the files of finetune_minilm.py, against transformers."""

import dataclasses

import finetune_minilm as example
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import pytest

import flora
import flora.hf
from tests.support.contract import randomized
from tests.support.decoders import close

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

SIZES = [
    minilm.Sizes(50, 32, 2, 4, 48, 20),
    minilm.Sizes(41, 24, 3, 2, 96, 16, 3, 1e-3),  # a large eps, three types
]


def theirs(sizes, folder):
    """transformers' BERT with random weights, saved into the folder."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(**dataclasses.asdict(sizes))).eval()
    for own in model.parameters():  # norms and biases too
        torch.nn.init.normal_(own, 0.1, 0.3)
    model.save_pretrained(folder)
    return model


def padded(sizes):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, sizes.vocab_size, (3, 11))
    return ids, np.arange(11) < np.array([[11], [7], [1]])


def hidden(model, ids, mask):
    import torch

    with torch.no_grad():
        given = torch.tensor(ids), torch.tensor(mask.astype(np.int64))
        return model(*given).last_hidden_state.numpy()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_encoder_is_transformers(sizes, tmp_path):
    wanted = hidden(theirs(sizes, tmp_path), *padded(sizes))
    ids, mask = padded(sizes)
    model, variables = minilm.load(tmp_path)
    found = np.asarray(model.apply(variables, ids, mask))
    close(found[mask], wanted[mask])


def test_transformers_reads_the_merged_model(tmp_path):
    from transformers import BertModel

    sizes = SIZES[0]
    theirs(sizes, tmp_path / "base")
    ids, mask = padded(sizes)
    model, variables = minilm.with_head(*minilm.load(tmp_path / "base"), 2)
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(32, 2)), rng.normal(size=2)
    head = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    variables["params"]["head"] = head
    config = flora.LoraConfig(rank=2, target="layer_*/kernel", train=["head/*"])
    adapted = flora.init(
        jax.random.key(0),
        config,
        model.apply,
        variables,
        *map(jnp.asarray, (ids, mask)),
    )
    adapted = randomized(adapted)
    test = minilm.Sentences(ids, mask, np.zeros(3, int))
    args = example.options(
        ["--out", str(tmp_path), "--checkpoint", str(tmp_path / "base")]
    )
    example.write(model, variables, adapted, test, args)
    back = BertModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False)
    states = hidden(back.eval(), ids, mask)
    plain = flora.merge(adapted)["params"]["head"]
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    logits = mean @ np.asarray(plain["kernel"]) + np.asarray(plain["bias"])
    apply = jax.jit(flora.lora(model.apply))
    close(np.asarray(apply(adapted, ids, mask)), logits)
    before = np.asarray(model.apply(variables, ids, mask))
    assert np.abs(logits - before).max() > 0.05 * np.abs(logits).max()
