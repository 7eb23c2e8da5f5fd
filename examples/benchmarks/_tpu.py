"""What the TPU compiler says of a program, on a machine that has no TPU.

`pip install libtpu` brings the compiler.  Its cycles are estimates: of compute and of
memory traffic, fusion by fusion, not of every stall.
"""

import collections
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Costs = dict[str, float]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def device(chip: str) -> Any:
    """One device of a chip that is not there."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    topology = topologies.get_topology_desc(topology_name=CHIPS[chip], platform="tpu")
    return topology.devices[0]


def cost(chip: str, step: Callable, *args: Any) -> Costs:
    """Cycles, FLOPs and bytes of a step compiled for one device of a chip.

    Args:
      chip: of `CHIPS`.
      step: the function, not jitted.
      *args: trees of anything with a shape and a dtype.

    Returns:
      "cycles" (loops times their trips), "cycles_once" (each loop's body once),
      "without_estimate" (instructions that are in neither), "flops" (each loop's body
      once), "temp_bytes" and "out_bytes".
    """
    mesh = Mesh([device(chip)], "device")
    place = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args
    )
    with jax.set_mesh(mesh):  # the target, for code that asks what it is traced for
        compiled = jax.jit(step).lower(*args).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    if not analysis or memory is None or not text:
        raise RuntimeError(f"The compiler for {chip} reports no cost of a program.")
    own, trips = _cycles(text), _trips(text)
    return {
        "cycles": float(sum(n * trips[name] for name, n in own.items())),
        "cycles_once": float(sum(own.values())),
        "without_estimate": float(_without_estimate(text)),
        "flops": float(analysis["flops"]),
        "temp_bytes": float(memory.temp_size_in_bytes),
        "out_bytes": float(memory.output_size_in_bytes),
    }


def _computations(text: str) -> dict[str, str]:
    """`{name: body}` of an HLO module's text; the entry is named 'ENTRY'."""
    found = re.findall(
        r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL
    )
    return {"ENTRY" if entry else name: body for entry, name, body in found}


def _cycles(text: str) -> dict[str, int]:
    """Estimated cycles of each computation's own instructions."""
    found = {
        name: [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', body)]
        for name, body in _computations(text).items()
    }
    return {
        name: sum(n for n in cycles if n < _NO_ESTIMATE)
        for name, cycles in found.items()
    }


_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has none


def _without_estimate(text: str) -> int:
    """How many instructions the compiler has no estimate for."""
    return text.count(f'"estimated_cycles":"{_NO_ESTIMATE}"')


def _trips(text: str) -> dict[str, int]:
    """How often each computation runs: the product of the trips of loops around it."""
    trips: dict[str, int] = collections.defaultdict(lambda: 1, ENTRY=1)
    computations, waiting = _computations(text), ["ENTRY"]
    while waiting:
        outer = waiting.pop()
        for line in computations.get(outer, "").splitlines():
            count = _trip_count(line, computations) if " while(" in line else 1
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                trips[inner] = trips[outer] * count
                waiting.append(inner)
    return trips


def _trip_count(line: str, computations: dict[str, str]) -> int:
    """N, of a loop whose condition is i < N; JAX's scans count i from 0."""
    (name,) = re.findall(r"condition=%?([\w.\-]+)", line)
    condition = computations[name]
    limits = re.findall(r"constant\((\d+)\)", condition)
    if len(limits) != 1 or "direction=LT" not in condition:
        raise RuntimeError(f"The condition of a loop is not i < N:\n{condition}")
    return int(limits[0])
