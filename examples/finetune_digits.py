"""Fine-tunes a small vision transformer four ways and shows what each one costs.

y = x W + scale (x A) B, scale = alpha/rank, in every attention and MLP kernel.

The 1,797 handwritten digits that ship inside scikit-learn are learned upright, then
the model moves to the same digits turned by 90 degrees.  Four arms: the frozen model,
a linear probe (the head alone), LoRA of rank 4, and full fine-tuning.  Every arm is
tested in both domains, on images that no training has seen, so that forgetting shows.

The run fails unless three things hold after LoRA has trained: the frozen base is bit
for bit the pretrained model; so are the logits with LoRA switched off; and the merged
and the adapted model have the same logits.

    python examples/finetune_digits.py --out finetune_digits.png

References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
  Dosovitskiy et al. 2020 (vision transformer). https://arxiv.org/abs/2010.11929
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flora

RANK, ALPHA = 4, 8
TARGET = "block_*/kernel"  # query, key, value, out, mlp_up and mlp_down of each block
# Of three tried an arm, that of the lowest training loss; pretraining had no search.
LEARNING_RATES = {
    "pretraining": 1e-3,
    "linear probe": 1e-1,
    "LoRA": 1e-2,
    "full fine-tuning": 2e-3,
}
TOLERANCE = 1e-5  # merged against adapted logits in float32, relative to max|y|


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a run is; `images=None` takes the whole data set."""

    width: int = 96
    depth: int = 3
    images: int | None = None
    pretrain_epochs: int = 30
    epochs: int = 20
    batch_size: int = 64


SMOKE = Sizes(width=16, depth=1, images=200, pretrain_epochs=2, epochs=2, batch_size=32)


class Block(nn.Module):
    """One pre-norm transformer block of four heads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, tokens, width]` to the same shape."""
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h)
        h = nn.LayerNorm()(x)
        h = nn.gelu(nn.Dense(2 * x.shape[-1], name="mlp_up")(h))
        return x + nn.Dense(x.shape[-1], name="mlp_down")(h)


class VisionTransformer(nn.Module):
    """Patches of 4 by 4 pixels, learned positions, blocks, mean over tokens, head."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[batch, 8, 8]` to logits `[batch, 10]`."""
        x = images.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16)
        x = nn.Dense(self.width, name="patch")(x)
        x = x + self.param("position", nn.initializers.normal(0.02), (4, self.width))
        for i in range(self.depth):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


@dataclasses.dataclass(frozen=True)
class Domain:
    """Images `[n, 8, 8]` in [-1, 1] and labels `[n]`, to train on and held out."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def domains(size: int | None) -> tuple[Domain, Domain]:
    """The upright digits and the same digits turned by 90 degrees."""
    digits: Any = load_digits()
    images = (digits.images[:size] / 8 - 1).astype(np.float32)
    labels = digits.target[:size].astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.3, random_state=0)
    x, x_test, y, y_test = map(jnp.asarray, parts)
    turned, turned_test = (jnp.rot90(part, axes=(1, 2)) for part in (x, x_test))
    return Domain(x, y, x_test, y_test), Domain(turned, y, turned_test, y_test)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: logits = apply(join(frozen, trained), x).

    Gradients and optimizer state exist for `trained` alone.
    """

    name: str
    apply: Callable[..., Any]
    join: Callable[[Any, Any], Any]
    frozen: Any
    trained: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm in training: its current state and its cost so far."""

    arm: Arm
    epoch: Callable
    trained: Any
    opt_state: Any
    losses: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    @property
    def tree(self) -> Any:
        """What `arm.apply` takes."""
        return self.arm.join(self.arm.frozen, self.trained)

    def cost(self) -> tuple[int, int, float]:
        """Trained parameters, bytes of optimizer state, median seconds a step."""
        trained, opt_state = map(jax.tree.leaves, (self.trained, self.opt_state))
        sizes = sum(x.size for x in trained), sum(x.nbytes for x in opt_state)
        return *sizes, statistics.median(self.seconds[1:])  # the first epoch compiles


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def epoch_function(arm: Arm, tx: optax.GradientTransformation) -> Callable:
    """One epoch as one compiled function: a scan over the minibatches."""

    def epoch(frozen, trained, opt_state, x, y, batches):
        def step(carry, batch):
            def loss(trained):
                logits = arm.apply(arm.join(frozen, trained), x[batch])
                return cross_entropy(logits, y[batch])

            trained, opt_state = carry
            value, grads = jax.value_and_grad(loss)(trained)
            updates, opt_state = tx.update(grads, opt_state, trained)
            return (optax.apply_updates(trained, updates), opt_state), value

        (trained, opt_state), losses = jax.lax.scan(step, (trained, opt_state), batches)
        return trained, opt_state, losses

    # The trained leaves and the optimizer state are overwritten in place; the frozen
    # ones must survive the call, so they are not donated.
    return jax.jit(epoch, donate_argnums=(1, 2))


def start(arm: Arm, steps: int) -> Run:
    """AdamW with a cosine schedule, the same for every arm but for its peak."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATES[arm.name], steps)
    tx = optax.adamw(schedule, weight_decay=1e-2)
    trained = jax.tree.map(jnp.copy, arm.trained)  # its buffers will be donated
    return Run(arm, epoch_function(arm, tx), trained, tx.init(trained))


