"""MiniLM, a sentence encoder with pretrained weights, moved to praise and blame.

What is learned: whether a sentence of a film review is praise.  What is forgotten: how
the encoder places other text, editorials of a newspaper: the correlation of its pairs'
cosine similarities with the pretrained encoder's, and how often the nearest sentence is
one of the same editorial.
"""

import collections
import dataclasses
import functools
import pathlib
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any

import _study as study
import finetune_minilm as example
import jax
import minilm
import numpy as np
from _page import COLORS, Row, label, panels
from finetune_minilm import FORM, Arm, Run, Split, by_chunks, rate_of
from minilm import Encoder, Sentences
from rated_sentences import rated

import flora

KERNELS = "layer_*/kernel"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained, and on what; the layers before `first` are computed once."""

    first: int = 4
    train: int = 384
    validation: int = 200
    test: int = 600
    other: int = 400
    batch: int = 32
    epochs: int = 2
    seeds: int = 3
    steps_of_grid: int = 4  # from the first rate, at most
    length: int = 16
    random: bool = False


SMOKE = Sizes(1, 32, 16, 24, 8, 16, 1, 2, 1, random=True)


@dataclasses.dataclass(frozen=True)
class World:
    """The encoder with its head, each seed's sentences, and the other text."""

    model: Encoder
    variables: Any
    splits: tuple[Split, ...]
    other: Sentences  # labels are editorials


