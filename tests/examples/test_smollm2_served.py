"""SmolLM2's adapter, trained for two steps, where others run it: PEFT, vLLM.

By hand: the weights come from the package index, 93 MB, once.
"""

import json
import pathlib
import subprocess
import sys

import finetune_smollm2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_models import hf_llama
from language_models.generation import generator
from language_models.llama import Llama
from lm_data import Text

import flora
from tests.support import vllm_server
from tests.support.decoders import close

pytestmark = [pytest.mark.by_hand, pytest.mark.filterwarnings("ignore")]
SAID = ["A film without a single idea.", "Warm, funny and beautifully acted."]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, its results, the model and prompts."""
    out, steps = tmp_path_factory.mktemp("smollm2"), ["--steps", "2", "--warmup", "0"]
    argv = ["--out", str(out), *steps, "--eval-every", "0", "--devices", "1", "--merge"]
    results = finetune_smollm2.main(argv)
    folder = finetune_smollm2.pretrained()
    config = hf_llama.read_config(folder)
    model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32)
    text = Text.read(folder)
    system = {"role": "system", "content": finetune_smollm2.QUESTION}
    chats = [[system, {"role": "user", "content": x}] for x in SAID]
    return out, results, model, [text.chat_prompt(x) for x in chats]


@pytest.mark.peft
def test_peft_and_transformers_give_the_same_logits(trained):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    out, results, model, prompts = trained
    folder = finetune_smollm2.pretrained()

    def theirs(loaded):
        with torch.no_grad():
            return loaded(input_ids=torch.tensor([prompts[0]])).logits.numpy()

    def read(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    apply, ids = jax.jit(flora.lora(model.apply)), jnp.array([prompts[0]])
    base, plain = hf_llama.load(folder, model), theirs(read(folder))
    close(apply(base, ids), plain)
    tuned = theirs(peft.PeftModel.from_pretrained(read(folder), out / "peft"))
    close(apply(results.adapted, ids), tuned)
    close(theirs(read(out / "merged")), tuned)
    assert np.abs(tuned - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.vllm
def test_vllm_gives_the_same_tokens(trained, tmp_path):
    out, results, model, prompts = trained
    folder, new = finetune_smollm2.pretrained(), 8
    adapter = str(out / "peft")
    options = {"enable_lora": True, "max_lora_rank": 8}
    jobs = {
        "adapter": {
            "engine": {"model": str(folder), **options},
            "new": new,
            "base": prompts,
            "batch": [(adapter, x) for x in prompts],
            "refused": [],
        },
        "merged": {
            "engine": {"model": str(out / "merged")},
            "new": new,
            "base": prompts,
            "batch": [],
            "refused": [],
        },
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = pathlib.Path(vllm_server.__file__).with_name("vllm_worker.py")
    command = [sys.executable, str(worker), "jobs.json", "out.json"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=1500)
    found = json.loads((tmp_path / "out.json").read_text())
    generate = generator(model, flora.lora, new=new, stop=())
    plain = generate(hf_llama.load(folder, model), prompts)
    tuned = generate(results.adapted, prompts)
    assert [x["tokens"] for x in found["adapter"]["base"]] == plain
    assert [x["tokens"] for x in found["adapter"]["batch"]] == tuned
    assert [x["tokens"] for x in found["merged"]["base"]] == tuned
    assert plain != tuned
