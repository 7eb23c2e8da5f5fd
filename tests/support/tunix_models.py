"""Decoders of Tunix at small sizes with random weights, batches and a tokenizer."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flora
import flora.nnx

SIZES = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 22, "num_heads": 4,
         "head_dim": 6, "num_kv_heads": 2}  # fmt: skip
WORDS = 31
OTHERS = {
    "Llama3": {"vocab_size": WORDS, "rope_theta": 10_000, "norm_eps": 1e-6},
    "Qwen3": {"vocab_size": WORDS, "rope_theta": 10_000, "norm_eps": 1e-6},
    "Gemma3": {"num_embed": WORDS, "sliding_window_size": 3,
               "param_dtype": jnp.float32},
}  # fmt: skip
NAMES = tuple(OTHERS)
SMALL = 0.1  # so that gradients of all weights are of a size


def matrices(path, leaf):
    """Every weight with two axes or more: embeddings, einsums, linear layers."""
    return leaf.ndim > 1


def decoder(name, remat=None, seed=0, **fields):
    """A decoder of Tunix, no weight of it zero, as some are at its own start."""
    module = importlib.import_module(f"tunix.models.{name.lower()}.model")
    if remat:
        fields["remat_config"] = module.RematConfig[remat]
    config = module.ModelConfig(**SIZES | OTHERS[name] | fields)
    model = getattr(module, name)(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    nnx.update(
        model,
        jax.tree.map(
            lambda x: x + SMALL * jax.random.normal(next(keys), x.shape, x.dtype),
            nnx.state(model, nnx.Param),
        ),
    )
    return model


def call_args(length=5, rows=2):
    """Tokens, positions, no cache and a causal mask."""
    ids = jnp.zeros((rows, length), jnp.int32)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, 5, 5))
    return ids, jnp.broadcast_to(jnp.arange(length), (rows, length)), None, mask


def adapted(model, key=1, target=matrices, rank=3, **settings):
    config = flora.LoraConfig(rank=rank, alpha=6, target=target, **settings)
    return flora.nnx.adapt(jax.random.key(key), config, model, *call_args())


def trained(model, key=2, **settings):
    """An adapted decoder whose factors are all random, as if it had trained."""
    model = adapted(model, **settings)
    keys = iter(jax.random.split(jax.random.key(key), 100))
    factors = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape, x.dtype),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, factors)
    return model


def names(state):
    """The arrays of a state by their dotted names, as Tunix writes them."""
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(x[...]) for path, x in flat}


def same(one, other):
    """Whether two states, or dicts as `names` returns, are equal bit for bit."""
    one, other = (x if isinstance(x, dict) else names(x) for x in (one, other))
    return one.keys() == other.keys() and all(
        np.array_equal(one[k], other[k]) for k in one
    )


def batches(count, rows=2, length=5, seed=0):
    """What `PeftTrainer` trains on: each token is a function of the last."""
    from tunix.sft import peft_trainer

    starts = np.random.default_rng(seed).integers(0, WORDS, (count, rows, 1))
    ids = (starts * 3 ** np.arange(length) + 1) % WORDS
    return [peft_trainer.TrainingInput(x, np.ones_like(x)) for x in ids.astype("int32")]


def model_input(batch):
    """The arguments that Tunix's default loss has."""
    from tunix.sft import utils

    mask = batch.input_mask != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


class Tokenizer:
    """Words that are numbers."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2
