"""flora beside the other ways to train the same MLP: one command, one run.

Three sections, those that this machine can run unless `--on` chooses:

  tpu   estimates of the TPU's own compiler for v5e, v5p and v6e, with no TPU (needs
        `pip install libtpu`): cycles, FLOPs and temporary memory.
  cpu   wall-clock on this machine, float32: a round is one call of each arm in random
        order; the ratios are medians over rounds of the ratios within a round.
  peft  the same in PyTorch with PEFT, beside PyTorch's own frozen model.

Every arm computes the loss and the gradients of what it trains and of x.  Before
anything is measured, each is checked on small arrays: it must compute W + scale A B,
its gradient must not be zero, and gradient descent must lower its loss.  If an arm of
flora's fails, the run stops; if another library's fails, its row says why.

    pip install libtpu qwix quax peft torch
    python examples/benchmarks/compare.py --on tpu,cpu,peft
"""

import argparse
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import _arms
import _peft
import _report
import _timing
import _tpu
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

NEEDS = {"tpu": ("libtpu",), "cpu": (), "peft": ("torch", "peft")}


def measure_tpu(chip: str, sizes: _arms.Sizes, only: list[str]) -> _report.Results:
    """`{arm: costs}` on a chip, as `_tpu.cost` has them, with "to_frozen"."""
    found: _report.Results = {}
    for name, arm in _arms.arms(sizes, only).items():
        if isinstance(arm, str):
            found[name] = arm
            continue
        costs = _tpu.cost(chip, arm.step, *arm.shapes(sizes))
        found[name] = costs
        frozen: Any = found["frozen"]
        costs["to_frozen"] = costs["cycles"] / frozen["cycles"]
        costs["flops_to_frozen"] = costs["flops"] / frozen["flops"]
    return found


def measure_cpu(sizes: _arms.Sizes, rounds: int, only: list[str]) -> _report.Results:
    """`{arm: {"ms", "to_frozen", "lower", "upper"}}` of JAX on this machine."""
    calls, refused = _arms.calls(sizes, only)
    return _timing.summary(calls, rounds, dict.fromkeys(calls, "frozen")) | refused


def measure_peft(sizes: _arms.Sizes, rounds: int) -> _report.Results:
    """The same of PyTorch, beside its own frozen model."""
    calls, refused = _peft.calls(sizes, "cpu")
    return _timing.summary(calls, rounds, _peft.baselines(calls)) | refused


def tpu_table(title: str, results: _report.Results) -> Table:
    """Estimates of a chip as rows."""

    def row(x: dict[str, float] | str) -> list[str] | str:
        if isinstance(x, str):
            return x
        return [
            f"{x['cycles'] / 1e6:.3f}",
            f"{x['to_frozen']:.3f}",
            f"{x['flops'] / 1e9:.1f}",
            f"{x['flops_to_frozen']:.3f}",
            f"{x['temp_bytes'] / 2**20:.0f}",
        ]

    columns = ("arm", "Mcycles", "to frozen", "GFLOPs", "to frozen", "temp MiB")
    return _report.table(title, columns, [(k, row(v)) for k, v in results.items()])


def tables(args: argparse.Namespace) -> Iterator[Table]:
    """Measures section by section."""
    only, cpu = args.arms, _sizes(args.cpu_shape, args.rank, jnp.float32)
    if "tpu" in args.on:
        compiler = f"libtpu {metadata.version('libtpu')}'s estimates"
        for chip in args.chips:
            for shape in args.shapes:
                sizes = _sizes(shape, args.rank, jnp.bfloat16)
                title = f"{chip}, {compiler}: {sizes}"
                yield tpu_table(title, measure_tpu(chip, sizes, only))
    if "cpu" in args.on:
        title = f"JAX on {os.cpu_count()} CPUs, {args.rounds} rounds: {cpu}"
        yield _report.time_table(title, measure_cpu(cpu, args.rounds, only))
    if "peft" in args.on:
        title = f"PyTorch on {os.cpu_count()} CPUs, {args.rounds} rounds: {cpu}"
        yield _report.time_table(title, measure_peft(cpu, args.rounds))


def _sizes(shape: str, rank: int, dtype: Any) -> _arms.Sizes:
    tokens, d, ff = (int(x) for x in shape.split("x"))
    return _arms.Sizes(tokens, d, ff, rank, dtype)


def _names(text: str) -> list[str]:
    return [x for x in text.split(",") if x]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="flora beside other libraries.")
    flag: Callable = parser.add_argument
    here = [name for name, needs in NEEDS.items() if _report.installed(*needs)]
    shapes = ["8192x4096x14336", "4096x2048x5632"]
    flag("--on", type=_names, default=here, help=f"of {', '.join(NEEDS)}")
    flag("--chips", type=_names, default=list(_tpu.CHIPS))
    flag("--shapes", type=_names, default=shapes, help="TPU: tokens x d x ff, ...")
    flag("--cpu-shape", default="512x512x1408", help="CPU: tokens x d x ff")
    flag("--arms", type=_names, default=[], help="JAX arms by name; default: all")
    flag("--rank", type=int, default=16)
    flag("--rounds", type=int, default=30)
    args = parser.parse_args()
    for section in args.on:
        if section not in NEEDS:
            parser.error(f"--on {section!r} is not one of {', '.join(NEEDS)}.")
        if not _report.installed(*NEEDS[section]):
            parser.error(f"--on {section} needs {' and '.join(NEEDS[section])}.")
    return args


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    args, console = parse(), Console()
    others = ("qwix", "quax", "libtpu", "torch", "peft")
    console.print(_report.versions(*others), highlight=False)
    for table in tables(args):
        console.print(table)


if __name__ == "__main__":
    main()
