"""The TPU compiler's estimates for a program, on a machine without a TPU.

`pip install libtpu` brings the compiler.  Its cycles are estimates: of compute and of
memory traffic, fusion by fusion, not of every stall.
"""

import collections
import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Costs = dict[str, float]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


HBM = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
"""GiB of a chip that a program can use, as the compiler of libtpu 0.0.52 says.

On paper they are 16, 95 and 32 GB:
https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e.
"""


@functools.cache
def topology(name: str) -> Any:
    """Chips that are not there, such as 'v5e:4x4' or 'v5p:2x2x1'."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    return topologies.get_topology_desc(topology_name=name, platform="tpu")


def device(chip: str) -> Any:
    """One device of a chip that is not there."""
    return topology(CHIPS[chip]).devices[0]


def mesh(name: str, **axes: int) -> Mesh:
    """A mesh over all chips of a topology: `mesh("v5e:4x4", fsdp=4, tp=4)`."""
    devices = mesh_utils.create_device_mesh(
        tuple(axes.values()), topology(name).devices, allow_split_physical_axes=True
    )
    return Mesh(devices, tuple(axes))


def cost(chip: str, step: Callable, *args: Any) -> Costs:
    """Cycles, FLOPs and bytes of a step compiled for one device of a chip.

    Args:
      chip: of `CHIPS`.
      step: the function, not jitted.
      *args: trees of anything with a shape and a dtype.

    Returns:
      What `costs` returns.
    """
    one = Mesh([device(chip)], "device")
    place = NamedSharding(one, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args
    )
    with jax.set_mesh(one):  # the target, for code that asks what it is traced for
        return costs(jax.jit(step).lower(*args).compile())


def costs(compiled: jax.stages.Compiled) -> Costs:
    """What the compiler says of one device's part of a program.

    Returns:
      "cycles" (loops times their trips), "cycles_once" (each loop's body once; neither
      has branches that are not taken),
      "without_estimate" (instructions that are in neither), "flops" (each loop's body
      once), "temp_bytes", "out_bytes" and "peak_bytes" (arguments, results that are not
      donated arguments, and temporary memory).
    """
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    if not analysis or memory is None or not text:
        raise RuntimeError("The compiler reports no cost of a program.")
    own, trips = _cycles(text), _trips(text)
    temp, out = memory.temp_size_in_bytes, memory.output_size_in_bytes
    kept = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    return {
        "cycles": float(sum(n * trips[name] for name, n in own.items())),
        "cycles_once": float(sum(n for name, n in own.items() if trips[name])),
        "without_estimate": float(_without_estimate(text)),
        "flops": float(analysis["flops"]),
        "temp_bytes": float(temp),
        "out_bytes": float(out),
        "peak_bytes": float(kept + out + temp),
    }


def collectives(text: str) -> dict[str, int]:
    """`{kind: bytes}` of the collectives that one device takes part in, from HLO text.

    The size of a collective is that of its result, and of its operand where that is the
    larger one (reduce-scatter): what a ring moves, but for the factor (n - 1)/n and an
    all-reduce's factor of 2.  One asynchronous collective may be several instructions
    in several fused computations that share a channel; it counts once, times the trips
    of the loops around it.  (One that goes on behind a loop has parts in its body, too;
    it starts and ends outside, so the fewest trips count.)
    """
    trips, found = _trips(text), {}
    for computation, body in _computations(text).items():
        for line in body.splitlines():
            if not (match := _COLLECTIVE.match(line)):
                continue
            name, shape, kind, start = match.groups()
            size = _bytes(_result(shape) if start and kind != "all-reduce" else shape)
            if kind == "reduce-scatter":
                size *= _group(line)
            if computation.startswith("all-reduce-scatter"):  # how a TPU's are written
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else f"{computation}/{name}"
            size *= trips[computation]
            found[key] = min(found.get(key, (size, kind)), (size, kind))
    total: dict[str, int] = collections.Counter()
    for size, kind in found.values():
        total[kind] += size
    return dict(total)


_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(
    rf"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(_KINDS)})(-start)?\("
)


def _result(shape: str) -> str:
    """The second part of an asynchronous start's (operands, results, ...)."""
    depth, parts = 0, [""]
    for x in re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)[1:-1]:
        depth += (x in "([") - (x in ")]")
        if x == "," and not depth:
            parts.append("")
        else:
            parts[-1] += x
    return parts[1]


def _bytes(shape: str) -> int:
    """Of all arrays in a shape or a tuple of shapes, such as 'bf16[8,128]{1,0}'."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * int(bits or 8) // 8
        for _, bits, sizes in arrays
    )


def _group(line: str) -> int:
    """How many devices each group of a collective has."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    raise RuntimeError(f"No groups of devices in:\n{line}")


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
    """ceil(N / S), of a loop `while i < N` whose body ends with i + S.

    JAX's scans and XLA's windowed products count i from 0; an unrolled one has S = 2.
    A loop `while flag` whose body flips the flag is a branch that is not taken: so
    flora computes the exact norms of DoRA's columns where terms cancel, which is rare.
    """
    (name,) = re.findall(r"condition=%?([\w.\-]+)", line)
    (body,) = re.findall(r"body=%?([\w.\-]+)", line)
    condition = computations[name]
    is_flag = re.search(r"ROOT .* get-tuple-element\(.*index=0\b", condition)
    if is_flag and " not(" in computations[body]:
        return 0
    limits = re.findall(r"constant\((\d+)\)", condition)
    indices = re.findall(r"index=(\d+)(?!\d*\*/)", condition)
    if len(limits) != 1 or len(indices) != 1 or "direction=LT" not in condition:
        raise RuntimeError(f"The condition of a loop is not i < N:\n{condition}")
    return -(-int(limits[0]) // _step(computations[body], int(indices[0])))


def _step(body: str, index: int) -> int:
    """What a loop's body adds to part `index` of its tuple."""
    made = re.findall(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$", body, re.MULTILINE)
    lines = {name: text for _, name, text in made}

    def added(name: str) -> int:
        if found := re.search(r" constant\((\d+)\)", lines[name]):
            return int(found[1])
        if re.search(rf" get-tuple-element\(.*index={index}\b", lines[name]):
            return 0
        if found := re.search(r" (?:add|copy|bitcast)\((.*?)\)", lines[name]):
            return sum(added(x) for x in re.findall(r"%([\w.\-]+)", found[1]))
        raise RuntimeError(f"A loop's counter does not count by a constant:\n{body}")

    (root,) = (text for is_root, _, text in made if is_root)
    operands = re.findall(r"%([\w.\-]+)", root[root.rindex(" tuple(") :])
    return added(operands[index])
