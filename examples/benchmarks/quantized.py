"""What a base in fewer bits saves in a training step, compiled for a TPU without one.

A stack of residual gated MLPs in bfloat16, LoRA on every weight; the step returns the
loss and the gradients of A, B and x.  The layers are unrolled, or one `lax.scan`, each
with `jax.checkpoint` around a layer or without.  `--d 4096 --ff 14336 --tokens 8192` is
a Llama-3-8B's.

If a dense copy of the base were kept for the backward pass, the temporary memory with a
quantized base would be above bfloat16's by that copy, whose size is the column "dense
base".

    pip install libtpu qwix
    python examples/benchmarks/quantized.py
"""

import argparse
import dataclasses
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import _report
import _tpu
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from scale import adapted_step

from flora import quantize

VARIANTS = ("unrolled", "unrolled, remat", "scan", "scan, remat")
# A type alone has one scale an output; "int4/64" is in blocks of 64.
CHANNELWISE = tuple(x for x in quantize.QTYPES if x != "nf4")
STORED = ("bfloat16", *CHANNELWISE, "int4/64", "nf4/64")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and of its input."""

    layers: int = 8
    tokens: int = 1024
    d: int = 2048
    ff: int = 5632
    rank: int = 16


def layer(x: jax.Array, p: Any) -> jax.Array:
    """X + (silu(x W_gate) * (x W_up)) W_down."""
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def loss(params: Any, x: jax.Array, variant: str) -> jax.Array:
    """Mean of the squares of what the stack makes of x, `[tokens, d]`."""
    step = jax.checkpoint(layer) if "remat" in variant else layer
    if "scan" in variant:
        x, _ = jax.lax.scan(lambda x, p: (step(x, p), None), x, params)
    else:
        for i in range(len(params)):
            x = step(x, params[str(i)])
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def parameters(sizes: Sizes, variant: str) -> Any:
    """Shapes of the weights, stacked for a scan."""
    shapes = {k: (sizes.d, sizes.ff) for k in ("gate", "up")}
    shapes["down"] = (sizes.ff, sizes.d)
    stack = (sizes.layers,) if "scan" in variant else ()
    one = {
        k: jax.ShapeDtypeStruct((*stack, *shape), jnp.bfloat16)
        for k, shape in shapes.items()
    }
    return one if stack else {str(i): one for i in range(sizes.layers)}


def measure(chip: str, sizes: Sizes, variant: str, stored: str) -> dict[str, float]:
    """`_tpu.cost` of the step, with "base_bytes" and "dense_bytes"."""
    dense = parameters(sizes, variant)
    base = dense
    if stored != "bfloat16":
        qtype, _, block = stored.partition("/")
        block = int(block) if block else None
        base = quantize.quantize(dense, qtype, target="*", block=block)
    x = jax.ShapeDtypeStruct((sizes.tokens, sizes.d), jnp.bfloat16)

    def model(params: Any, x: jax.Array) -> jax.Array:
        return loss(params, x, variant)

    step, inputs = adapted_step(model, base, x, sizes.rank, jnp.bfloat16)
    costs = _tpu.cost(chip, step, *inputs)
    return costs | {
        "base_bytes": stored_bytes(inputs[2]),
        "dense_bytes": stored_bytes(dense),
    }


def stored_bytes(tree: Any) -> float:
    """Bytes of the arrays, packed."""

    def bits(x: Any) -> int:
        kind = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
        return x.size * kind(x.dtype).bits

    return sum(map(bits, jax.tree.leaves(tree))) / 8


def rows(
    chip: str, sizes: Sizes, variant: str, kinds: list[str]
) -> Iterator[tuple[str, list[str]]]:
    """A row for each way to store the base."""
    first = None
    for kind in kinds:
        x = measure(chip, sizes, variant, kind)
        first = first or x
        yield (
            kind,
            [
                f"{x['base_bytes'] / 2**20:.0f}",
                f"{x['temp_bytes'] / 2**20:.0f}",
                f"{(x['temp_bytes'] - first['temp_bytes']) / x['dense_bytes']:+.3f}",
                f"{x['cycles'] / first['cycles']:.3f}",
            ],
        )


def table(chip: str, sizes: Sizes, variant: str, kinds: list[str]) -> Table:
    """The rows of one way to write the layers."""
    title = f"{chip}, {variant}; libtpu {metadata.version('libtpu')}'s estimates"
    columns = ("base", "base MiB", "temp MiB", "more, of dense base", "cycles to bf16")
    return _report.table(title, columns, list(rows(chip, sizes, variant, kinds)))


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    parser = argparse.ArgumentParser(description="Bases in fewer bits.")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--chip", default="v5e", choices=_tpu.CHIPS)
    parser.add_argument("--base", nargs="+", default=list(STORED))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS
    )
    args, console = parser.parse_args(), Console()
    sizes = Sizes(**{x.name: getattr(args, x.name) for x in dataclasses.fields(Sizes)})
    console.print(f"{_report.versions('libtpu', 'qwix')}; {sizes}", highlight=False)
    for variant in args.variants:
        console.print(table(args.chip, sizes, variant, args.base))


if __name__ == "__main__":
    main()
