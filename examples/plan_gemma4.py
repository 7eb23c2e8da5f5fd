"""LoRA of Gemma 4 31B on a v5p-8, planned on any machine: no line adapts the model.

The models are other packages' own, as they are: Tunix's `Gemma4`, `Qwen3`, `Llama3`
(NNX) and DeepMind's `gemma` (Linen).  flora reads the axes off the computation and
lays A and B as the model's own metadata lays its weights; the training step (AdamW on
A and B, donated) is compiled by the TPU's compiler for chips that are not there.

    pip install -e ".[examples,third-party,tpu-compiler]"
    python examples/plan_gemma4.py --coverage         # seconds: what is factored
    python examples/plan_gemma4.py --topology v5p:2x2x1 --mesh 4x1 --base int8
    python examples/plan_gemma4.py --model llama3-70b --cycles

All layers are compiled in one program at XLA's level O1, which takes minutes for these
unrolled models: memory and bytes between chips are of that.  `--layers 12` plans the
first twelve alone.  `--cycles` compiles one layer and two at the level that a run has
(O1's cycles are not those), and sums what each kind of layer adds:
f(all) = f(first) + the sum over each further layer of f(first, its kind) - f(first);
the same for the frozen model: its own loss and the gradient for the scale of its first
norm, which goes through all layers as those for A and B do.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from benchmarks import _plan, _report, _tpu
from benchmarks._plan import Plan
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

import flora
import flora.quantize
import flora.sharding

LOCAL, GLOBAL = "LOCAL_SLIDING", "GLOBAL"
RANK = 16


def of_tunix(
    package: str, name: str, sizes: str, kinds: Sequence[str]
) -> tuple[Callable, Any]:
    """The loss of Tunix's model with these layers, and its state: shapes, metadata."""
    module = importlib.import_module(f"tunix.models.{package}.model")
    config = getattr(module.ModelConfig, sizes)()
    known = {x.name for x in dataclasses.fields(config)}
    wanted = {
        "num_layers": len(kinds),
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
        "remat_config": module.RematConfig.DECODER,
    }
    if "attention_pattern" in known:
        wanted["attention_pattern"] = tuple(module.AttentionType[x] for x in kinds)
    config = dataclasses.replace(config, **{k: wanted[k] for k in known & {*wanted}})
    make = getattr(module, name)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state
    )  # Llama3's config has no dtype

    def loss(state: Any, ids: jax.Array, positions: jax.Array, mask: jax.Array) -> Any:
        logits, _ = nnx.merge(graphdef, state)(ids, positions, None, mask)
        return next_token_loss(logits, ids)

    return loss, state


def of_deepmind(name: str, kinds: Sequence[str]) -> tuple[Callable, Any]:
    """The loss of a Gemma 4 of the package gemma, and its parameters' shapes."""
    make = getattr(importlib.import_module("gemma.gm").nn, name)
    known = importlib.import_module("gemma.gm.nn.gemma4._modules").AttentionType
    config = dataclasses.replace(
        make().config, attention_types=tuple(known[x] for x in kinds)
    )
    model = make(config=config)

    def loss(params: Any, ids: jax.Array, positions: jax.Array, mask: jax.Array) -> Any:
        out = model.apply(params, ids, positions=positions, attention_mask=mask)
        return next_token_loss(out.logits, ids)

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    return loss, jax.eval_shape(model.init, key, ids)


def largest_axis(state: Any, mesh: Mesh) -> Any:
    """The largest axis of each array over all chips: `kd.sharding.FSDPSharding`.

    gemma's Linen modules say nothing of shardings; that is its trainer's rule.
    """

    def one(x: Any) -> NamedSharding:
        divide = [i for i, n in enumerate(x.shape) if n % mesh.size == 0]
        if x.size * x.dtype.itemsize <= 4 * 2**20 or not divide:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(divide, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))

    return jax.tree.map(one, state)


