"""SmolLM2, a language model with pretrained weights, asked about film reviews.

What is learned: the word that tells in a chat whether a review's sentence is praise.
What is forgotten: the perplexity of other text, passages of Python's reference.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any

import _minilm as minilm
import _study as study
import finetune_minilm as example
import finetune_smollm2 as real
import jax
import jax.numpy as jnp
import lm_data
import lm_tiny
import numpy as np
from _page import COLORS, label, panels
from language_models import hf_llama
from language_models.llama import Llama
from minilm import Sentences

import flora

FULL = minilm.Sizes(
    train=128, validation=40, test=64, other=4, batch=8, epochs=1, length=32
)
SMOKE = dataclasses.replace(minilm.SMOKE, other=2, length=128)
TARGET = ("self_attn/*/kernel", "mlp/*/kernel")


@dataclasses.dataclass(frozen=True)
class World:
    """The model, each seed's chats up to the answer, and rows of the other text."""

    model: Llama
    params: Any
    splits: tuple[example.Split, ...]
    other: Mapping[str, np.ndarray]


@functools.cache
def world(sizes: minilm.Sizes) -> World:
    """Of a tiny random model and made-up sentences where asked."""
    folder, data = pathlib.Path(tempfile.mkdtemp()), None
    if sizes.random:
        lm_tiny.write_checkpoint(folder, steps=0, layers=1)
        data = str(example.write_sentences(folder / "sentences.jsonl"))
    else:
        folder = real.pretrained()
    texts, labels, _ = example.read_data(types.SimpleNamespace(data=data, cache=None))
    coder = lm_data.Text.read(folder)
    chats = prompts(coder, dict(zip(texts, labels, strict=True)), sizes.length)
    splits = [example.split(chats, sizes, seed) for seed in range(sizes.seeds)]
    others = [coder.example({"text": x}) for x in real.documentation(sizes.other)]
    read, wide = hf_llama.read_config(folder), jnp.float32
    model = Llama(read, dtype=wide, param_dtype=wide)
    params = hf_llama.load(folder, model)
    return World(model, params, tuple(splits), lm_data.pack(others, 128))


def prompts(coder: lm_data.Text, labels: Mapping[str, int], length: int) -> Sentences:
    """Chats of at most `length` tokens; a label is the token of the answer's word."""
    answers, rows = coder.first_tokens(real.ANSWERS), []
    for text, label_of in labels.items():
        ids = coder.chat_prompt(real.asked(text))
        if (rest := length - len(ids)) >= 0:
            mask = [1] * len(ids) + [0] * rest
            rows.append((ids + [0] * rest, mask, answers[label_of]))
    return Sentences(*(np.asarray(x, np.int32) for x in zip(*rows, strict=True)))


def arm(
    sizes: minilm.Sizes,
    name: str,
    *,
    rank: int = 8,
    alpha: float = 16,
    rate: int = 2,
    **config: Any,
) -> example.Arm:
    """LoRA on all kernels of all layers; the search of the rate begins at `rate`."""
    here = world(sizes)
    made = flora.LoraConfig(rank=rank, alpha=alpha, target=TARGET, **config)

    def answer(tree: Any, ids: Any, mask: Any) -> Any:
        """The logits after a chat's last token, `[batch, vocab]`."""
        at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        batch = {"ids": ids, "positions": at, "segments": mask, "targets": ids}
        batch["weights"] = at == mask.sum(1, keepdims=True) - 1
        asked = (lambda x, _: x), batch, 0, 1
        return here.model.apply(tree, *asked, method="of_logits")[0][:, 0]

    apply = flora.lora(answer, form=example.FORM)

    def start(seed: int) -> tuple[Any, Any]:
        key, ids = jax.random.key(seed), here.splits[0].test.ids[:2]
        return flora.split(flora.init(key, made, here.model.apply, here.params, ids))

    def logits(frozen: Any, trained: Any, ids: Any, mask: Any) -> Any:
        return apply(flora.join(frozen, trained), ids, mask)

    return example.Arm(name, start, logits, example.tokens, sizes.epochs, rate)


