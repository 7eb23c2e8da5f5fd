"""`layer_replication`: layers of a base repeated, each time with factors of their own.

Ranges [[0, 2], [1, 3]] make the layers 0, 1, 1, 2 of a base of three.  In a tree these
are four layers, two of which hold the same values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flora._peft.naming.names import Slot
from flora._tree.weight import base_of

_LAYER = re.compile(r"(^|\.)(\d+)(?=\.)")


def sources(spans: Sequence[Sequence[int]]) -> list[int]:
    """Which layer of the base each layer is."""
    return [i for first, end in spans for i in range(first, end)]


def problems(
    spans: Sequence[Sequence[int]], slots: Sequence[Slot], leaves: Mapping[str, Any]
) -> Iterator[str]:
    """Layers of a tree that the ranges do not make, or that are no copies."""
    origin = sources(spans)
    shown = (
        f"layer_replication {[[*span] for span in spans]} makes {len(origin)} layers"
    )
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    known, whole = set(), True
    for slot in slots:
        base = base_of(leaves[slot.path])
        held = leaves[slot.path].a if base is None else base
        whole &= base is not None
        for index in np.ndindex(*getattr(held, "shape", ())[: slot.holes]):
            name = slot.at(index)
            found = _LAYER.search(name)
            if found is None:
                continue
            i = int(found[2])
            known.add(i)
            if i >= len(origin):
                yield f"{shown}, and '{slot.path}' is '{name}', one more."
                continue
            one = (
                base[index]
                if index and isinstance(base, jax.Array | np.ndarray)
                else base
            )
            key = origin[i], name[: found.start(2)] + name[found.end(2) :]
            other, value = first.setdefault(key, (name, one))
            if other != name and not _alike(value, one):
                yield (
                    f"{shown}, of which '{other}' and '{name}' are layer {origin[i]} "
                    f"of the base, and their values differ in the tree. Repeat its "
                    f"layers as {origin}."
                )
    if whole and (lost := sorted({*range(len(origin))} - known)):
        yield (
            f"{shown}, and the tree has no layer {lost[0]}. Pass a tree whose layers "
            f"are {origin} of the base's, each a leaf of its own."
        )


def _alike(x: Any, y: Any) -> bool:
    arrays = isinstance(x, jax.Array | np.ndarray) and hasattr(y, "__array__")
    return x is y or not arrays or np.array_equal(np.asarray(x), np.asarray(y))
