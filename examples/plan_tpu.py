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
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from benchmarks import _report, _tpu
from benchmarks._decoder import LIKE, Llama, Sizes, on_mesh, weight_spec
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

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

OPTIMIZER = optax.adamw(1e-4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of a step on each chip, in bytes unless a field says otherwise."""

    mesh: str
    seconds: float
    base: int = 0
    adapter: int = 0
    optimizer: int = 0
    temp: float = 0
    peak: float = 0
    flops: float = 0
    cycles: float = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def fits(self, chip: str) -> bool:
        """Whether a chip's memory holds the step."""
        return not self.problem and self.peak <= _tpu.HBM[chip] * 2**30


def place(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def inputs(
    model: Llama, mesh: Mesh, base: str, train_dtype: Any
) -> tuple[Callable, tuple[Any, ...]]:
    """The step, and shapes of its adapter, optimizer state, base and tokens."""
    sizes, key = model.sizes, jax.random.key(0)
    by_batch = PartitionSpec(("data", "fsdp"))
    ids = place(sizes.ids, NamedSharding(mesh, by_batch))
    dense = jax.eval_shape(model.init, key, ids)
    like = jax.tree_util.tree_map_with_path(weight_spec, dense)
    params = BASES[base](dense)
    params = place(params, flora.sharding.shardings(params, like, mesh=mesh))
    config = flora.LoraConfig(
        rank=sizes.rank, alpha=2 * sizes.rank, target=TARGET, dtype=train_dtype
    )
    adapted = flora.init(key, config, model.apply, params, ids)
    adapted = place(adapted, flora.sharding.shardings(adapted, like, mesh=mesh))
    frozen, adapter = flora.split(adapted)
    state = jax.eval_shape(OPTIMIZER.init, adapter)
    places = jax.tree.map(lambda x: x.sharding, adapter)
    state = place(state, flora.sharding.of_state(state, adapter, places))
    return flora.lora(model.apply), (adapter, state, frozen, ids)


def train_step(run: Callable) -> Callable:
    """`(adapter, state, base, ids)` to the new adapter and state, and the loss."""

    def step(adapter: Any, state: Any, base: Any, ids: Any) -> tuple[Any, Any, Any]:
        def loss(adapter: Any) -> jax.Array:
            return run(flora.join(base, adapter), ids)

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = OPTIMIZER.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


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
    run, args = inputs(model, mesh, how["base"], how["train_dtype"])
    kinds: dict[str, Any] = argument_bytes(*args[:3])
    result, step = Plan(title, 0.0, **kinds), train_step(run)
    with jax.set_mesh(mesh):  # the target, for flora's choice of a form
        places = jax.tree.map(lambda x: x.sharding, args[:2])
        places = *places, NamedSharding(mesh, PartitionSpec())
        traced = jax.jit(step, donate_argnums=(0, 1), out_shardings=places).trace(*args)
        found = compiled_costs(traced.lower())
    flops = product_flops(traced.jaxpr) / mesh.size
    seconds = time.perf_counter() - start
    return dataclasses.replace(result, seconds=seconds, flops=flops, **found)


def compiled_costs(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What the compiler says, or why it refuses for want of memory."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"problem": _reason(str(error))}
    costs, text = _tpu.costs(compiled), compiled.as_text() or ""
    return {
        "temp": costs["temp_bytes"],
        "peak": costs["peak_bytes"],
        "cycles": costs["cycles"],
        "collectives": _tpu.collectives(text),
    }


def _reason(error: str) -> str:
    """The numbers in the compiler's message."""
    found = re.search(r"(Ran out of memory|Used)[^\n]*?(\. |\n|$)", error)
    return found[0].strip() if found else error.splitlines()[0]


def argument_bytes(adapter: Any, state: Any, base: Any) -> dict[str, int]:
    """What one chip holds of each kind, from shapes and shardings."""

    def size(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * _bits(x.dtype) // 8
            for x in jax.tree.leaves(tree)
        )

    return {"base": size(base), "adapter": size(adapter), "optimizer": size(state)}


def _bits(dtype: Any) -> int:
    integer = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.iinfo if integer else jnp.finfo)(dtype).bits


def product_flops(jaxpr: Any) -> float:
    """FLOPs of all products of a jaxpr, loops times their trips, recomputation too."""
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive is jax.lax.dot_general_p:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            inner = math.prod(lhs[i] for i in contracted)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        trips = eqn.params.get("length", 1) if eqn.primitive is jax.lax.scan_p else 1
        for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            total += trips * product_flops(x) if _is_jaxpr(x) else 0.0
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")


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


def table(title: str, plans: list[Plan], chip: str) -> Table:
    """A column for each mesh, data x fsdp x tp."""
    result = Table(title=title, title_justify="left", caption_justify="left")
    result.add_column("", no_wrap=True)
    for x in plans:
        result.add_column(x.mesh, justify="right")

    def row(name: str, shown: Callable[[Plan], float], form: str = "") -> None:
        cells = (f"{shown(x):{form}}" if shown(x) else "" for x in plans)
        result.add_row(name, *cells)

    for kind in ("base", "adapter", "optimizer", "temp", "peak"):
        row(f"{kind}, GiB", lambda x, kind=kind: getattr(x, kind) / 2**30, ".2f")
    result.add_row("fits", *("yes" if x.fits(chip) else "no" for x in plans))
    row("TFLOPs", lambda x: x.flops / 1e12, ".1f")
    row("Mcycles", lambda x: x.cycles / 1e6, ".0f")
    for kind in sorted({kind for x in plans for kind in x.collectives}):
        row(f"{kind}, GiB", lambda x, k=kind: x.collectives.get(k, 0) / 2**30, ".2f")
    row("planned in, s", lambda x: x.seconds, ".0f")
    problems = [f"{x.mesh}: {x.problem}" for x in plans if x.problem]
    result.caption = "\n".join(problems) or None
    return result


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
    console.print(table(title, plans, chip))
    console.print(f"Planned in {time.perf_counter() - start:.0f} s.", highlight=False)
    return plans


if __name__ == "__main__":
    main()
