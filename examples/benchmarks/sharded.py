"""What a sharded step of a Llama-style block costs on 16 TPUs, compiled without any.

The block is attention and a gated MLP (`_decoder.py`), or one of experts; frozen is its
loss and dx, flora the same with the gradients of A and B.  Bytes of collectives are
those of one chip, counted as `_tpu.collectives` says; each collective is there once.

    pip install -e ".[examples,tpu-compiler]"
    python examples/benchmarks/sharded.py --forms auto,direct
    python examples/benchmarks/sharded.py --cases "FSDP x TP" --base int8

Meshes of v5e:4x4: FSDP x TP (4 x 4), the same with the tokens between blocks divided
over 'tp', FSDP (16), data parallel (16), and 16 experts on 16 chips.
"""

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _report
import _tpu
import jax
import jax.numpy as jnp
from _decoder import Layer, Sizes, on_mesh, weight_spec
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import flora
import flora.quantize
import flora.sharding

TOPOLOGY = "v5e:4x4"
NOT_ADAPTED = re.compile(r".*norm.*|router")
SIZES = Sizes(sequences=16, tokens=16384, d=4096, heads=32, kv_heads=8, ff=14336)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of params and x, with their shapes and shardings."""

    mesh: Mesh
    loss: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.ShapeDtypeStruct


def struct(shape: Sequence[int], mesh: Mesh, spec: P) -> jax.ShapeDtypeStruct:
    """A bfloat16 array on a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16, sharding=sharding)


def mean_square(y: jax.Array) -> jax.Array:
    """A loss that needs all of y."""
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def block(sizes: Sizes, axes: Sequence[int], *, shard_sequence: bool = False) -> Case:
    """Attention and a gated MLP on a mesh of ('data', 'fsdp', 'tp')."""
    mesh = _tpu.mesh(TOPOLOGY, **dict(zip(("data", "fsdp", "tp"), axes, strict=True)))
    at = on_mesh(mesh, sizes.kv_heads, shard_sequence=shard_sequence)
    layer = Layer(sizes, at)
    stream = P(("data", "fsdp"), "tp" if shard_sequence else None, None)
    x = struct((*sizes.ids.shape, sizes.d), mesh, stream)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = jax.tree_util.tree_map_with_path(
        lambda path, w: struct(w.shape, mesh, weight_spec(path, w)), params
    )

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y: Any = layer.apply(params, x)
        return mean_square(y[0])

    return Case(mesh, loss, params, x)


