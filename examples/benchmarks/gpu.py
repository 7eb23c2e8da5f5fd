"""Wall-clock of the ways to train one MLP on a GPU: flora, qwix and others, and PEFT.

The model, the arms and their checks are those of `compare.py`, in bfloat16.  A round is
one call of each arm in random order, each waited for; a ratio is the median over rounds
of the ratios within a round, to the frozen model of the same library (PyTorch compiled
to PyTorch compiled).  JAX's steps are compiled; PyTorch's are eager and compiled.
Widths are those of a Llama of 1 and of 8 billion parameters, and the weights are
bfloat16, int8 or nf4.

    pip install "jax[cuda13]" qwix quax torch peft bitsandbytes
    python examples/benchmarks/gpu.py --shapes 8192x2048x8192,8192x4096x14336
    python examples/benchmarks/gpu.py --device cpu --shapes 256x128x256 --rounds 5
"""

import argparse
import os
import subprocess

import _arms
import _peft
import _report
import _timing
import jax
import jax.numpy as jnp
from rich.console import Console

SHAPES = "8192x2048x8192,8192x4096x14336"  # of 1B and of 8B


def measure(
    sizes: _arms.Sizes, *, device: str = "gpu", rounds: int = 50, only: list[str]
) -> _report.Results:
    """`{arm: {"ms", "to_frozen", "lower", "upper"}}`, or why there is no number.

    Args:
      sizes: of the model.
      device: 'gpu' or 'cpu'.
      rounds: that are timed; three more warm up.
      only: JAX arms, by default all.
    """
    calls, refused = _arms.calls(sizes, only)
    baselines = dict.fromkeys(calls, "frozen")
    if _report.installed("torch", "peft"):
        others, more = _peft.calls(sizes, "cuda" if device == "gpu" else "cpu")
        calls, refused = calls | others, refused | more
        baselines |= _peft.baselines(others)
    else:
        refused["PEFT"] = "torch and peft are not installed."
    return _timing.summary(calls, rounds, baselines) | refused


def described(device: str) -> str:
    """The device that JAX runs on, and for a GPU its driver and clocks."""
    name = jax.devices(device)[0].device_kind
    if device == "cpu":
        return f"{name}, {os.cpu_count()} CPUs"
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{name} (nvidia-smi: {error})"
    return f"{name}; driver, power limit, clock: {told.stdout.strip()}"


def main() -> None:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description="Wall-clock on a GPU.")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shapes", default=SHAPES, help="tokens x d x ff, ...")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--arms", default="", help="JAX arms, comma-separated")
    args, console = parser.parse_args(), Console()
    # PyTorch needs memory beside JAX; the backend reads this when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", "cpu" if args.device == "cpu" else "cuda,cpu")
    others = ("qwix", "quax", "torch", "peft", "bitsandbytes")
    console.print(_report.versions(*others), highlight=False)
    console.print(described(args.device), highlight=False)
    only = [x for x in args.arms.split(",") if x]
    for shape in args.shapes.split(","):
        tokens, d, ff = (int(x) for x in shape.split("x"))
        sizes = _arms.Sizes(tokens, d, ff, args.rank, jnp.dtype(args.dtype))
        found = measure(sizes, device=args.device, rounds=args.rounds, only=only)
        console.print(_report.time_table(f"{args.rounds} rounds: {sizes}", found))


if __name__ == "__main__":
    main()
