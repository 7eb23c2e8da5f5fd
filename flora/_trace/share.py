"""Finds products of the same activations, before a jaxpr is interpreted.

Query, key and value projections read one x, and so do the gate and up projections of an
MLP.  Taken together, their low-rank terms read it once.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flora._trace.compat import P, variables


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which to interpret the equations of a jaxpr.

    Attributes:
      steps: positions of equations; more than one where they are taken together.
      same: the earlier variable of equal value, for each variable that repeats one.
    """

    steps: list[tuple[int, ...]]
    same: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def last_uses(
        self, jaxpr: Any, beside: Mapping[Any, Sequence[Any]]
    ) -> dict[Any, int]:
        """The last step that reads each variable; outputs are read after every step.

        Args:
          jaxpr: whose equations these are.
          beside: what is read with a variable.
        """
        found: dict[Any, int] = {}
        read = [[v for i in step for v in jaxpr.eqns[i].invars] for step in self.steps]
        for at, invars in enumerate([*read, jaxpr.outvars]):
            for v in variables(invars):
                for u in (v, *beside.get(v, ())):
                    found[u] = found[self.same.get(u, u)] = at
        return found


def in_order(eqns: Sequence[Any]) -> Schedule:
    """One equation after the other."""
    return Schedule([(i,) for i in range(len(eqns))])


def together(eqns: Sequence[Any], weights: Iterable[Any]) -> Schedule:
    """Takes products of the same activations in one step.

    Equations that read nothing but weights, such as casts, move before the first
    product of a step that needs them.  All others keep their order.

    Args:
      eqns: of a jaxpr.
      weights: the variables that hold adapted weights.
    """
    same, of_weights = _repeated(eqns), _made_of(eqns, set(weights))
    groups: dict[Any, list[int]] = {}
    for i, eqn in enumerate(eqns):
        if (key := _activations(eqn, of_weights, same)) is not None:
            groups.setdefault(key, []).append(i)
    first = {group[0]: group for group in groups.values() if len(group) > 1}
    maker = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    done: set[int] = set()
    steps: list[tuple[int, ...]] = []
    for i in range(len(eqns)):
        if i in done:
            continue
        group = first.get(i, [i])
        for j in group[1:]:
            early = sorted(set(_before(eqns[j], eqns, maker, of_weights)) - done)
            steps += [(k,) for k in early]
            done.update(early)
        steps.append(tuple(group))
        done.update(group)
    return Schedule(steps, same)


def _made_of(eqns: Sequence[Any], weights: set[Any]) -> set[Any]:
    """The variables that are computed from adapted weights alone."""
    for eqn in eqns:
        found = list(variables(eqn.invars))
        if found and not eqn.effects and all(v in weights for v in found):
            weights.update(eqn.outvars)
    return weights


def _repeated(eqns: Sequence[Any]) -> dict[Any, Any]:
    """Casts that repeat an earlier one: each layer casts x for itself."""
    casts: dict[Any, Any] = {}
    same: dict[Any, Any] = {}
    for eqn in eqns:
        xs, (y, *_) = list(variables(eqn.invars)), [*eqn.outvars, None]
        if eqn.primitive is P.convert_element_type and xs:
            (x,) = xs
            key = (same.get(x, x), y.aval.dtype, y.aval.weak_type)
            if (earlier := casts.setdefault(key, y)) is not y:
                same[y] = earlier
    return same


def _activations(eqn: Any, of_weights: set[Any], same: dict[Any, Any]) -> Any:
    """What products must have in common to be taken together; `None` for others."""
    if eqn.primitive is not P.dot_general or len(list(variables(eqn.invars))) < 2:
        return None
    sides = [v in of_weights for v in eqn.invars]
    if sum(sides) != 1:
        return None
    side = sides.index(False)
    x = eqn.invars[side]
    summed, batch = eqn.params["dimension_numbers"]
    return same.get(x, x), side, tuple(summed[side]), tuple(batch[side])


def _before(
    eqn: Any, eqns: Sequence[Any], maker: dict[Any, int], of_weights: set[Any]
) -> Iterator[int]:
    """The equations that compute the weight of a product."""
    for v in variables(eqn.invars):
        if v in of_weights and v in maker:
            yield maker[v]
            yield from _before(eqns[maker[v]], eqns, maker, of_weights)
