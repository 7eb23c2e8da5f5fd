"""`LoraConfig.rows`: leaves of which some rows train, new tokens above all."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from flora._algebra.variants import Rows
from flora._trace.discover import Finding
from flora._tree.config import LoraConfig
from flora._tree.errors import LoraError, fail
from flora._tree.layout import Layout
from flora._tree.paths import exactly, first
from flora._tree.selection import idle_keys
from flora._tree.weight import LoraWeight

Named = list[tuple[str, Any]]


def chosen(
    config: LoraConfig, named: Named, others: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The leaves of which rows train, and which; `others` train in another way."""
    fail(idle_keys("rows", config.rows, named))
    held = {p: first(config.rows, None, p, x) for p, x in named}
    found = {p: tuple(map(int, x)) for p, x in held.items() if x is not None}
    fail(
        f"'{p}' is named in rows and in target or train. Write exclude={exactly(p)!r}, "
        "or take it out of one."
        for p in found
        if p in others
    )
    return found


def weight(
    config: LoraConfig,
    path: str,
    leaf: Any,
    rows: tuple[int, ...],
    layout: Layout,
    finding: Finding,
) -> LoraWeight:
    """The node of a leaf, not started: its words are looked up, or are its outputs."""
    looked_up = [
        axis
        for use in finding.uses
        if use.primitive == "gather"
        for axis, role in use.roles
        if role == "in"
    ]
    words = looked_up[0] if looked_up else (*layout.out, -1)[0]
    variant = Rows(rows, "in" if words in layout.in_ else "out")
    shape, rank = tuple(leaf.shape), len(rows)
    if problem := variant.problem(layout, shape):
        raise LoraError(f"rows: '{path}': {problem}")
    dtype = jnp.dtype(config.dtype)
    a, b = (jax.ShapeDtypeStruct(s, dtype) for s in layout.factor_shapes(shape, rank))
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        with jax.transfer_guard_host_to_device("allow"):
            a, b = (jnp.zeros(x.shape, x.dtype) for x in (a, b))
    return LoraWeight(
        leaf,
        a,
        b,
        layout=layout,
        rank=rank,
        alpha=float(rank),
        fallback=config.fallback,
        variant=variant,
    )
