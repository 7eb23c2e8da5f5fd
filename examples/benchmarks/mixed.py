"""What a batch with several adapters costs, where the products with W dominate.

Gated MLPs of a Llama-3-8B's width in bfloat16, k adapters, and a batch whose rows are
dealt out among them.  To the same batch through the base alone:

- mixed: `flora.multi.lora`, each of its methods;
- one at a time: k batches of rows / k, `flora.lora` on each adapter;
- merged: k batches through k merged models, which takes k times the memory;
- merging: the same with one model in memory, each adapter merged in its turn.

Costs are the TPU compiler's estimated cycles, and its FLOPs in brackets.

    pip install libtpu
    python examples/benchmarks/mixed.py --chips v5e,v6e
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import _report
import _tpu
import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import flora
import flora.multi

Shapes = Any


class Gated(nn.Module):
    """One gated MLP with a residual, in bfloat16."""

    ff: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[rows, tokens, d]` to the same."""

        def dense(width: int) -> nn.Dense:
            kind = jnp.bfloat16
            return nn.Dense(width, use_bias=False, dtype=kind, param_dtype=kind)

        gate, up = dense(self.ff)(x), dense(self.ff)(x)
        return x + dense(x.shape[-1])(nn.silu(gate) * up)


def arms(
    rows: int, tokens: int, count: int, rank: int, d: int, ff: int
) -> Iterator[tuple[str, int, Callable, tuple[Shapes, ...]]]:
    """`(name, how often, function, its arguments' shapes)` of every arm."""
    model = Gated(ff)
    x = jax.ShapeDtypeStruct((rows, tokens, d), jnp.bfloat16)
    part = jax.ShapeDtypeStruct((rows // count, tokens, d), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    config = flora.LoraConfig(rank=rank, alpha=2.0 * rank, dtype=jnp.bfloat16)
    key = jax.random.key(0)
    adapted = jax.eval_shape(
        lambda p, x: flora.init(key, config, model.apply, p, x), params, x
    )
    _, adapter = flora.split(adapted)
    stacked = flora.multi.stack([adapter] * count)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    yield "base", 1, model.apply, (params, x)
    for method in ("auto", "masked", "gather"):
        run = flora.multi.lora(model.apply, method=method)
        yield f"mixed, {method}", 1, run, (params, stacked, ids, x)
    yield "one at a time", count, flora.lora(model.apply), (adapted, part)
    yield "merged", count, model.apply, (params, part)

    def merging(adapted: Any, x: Any) -> Any:
        return model.apply(flora.merge(adapted), x)

    yield "merging", count, merging, (adapted, part)


def measured(
    chip: str, *, only: tuple[str, ...] = (), **sizes: int
) -> dict[str, tuple[float, float]]:
    """Cycles and FLOPs of every arm, or of some, to those of the base."""
    found = {}
    for name, times, fn, args in arms(**sizes):
        if only and name not in ("base", *only):
            continue
        cost = _tpu.cost(chip, fn, *args)
        found[name] = (times * cost["cycles"], times * cost["flops"])
    cycles, flops = found["base"]
    return {name: (c / cycles, f / flops) for name, (c, f) in found.items()}


def main(argv: list[str] | None = None) -> dict[str, dict[str, tuple[float, float]]]:
    """Prints a table, and returns it by column."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--batches", default="64x1,256x1,16x512", help="rows x tokens")
    for name, size in {"count": 8, "rank": 16, "d": 4096, "ff": 14336}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args(argv)
    sizes = {k: getattr(args, k) for k in ("count", "rank", "d", "ff")}
    columns = {}
    for chip in args.chips.split(","):
        for batch in args.batches.split(","):
            rows, tokens = map(int, batch.split("x"))
            found = measured(chip, rows=rows, tokens=tokens, **sizes)
            columns[f"{chip}, {batch}"] = found
    cells = {
        name: [f"{c[name][0]:.3f} ({c[name][1]:.3f})" for c in columns.values()]
        for name in next(iter(columns.values()))
    }
    console = Console()
    console.print(f"{_report.versions('libtpu')}; {sizes}", highlight=False)
    title = "Cycles and (FLOPs) to the base's; batches as rows x tokens"
    console.print(_report.table(title, ("arm", *columns), cells.items()))
    return columns


if __name__ == "__main__":
    main()
