"""GGUF as transformers itself reads it: the same tokens, the same logits."""

import importlib
import json
import re

import finetune_smollm2
import jax
import jax.numpy as jnp
import lm_tiny
import numpy as np
import pytest
import tokenizers
from language_models import from_gguf, hf_llama
from language_models.llama import Llama
from lm_data import Text

from tests.examples.test_from_gguf import arrays_of
from tests.support import gguf_files
from tests.support.decoders import close

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]


def topics():
    return [*importlib.import_module("pydoc_data.topics").topics.values()]


def tiny(folder):
    made = lm_tiny.write_checkpoint(folder / "tiny", steps=0, layers=2)
    path = folder / "m.gguf"
    gguf_files.write(
        path, made, arrays_of(made), types={"_proj": gguf_files.TYPES.Q4_1}
    )
    return path, from_gguf.convert(path, folder / "out")


def smollm2(_):
    package = finetune_smollm2.package()
    return package / finetune_smollm2.GGUF, finetune_smollm2.pretrained()


@pytest.mark.parametrize(
    "made", [tiny, pytest.param(smollm2, marks=pytest.mark.by_hand)]
)
def test_transformers_own_reader_agrees(made, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = made(tmp_path)
    theirs = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    text, tokenizer = Text.read(folder), AutoTokenizer.from_pretrained(**theirs)
    ours = AutoTokenizer.from_pretrained(folder)
    texts = [
        *topics()[:20],
        "In 1984: 3.14159, ½ and １２!",
        "  two\n\n\tspaces  é 日本",
    ]
    for one in texts:
        assert text.tokenizer.encode(one).ids == ours(one)["input_ids"]
    # It does not read that each digit is alone (tokenizer.ggml.pre), which shows after
    # white space of several characters, and with digits that are not ASCII's.
    for one in topics()[:20]:
        plain = re.sub(r"\s+(?=\d)", " ", one)
        assert text.tokenizer.encode(plain).ids == tokenizer(plain)["input_ids"]
    split, backend = tokenizers.pre_tokenizers, tokenizer.backend_tokenizer
    digits = split.Digits(individual_digits=True)
    backend.pre_tokenizer = split.Sequence([digits, backend.pre_tokenizer])
    for one in texts:
        assert text.tokenizer.encode(one).ids == tokenizer(one)["input_ids"]
    chat = lm_tiny.chats()[0]["messages"]
    rendered = text.render(chat)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == rendered
    assert ours.apply_chat_template(chat, tokenize=False) == rendered
    assert text.tokenizer.encode(rendered).ids == tokenizer(rendered)["input_ids"]

    config = hf_llama.read_config(folder)
    model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32)
    ids = np.array([text.tokenizer.encode(texts[0]).ids[:48]])
    logits = jax.jit(model.apply)(hf_llama.load(folder, model), jnp.asarray(ids))
    for source in (theirs, {"pretrained_model_name_or_path": folder}):
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        with torch.no_grad():
            close(logits, loaded(input_ids=torch.tensor(ids)).logits.numpy())
    given = json.loads((folder / "config.json").read_text())
    assert loaded.config.rope_parameters["rope_theta"] == given["rope_theta"]
