"""What a training step of a Llama-style decoder costs on TPUs, compiled without one.

RMSNorm, rotary positions, grouped-query attention under a causal mask, a gated MLP and
a cross-entropy loss, in plain Linen and bfloat16.  Three arms: frozen (loss and the
gradient of the embedded tokens: a lower bound for every way to train), flora on the
weights of `--target` (loss, dA, dB and that gradient) and full (loss, all dW and that
gradient).  With `--base int8` and others, the frozen model and flora on the quantized
base stand beside them.

The row that counts, the linear layers of a Llama-3-8B with nothing between them that
the compiler estimates badly, and the same with attention written out and a frozen head:

    pip install libtpu
    python examples/benchmarks/llama.py --like 8b --attention none --head none
    python examples/benchmarks/llama.py --like 8b --attention written --head frozen

The layers are unrolled, or one `nn.scan`, each with `nn.remat` around a layer or
without.  XLA counts a loop's body once.  With `--cycles once` so does the column "to
frozen", for all arms alike: four layers weigh as one forward and one backward pass.
With `--cycles trips` each body's cycles are times its trips, read off the loop's
condition.  FLOPs are as XLA counts them, bodies once.  "left out" counts the kernels
that the compiler has no estimate for, Pallas's flash attention too: they are in no sum
of any arm, and what is left are the products around them.

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Ainslie et al. 2023 (grouped queries). https://arxiv.org/abs/2305.13245
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

import _report
import _tpu
import jax
import jax.numpy as jnp
from _decoder import ATTENTION, LIKE, Llama, Sizes, sizes_like
from rich.console import Console
from rich.table import Table

import flora
import flora.quantize
import flora.variants

LAYERS = ("unrolled", "unrolled, remat", "scan", "scan, remat")
HEADS = ("none", "frozen", "adapted")
LINEAR = "*_proj/kernel"
POLICIES = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}
ADAPTERS = {"lora": None, "dora": flora.variants.DoRA()}


@dataclasses.dataclass(frozen=True)
class How:
    """What is computed, and how it is adapted.

    Attributes:
      layers: of `LAYERS`.
      form: of flora's products.
      target: "linear" for every linear kernel but the head, "all" for the head too, or
        patterns as in `LoraConfig`.
      attention: of `_decoder.ATTENTION`.
      head: "none" (the loss is the mean of the last layer's squares), "frozen" or
        "adapted".
      head_block: how many tokens of the head are computed at a time; 0 for all.
      variant: of `ADAPTERS`.
      base: "bfloat16", or what the kernels of the layers are stored as: one of
        `flora.quantize.QTYPES`.
      block: how many weights share a scale there; None for all of a column.
      policy: what remat keeps, of `POLICIES`.
      packed: whether several examples share a sequence (attention is masked).
      accumulate: over how many batches of x the gradients of what trains are summed.
      dropout: the rate of dropout on the low-rank paths.
    """

    layers: str = "scan, remat"
    form: str = "auto"
    target: str | tuple[str, ...] = "linear"
    attention: str = "written"
    head: str = "adapted"
    head_block: int = 0
    variant: str = "lora"
    base: str = "bfloat16"
    block: Any = 64
    policy: str = "nothing"
    packed: bool = False
    accumulate: int = 1
    dropout: float = 0.0

    def config(self, sizes: Sizes) -> flora.LoraConfig:
        """LoRA of the model's rank on what is selected."""
        rank, every = sizes.rank, self.target in ("linear", "all")
        target = list(self.target) if not every else [LINEAR] if sizes.layers else []
        if self.target == "all" or self.head == "adapted":
            target.append("lm_head/kernel")
        return flora.LoraConfig(
            rank=rank,
            alpha=2 * rank,
            target=target,
            dtype=jnp.bfloat16,
            form=self.form,
            variant=ADAPTERS[self.variant],
            dropout=self.dropout,
        )


def steps(
    sizes: Sizes, how: How, key: jax.Array | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """`(arm, step, inputs)` of the arms; x is the embedded tokens.

    Args:
      sizes: of the model.
      how: what is computed.
      key: what inputs are drawn with; without it they are `ShapeDtypeStruct`s.
    """
    has_head = how.head != "none"
    model = Llama(
        sizes,
        how.layers,
        attention=how.attention,
        head=has_head,
        head_block=how.head_block,
        policy=POLICIES[how.policy],
        packed=how.packed,
    )
    x, ids = jax.ShapeDtypeStruct((*sizes.ids.shape, sizes.d), jnp.bfloat16), sizes.ids

    def loss(params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        value: Any = model.apply(params, x, ids, method=Llama.loss)
        return value

    def with_factors(params: Any) -> tuple[Any, ...]:
        config = how.config(sizes)
        adapted = flora.init(jax.random.key(0), config, loss, params, x, ids)
        base, adapter = flora.split(adapted)
        run = flora.lora(loss)

        def lora(adapter: Any, x: jax.Array, base: Any, ids: jax.Array) -> jax.Array:
            tree = flora.join(base, adapter)
            if how.dropout:
                tree = flora.with_dropout(tree, jax.random.key(0))
            return run(tree, x, ids)

        return lora, adapter, base

    def without(loss: Any) -> Any:
        return lambda _, x, params, ids: loss(params, x, ids)

    def init(x: jax.Array, ids: jax.Array) -> Any:
        return model.init(jax.random.key(0), x, ids, method=Llama.loss)

    if key is None:
        params = jax.eval_shape(init, x, ids)
    else:
        x = jax.random.normal(key, x.shape, x.dtype)
        ids = jax.random.randint(key, ids.shape, 0, sizes.vocab)
        params = jax.jit(init)(x, ids)
    arms = {
        "frozen": (without(loss), (), params),
        f"flora {how.form}": with_factors(params),
        "full": (lambda params, x, _, ids: loss(params, x, ids), params, ()),
    }
    if how.base != "bfloat16":
        stored = flora.quantize.quantize(
            params, how.base, target=LINEAR, block=how.block
        )
        arms[f"frozen, {how.base}"] = without(flora.lora(loss)), (), stored
        arms[f"flora {how.form}, {how.base}"] = with_factors(stored)
    for name, (fn, trained, base) in arms.items():
        yield name, accumulated(fn, how.accumulate), (trained, x, base, ids)


def accumulated(fn: Any, count: int) -> Any:
    """`fn`'s value, and its gradients summed over so many batches; those by x stay."""
    step = jax.value_and_grad(fn, (0, 1))
    if count == 1:
        return step

    def by_batches(trained: Any, x: jax.Array, base: Any, ids: jax.Array) -> Any:
        def add(total: Any, batch: Any) -> tuple[Any, jax.Array]:
            value, (grads, dx) = step(trained, batch[0], base, batch[1])
            return jax.tree.map(jnp.add, total, (value, grads)), dx

        parts = (y.reshape(count, -1, *y.shape[1:]) for y in (x, ids))
        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(add, zero, tuple(parts))

    return by_batches


def measure(
    chip: str,
    sizes: Sizes,
    how: How,
    arms: Sequence[str] = (),
    known: Mapping[str, _tpu.Costs] = MappingProxyType({}),
) -> dict[str, _tpu.Costs]:
    """`{arm: costs}` as `_tpu.cost` has them, of frozen and these arms or of all.

    "once_to_frozen" and "trips_to_frozen" are the ratios of "cycles_once" and "cycles",
    "temp_to_frozen" that of "temp_bytes".  `known` has arms that were measured before.
    """
    costs: dict[str, _tpu.Costs] = {}
    for name, step, inputs in steps(sizes, how):
        if name != "frozen" and arms and name not in arms:
            continue
        found = dict(known[name]) if name in known else _tpu.cost(chip, step, *inputs)
        costs[name] = found
        for ratio, key in RATIOS.items():
            found[ratio] = found[key] / costs["frozen"][key]
    return costs


RATIOS = {
    "once_to_frozen": "cycles_once",
    "trips_to_frozen": "cycles",
    "temp_to_frozen": "temp_bytes",
}


def table(title: str, costs: dict[str, _tpu.Costs], cycles: str) -> Table:
    """The arms as rows, cycles of loops' bodies "once" or times their "trips"."""

    def row(x: _tpu.Costs) -> list[str]:
        return [
            f"{x['cycles_once' if cycles == 'once' else 'cycles'] / 1e6:.2f}",
            f"{x[f'{cycles}_to_frozen']:.3f}",
            f"{x['without_estimate']:.0f}",
            f"{x['flops'] / 1e12:.3f}",
            f"{x['temp_bytes'] / 2**20:.0f}",
            f"{x['temp_to_frozen']:.3f}",
            f"{x['out_bytes'] / 2**20:.0f}",
        ]

    columns = (
        "arm",
        f"Mcycles, {cycles}",
        "to frozen",
        "left out",
        "TFLOPs, once",
        "temp MiB",
        "to frozen",
        "out MiB",
    )
    return _report.table(title, columns, [(k, row(v)) for k, v in costs.items()])


def parse() -> tuple[Sizes, How, argparse.Namespace]:
    """The options; those of `Sizes` that are not given are those of `--like`."""
    parser = argparse.ArgumentParser(description="A decoder's training step on TPUs.")
    parser.add_argument("--like", choices=LIKE, help="widths; 4 layers, 8192 tokens")
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "tied":
            parser.add_argument(flag, action="store_true", help="head is the embedding")
        else:
            parser.add_argument(flag, type=int)
    parser.add_argument("--form", default="auto", help="of flora")
    parser.add_argument(
        "--target", nargs="+", default=["linear"], help="linear, all or patterns"
    )
    parser.add_argument("--attention", default="written", choices=ATTENTION)
    parser.add_argument("--head", default="adapted", choices=HEADS)
    parser.add_argument("--head-block", type=int, default=0, help="tokens at a time")
    parser.add_argument("--variant", default="lora", choices=ADAPTERS)
    parser.add_argument(
        "--base", default="bfloat16", choices=("bfloat16", *flora.quantize.QTYPES)
    )
    parser.add_argument("--block", type=int, default=64, help="0: one scale a column")
    parser.add_argument("--policy", default="nothing", choices=POLICIES)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1, help="batches")
    parser.add_argument("--dropout", type=float, default=0.0, help="its rate")
    parser.add_argument("--chips", default=",".join(_tpu.CHIPS))
    parser.add_argument("--cycles", default="once", choices=("once", "trips"))
    parser.add_argument("--arms", nargs="+", default=[], help="beside frozen")
    parser.add_argument(
        "--variants", nargs="+", default=["scan, remat"], choices=LAYERS
    )
    args = parser.parse_args()
    given = {x.name: getattr(args, x.name) for x in dataclasses.fields(Sizes)}
    sizes = sizes_like(args.like) if args.like else Sizes()
    sizes = dataclasses.replace(
        sizes, **{k: v for k, v in given.items() if v is not None}
    )
    named = args.target[0] if args.target[0] in ("linear", "all") else None
    how = How(
        form=args.form,
        target=named or tuple(args.target),
        attention=args.attention,
        head=args.head,
        head_block=args.head_block,
        variant=args.variant,
        base=args.base,
        block=args.block or None,
        policy=args.policy,
        packed=args.packed,
        accumulate=args.accumulate,
        dropout=args.dropout,
    )
    return sizes, how, args


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    (sizes, how, args), console = parse(), Console()
    console.print(f"{_report.versions('libtpu')}; {sizes}; {how}", highlight=False)
    if how.attention == "flash":
        console.print("Flash attention has no estimate: it is in no arm's cycles.")
    for chip in args.chips.split(","):
        for layers in args.variants:
            title = f"{chip}, {layers}; libtpu {metadata.version('libtpu')}'s estimates"
            now = dataclasses.replace(how, layers=layers)
            costs = measure(chip, sizes, now, args.arms)
            console.print(table(title, costs, args.cycles))


if __name__ == "__main__":
    main()
