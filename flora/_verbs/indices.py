"""Ranks and scales index by index, where a config's globs name indices of a stack."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flora._tree.blocks import Block
from flora._tree.config import LoraConfig
from flora._tree.errors import fail
from flora._tree.indices import Indexed, with_indices
from flora._tree.layout import Layout
from flora._tree.paths import entries, matches

Named = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a leaf.

    Attributes:
      rank: the largest of them.
      alpha: of that rank.
      blocks: the adapters, unless there is one for the whole stack.
    """

    rank: int
    alpha: float
    blocks: tuple[Block, ...] = ()


def read(config: LoraConfig, named: Named) -> LoraConfig:
    """The config, its globs that name indices as such."""

    def keys(patterns: Mapping[Any, Any]) -> dict[Any, Any]:
        return {with_indices(key, named): x for key, x in patterns.items()}

    return dataclasses.replace(
        config,
        target=with_indices(config.target, named),
        exclude=with_indices(config.exclude, named),
        rank_pattern=keys(config.rank_pattern),
        alpha_pattern=keys(config.alpha_pattern),
    )


def whole(pattern: Any) -> list[Any]:
    """The entries that select whole leaves."""
    return [e for e in entries(pattern) if not isinstance(e, Indexed)]


def adapters(
    config: LoraConfig, named: Named, layouts: Mapping[str, Layout]
) -> dict[str, Adapters]:
    """The adapters of each leaf that has a layout; none of one of which none is named.

    Raises:
      LoraError: an entry names no index.
    """
    seen = _Seen(set(), set())
    found = {}
    for path, leaf in named:
        if path not in layouts:
            continue
        stack = layouts[path].sizes(leaf.shape)[0]
        chosen = seen.named(config.target, path, leaf, stack)
        chosen &= ~seen.named(config.exclude, path, leaf, stack)
        values = []
        for name in ("rank", "alpha"):
            value, free = np.full(stack, getattr(config, name), object), chosen.copy()
            for key, x in getattr(config, f"{name}_pattern").items():
                here = free & seen.named(key, path, leaf, stack)
                value[here], free = x, free & ~here
                seen.deciding |= {(name, key)} if here.any() else set()
            values.append(value)
        if chosen.any():
            found[path] = _adapters(config, chosen, *values)
    fail(seen.problems(config))
    return found


@dataclasses.dataclass
class _Seen:
    """Which entries name an index, and which keys `(name, key)` decide for one."""

    naming: set[Any]
    deciding: set[tuple[str, Any]]

    def named(
        self, pattern: Any, path: str, leaf: Any, stack: Sequence[int]
    ) -> np.ndarray:
        """Which matrices of a leaf's stack a pattern selects, bool `[*stack]`."""
        where = np.zeros(tuple(stack), bool)
        for entry in entries(pattern):
            if not isinstance(entry, Indexed):
                where |= matches(entry, path, leaf)
            elif stack and (here := entry.named(path, stack)).any():
                where |= here
                self.naming.add(entry)
        return where

    def problems(self, config: LoraConfig) -> Iterator[str]:
        """What names no index, or decides for none."""
        keys = [
            (name, key)
            for name in ("rank", "alpha")
            for key in getattr(config, f"{name}_pattern")
        ]
        given = [("target", config.target), ("exclude", config.exclude)]
        for field, pattern in [*given, *((f"{n}_pattern", k) for n, k in keys)]:
            for entry in entries(pattern):
                if isinstance(entry, Indexed) and entry not in self.naming:
                    yield (
                        f"{field}: {entry!r} names no index of a stack. Numbers count "
                        "the stacked axes of a leaf from 0; leave them out for all."
                    )
        for name, key in keys:
            idle = (name, key) not in self.deciding
            if idle and isinstance(key, Indexed) and key in self.naming:
                yield (
                    f"{name}_pattern: {key!r} decides for no index: earlier entries "
                    "take all that it names. Write it before them, or take it out."
                )


def _adapters(
    config: LoraConfig, chosen: np.ndarray, ranks: np.ndarray, alphas: np.ndarray
) -> Adapters:
    pairs = {
        (int(r), float(a)) for r, a in zip(ranks[chosen], alphas[chosen], strict=True)
    }
    rank, alpha = max(pairs)
    if chosen.all() and len(pairs) == 1:
        return Adapters(rank, alpha)
    power = 0.5 if config.rank_stabilized else 1
    blocks = [
        Block(tuple(map(int, at)), 0, int(ranks[tuple(at)]),
              float(alphas[tuple(at)]) / math.pow(ranks[tuple(at)], power))
        for at in np.argwhere(chosen)
    ]  # fmt: skip
    return Adapters(rank, alpha, tuple(blocks))
