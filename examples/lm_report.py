"""What a run of a language model says: a bar or lines, and what it has come to."""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

import numpy as np
from lm_train import Scores
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

CONSOLE = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
      losses: of each step, in nats a token.
      train_loss: of some training rows, before and after.
      held_out: what was held out, by step.
      other: the loss of `--other`, before and after.
      answers: before and after, by prompt.
      seconds: of each step, by the clock and of all cores.
      parameters: how many train.
      bytes: of the adapter's file.
      memory: the most that the process has held, in bytes.
      adapted: the tree.
    """

    losses: dict[int, float]
    train_loss: tuple[float, float]
    held_out: dict[int, Scores]
    other: tuple[float, ...]
    answers: dict[str, tuple[str, str]]
    seconds: dict[int, tuple[float, float]]
    parameters: int
    bytes: int
    memory: int
    adapted: Any

    def write(self, path: pathlib.Path, args: argparse.Namespace) -> None:
        """All but the tree, and the options, as JSON."""
        told = {k: v for k, v in vars(self).items() if k != "adapted"}
        told["held_out"] = {n: x._asdict() for n, x in self.held_out.items()}
        path.write_text(json.dumps({"options": vars(args), **told}, indent=1))


def progress(steps: int) -> tuple[Progress, Any]:
    """A bar, and the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal)
    task = bar.add_task("", total=steps)

    def report(step: int, loss: float, held_out: dict[int, Any], rate: Any) -> None:
        words = f"step {step}"
        if step:
            words += f"  loss {loss:.3f}  rate {float(rate):.1e}"
        if held_out:
            words += f"  held out {[*held_out.values()][-1]}"
        bar.update(task, completed=step, description=words)
        if not CONSOLE.is_terminal and (step in held_out or step == steps):
            print(words, flush=True)  # a log shows no bar

    return bar, report


def tell(results: Results) -> None:
    """Prints what a run has come to."""
    say = CONSOLE.print
    say("loss on training rows: {:.3f}, then {:.3f}".format(*results.train_loss))
    if results.held_out:
        first, *_, last = [*results.held_out.values()] * 2
        say(f"held out, before: {first}\nheld out, after:  {last}")
    if results.other:
        say(
            "perplexity of other text: {:.2f}, then {:.2f}".format(
                *np.exp(results.other)
            )
        )
    for prompt, (first, then) in results.answers.items():
        say(f"{prompt}\n  before: {first!r}\n  after:  {then!r}")
    step = statistics.median([x for x, _ in results.seconds.values()] or [math.nan])
    say(
        f"{results.parameters:,} parameters trained, {results.bytes / 2**20:.1f} MiB; "
        f"{step:.2f} s a step; {results.memory / 2**30:.1f} GiB at most"
    )
