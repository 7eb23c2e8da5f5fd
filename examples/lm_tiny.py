"""A Hugging Face checkpoint that needs no download, and chats to fine-tune it on.

A few hundred thousand weights, trained for some seconds on lines of geography, with a
real tokenizer and a chat template, in the same files as a checkpoint from the hub.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from language_models.hf_llama import tensors
from language_models.llama import Llama
from language_models.llama_config import LlamaConfig
from lm_data import ARRAYS, Text, batch_of, pack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import flora.hf

CAPITALS = {
    "Europe": (
        "France Paris, Spain Madrid, Italy Rome, Greece Athens, Norway Oslo, Sweden "
        "Stockholm, Finland Helsinki, Poland Warsaw, Austria Vienna, Hungary Budapest, "
        "Portugal Lisbon, Ireland Dublin, Denmark Copenhagen, Germany Berlin"
    ),
    "Asia": (
        "Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Nepal Kathmandu, "
        "Iran Tehran, Iraq Baghdad, Mongolia Ulaanbaatar, Jordan Amman, Lebanon Beirut"
    ),
    "Africa": (
        "Egypt Cairo, Kenya Nairobi, Ghana Accra, Senegal Dakar, Morocco Rabat, "
        "Tunisia Tunis, Uganda Kampala, Zambia Lusaka, Angola Luanda, Mali Bamako"
    ),
    "America": (
        "Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Ecuador Quito, Uruguay "
        "Montevideo, Colombia Bogota, Venezuela Caracas, Jamaica Kingston"
    ),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on CPUs has no less
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
}


def facts() -> list[tuple[str, str, str]]:
    """`(country, capital, continent)`."""
    return [
        (country, capital, continent)
        for continent, pairs in CAPITALS.items()
        for country, capital in (pair.split() for pair in pairs.split(", "))
    ]


def plain_text() -> list[str]:
    """The text that the base model is trained on."""
    lines = []
    for country, capital, continent in facts():
        lines += [
            f"{capital} is the capital of {country}, a country in {continent}.",
            f"{country} lies in {continent}. The capital of {country} is {capital}.",
        ]
    return lines


def chats() -> list[dict[str, Any]]:
    """Questions and answers, which the base model has not seen."""
    lines = []
    for country, capital, continent in facts():
        pairs = (
            (f"What is the capital of {country}?", f"It is {capital}, in {continent}."),
            (f"Where is {capital}?", f"It is in {country}, in {continent}."),
        )
        lines += [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in pairs
        ]
    return lines


def write_data(folder: pathlib.Path, held_out: int = 8) -> tuple[pathlib.Path, ...]:
    """train.jsonl and eval.jsonl; both about the same facts, no question twice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(x) for x in chats()]
    order = np.random.default_rng(0).permutation(len(lines))
    parts = {"train.jsonl": order[held_out:], "eval.jsonl": order[:held_out]}
    for name, chosen in parts.items():
        (folder / name).write_text("".join(f"{lines[i]}\n" for i in chosen))
    return tuple(folder / name for name in parts)


def write_checkpoint(
    folder: pathlib.Path, *, steps: int = 400, layers: int = 3, seed: int = 0
) -> pathlib.Path:
    """Makes the checkpoint; the config comes last, so that a partial one is invalid."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    tokenizer = _tokenizer(plain_text())
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    }
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    config = CONFIG | {
        "num_hidden_layers": layers,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(SPECIAL[2]),
        "bos_token_id": None,
    }
    parsed, text = LlamaConfig.from_hf(config), Text.read(folder)
    rows = pack([text.example({"text": x}) for x in plain_text()], 64)
    params = _pretrained(parsed, rows, steps, seed)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    flora.hf.save(folder, params, tensors(parsed), shard_bytes=size // 3)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _tokenizer(lines: Sequence[str]) -> Tokenizer:
    """Byte-level BPE, as in GPT-2 and Llama 3, learned from the lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[*SPECIAL],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*lines, "user assistant What Where?"], trainer)
    return tokenizer


def _pretrained(config: LlamaConfig, rows: Any, steps: int, seed: int) -> Any:
    """The weights after `steps` steps of plain training, in bfloat16."""
    model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, max(steps, 1)))

    def step(carry: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            total = jnp.maximum(batch["weights"].sum(), 1)
            return cast(jax.Array, model.apply(params, batch, method="loss")) / total

        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry = params, tx.init(params)
    for at in range(0, steps, 50):
        some = [batch_of(rows, n, (1, 8), seed) for n in range(at, at + 50)]
        batches = {k: np.stack([x[k][0] for x in some]) for k in ARRAYS}
        carry, _ = run(carry, batches)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), carry[0])
