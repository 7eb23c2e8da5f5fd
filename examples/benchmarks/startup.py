"""How long a job takes to its first compilation: shapes, `flora.init`, one trace.

A Llama-3-8B in plain Linen, as shapes: 32 layers unrolled, of which LoRA adapts 224
leaves, or in one `nn.scan`.  Each arm starts in a process of its own, with nothing
cached: frozen asks the model for its shapes and traces loss and the gradient of the
embedding; flora calls `flora.init` on such shapes and traces loss and the gradients of
A and B.  Seconds are of the processor, arms take turns, and the median of the pairs'
ratios is reported.

    python examples/benchmarks/startup.py --pairs 3
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import statistics
import time
from typing import Any

import _report
import jax
import jax.numpy as jnp
from _decoder import LIKE, Llama
from rich.console import Console

import flora

VARIANTS = ("unrolled", "scan")


def seconds(arm: str, variant: str, layers: int) -> list[float]:
    """Of the processor, step by step, in a process that has done nothing yet.

    Args:
      arm: "frozen" (the model's shapes, a trace) or "flora" (those shapes,
        `flora.init`, a trace).
      variant: of `VARIANTS`.
      layers: how many.
    """
    sizes = dataclasses.replace(LIKE["8b"], layers=layers)
    model, key = Llama(sizes, variant), jax.random.key(0)
    times = [time.process_time()]
    params = jax.eval_shape(model.init, key, sizes.ids)
    times.append(time.process_time())

    def loss(params: Any, ids: Any) -> jax.Array:
        logits: Any = model.apply(params, ids)
        return jnp.mean(logits)

    if arm == "frozen":
        rest = dict(params["params"])
        embed = rest.pop("embed")

        def of(embed: Any, rest: Any, ids: Any) -> jax.Array:
            return loss({"params": {**rest, "embed": embed}}, ids)

        jax.jit(jax.value_and_grad(of)).trace(embed, rest, sizes.ids)
    else:
        config = flora.LoraConfig(rank=16, alpha=32, target="*_proj/kernel")
        adapted = flora.init(key, config, loss, params, sizes.ids)
        times.append(time.process_time())
        base, adapter = flora.split(adapted)
        run = flora.lora(loss)

        def lora(adapter: Any, base: Any, ids: Any) -> jax.Array:
            return run(flora.join(base, adapter), ids)

        jax.jit(jax.value_and_grad(lora)).trace(adapter, base, sizes.ids)
    times.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(times)]


def measure(variant: str, layers: int = 32, pairs: int = 3) -> dict[str, float]:
    """Medians of each step's seconds, and of the pairs' ratios.

    "ratio" is flora's init and trace to the model's shapes and the frozen trace.
    """
    fresh, runs = multiprocessing.get_context("spawn"), []
    for _ in range(pairs):
        with fresh.Pool(1, maxtasksperchild=1) as pool:  # a process for each
            runs.append(
                [pool.apply(seconds, (x, variant, layers)) for x in ("frozen", "flora")]
            )
    steps = {
        "shapes": [frozen[0] for frozen, _ in runs],
        "frozen trace": [frozen[1] for frozen, _ in runs],
        "flora.init": [ours[1] for _, ours in runs],
        "flora trace": [ours[2] for _, ours in runs],
        "ratio": [sum(ours[1:]) / sum(frozen) for frozen, ours in runs],
    }
    return {name: statistics.median(found) for name, found in steps.items()}


def main() -> None:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description="Time to the first compilation.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    args, console = parser.parse_args(), Console()
    console.print(f"{_report.versions()}; {vars(args)}", highlight=False)
    found = [(x, measure(x, args.layers, args.pairs)) for x in VARIANTS]
    rows = [(x, [f"{n:.2f}" for n in each.values()]) for x, each in found]
    columns = ("layers", *found[0][1])
    console.print(_report.table("init and first trace, 8B", columns, rows))


if __name__ == "__main__":
    main()
