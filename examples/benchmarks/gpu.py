"""Wall-clock of the ways to train on a GPU: flora, qwix and others, and PEFT.

The model is one gated MLP, in bfloat16; it, the arms and their checks are those of
`compare.py`.  With `--like` it is four layers of a Llama, scanned and rematted, in the
arms of `llama.py`.  A round is one call of each arm in random order, each waited for; a
ratio is the median over rounds of the ratios within a round, to the frozen model of the
same library (PyTorch compiled to PyTorch compiled).  JAX's steps are compiled;
PyTorch's are eager and compiled.  Widths are those of a Llama of 1 and of 8 billion
parameters, and the weights are bfloat16, int8 or nf4.

    pip install "jax[cuda13]" qwix quax torch peft bitsandbytes
    python examples/benchmarks/gpu.py --shapes 8192x2048x8192,8192x4096x14336
    python examples/benchmarks/gpu.py --like 8b --attention none cudnn
    python examples/benchmarks/gpu.py --device cpu --shapes 256x128x256 --rounds 5
"""

import argparse
import dataclasses
import os
import subprocess
from collections.abc import Sequence

import _arms
import _peft
import _report
import _timing
import jax
import jax.numpy as jnp
import llama
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


def measure_decoder(
    sizes: llama.Sizes, how: llama.How, *, rounds: int = 50, only: Sequence[str] = ()
) -> _report.Results:
    """As `measure`, of the arms of `llama.py`, and of its flora in the direct form."""
    calls, refused = {}, {}
    for form in ("auto", "direct"):
        now, key = dataclasses.replace(how, form=form), jax.random.key(0)
        for name, step, (trained, *others) in llama.steps(sizes, now, key):
            if name in calls or (only and name not in {*only, "frozen"}):
                continue
            inputs = jax.tree.map(moved, trained), *others
            try:
                call = _timing.blocking(jax.jit(step), *inputs)
                call()
            except Exception as error:  # what stops an arm is a result
                refused[name] = f"{type(error).__name__}: {error}"[:200]
            else:
                calls[name] = call
    return _timing.summary(calls, rounds, dict.fromkeys(calls, "frozen")) | refused


def moved(x: jax.Array) -> jax.Array:
    """What trains, a little off its start: a product with zeros takes less power."""
    return x + jax.random.normal(jax.random.key(1), x.shape, x.dtype) / 64


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
    parser.add_argument("--like", default="", choices=("", *llama.LIKE))
    parser.add_argument(
        "--attention", nargs="+", default=["none"], choices=llama.ATTENTION
    )
    parser.add_argument("--base", default="bfloat16", help="of --like, as of llama.py")
    args, console = parser.parse_args(), Console()
    # PyTorch needs memory beside JAX; the backend reads this when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", "cpu" if args.device == "cpu" else "cuda,cpu")
    others = ("qwix", "quax", "torch", "peft", "bitsandbytes")
    console.print(_report.versions(*others), highlight=False)
    console.print(described(args.device), highlight=False)
    only = [x for x in args.arms.split(",") if x]
    if args.like:
        sizes = llama.sizes_like(args.like)
        for attention in args.attention:
            how = llama.How(attention=attention, head="none", base=args.base)
            found = measure_decoder(sizes, how, rounds=args.rounds, only=only)
            title = f"{args.rounds} rounds: {sizes}, attention {attention}"
            console.print(_report.time_table(title, found))
        return
    for shape in args.shapes.split(","):
        tokens, d, ff = (int(x) for x in shape.split("x"))
        sizes = _arms.Sizes(tokens, d, ff, args.rank, jnp.dtype(args.dtype))
        found = measure(sizes, device=args.device, rounds=args.rounds, only=only)
        console.print(_report.time_table(f"{args.rounds} rounds: {sizes}", found))


if __name__ == "__main__":
    main()