def experts(sizes: Sizes, count: int = 16) -> Case:
    """A gated MLP of experts: each token goes to one, of an axis 'expert' of the mesh.

    Dispatch is by one-hot einsums with capacity factor 1 (Lepikhin et al. 2020,
    https://arxiv.org/abs/2006.16668); the router is not adapted.
    """
    mesh, (groups, tokens) = _tpu.mesh(TOPOLOGY, expert=count), sizes.ids.shape

    def at(x: jax.Array, *spec: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(x @ params["router"])
        chosen = jax.nn.one_hot(jnp.argmax(scores, -1), count, dtype=jnp.int32)
        slot = jnp.cumsum(chosen, 1) * chosen - 1
        sent = jax.nn.one_hot(slot, tokens // count, dtype=x.dtype)  # [g, t, e, c]
        h = jnp.einsum("gtec,gtd->egcd", sent, x)
        h = at(h, "expert")
        gate = jnp.einsum("egcd,edf->egcf", h, params["gate"])
        h = jax.nn.silu(gate) * jnp.einsum("egcd,edf->egcf", h, params["up"])
        h = at(jnp.einsum("egcf,efd->egcd", h, params["down"]), "expert")
        h = at(h, None, "expert")
        y = jnp.einsum("gtec,gte,egcd->gtd", sent, scores, h)
        return mean_square(at(x + y, "expert"))

    wide, place = (count, sizes.d, sizes.ff), P("expert")
    params = {
        "router": struct((sizes.d, count), mesh, P()),
        "gate": struct(wide, mesh, place),
        "up": struct(wide, mesh, place),
        "down": struct((count, sizes.ff, sizes.d), mesh, place),
    }
    return Case(mesh, loss, params, struct((groups, tokens, sizes.d), mesh, place))


CASES: dict[str, Callable[[Sizes], Case]] = {
    "FSDP x TP": functools.partial(block, axes=(1, 4, 4)),
    "FSDP x TP, sequence": functools.partial(
        block, axes=(1, 4, 4), shard_sequence=True
    ),
    "FSDP": functools.partial(block, axes=(1, 16, 1)),
    "data": functools.partial(block, axes=(16, 1, 1)),
    "experts": experts,
}


def arms(
    case: Case, sizes: Sizes, forms: Sequence[str], dtype: Any, base: str = ""
) -> Iterator[tuple[str, Callable, tuple[Any, ...]]]:
    """`(arm, loss, its arguments)`: the frozen model, then flora in each form.

    flora's base is stored as `base` says, such as 'int8' or 'int4/64' in blocks of 64;
    the frozen model's is bfloat16 in any case.
    """
    yield "frozen", lambda _, x, params: case.loss(params, x), ((), case.x, case.params)
    config = flora.LoraConfig(
        rank=sizes.rank,
        alpha=2 * sizes.rank,
        dtype=dtype,
        target="*",
        exclude=NOT_ADAPTED,
    )
    key = jax.random.key(0)
    adapted = flora.init(key, config, case.loss, case.params, case.x)
    if base:
        qtype, _, block = base.partition("/")
        block = int(block) if block else None
        adapted = flora.quantize.quantize(
            adapted, qtype, target="*", exclude=NOT_ADAPTED, block=block
        )
    adapted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        adapted,
        flora.sharding.shardings(adapted),
    )
    base, adapter = flora.split(adapted)
    for form in forms:
        run = flora.lora(case.loss, form=form)

        def loss(adapter: Any, x: Any, base: Any, run: Callable = run) -> jax.Array:
            return run(flora.join(base, adapter), x)

        yield f"flora {form}", loss, (adapter, case.x, base)


def measure(
    name: str,
    sizes: Sizes = SIZES,
    forms: Sequence[str] = ("auto",),
    dtype: Any = jnp.bfloat16,
    base: str = "",
) -> dict[str, dict[str, Any]]:
    """What the compiler says of each arm of a case; `base` as of `arms`.

    Returns:
      `{arm: {"cycles", "temp_bytes", "collectives", "bytes", "factor_bytes",
      "cycles_to_frozen", "bytes_to_frozen"}}`: "collectives" by kind, "bytes" their
      sum, "factor_bytes" those of A and B of one chip.
    """
    case, found = CASES[name](sizes), {}
    whole = NamedSharding(case.mesh, P())
    for arm, loss, args in arms(case, sizes, forms, dtype, base):
        step = jax.value_and_grad(loss, (0, 1))
        places = jax.tree.map(lambda x: x.sharding, args[:2])
        with jax.set_mesh(case.mesh):  # the target, for flora's choice of a form
            jitted = jax.jit(step, out_shardings=(whole, places))
            compiled = jitted.lower(*args).compile()
        costs = _tpu.costs(compiled)
        kinds = _tpu.collectives(compiled.as_text() or "")
        costs |= {"bytes": sum(kinds.values()), "factor_bytes": _chip_bytes(args[0])}
        first = next(iter(found.values()), costs)
        for what in ("cycles", "bytes"):
            costs[f"{what}_to_frozen"] = costs[what] / first[what]
        found[arm] = costs | {"collectives": kinds}
    return found


def _chip_bytes(tree: Any) -> int:
    """What one chip holds of a tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def table(name: str, found: dict[str, dict[str, Any]]) -> Table:
    """The arms as rows."""
    kinds = sorted({kind for x in found.values() for kind in x["collectives"]})

    def row(x: dict[str, Any]) -> list[str]:
        return [
            f"{x['cycles'] / 1e6:.2f}",
            f"{x['cycles_to_frozen']:.3f}",
            *(f"{x['collectives'].get(kind, 0) / 2**20:.1f}" for kind in kinds),
            f"{x['bytes'] / 2**20:.1f}",
            f"{x['bytes_to_frozen']:.3f}" if x["bytes_to_frozen"] < 100 else "—",
            f"{x['factor_bytes'] / 2**20:.2f}",
            f"{x['temp_bytes'] / 2**20:.0f}",
        ]

    columns = ("arm", "Mcycles", "to frozen", *kinds, "all MiB", "to frozen")
    columns = (*columns, "A and B", "temp MiB")
    return _report.table(name, columns, [(k, row(v)) for k, v in found.items()])


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    parser = argparse.ArgumentParser(description="A sharded step on 16 TPUs.")
    parser.add_argument("--forms", default="auto", help="of flora, with commas")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtype", default="bfloat16", help="of A and B")
    parser.add_argument("--base", default="", help="flora's, such as int8 or int4/64")
    parser.add_argument("--rank", type=int, default=SIZES.rank)
    args, console = parser.parse_args(), Console()
    sizes = dataclasses.replace(SIZES, rank=args.rank)
    forms, dtype = args.forms.split(","), jnp.dtype(args.dtype)
    console.print(f"{_report.versions('libtpu')}; {TOPOLOGY}; {sizes}", highlight=False)
    for name in args.cases:
        console.print(table(name, measure(name, sizes, forms, dtype, args.base)))


if __name__ == "__main__":
    main()
