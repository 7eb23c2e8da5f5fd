"""What a training step of a Llama-style decoder costs on TPUs, compiled without one.

RMSNorm, rotary positions, grouped-query attention under a causal mask, a gated MLP and
a cross-entropy loss, in plain Linen and bfloat16.  Three arms: frozen (loss and the
gradient of the embedded tokens: a lower bound for every way to train), flora on every
linear kernel (loss, dA, dB and that gradient) and full (loss, all dW and that
gradient).

The layers are unrolled, or one `nn.scan`, each with `nn.remat` around a layer or
without.  XLA counts a loop's body once.  For the scanned model "Mcycles" has each
body's cycles times its trips, read off the loop's condition; the columns with "once"
are as XLA counts, so there only the ratios of FLOPs mean anything, and not across
variants.  "left out" counts the kernels that the compiler has no estimate for: they are
in neither sum.

    pip install libtpu
    python examples/benchmarks/llama.py --chips v5e,v5p,v6e --form auto

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Ainslie et al. 2023 (grouped queries). https://arxiv.org/abs/2305.13245
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
from _decoder import Llama, Sizes
from rich.console import Console
from rich.table import Table

import flora

VARIANTS = ("unrolled", "unrolled, remat", "scan", "scan, remat")


def steps(sizes: Sizes, variant: str, form: str) -> Iterator[tuple[str, Any, Any]]:
    """`(arm, step, inputs)` of the arms; x is the embedded tokens."""
    model = Llama(sizes, variant)
    params = jax.eval_shape(model.init, jax.random.key(0), sizes.ids)
    if not sizes.tied:  # the steps start at the embedded tokens
        params = {"params": {k: v for k, v in params["params"].items() if k != "embed"}}
    x = jax.ShapeDtypeStruct((*sizes.ids.shape, sizes.d), jnp.bfloat16)

    def loss(params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        value: Any = model.apply(params, x, ids, method=Llama.loss)
        return value

    config = flora.LoraConfig(
        rank=sizes.rank, alpha=2 * sizes.rank, dtype=jnp.bfloat16, form=form
    )
    adapted = flora.init(jax.random.key(0), config, loss, params, x, sizes.ids)
    base, adapter = flora.split(adapted)
    run = flora.lora(loss)

    def lora(adapter: Any, x: jax.Array, base: Any, ids: jax.Array) -> jax.Array:
        return run(flora.join(base, adapter), x, ids)

    yield "frozen", jax.value_and_grad(loss, 1), (params, x, sizes.ids)
    both = jax.value_and_grad(lora, (0, 1))
    yield f"flora {form}", both, (adapter, x, base, sizes.ids)
    yield "full", jax.value_and_grad(loss, (0, 1)), (params, x, sizes.ids)


def measure(chip: str, sizes: Sizes, variant: str, form: str) -> dict[str, _tpu.Costs]:
    """`{arm: costs}` as `_tpu.cost` has them, with "to_frozen", a ratio of cycles."""
    costs: dict[str, _tpu.Costs] = {}
    for name, step, inputs in steps(sizes, variant, form):
        costs[name] = _tpu.cost(chip, step, *inputs)
        costs[name]["to_frozen"] = costs[name]["cycles"] / costs["frozen"]["cycles"]
    return costs


def table(title: str, costs: dict[str, _tpu.Costs]) -> Table:
    """The arms as rows."""

    def row(x: _tpu.Costs) -> list[str]:
        return [
            f"{x['cycles'] / 1e6:.2f}",
            f"{x['cycles_once'] / 1e6:.2f}",
            f"{x['without_estimate']:.0f}",
            f"{x['to_frozen']:.3f}",
            f"{x['flops'] / 1e12:.3f}",
            f"{x['temp_bytes'] / 2**20:.0f}",
            f"{x['out_bytes'] / 2**20:.0f}",
        ]

    columns = (
        "arm",
        "Mcycles",
        "once",
        "left out",
        "to frozen",
        "TFLOPs once",
        "temp MiB",
        "out MiB",
    )
    return _report.table(title, columns, [(k, row(v)) for k, v in costs.items()])


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="A decoder's training step on TPUs.")
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "tied":
            parser.add_argument(flag, action="store_true", help="head is the embedding")
        else:
            parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--form", default="auto", help="of flora")
    parser.add_argument("--chips", default=",".join(_tpu.CHIPS))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS
    )
    return parser.parse_args()


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    args, console = parse(), Console()
    sizes = Sizes(**{x.name: getattr(args, x.name) for x in dataclasses.fields(Sizes)})
    console.print(f"{_report.versions('libtpu')}; {sizes}", highlight=False)
    for chip in args.chips.split(","):
        for variant in args.variants:
            title = (
                f"{chip}, {variant}; libtpu {metadata.version('libtpu')}'s estimates"
            )
            console.print(table(title, measure(chip, sizes, variant, args.form)))


if __name__ == "__main__":
    main()
