"""What the planners share: a step of AdamW on A and B, and its costs on each chip."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from benchmarks import _tpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

import flora
import flora.sharding

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


def inputs(adapted: Any, *args: Any) -> tuple[Any, ...]:
    """What a step takes: shapes of adapter, optimizer state, base and arguments."""
    base, adapter = flora.split(adapted)
    places = jax.tree.map(lambda x: x.sharding, adapter)
    state = jax.eval_shape(OPTIMIZER.init, adapter)
    state = place(state, flora.sharding.of_state(state, adapter, places))
    return adapter, state, base, *args


def train_step(loss: Callable) -> Callable:
    """`(adapter, state, base, *args)` to the new adapter and state, and the loss.

    `loss(adapted, *args)` is a scalar.
    """

    def step(adapter: Any, state: Any, base: Any, *args: Any) -> tuple[Any, Any, Any]:
        def of_adapter(adapter: Any) -> jax.Array:
            return loss(flora.join(base, adapter), *args)

        value, grads = jax.value_and_grad(of_adapter)(adapter)
        updates, state = OPTIMIZER.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


def traced(step: Callable, mesh: Mesh, inputs: tuple[Any, ...]) -> jax.stages.Traced:
    """The step, its adapter and optimizer state donated, traced for a mesh."""
    with jax.set_mesh(mesh):  # the target, for flora's choice of a form
        places = jax.tree.map(lambda x: x.sharding, inputs[:2])
        places = *places, NamedSharding(mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=(0, 1), out_shardings=places).trace(*inputs)


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
    answers = {True: "yes", False: "no"}
    result.add_row(
        "fits", *(answers[x.fits(chip)] if x.peak or x.problem else "" for x in plans)
    )
    row("TFLOPs", lambda x: x.flops / 1e12, ".1f")
    row("Mcycles", lambda x: x.cycles / 1e6, ".0f")
    for kind in sorted({kind for x in plans for kind in x.collectives}):
        row(f"{kind}, GiB", lambda x, k=kind: x.collectives.get(k, 0) / 2**30, ".2f")
    row("planned in, s", lambda x: x.seconds, ".0f")
    problems = [f"{x.mesh}: {x.problem}" for x in plans if x.problem]
    result.caption = "\n".join(problems) or None
    return result
