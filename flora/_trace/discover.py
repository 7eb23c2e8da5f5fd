"""Finds the layout of each weight by following it to the operations that read it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora._algebra.axes import Factored, Squared, from_weight, undiscovered
from flora._trace.interpret import Use, by_path, interpret, lookup_roles
from flora._trace.rules import context
from flora._trace.stage import Staged
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a function does with one leaf.

    Attributes:
      uses: the operations that read the leaf, in order.
      layout: the layout they imply, if they agree on one.
      conflict: why there is no layout, or ''.
      returned: whether the function returns the leaf or a view of it.
    """

    uses: tuple[Use, ...]
    layout: Layout | None
    conflict: str = ""
    returned: bool = False

    @property
    def dense(self) -> list[Use]:
        return [use for use in self.uses if use.dense]

    @property
    def status(self) -> str:
        """'unused', 'dense' or 'factored'."""
        if not any(use.binding for use in self.uses) and not self.returned:
            return "unused"
        return "factored" if self.layout and not self.dense else "dense"


def discover(
    staged: Staged,
    leaves: Sequence[Any],
    paths: Mapping[int, str],
    given: Mapping[str, Layout] | None = None,
) -> dict[str, Finding]:
    """Follows the leaves `{position: path}` through a traced call.

    A `given` layout is kept, whatever the uses imply.
    """
    given = given or {}
    log, returned = _walk(
        staged,
        leaves,
        {i: _Followed(path, given.get(path)) for i, path in paths.items()},
    )
    uses_of, found = _by_path(log), {}
    for i, path in paths.items():
        uses = tuple(uses_of.get(path, ()))
        layout, conflict = given.get(path), ""
        if layout is None:
            layout, conflict = _agree(uses, len(leaves[i].shape))
        found[path] = Finding(uses, layout, conflict, path in returned)
    return _verified(staged, leaves, paths, found)


def _verified(
    staged: Staged,
    leaves: Sequence[Any],
    paths: Mapping[int, str],
    found: dict[str, Finding],
) -> dict[str, Finding]:
    """Interprets once more, with the layouts found: an operation may refuse one."""
    log, _ = _walk(
        staged,
        leaves,
        {
            i: _Followed(path, layout)
            for i, path in paths.items()
            if (layout := found[path].layout) and not found[path].dense
        },
        claims=False,
    )
    dense = _by_path(use for use in log if use.dense)
    return {
        path: dataclasses.replace(f, uses=(*f.uses, *dense.get(path, ())))
        for path, f in found.items()
    }


def _by_path(uses: Iterable[Use]) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.path, []).append(use)
    return found


