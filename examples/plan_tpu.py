"""Plans LoRA on TPUs that you do not have: compiles one training step for each mesh.

A Llama-style decoder in bfloat16 (`benchmarks/_decoder.py`), layers in one `nn.scan`
with remat, LoRA on every linear kernel but the head, AdamW on A and B, all buffers
donated.  No array is ever made: the step is compiled from `ShapeDtypeStruct`s by
libtpu's own compiler, for the topology that you name, on any machine.

    pip install -e ".[examples,tpu-compiler]"
    python examples/plan_tpu.py --model 8b --topology v5e:4x4 --mesh 16x1,8x2,4x4

A mesh is FSDPxTP or DATAxFSDPxTP.  HBM of arguments follows from their shardings;
"temp" is the compiler's: activations, gathered weights, buffers of collectives.  Cycles
are its estimates of the kernels, without waiting for collectives.  Attention writes out
the scores of one block of queries at a time and masks half of them; the head's logits
are by blocks too.  A flash kernel needs less of both.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks import _plan, _report, _tpu
from benchmarks._decoder import LIKE, Llama, Sizes, on_mesh, weight_spec
from benchmarks._plan import Plan
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import flora
import flora.quantize
import flora.sharding

MODELS = {
    **LIKE,
    "smoke": Sizes(layers=2, d=256, heads=4, kv_heads=2, ff=512, vocab=1024),
}

TARGET = "*_proj/kernel"

# What the adapted weights are stored as, with a scale an output or, such as "int4/64",
# in blocks; the embedding and the head stay in bfloat16.
BASES: dict[str, Callable[[Any], Any]] = {"bf16": lambda params: params}
for name, qtype, block in (
    ("int8", "int8", None),
    ("int4", "int4", None),
    ("int4/64", "int4", 64),
    ("nf4", "nf4", 64),
):
    BASES[name] = functools.partial(
        flora.quantize.quantize, qtype=qtype, target=TARGET, block=block
    )


def inputs(
    model: Llama, mesh: Mesh, base: str, train_dtype: Any
) -> tuple[Callable, tuple[Any, ...]]:
    """The model's loss, and shapes of adapter, optimizer state, base and tokens."""
    sizes, key = model.sizes, jax.random.key(0)
    by_batch = PartitionSpec(("data", "fsdp"))
    ids = _plan.place(sizes.ids, NamedSharding(mesh, by_batch))
    dense = jax.eval_shape(model.init, key, ids)
    like = jax.tree_util.tree_map_with_path(weight_spec, dense)
    params = BASES[base](dense)
    params = _plan.place(params, flora.sharding.shardings(params, like, mesh=mesh))
    config = flora.LoraConfig(
        rank=sizes.rank, alpha=2 * sizes.rank, target=TARGET, dtype=train_dtype
    )
    adapted = flora.init(key, config, model.apply, params, ids)
    adapted = _plan.place(adapted, flora.sharding.shardings(adapted, like, mesh=mesh))
    return flora.lora(model.apply), _plan.inputs(adapted, ids)


def plan(sizes: Sizes, topology: str, axes: tuple[int, ...], **how: Any) -> Plan:
    """Compiles the step for a mesh of a topology.

    Args:
      sizes: of the model and the batch.
      topology: such as 'v5e:4x4'.
      axes: the mesh's 'data', 'fsdp' and 'tp'.
      **how: "base", "train_dtype", "block" and "shard_sequence", as the options say.

    Returns:
      The plan; where the compiler refuses, its reason is in "problem".
    """
    start, title = time.perf_counter(), "x".join(map(str, axes))
    data, fsdp, tp = axes
    if sizes.sequences % (data * fsdp):
        problem = f"{sizes.sequences} sequences do not divide over {data * fsdp} chips"
        return Plan(title, 0.0, problem=problem)
    mesh = _tpu.mesh(topology, data=data, fsdp=fsdp, tp=tp)
    constrain = on_mesh(mesh, sizes.kv_heads, shard_sequence=how["shard_sequence"])
    model = Llama(
        sizes, "scan, remat", constrain, how["block"], head_block=how["block"]
    )
    loss, args = inputs(model, mesh, how["base"], how["train_dtype"])
    kinds: dict[str, Any] = _plan.argument_bytes(*args[:3])
    traced = _plan.traced(_plan.train_step(loss), mesh, args)
    with jax.set_mesh(mesh):
        found = _plan.compiled_costs(traced.lower())
    flops = _plan.product_flops(traced.jaxpr) / mesh.size
    seconds = time.perf_counter() - start
    return Plan(title, seconds, flops=flops, **kinds, **found)


def meshes(chips: int, wanted: str) -> Iterator[tuple[int, ...]]:
    """`(data, fsdp, tp)` of '4x4,1x16', or every FSDP x TP that there is.

    Raises:
      ValueError: a mesh has another number of chips.
    """
    if not wanted:
        yield from ((1, chips // tp, tp) for tp in _divisors(chips))
    for text in filter(None, wanted.split(",")):
        axes = tuple(map(int, text.split("x")))
        if math.prod(axes) != chips or len(axes) not in (2, 3):
            raise ValueError(f"--mesh {text}: write AxB or AxBxC of {chips} chips.")
        yield (*(1,) * (3 - len(axes)), *axes)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5p:4x4x4")
    parser.add_argument("--mesh", default="", help="by default every FSDPxTP")
    parser.add_argument("--batch", type=int, default=16, help="sequences, of all chips")
    parser.add_argument("--tokens", type=int, default=4096, help="of each sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", choices=BASES, default="bf16")
    parser.add_argument("--train-dtype", default="float32", help="of A, B and AdamW")
    parser.add_argument("--block", type=int, default=512, help="queries at a time")
    parser.add_argument(
        "--shard-sequence", action="store_true", help="of activations between layers"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Plan]:
    """Parses the options, plans each mesh, prints the table."""
    args, console, start = parse(argv), Console(), time.perf_counter()
    if args.smoke:
        args.model, args.tokens, args.block = "smoke", 256, 128
    chip = args.topology.split(":")[0]
    sizes = dataclasses.replace(
        MODELS[args.model],
        sequences=args.batch,
        tokens=args.batch * args.tokens,
        rank=args.rank,
    )
    names = ("base", "train_dtype", "block", "shard_sequence")
    how = {name: getattr(args, name) for name in names}
    how["train_dtype"] = jnp.dtype(args.train_dtype)
    chips = len(_tpu.topology(args.topology).devices)
    plans = [
        plan(sizes, args.topology, axes, **how) for axes in meshes(chips, args.mesh)
    ]
    title = (
        f"{args.model} on {args.topology}, {args.base} base, {args.batch} x "
        f"{args.tokens} tokens, rank {args.rank}; per chip: GiB, of {_tpu.HBM[chip]}"
    )
    console.print(_report.versions("libtpu"), highlight=False)
    console.print(_plan.table(title, plans, chip))
    console.print(f"Planned in {time.perf_counter() - start:.0f} s.", highlight=False)
    return plans


if __name__ == "__main__":
    main()
