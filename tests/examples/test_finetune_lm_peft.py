"""What examples/finetune_lm.py writes, in the hands of transformers and PEFT."""

import _peft
import jax
import jax.numpy as jnp
import lm_tiny
import numpy as np
import pytest
from language_models import hf_llama
from language_models.llama import Llama
from lm_data import Text

import flora
import flora.peft
from tests.examples.test_finetune_lm import run
from tests.support.checkpoints import same
from tests.support.decoders import close

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]


def test_transformers_and_peft_give_the_same_logits(tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = lm_tiny.write_checkpoint(tmp_path / "tiny", steps=0, layers=2)
    out = tmp_path / "out"
    results = run(folder, out, "--merge", "--dtype", "float32")
    model = Llama(
        hf_llama.read_config(folder), dtype=jnp.float32, param_dtype=jnp.float32
    )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 17))

    def theirs(loaded):
        with torch.no_grad():
            return loaded(input_ids=torch.tensor(ids)).logits.numpy()

    def ours(params):
        return jax.jit(flora.lora(model.apply))(params, jnp.asarray(ids))

    base = hf_llama.load(folder, model)
    torch_base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = theirs(torch_base)
    close(ours(base), plain)

    adapted = peft.PeftModel.from_pretrained(torch_base, out / "peft")
    tuned = theirs(adapted)
    close(ours(results.adapted), tuned)
    assert np.abs(tuned - plain).max() > 0.05 * np.abs(plain).max()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    close(theirs(merged), tuned)

    names = hf_llama.peft_names(model.config)
    back = flora.peft.load(out / "peft", base, names=names)
    same(flora.split(back)[1], flora.split(results.adapted)[1])

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = lm_tiny.chats()[0]["messages"]
    text = Text.read(folder).render(chat)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    found = tokenizer.apply_chat_template(chat)
    found = found["input_ids"] if hasattr(found, "keys") else found
    assert tuple(found) == Text.read(folder).example({"messages": chat}).ids


@pytest.mark.parametrize("name", _peft.TORCH_ARMS)
def test_arms_of_pytorch_train(name):
    _peft.check(name)