def by_metadata(state: Any, mesh: Mesh) -> Any:
    """What the model's own variables say."""
    return flora.sharding.shardings(state, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder of another package, as it is.

    Attributes:
      build: `(kinds of layers)` to its loss and the shapes of its weights.
      kinds: of its layers, from the first to the last.
      target: what has factors: every linear layer that flora can factor.
      first_norm: the path of the scale in front of everything that is adapted.
      places: `(weights, mesh)` to their shardings.
    """

    build: Callable[[Sequence[str]], tuple[Callable, Any]]
    kinds: tuple[str, ...]
    target: tuple[str, ...]
    first_norm: str
    places: Callable[[Any, Mesh], Any] = by_metadata


GEMMA = (*[LOCAL] * 5, GLOBAL) * 10
MODELS = {
    "gemma4-31b": Model(
        functools.partial(of_tunix, "gemma4", "Gemma4", "gemma4_31b"),
        GEMMA,
        ("attn/*_einsum/w", "mlp/*_proj/kernel"),
        "layers/0/pre_attention_norm/scale",
    ),
    "gemma4-31b-linen": Model(
        functools.partial(of_deepmind, "Gemma4_31B"),
        GEMMA,
        ("attn/*_einsum/w", "mlp/gating_einsum", "mlp/linear"),
        "params/layer_0/pre_attention_norm/scale",
        largest_axis,
    ),
    # On a mesh of TPUs Tunix's experts are a Pallas kernel, which has no factors.
    "qwen3-30b-a3b": Model(
        functools.partial(of_tunix, "qwen3", "Qwen3", "qwen3_30b_a3b"),
        ("experts",) * 48,
        ("attn/*_proj/w", "router/kernel"),
        "layers/0/input_layernorm/w",
    ),
    "llama3-70b": Model(
        functools.partial(of_tunix, "llama3", "Llama3", "llama3_70b"),
        ("layer",) * 80,
        ("attn/*_proj/w", "mlp/*_proj/kernel"),
        "layers/0/input_layernorm/w",
    ),
}


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean nats of each token but the first."""
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], -1))


def arguments(batch: int, tokens: int, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """Shapes of tokens, positions and a mask, whose rows lie along 'fsdp'."""
    rows = mesh and NamedSharding(mesh, PartitionSpec("fsdp"))

    def shape(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, tokens, *rest), dtype, sharding=rows)

    return shape(jnp.int32), shape(jnp.int32), shape(bool, tokens)


@contextlib.contextmanager
def as_on(mesh: Mesh) -> Iterator[None]:
    """Traces as on the chips of a mesh.

    Models ask where they are, Tunix's for `jax.devices()` and the mesh of `with mesh:`,
    and leave out what they say about activations where that is a CPU.  On the chips
    themselves `with mesh:` is all.
    """
    chips = list(mesh.devices.flat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of `with mesh:`
        devices = mock.patch.object(jax, "devices", return_value=chips)
        with jax.set_mesh(mesh), mesh, devices:
            yield


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planned, but for the number of layers."""

    model: Model
    mesh: Mesh
    base: str
    batch: int
    tokens: int

    def placed(self, kinds: Sequence[str]) -> tuple[Callable, Any]:
        """The loss and the weights, each to lie where the model says."""
        loss, state = self.model.build(kinds)
        return loss, _plan.place(state, self.model.places(state, self.mesh))

    def adapted(self, kinds: Sequence[str]) -> tuple[Callable, Any]:
        """The loss and the adapted state: A and B lie as their weights do."""
        loss, state = self.placed(kinds)
        config = flora.LoraConfig(rank=RANK, alpha=RANK, target=self.model.target)
        with as_on(self.mesh):
            args = arguments(self.batch, self.tokens, self.mesh)
            key = jax.eval_shape(jax.random.key, 0)  # nothing is drawn
            adapted = flora.init(key, config, loss, state, *args)
        if self.base != "bf16":
            target = self.model.target
            adapted = flora.quantize.quantize(adapted, self.base, target=target)
        return loss, adapted

    def layers(self, kinds: Sequence[str], level: str = "UNKNOWN") -> Plan:
        """The costs of a model with these layers, compiled at a level of XLA's."""
        start = time.perf_counter()
        loss, adapted = self.adapted(kinds)
        inputs = _plan.inputs(adapted, *arguments(self.batch, self.tokens, self.mesh))
        with as_on(self.mesh):
            step = _plan.train_step(flora.lora(loss))
            traced = _plan.traced(step, self.mesh, inputs)
            lowered = traced.lower()
        held = _plan.argument_bytes(*inputs[:3])
        title = f"{len(kinds)} layers"
        return self.compiled(title, start, traced, lowered, level, **held)

    def frozen(self, kinds: Sequence[str]) -> Plan:
        """The costs of the model's own loss and a gradient through all of it."""
        start = time.perf_counter()
        loss, state = self.placed(kinds)
        flat, treedef = jax.tree_util.tree_flatten_with_path(state)
        paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in flat]
        first = [x.startswith(self.model.first_norm) for x in paths].index(True)
        leaves = [x for _, x in flat]

        def of_norm(scale: Any, leaves: list[Any], *args: Any) -> Any:
            leaves = [*leaves[:first], scale, *leaves[first + 1 :]]
            return loss(treedef.unflatten(leaves), *args)

        with as_on(self.mesh):
            args = arguments(self.batch, self.tokens, self.mesh)
            traced = jax.jit(jax.value_and_grad(of_norm)).trace(
                leaves[first], leaves, *args
            )
            lowered = traced.lower()
        title = f"{len(kinds)} layers, frozen"
        return self.compiled(title, start, traced, lowered, "UNKNOWN")

    def compiled(
        self,
        title: str,
        start: float,
        traced: Any,
        lowered: Any,
        level: str,
        **held: Any,
    ) -> Plan:
        """A plan of what was lowered; says so, since it takes a while."""
        jax.config.update("jax_optimization_level", level)
        found = _plan.compiled_costs(lowered)
        flops = _plan.product_flops(traced.jaxpr) / self.mesh.size
        result = Plan(title, time.perf_counter() - start, flops=flops, **held, **found)
        print(f"{title}: {result.seconds:.0f} s", flush=True)
        return result


