"""The factors of a weight as arrays with one label an axis."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.factored import Dim, Factored


@dataclasses.dataclass(frozen=True)
class Views:
    """The factors of a weight as labelled arrays.

    Attributes:
      a, b: the factors.
      a_labels, b_labels: one label an axis; the rank's label is `RANK`.
      segments: for each axis of W its `(label, size)`s; more than one where the axis
        mixes roles.
      columns: the factors of the outputs, if W has any, labelled as B without its rank.
    """

    a: Any
    b: Any
    a_labels: tuple[Any, ...]
    b_labels: tuple[Any, ...]
    segments: tuple[tuple[tuple[Any, int], ...], ...]
    columns: Any = None

    @property
    def column_labels(self) -> tuple[Any, ...]:
        return tuple(label for label in self.b_labels if label != RANK)


RANK = "rank"


def views(w: Factored, name: Any) -> Views:
    """Labels the factors by the axes of W that they belong to.

    Neighbouring dims of an axis that share a role form one label `(name, axis, i)`.
    """
    segments: list[list[tuple[Any, str, list[Dim]]]] = []
    for i, axis in enumerate(w.axes):
        runs: list[tuple[Any, str, list[Dim]]] = []
        for dim in axis:
            if runs and runs[-1][1] == dim.role:
                runs[-1][2].append(dim)
            else:
                runs.append(((name, i, len(runs)), dim.role, [dim]))
        segments.append(runs)
    every = [run for runs in segments for run in runs]

    def view(array: Any, before: str, after: str, rank_at: int):
        runs = [run for role in (before, after) for run in every if run[1] == role]
        held = w.dims(before, after)
        perm = [held.index(d) for run in runs for d in run[2]]
        perm = [i + (i >= rank_at) for i in perm]
        perm.insert(rank_at, rank_at)
        labels = [run[0] for run in runs]
        sizes = [math.prod(d.size for d in run[2]) for run in runs]
        at = len(runs) if rank_at == len(held) else sum(r[1] == before for r in runs)
        labels.insert(at, RANK)
        sizes.insert(at, array.shape[rank_at])
        return lax.reshape(lax.transpose(array, perm), sizes), tuple(labels)

    a, a_labels = view(w.a, "stack", "in", len(w.dims("stack", "in")))
    b, b_labels = view(w.b, "stack", "out", len(w.dims("stack")))
    shown = tuple(
        tuple((label, math.prod(d.size for d in dims)) for label, _, dims in runs)
        for runs in segments
    )
    columns = w.columns
    if columns is not None:
        at = len(w.dims("stack"))
        columns, labels = view(jnp.expand_dims(columns, at), "stack", "out", at)
        columns = lax.squeeze(columns, (labels.index(RANK),))
    return Views(a, b, a_labels, b_labels, shown, columns)