@functools.cache
def perplexity_of(sizes: minilm.Sizes) -> Any:
    """`(frozen, trained) -> the other text's perplexity`."""
    here = world(sizes)

    def summed(tree: Any, batch: Any) -> Any:
        return here.model.apply(tree, batch, method="loss")

    apply = flora.lora(summed, form=example.FORM)
    nats = jax.jit(lambda frozen, trained: apply(flora.join(frozen, trained), batch))
    batch, count = here.other, here.other["weights"].sum()
    return lambda *parts: math.exp(min(float(nats(*parts)) / count, 100))


NUMBERS = ("test_loss", "right_words", "perplexity")


def told(sizes: minilm.Sizes, logits: np.ndarray, *parts: Any) -> np.ndarray:
    """`NUMBERS`: nats of the word, which of the two is likelier; of the other text."""
    labels = world(sizes).splits[0].test.labels
    words = np.unique(labels)
    right = words[logits[:, words].argmax(1)] == labels
    loss = float(example.cross_entropy(logits, labels))
    return np.array([loss, right.mean(), perplexity_of(sizes)(*parts)])


@dataclasses.dataclass(frozen=True)
class Found:
    """An arm: `NUMBERS` before training `[3]`, and after it `[rates, 3, seeds]`."""

    name: str
    before: np.ndarray
    rates: tuple[float, ...]
    best: int
    validation: np.ndarray  # [rates, seeds]
    after: np.ndarray

    def row(self, k: int) -> dict[str, Any]:
        """At one rate."""
        loss, right, other = self.after[k]
        return (
            study.cells("test_loss", loss)
            | study.cells("right_words", right)
            | study.cells("perplexity", other, log=True)
        )


def fit(own: example.Arm, sizes: minilm.Sizes) -> Found:
    """Tries rates until the best has a worse one on both sides."""
    here = world(sizes)
    run = example.runner(own, here.splits, sizes.batch)
    best, tried = minilm.searched(run, own, sizes)

    def after(rate: int, seed: int) -> np.ndarray:
        one = run(rate, seed)
        return told(sizes, one.test_logits, one.frozen, one.trained)

    first = own.start(0)
    logits = functools.partial(jax.jit(own.logits), *first)
    asked = example.tokens(here.splits[0].test)
    before = told(sizes, example.by_chunks(logits, asked), *first)
    each = [[after(rate, seed) for seed in range(sizes.seeds)] for rate in tried]
    rates = tuple(map(example.rate_of, tried))
    numbers = [*tried.values()], np.swapaxes(each, 1, 2)
    return Found(
        own.name, before, rates, [*tried].index(best), *map(np.asarray, numbers)
    )


def rows_of(founds: Sequence[Found], kind: str) -> dict[str, list[Any]]:
    """Tables of each arm at its best rate, and at every rate; a `kind` of arm a row.

    "to ..." is the test loss less that of the first, seed by seed.
    """
    first = founds[0]
    ours, to_first = first.after[first.best][0], f"to_{first.name.replace(' ', '_')}"
    return {
        "best": [
            {kind: f.name}
            | study.rate_cells(f.rates, f.best)
            | f.row(f.best)
            | study.cells(to_first, f.after[f.best][0] - ours)
            for f in founds
        ],
        "rates": [
            {kind: f.name, "rate": f.rates[k]}
            | study.cells("validation_loss", f.validation[k])
            | f.row(k)
            for f in founds
            for k in range(len(f.rates))
        ],
    }


def picture(founds: Sequence[Found]) -> Any:
    """Loss over the rate; what the other text costs over what is learned."""
    figure, (losses, kept) = panels(2, width=4.2, height=3.4)
    for found, color in zip(founds, COLORS, strict=False):
        loss, other = found.after[:, 0], np.exp(np.log(found.after[:, 2]).mean(1))
        arm = found.name, found.rates, found.best
        minilm.draw((losses, kept), arm, loss, other, color)
    label(losses, "film reviews (ring: chosen)", "peak learning rate", "test loss")
    losses.set_yscale("linear")
    losses.legend(fontsize=7)
    label(kept, "one point a rate", "test loss", "other text's perplexity")
    kept.set_xscale("linear")
    return figure