def one_epoch(run: Run, domain: Domain, batches: jax.Array) -> Run:
    """The run after one more epoch."""
    frozen, x, y = run.arm.frozen, domain.x, domain.y
    began = time.perf_counter()
    out = run.epoch(frozen, run.trained, run.opt_state, x, y, batches)
    trained, opt_state, losses = jax.block_until_ready(out)
    seconds = (*run.seconds, (time.perf_counter() - began) / len(batches))
    losses = (*run.losses, *losses.tolist())
    return Run(run.arm, run.epoch, trained, opt_state, losses, seconds)


def minibatches(size: int, epochs: int, batch_size: int) -> jax.Array:
    """Shuffled indices `[epochs, steps, batch_size]`; an epoch drops its last few."""
    steps = size // batch_size
    keys = jax.random.split(jax.random.key(1), epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
    return order[:, : steps * batch_size].reshape(epochs, steps, batch_size)


def fit(arms: Sequence[Arm], domain: Domain, epochs: int, batch_size: int) -> list[Run]:
    """Trains the arms side by side on the same minibatches.

    They take turns epoch by epoch: whatever else the machine does then slows them all
    alike, and their seconds a step can be compared.
    """
    batches = minibatches(len(domain.y), epochs, batch_size)
    runs = [start(arm, epochs * batches.shape[1]) for arm in arms]
    name, loss = "{task.description:<16}", "loss {task.fields[loss]:.4f}"
    bars = TextColumn(name), BarColumn(), TimeElapsedColumn(), TextColumn(loss)
    with Progress(*bars) as progress:
        tasks = [progress.add_task(a.name, total=epochs, loss=np.nan) for a in arms]
        for epoch_batches in batches:
            for i, task in enumerate(tasks):
                runs[i] = one_epoch(runs[i], domain, epoch_batches)
                loss = np.mean(runs[i].losses[-len(epoch_batches) :])
                progress.update(task, advance=1, loss=loss)
    return runs


def full_arm(name: str, model: nn.Module, variables: Any) -> Arm:
    """Everything trains."""
    return Arm(name, model.apply, lambda _, trained: trained, None, variables)


def probe_arm(model: nn.Module, variables: Any) -> Arm:
    """The head trains."""
    body = dict(variables["params"])
    head = {"head": body.pop("head")}
    return Arm("linear probe", model.apply, lambda f, t: {"params": f | t}, body, head)


def lora_arm(model: nn.Module, variables: Any, x: jax.Array) -> Arm:
    """A and B of the blocks' kernels train, in the unmodified model."""
    config = flora.LoraConfig(rank=RANK, alpha=ALPHA, target=TARGET)
    adapted = flora.init(jax.random.key(2), config, model.apply, variables, x)
    base, adapter = flora.split(adapted)
    return Arm("LoRA", flora.lora(model.apply), flora.join, base, adapter)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; accuracies on the held-out images of each domain."""

    name: str
    upright: float
    turned: float
    trained_parameters: int = 0
    optimizer_bytes: int = 0
    step_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """What `main` measured; the last three numbers are those that `prove` checks."""

    rows: tuple[Row, ...]
    base_bytes_changed: int
    off_bytes_changed: int
    merge_error: float


def bytes_changed(before: Any, after: Any) -> int:
    """In how many bytes two trees of arrays differ."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    views = ([np.frombuffer(np.asarray(x).tobytes(), "u1") for x in p] for p in pairs)
    return sum(int((a != b).sum()) for a, b in views)


def prove(base_bytes: int, off_bytes: int, merge_error: float) -> None:
    """Prints the three facts; raises RuntimeError if one does not hold."""
    facts = {
        f"base after LoRA training: {base_bytes} bytes changed": base_bytes == 0,
        f"logits, LoRA off: {off_bytes} bytes differ from pretrained": off_bytes == 0,
        f"logits, merged against adapted: {merge_error:.1e} of max|y| apart, at most "
        f"{TOLERANCE:.0e} allowed": merge_error <= TOLERANCE,  # NaN fails too
    }
    print(*facts, sep="\n")
    broken = [fact for fact, holds in facts.items() if not holds]
    if broken:
        raise RuntimeError(f"The proof fails. {'; '.join(broken)}.")


def held_out_logits(model: nn.Module, before: Any, runs: Sequence[Run], x) -> dict:
    """Logits of each arm, of LoRA switched off and LoRA merged, for `[n, 8, 8]`."""
    probe, lora, full = (run.tree for run in runs)
    base, _ = flora.split(lora)
    apply, lora_apply = jax.jit(model.apply), jax.jit(runs[1].arm.apply)
    # Accelerators may round float32 products to fewer bits, unless told not to.
    with jax.default_matmul_precision("highest"):
        return {
            "frozen model": apply(before, x),
            "linear probe": apply(probe, x),
            "LoRA": lora_apply(lora, x),
            "LoRA, off": lora_apply(base, x),
            "LoRA, merged": apply(flora.merge(lora), x),
            "full fine-tuning": apply(full, x),
        }


def judge(model: nn.Module, before: Any, runs: Sequence[Run], x, y) -> Results:
    """Tests every arm in both domains and checks the three facts of the run.

    x: held-out images `[2, n, 8, 8]`, upright and turned; y: their labels `[n]`.
    """
    out = held_out_logits(model, before, runs, x.reshape(-1, 8, 8))
    costs = {run.arm.name: run.cost() for run in runs}
    rows = []
    for name, logits in out.items():
        hits = (logits.reshape(2, len(y), -1).argmax(-1) == y).mean(axis=1)
        rows.append(Row(name, *hits.tolist(), *costs.get(name, ())))
    apart = jnp.abs(out["LoRA, merged"] - out["LoRA"]).max()
    facts = (
        bytes_changed(before, flora.split(runs[1].tree)[0]),
        bytes_changed(out["frozen model"], out["LoRA, off"]),
        float(apart / jnp.abs(out["LoRA"]).max()),
    )
    prove(*facts)
    return Results(tuple(rows), *facts)


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal."""
    title = f"Held-out accuracy and cost (LoRA: rank {RANK}, alpha {ALPHA})"
    out = Table(title=title, title_justify="left")
    for name in ("arm", "upright", "turned", "trained", "optimizer", "a step"):
        out.add_column(name, justify="left" if name == "arm" else "right")
    for r in rows:
        hits = f"{r.upright:.1%}", f"{r.turned:.1%}"
        sizes = f"{r.trained_parameters:,}", f"{r.optimizer_bytes:,} B"
        step = f"{1e3 * r.step_seconds:.2f} ms" if r.step_seconds else ""
        out.add_row(r.name, *hits, *sizes, step)
    return out


def plot(runs: Sequence[Run], frozen_loss: float, rows: Sequence[Row], path: str):
    """Saves the training losses and the held-out accuracies as a picture."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=(1.15, 1))
    losses.axhline(frozen_loss, color="black", linestyle="--", label="frozen model")
    for color, run in zip(("#009E73", "#0072B2", "#D55E00"), runs, strict=True):
        means = np.reshape(run.losses, (len(run.seconds), -1)).mean(axis=1)
        centers = (np.arange(len(means)) + 0.5) * (len(run.losses) // len(means))
        losses.plot(run.losses, color=color, alpha=0.25, linewidth=0.8)
        losses.plot(centers, means, color=color, linewidth=2, label=run.arm.name)
    losses.set(xlabel="step", ylabel="cross-entropy (nats)", yscale="log")
    losses.set(title="Training loss on digits turned by 90° (bold: mean of an epoch)")
    losses.legend()
    losses.grid(alpha=0.3)
    places = np.arange(len(rows))
    for shift, domain, color in ((-0.2, "upright", "0.6"), (0.2, "turned", "#E69F00")):
        heights = [100 * getattr(r, domain) for r in rows]
        drawn = bars.bar(places + shift, heights, 0.38, color=color, label=domain)
        bars.bar_label(drawn, fmt="%.0f", fontsize=9)
    bars.set_xticks(places, [r.name.replace(" ", "\n", 1) for r in rows])
    bars.set(ylabel="accuracy (%)", ylim=(0, 118), yticks=range(0, 101, 20))
    bars.set(title="Held-out accuracy in the old domain and the new")
    bars.legend(loc="upper center", ncols=2)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> Results:
    """Pretrains, fine-tunes the arms, proves, reports."""
    parser = argparse.ArgumentParser(description="LoRA against three others.")
    parser.add_argument("--out", default="finetune_digits.png", help="the picture")
    parser.add_argument("--smoke", action="store_true", help="seconds, at tiny size")
    args = parser.parse_args(argv)
    sizes = SMOKE if args.smoke else Sizes()
    upright, turned = domains(sizes.images)
    model = VisionTransformer(sizes.width, sizes.depth)
    scratch = jax.jit(model.init)(jax.random.key(0), upright.x[:1])
    arms = [full_arm("pretraining", model, scratch)]
    (run,) = fit(arms, upright, sizes.pretrain_epochs, sizes.batch_size)
    # A copy outside of JAX: nothing that the arms do can reach it.
    before = jax.tree.map(np.array, run.tree)
    lora = lora_arm(model, run.tree, upright.x[:1])
    full = full_arm("full fine-tuning", model, run.tree)
    arms = [probe_arm(model, run.tree), lora, full]
    runs = fit(arms, turned, sizes.epochs, sizes.batch_size)
    print(flora.summary(runs[1].tree))
    x_test = jnp.stack([upright.x_test, turned.x_test])
    results = judge(model, before, runs, x_test, turned.y_test)
    frozen_loss = float(cross_entropy(jax.jit(model.apply)(before, turned.x), turned.y))
    plot(runs, frozen_loss, results.rows, args.out)
    Console().print(table(results.rows))
    print(f"peak learning rates: {LEARNING_RATES}\nsaved {args.out}")
    return results


if __name__ == "__main__":
    main()
