"""Experiment 16: how A and B start, in a language model with pretrained weights."""

import dataclasses
import functools
import math
import pathlib
import tempfile
import types
from collections.abc import Mapping
from typing import Any

import _minilm as minilm
import _study as study
import finetune_minilm as example
import finetune_smollm2 as smollm2
import jax
import jax.numpy as jnp
import lm_data
import lm_tiny
import numpy as np
from _page import COLORS, Result, Text, label, panels
from language_models import hf_llama
from language_models.llama import Llama
from minilm import Sentences

import flora
import flora.initializers as init

FULL = minilm.Sizes(
    train=128, validation=40, test=64, other=4, batch=8, epochs=1, length=32
)
SMOKE = dataclasses.replace(minilm.SMOKE, other=2, length=128)
TARGET = ("self_attn/*/kernel", "mlp/*/kernel")
# How they start, and where the search of the rate begins.
STARTS = {
    "standard": (init.gaussian(), 2),
    "reversed": (init.a_zero(), 1),
    "both random": (init.both_random(), 1),
}


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
        folder = smollm2.pretrained()
    texts, labels, _ = example.read_data(types.SimpleNamespace(data=data, cache=None))
    coder = lm_data.Text.read(folder)
    chats = prompts(coder, dict(zip(texts, labels, strict=True)), sizes.length)
    splits = [example.split(chats, sizes, seed) for seed in range(sizes.seeds)]
    others = [coder.example({"text": x}) for x in smollm2.documentation(sizes.other)]
    read, wide = hf_llama.read_config(folder), jnp.float32
    model = Llama(read, dtype=wide, param_dtype=wide)
    params = hf_llama.load(folder, model)
    return World(model, params, tuple(splits), lm_data.pack(others, 128))


def prompts(coder: lm_data.Text, labels: Mapping[str, int], length: int) -> Sentences:
    """Chats of at most `length` tokens; a label is the token of the answer's word."""
    answers, rows = coder.first_tokens(smollm2.ANSWERS), []
    for text, label_of in labels.items():
        ids = coder.chat_prompt(smollm2.asked(text))
        if (rest := length - len(ids)) >= 0:
            mask = [1] * len(ids) + [0] * rest
            rows.append((ids + [0] * rest, mask, answers[label_of]))
    return Sentences(*(np.asarray(x, np.int32) for x in zip(*rows, strict=True)))


def arm(sizes: minilm.Sizes, name: str) -> example.Arm:
    """LoRA on all kernels of all layers, from one of the starts."""
    (start_of, rate), here = STARTS[name], world(sizes)
    config = flora.LoraConfig(rank=8, alpha=16, target=TARGET, init=start_of)

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
        return flora.split(flora.init(key, config, here.model.apply, here.params, ids))

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
    """A start: `NUMBERS` before training `[3]`, and after it `[rates, 3, seeds]`."""

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


def fit(sizes: minilm.Sizes, name: str) -> Found:
    """Tries rates until the best has a worse one on both sides."""
    here, own = world(sizes), arm(sizes, name)
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
    return Found(name, before, rates, [*tried].index(best), *map(np.asarray, numbers))


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    founds = [fit(sizes, name) for name in STARTS]
    standard = founds[0].after[founds[0].best][0]
    tables = {
        "before": [
            {"start": f.name} | dict(zip(NUMBERS, map(float, f.before), strict=True))
            for f in founds
        ],
        "best": [
            {"start": f.name}
            | study.rate_cells(f.rates, f.best)
            | f.row(f.best)
            | study.cells("to_standard", f.after[f.best][0] - standard)
            for f in founds
        ],
        "rates": [
            {"start": f.name, "rate": f.rates[k]}
            | study.cells("validation_loss", f.validation[k])
            | f.row(k)
            for f in founds
            for k in range(len(f.rates))
        ],
    }
    return Result(tables, picture(founds))


def picture(founds: list[Found]) -> Any:
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


TEXT = Text(
    title="16. How A and B start, a language model",
    claim="""
    Those of experiment 1, tried on an encoder in 12: with A = 0 and B random the model
    is poorer, both random is unsuitable, and the standard start stands larger rates.
    """,
    setup="""
    SmolLM2-135M-Instruct (30 layers, width 576) answers in a chat whether a film
    review's sentence is positive or negative. LoRA of rank 8, alpha 16 on every kernel
    of attention and MLP; 16 steps of Adam with 8 chats of at most 32 tokens, 40 for
    validation, 64 for the test; three seeds, each with chats and factors of its own.
    The loss is that of the answer's word, in nats, among all words there are.
    """,
    captions={
        "before": """
    Before training, first seed; standard and reversed are the model as it is. "right
    words": how often the right one of the two words is the likelier; "perplexity": of
    four passages of Python's reference, which nothing is trained on.
    """,
        "best": """
    At the rate that validation chose. "to standard": test loss less that of the
    standard start, seed by seed.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    Larger rates: as claimed, though the chosen ones are the same ([[best |
    start=standard | rate]] for standard and reversed). At 0.0003 reversed has learned
    ([[rates | start=reversed; rate=0.0003 | test_loss]] nats) what standard has not yet
    ([[rates | start=standard; rate=0.0003 | test_loss]], where telling nothing apart is
    0.693); at 0.003 reversed guesses ([[rates | start=reversed; rate=0.003 |
    right_words]] right) and its other text is lost, while standard still has a
    perplexity of [[rates | start=standard; rate=0.003 | perplexity]]. Poorer: not seen,
    as in experiment 12. Reversed ends [[best | start=reversed | to_standard]] nats from
    standard, and the interval has 0 in it; the toy's, at width 512 and after 150 steps,
    ended 1.26 times as high. Sixteen steps are few, and a start that moves further in
    each may gain by that: this cannot say what longer training would. Nor does reversed
    forget more for what it learns: at 0.001 its perplexity is [[rates | start=reversed;
    rate=0.001 | perplexity]] and standard's [[rates | start=standard; rate=0.001 |
    perplexity]], but at 0.0003, where it has learned about as much as standard at
    0.001, it is [[rates | start=reversed; rate=0.0003 | perplexity]]. Unsuitable: yes
    for both random. It begins with a perplexity of [[before | start=both random |
    perplexity]] in the place of [[before | start=standard | perplexity]] and chance
    among the two words ([[before | start=both random | right_words]] for [[before |
    start=standard | right_words]]); training brings the words back to where they were
    ([[best | start=both random | right_words]]), and the other text not at all ([[best
    | start=both random | perplexity]]). Its loss, [[best | start=both random |
    test_loss]] against [[best | start=standard | test_loss]], is the highest, as in the
    toy, but the interval of the difference has 0 in it. As in experiment 12, the old
    behavior shows more clearly than the loss what such a start costs.
    """,
)