@functools.cache
def world(sizes: Sizes) -> World:
    """Weights and sentences; of a random encoder and made-up ones where asked."""
    if sizes.random:
        folder = example.write_random(pathlib.Path(tempfile.mkdtemp()), layers=2)
        path = example.write_sentences(folder / "sentences.jsonl")
        data = types.SimpleNamespace(data=str(path))
        texts, labels, _ = example.read_data(data)
        others, groups = texts, [i // 2 for i in range(len(texts))]
    else:
        folder = minilm.pretrained()
        texts, labels, _ = example.read_data(
            types.SimpleNamespace(data=None, cache=None)
        )
        rows = rated("nytEditorial")
        others, groups = [r[0] for r in rows], [int(r[2].split("_")[0]) for r in rows]
    model, variables = minilm.load(folder)
    coder = minilm.tokenizer(folder)

    def hidden(sentences: Sentences) -> Sentences:
        """With what the first layer that trains takes in the place of ids."""
        if not sizes.first:
            return sentences
        depth = dataclasses.replace(model.sizes, num_hidden_layers=sizes.first)
        below = jax.jit(Encoder(depth).apply)
        given = example.tokens(sentences)
        x = by_chunks(functools.partial(below, variables), given)
        return dataclasses.replace(sentences, ids=x)

    encode = functools.partial(minilm.encoded, coder, length=sizes.length, least=5)
    reviews = hidden(encode(texts, labels))
    splits = [example.split(reviews, sizes, seed) for seed in range(sizes.seeds)]
    other = encode(others, groups)
    count = collections.Counter(other.labels.tolist())
    paired = [i for i, x in enumerate(other.labels.tolist()) if count[x] > 1]
    head, tree = minilm.with_head(model, variables, 2)
    above = {k: v for k, v in tree["params"].items() if not is_below(k, sizes)}
    head = dataclasses.replace(head, first=sizes.first)
    others_in = hidden(other[paired[: sizes.other]])
    return World(head, {"params": above}, tuple(splits), others_in)


def is_below(name: str, sizes: Sizes) -> bool:
    """Whether a module comes before the first layer that trains."""
    if not sizes.first or name == "head":
        return False
    return not name.startswith("layer_") or int(name[6:]) < sizes.first


# --- Arms -----------------------------------------------------------------------------


@functools.cache
def heads(sizes: Sizes) -> tuple[Run, ...]:
    """The head on frozen features, at its best rate, for each seed."""
    here = world(sizes)
    arm = example.head_arm(here.model, here.variables, sizes.epochs)
    run = example.runner(arm, here.splits, sizes.batch)
    best = searched(run, arm, sizes)[0]
    return tuple(run(best, seed) for seed in range(sizes.seeds))


def start_of(sizes: Sizes, seed: int) -> Any:
    """The pretrained encoder with that seed's head."""
    params = world(sizes).variables["params"]
    return {"params": {**params, "head": heads(sizes)[seed].trained}}


def full_arm(sizes: Sizes) -> Arm:
    """Every parameter of the layers that train (of all, from layer 0)."""
    arm = example.full_arm(world(sizes).model, None, sizes.epochs)
    return dataclasses.replace(arm, start=lambda seed: (None, start_of(sizes, seed)))


def lora_arm(
    sizes: Sizes,
    name: str,
    *,
    rank: int = 8,
    alpha: float = 16,
    rate: int = 2,
    then: Callable[[Any], Any] = lambda adapted: adapted,
    before: Callable[[Any], Any] = lambda variables: variables,
    form: str = FORM,
    after: Any = example.UNCHANGED,
    **config: Any,
) -> Arm:
    """LoRA on the kernels, with the head.

    Args:
      sizes: as elsewhere.
      name: of the table.
      rank: of every factor.
      alpha: scale = alpha / rank.
      rate: where the search begins.
      then: what is done to the adapted tree, such as `flora.starts.pissa`.
      before: what is done to the base, such as `flora.quantize.quantize`.
      form: how products are computed.
      after: what happens to Adam's updates.
      **config: what else `flora.LoraConfig` takes.
    """
    model = world(sizes).model
    made = flora.LoraConfig(
        rank=rank, alpha=alpha, target=KERNELS, train=["head/*"], **config
    )
    x = example.tokens(world(sizes).other[:2])
    apply = flora.lora(model.apply, form=form)

    def start(seed: int) -> tuple[Any, Any]:
        variables = before(start_of(sizes, seed))
        adapted = flora.init(jax.random.key(seed), made, model.apply, variables, *x)
        return flora.split(then(adapted))

    def logits(frozen: Any, trained: Any, *inputs: Any) -> Any:
        return apply(flora.join(frozen, trained), *inputs)

    return Arm(name, start, logits, example.tokens, sizes.epochs, rate, after)


@functools.cache
def standard(sizes: Sizes) -> Arm:
    """LoRA as it is by default: the same arm for every experiment."""
    return lora_arm(sizes, "LoRA, rank 8")


# --- Results --------------------------------------------------------------------------


def searched(
    run: Callable[[int, int], Run], arm: Arm, sizes: Sizes
) -> tuple[int, dict[int, list[float]]]:
    """The rate that validation chose, and each rate's loss on validation by seed."""
    tried: dict[int, list[float]] = {}

    def loss(rate: int) -> float:
        if abs(rate - arm.rate) > sizes.steps_of_grid:  # marked as an edge
            return np.inf
        tried[rate] = [run(rate, seed).loss for seed in range(sizes.seeds)]
        return float(np.mean(tried[rate]))

    best = example.bracketed(loss, arm.rate)
    return best, dict(sorted(tried.items()))


@dataclasses.dataclass(frozen=True)
class Found:
    """An arm at every rate that was tried; arrays are `[rates, seeds]`."""

    name: str
    trained: int
    rates: tuple[float, ...]
    best: int
    validation: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    similarity: np.ndarray
    neighbors: np.ndarray

    def row(self) -> Row:
        """At the rate that validation chose."""
        k = self.best
        return (
            {"arm": self.name, "trained": self.trained}
            | study.rate_cells(self.rates, k)
            | study.cells("test_loss", self.loss[k])
            | study.cells("accuracy", self.accuracy[k])
            | study.cells("similarity", self.similarity[k])
            | study.cells("same_editorial", self.neighbors[k])
        )


def embedding(sizes: Sizes) -> Callable[[Any], np.ndarray]:
    """Of the other text, `[n, width]`, for a tree, adapted or plain."""
    here = world(sizes)
    body = dataclasses.replace(here.model, classes=None)
    apply = flora.lora(body.apply, form="direct")

    @jax.jit
    def one(tree: Any, x: Any, mask: Any) -> Any:
        return minilm.pooled(apply(tree, x, mask), mask)

    def embed(tree: Any) -> np.ndarray:
        params = {k: v for k, v in tree["params"].items() if k != "head"}
        found = by_chunks(
            functools.partial(one, {"params": params}), example.tokens(here.other)
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return embed


@functools.cache
def before_training(sizes: Sizes) -> np.ndarray:
    """The pretrained encoder's embeddings of the other text."""
    return embedding(sizes)(world(sizes).variables)


def similarity(one: np.ndarray, two: np.ndarray) -> float:
    """The correlation of two encoders' cosine similarities over all pairs."""
    above = np.triu_indices(len(one), 1)
    return float(np.corrcoef((one @ one.T)[above], (two @ two.T)[above])[0, 1])


def neighbors(found: np.ndarray, groups: np.ndarray) -> float:
    """How often a sentence's nearest is of the same group."""
    cosines = found @ found.T
    np.fill_diagonal(cosines, -np.inf)
    return float((groups[cosines.argmax(1)] == groups).mean())


def tested(runs: Sequence[Run], sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy on the test sentences, by seed."""
    labels = world(sizes).splits[0].test.labels
    losses = [float(example.cross_entropy(r.test_logits, labels)) for r in runs]
    hits = [float((r.test_logits.argmax(1) == labels).mean()) for r in runs]
    return np.asarray(losses), np.asarray(hits)


@functools.cache
def fit(arm: Arm, sizes: Sizes) -> Found:
    """The arm at its rates, and what each forgets; an arm is fitted once."""
    here = world(sizes)
    run, embed = example.runner(arm, here.splits, sizes.batch), embedding(sizes)
    best, tried = searched(run, arm, sizes)
    before, rows = before_training(sizes), []
    for rate in tried:
        runs = [run(rate, seed) for seed in range(sizes.seeds)]
        trees = [
            r.trained if r.frozen is None else flora.join(r.frozen, r.trained)
            for r in runs
        ]
        found = [embed(tree) for tree in trees]
        kept = [similarity(before, x) for x in found]
        near = [neighbors(x, here.other.labels) for x in found]
        rows.append((tried[rate], *tested(runs, sizes), kept, near))
    trained = sum(x.size for x in jax.tree.leaves(run(best, 0).trained))
    rates = tuple(rate_of(i) for i in tried)
    arrays = (np.asarray(x) for x in zip(*rows, strict=True))
    return Found(arm.name, trained, rates, list(tried).index(best), *arrays)


def frozen_row(sizes: Sizes) -> Row:
    """The head on frozen features: nothing is forgotten."""
    here, (loss, hits) = world(sizes), tested(heads(sizes), sizes)
    near = neighbors(before_training(sizes), here.other.labels)
    trained = sum(x.size for x in jax.tree.leaves(heads(sizes)[0].trained))
    blank = {"rate": float("nan"), "edge": ""}
    return (
        {"arm": "head alone", "trained": trained}
        | blank
        | study.cells("test_loss", loss)
        | study.cells("accuracy", hits)
        | study.cells("similarity", np.ones(sizes.seeds))
        | study.cells("same_editorial", np.full(sizes.seeds, near))
    )


def own_best(found: Found) -> np.ndarray:
    """Each seed's own best rate on validation, between grid points."""
    return study.own_best(found.rates, found.validation)


def rows_of(founds: Sequence[Found], *, first: str) -> list[Row]:
    """A row an arm; "to ..." is the test loss less that of the first, seed by seed."""
    ours = founds[0].loss[founds[0].best]
    return [
        {**f.row(), **study.cells(f"to_{first}", f.loss[f.best] - ours)} for f in founds
    ]


def rate_rows(founds: Sequence[Found]) -> list[Row]:
    """Every rate that was tried."""
    return [
        {"arm": f.name, "rate": f.rates[k]}
        | study.cells("validation_loss", f.validation[k])
        | study.cells("test_loss", f.loss[k])
        | study.cells("similarity", f.similarity[k])
        for f in founds
        for k in range(len(f.rates))
    ]


def picture(founds: Sequence[Found]) -> Any:
    """Loss over the rate; what is kept of the old over what is learned."""
    figure, (losses, kept) = panels(2, width=4.2, height=3.4)
    for found, color in zip(founds, COLORS, strict=False):
        arm = found.name, found.rates, found.best
        draw((losses, kept), arm, found.loss, found.similarity.mean(axis=1), color)
    lowest = min(f.loss.mean(axis=1).min() for f in founds)
    for set_to in (losses.set_ylim, kept.set_xlim):
        set_to(0.97 * lowest, min(1.9 * lowest, 1.05 * _top(founds)))
    label(losses, "film reviews (ring: chosen)", "peak learning rate", "test loss")
    losses.set_yscale("linear")
    losses.legend(fontsize=7)
    label(kept, "one point a rate", "test loss", "similarity kept", "linear")
    return figure


def draw(
    axes: tuple[Any, Any],
    arm: tuple[str, Sequence[float], int],
    loss: np.ndarray,
    old: np.ndarray,
    color: str,
) -> None:
    """An arm's loss `[rates, seeds]` over the rate, and what is old over the loss.

    Args:
      axes: for the two.
      arm: its name, its rates, and which was chosen; a ring marks it.
      loss: of every rate and seed.
      old: what is kept or lost at each rate.
      color: of the arm.
    """
    (losses, kept), (name, rates, k), middle = axes, arm, loss.mean(axis=1)
    losses.plot(rates, middle, ".-", color=color, label=name)
    losses.plot(rates, loss, color=color, lw=0.5, alpha=0.5)
    kept.plot(middle, old, ".-", color=color, lw=0.7)
    losses.plot(rates[k], middle[k], "o", color=color, ms=8, mfc="none")
    kept.plot(middle[k], old[k], "o", color=color, ms=8, mfc="none")


def _top(founds: Sequence[Found]) -> float:
    return max(float(x) for f in founds for x in f.loss.mean(axis=1) if np.isfinite(x))