@dataclasses.dataclass(frozen=True)
class _Followed:
    """A leaf to follow, and its layout if that is known."""

    path: str
    layout: Layout | None = None

    def factors(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Abstract factors.  Rank 1 is enough to see which rules apply."""
        shapes = self.layout.factor_shapes(shape, 1) if self.layout else ()
        dtype = jnp.result_type(float)
        return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)

    def weight(self, base: Any, factors: Sequence[Any]) -> Factored:
        if self.layout is None:
            return undiscovered(base, self.path)
        return from_weight(LoraWeight(base, *factors, layout=self.layout), self.path)


def _walk(
    staged: Staged,
    leaves: Sequence[Any],
    followed: Mapping[int, _Followed],
    *,
    claims: bool = True,
) -> tuple[dict[Use, None], set[str]]:
    """The uses in an abstract run of the call; the paths of leaves that it returns.

    Args:
      staged: the call.
      leaves: of the parameter tree.
      followed: some of the leaves, by position.
      claims: whether roles are recorded, not only what has no factored form.
    """
    log: dict[Use, None] = {}
    returned: set[str] = set()

    def run(tree_arrays: list[Any], args: list[Any], factors: dict[int, Any]) -> None:
        values = list(tree_arrays)
        for i, k in enumerate(staged.tree_inputs):
            if k is not None and i in followed:
                values[k] = followed[i].weight(values[k], factors[i])
        known = {id(w) for w in values}
        outs = interpret(context(log, claims=claims), staged.jaxpr, [*values, *args])
        for x in outs:
            x = x.root if isinstance(x, Squared) else x
            if not isinstance(x, Factored) or id(x) in known:
                continue
            if x.indexed:
                for path, roles in by_path(lookup_roles(x)).items():
                    log.setdefault(Use(path, "output", "the function's result", roles))
            elif not x.reduced:
                returned.update(x.settings.paths)
            else:
                for path in x.settings.paths:
                    log.setdefault(Use(path, "output", "the function's result"))

    arrays = [
        x for x, k in zip(leaves, staged.tree_inputs, strict=True) if k is not None
    ]
    factors = {i: leaf.factors(tuple(leaves[i].shape)) for i, leaf in followed.items()}
    jax.eval_shape(run, arrays, list(staged.args), factors)
    return log, returned


def _agree(uses: Sequence[Use], ndim: int) -> tuple[Layout | None, str]:
    """The one layout that all uses imply, or why there is none."""
    binding = [use for use in uses if use.roles and use.binding]
    chosen: dict[int, str] = {}
    first: Use | None = None
    # Products come before lookups: a tied embedding takes the layout of its product.
    # Those of many tokens come first: the power iteration of a norm has one.
    for use in sorted(
        binding, key=lambda use: (use.primitive in ("gather", "output"), -use.tokens)
    ):
        roles, conflict = _of_one_use(use)
        if conflict:
            return None, conflict
        if first is None:
            first = use
        else:
            aligned = _aligned(chosen, roles)
            if aligned is None:
                return None, (
                    f"'{first.primitive}' at {first.source} reads it as "
                    f"{_as_text(chosen)}, '{use.primitive}' at {use.source} as "
                    f"{_as_text(roles)}"
                )
            roles = aligned
        chosen = roles | chosen
        # A window can still become any other role.
        chosen |= {i: r for i, r in roles.items() if chosen[i] == "window"}
    if first is None:
        sums = [use for use in uses if use.binding and not use.dense]
        if not sums or any(use.dense for use in uses):
            return None, ""
        where = f"'{sums[0].primitive}' at {sums[0].source}"
        return None, f"{where} sums over it, and nothing multiplies by it"
    # The axes of a window are contracted, unless another use says otherwise.
    chosen = {i: "in" if role == "window" else role for i, role in chosen.items()}
    groups = {
        role: tuple(i for i in range(ndim) if chosen.get(i, "stack") == role)
        for role in ("stack", "in", "out")
    }
    if not groups["in"] or not groups["out"]:
        missing = "in" if not groups["in"] else "out"
        return None, (
            f"'{first.primitive}' at {first.source} reads it as "
            f"{_as_text(chosen)}: there is no {missing} axis"
        )
    return Layout(groups["stack"], groups["in"], groups["out"]), ""


def _of_one_use(use: Use) -> tuple[dict[int, str], str]:
    """The role of each axis in one operation, or why there is none."""
    roles: dict[int, str] = {}
    for axis, role in use.roles:
        if {roles.get(axis), role} == {"in", "out"}:
            return {}, (
                f"'{use.primitive}' at {use.source} contracts one part of axis "
                f"{axis} and keeps another"
            )
        if roles.get(axis, "stack") == "stack":
            roles[axis] = role
    return roles, ""


def _aligned(one: Mapping[int, str], other: dict[int, str]) -> dict[int, str] | None:
    """`other`, with in and out swapped if it then agrees with `one`, or `None`."""
    swap = {"in": "out", "out": "in"}
    for roles in (other, {i: swap.get(role, role) for i, role in other.items()}):
        pairs = [{one[i], roles[i]} for i in one.keys() & roles.keys()]
        if all(len(pair) == 1 or "window" in pair for pair in pairs):
            return roles
    return None


def _as_text(roles: Mapping[int, str]) -> str:
    named = {
        r: [str(i) for i in sorted(roles) if roles[i] == r]
        for r in ("stack", "window", "in", "out")
    }
    return " ".join(f"{r}={','.join(axes)}" for r, axes in named.items() if axes)