def covered(model: Model, kinds: Sequence[str], mesh: Mesh, args: Any) -> Any:
    """What flora can factor of a model with these layers."""
    loss, state = model.build(kinds)
    with as_on(mesh):
        return flora.coverage(loss, state, *arguments(args.batch, args.tokens, mesh))


def summed(compiled: Callable, kinds: Sequence[str]) -> tuple[float, float]:
    """Cycles of a stack of layers, and the seconds to find them out.

    f(stack) = f(first) + the sum over each further layer's kind of
    f(first, kind) - f(first).
    """
    first, *rest = kinds
    one = compiled((first,))
    cycles, seconds = one.cycles, one.seconds
    for kind in dict.fromkeys(rest):
        two = compiled((first, kind))
        cycles += rest.count(kind) * (two.cycles - one.cycles)
        seconds += two.seconds
    return cycles, seconds


def plan(case: Case, kinds: tuple[str, ...], *, cycles: bool = False) -> list[Plan]:
    """The plan of all layers, and the cycles of the frozen model's step."""
    whole = case.layers(kinds, "O1")
    if not cycles:
        return [dataclasses.replace(whole, cycles=0)]
    mine, seconds = summed(case.layers, kinds)
    whole = dataclasses.replace(whole, cycles=mine, seconds=whole.seconds + seconds)
    theirs, seconds = summed(case.frozen, kinds)
    return [whole, Plan("frozen", seconds, cycles=theirs)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="gemma4-31b")
    parser.add_argument("--topology", default="v5p:2x2x1", help="such as v5e:4x4")
    parser.add_argument("--mesh", default="4x1", help="FSDP x TP")
    parser.add_argument("--base", choices=("bf16", "int8", "int4"), default="bf16")
    parser.add_argument("--batch", type=int, default=8, help="sequences, of all chips")
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence")
    parser.add_argument("--cycles", action="store_true", help="and the frozen model's")
    parser.add_argument("--layers", type=int, help="the first ones; by default all")
    parser.add_argument("--coverage", action="store_true", help="no compiler")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Plan]:
    """Parses the options, plans, prints the table."""
    args, console, start = parse(argv), Console(), time.perf_counter()
    model, chip = MODELS[args.model], args.topology.split(":")[0]
    fsdp, tp = map(int, args.mesh.split("x"))
    mesh = _tpu.mesh(args.topology, fsdp=fsdp, tp=tp)
    if args.coverage:
        each = tuple(dict.fromkeys(model.kinds))
        print(covered(model, each, mesh, args), "\n\nAll layers:")
        print(str(covered(model, model.kinds, mesh, args)).splitlines()[0])
        return []
    case = Case(model, mesh, args.base, args.batch, args.tokens)
    plans = plan(case, model.kinds[: args.layers], cycles=args.cycles)
    title = (
        f"{args.model} on {args.topology}, fsdp x tp {args.mesh}, {args.base} base, "
        f"{args.batch} x {args.tokens} tokens, rank {RANK}; per chip: GiB, of "
        f"{_tpu.HBM[chip]}"
    )
    console.print(_report.versions("libtpu", "google-tunix"), highlight=False)
    console.print(_plan.table(title, plans, chip))
    console.print(
        f"Planned in {time.perf_counter() - start:.0f} s "
        f"({time.process_time():.0f} s of one core), with "
        f"{_report.peak_bytes() / 2**30:.1f} GiB of this machine's memory.",
        highlight=False,
    )
    return plans


if __name__ == "__main__":
    main()
