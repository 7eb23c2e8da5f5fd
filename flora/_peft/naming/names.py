"""Names: which parameter of a PyTorch model is in which leaf of a Flax tree.

A parameter has a dotted name, a leaf a '/'-joined path.  A `Slot` connects the two: the
name may have placeholders for the stacked axes of the leaf, and the parameter's
features may be in another order, or among those of other parameters.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flora._tree.errors import LoraError, LoraTypeError

# The last word of a leaf's path and the parameter that it is.
PARAMETERS = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_HOLE = re.compile(r"\{([^{}]*)\}")
INDEX = "0|[1-9][0-9]{0,8}"  # `00` and other scripts' digits are names
KINDS = ("", "linear", "conv", "embedding", "conv1d")


@dataclasses.dataclass(frozen=True)
class Module:
    """A PyTorch module, or a part of it, that a leaf holds.

    Attributes:
      name: the module's dotted path.  `{i}` is what the pattern of the leaf calls
        `{i}`; other placeholders count along the leaf's stacked axes, in order, and
        `{q|k|v}` names the indices instead.
      parameter: the name of the module's parameter.
      rows: which of the module's out features the leaf has, in the leaf's order; an int
        n for the first n; `None` for all.
      columns: the leaf's order of the module's in features.
      kind: 'linear', 'conv' or 'embedding', where the leaf does not tell; 'conv1d' for
        the linear layer of GPT-2, whose weight is `[in, out]`.
      groups: of a convolution.
      tied: whether the module uses the weight of another one, the first of the list.
    """

    name: str
    parameter: str = "weight"
    rows: Sequence[int] | int | None = None
    columns: Sequence[int] | None = None
    kind: str = ""
    groups: int = 1
    tied: bool = False

    @property
    def order(self) -> tuple[int, ...] | None:
        """The rows as a tuple."""
        return self.rows if isinstance(self.rows, tuple) else None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise LoraTypeError(
                f"Module: name={self.name!r}. Write a dotted path such as "
                "'model.layers.{i}.self_attn.q_proj'."
            )
        if self.kind not in KINDS:
            raise LoraError(
                f"Module: kind={self.kind!r}. Write one of {', '.join(KINDS[1:])}."
            )
        for field in ("rows", "columns"):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, int | np.integer):
                value = range(value)
            order = [int(i) for i in value]
            if len(order) != len({*order}) or min(order, default=-1) < 0:
                raise LoraError(
                    f"Module: {field} of '{self.name}' must name features once each, "
                    "from 0. Write a range or a permutation."
                )
            object.__setattr__(self, field, tuple(order))


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one parameter, or of one in each layer, in a leaf.

    Attributes:
      path: the leaf.
      name: the parameter's dotted name, with a placeholder for each stacked axis.
      module: its features and kind.
      part: its position among those that share the leaf's out features, and how many
        there are.
    """

    path: str
    name: str
    module: Module = Module("-")
    part: tuple[int, int] = (0, 1)

    @property
    def holes(self) -> int:
        """How many stacked axes of the leaf count parameters of their own."""
        return len(_HOLE.findall(self.name))

    def index(self, name: str) -> tuple[int, ...] | None:
        """The parameter's index along these axes; `None` if it is not in the leaf."""
        pattern, choices, end = "", [], 0
        for hole in _HOLE.finditer(self.name):
            options = hole[1].split("|") if "|" in hole[1] else None
            choices.append(options)
            some = "|".join(map(re.escape, options)) if options else INDEX
            pattern += re.escape(self.name[end : hole.start()]) + f"({some})"
            end = hole.end()
        found = re.fullmatch(pattern + re.escape(self.name[end:]), name)
        if found is None:
            return None
        return tuple(
            int(word) if options is None else options.index(word)
            for word, options in zip(found.groups(), choices, strict=True)
        )

    def at(self, index: Sequence[int]) -> str:
        """The name of the parameter at an index."""
        name, left = self.name, list(index)
        for hole in _HOLE.findall(self.name):
            i = left.pop(0)
            word = hole.split("|")[i] if "|" in hole else str(i)
            name = name.replace(f"{{{hole}}}", word, 1)
        return name


class Finder:
    """The slot and index of a parameter's name."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._exact: dict[str, list[Slot]] = {}
        for slot in slots:
            if not slot.holes:
                self._exact.setdefault(slot.name, []).append(slot)
        self._stacked = [s for s in slots if s.holes]

    def all(self, name: str) -> list[tuple[Slot, tuple[int, ...]]]:
        """All of them; several where several leaves hold a module's features."""
        found: list[tuple[Slot, tuple[int, ...]]] = [
            (s, ()) for s in self._exact.get(name, ())
        ]
        for slot in self._stacked:
            index = slot.index(name)
            if index is not None:
                found.append((slot, index))
        return found


def split_name(name: str) -> tuple[str, str]:
    """A parameter's module and its name in it."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


Rule = str | Module | Sequence[str | Module]


@dataclasses.dataclass(frozen=True)
class Names:
    """A finished map of names, as `flora.peft.match_names` returns it."""

    slots: tuple[Slot, ...]

    def __repr__(self) -> str:
        lines = [f"  {s.path} <- {s.name}" for s in self.slots]
        return "\n".join([f"Names of {len(lines)} parameters:", *lines])


def given_slots(
    names: Names | Mapping[str, Rule] | Callable[[str], Rule | None],
    paths: Sequence[str],
    *,
    partial: bool = False,
) -> list[Slot]:
    """The slots of names that a caller wrote; `partial` if the tree may lack leaves."""
    if isinstance(names, Names):
        return list(names.slots)
    if isinstance(names, Mapping):
        found = _by_patterns(names, paths, partial=partial)
    elif callable(names):
        found = {path: rule for path in paths if (rule := names(path)) is not None}
    else:
        raise LoraTypeError(
            f"names is a {type(names).__name__}. Write {{leaf pattern: module}}, such "
            f"as "
            "{'layers_{i}/attn/q/kernel': 'model.layers.{i}.self_attn.q_proj'}, a "
            "callable "
            "path -> module, or what flora.peft.match_names returned."
        )
    slots = [s for path, rule in found.items() for s in _slots_of(path, rule, names)]
    return slots + siblings(slots, paths)


def _by_patterns(
    names: Mapping[str, Rule], paths: Sequence[str], *, partial: bool
) -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    for pattern, rule in names.items():
        if not isinstance(pattern, str):
            raise LoraTypeError(
                f"names: the key {pattern!r} is no pattern. Write a leaf's path such "
                f"as "
                "'layers_{i}/attn/q/kernel'."
            )
        regex = _leaf_regex(pattern)
        hits = [(path, m) for path in paths if (m := regex.fullmatch(path))]
        if hits and all(path in found for path, _ in hits):
            raise LoraError(
                f"names: all {len(hits)} leaves that '{pattern}' matches are taken by "
                "earlier entries; the first that matches a leaf decides. Write it "
                "before them, or take it out."
            )
        if not hits and not partial:
            raise LoraError(
                f"names: '{pattern}' matches none of the {len(paths)} leaves, such as "
                f"'{paths[0] if paths else ''}'. Write a leaf's path, or its end."
            )
        for path, m in hits:
            found.setdefault(path, _bound(rule, m.groupdict()))
    return found


def _leaf_regex(pattern: str) -> re.Pattern[str]:
    """A regex for a leaf's path, or a module's around it, in full or from a word on.

    One that starts with '/' is for the path in full.
    """
    before = "" if pattern.startswith("/") else "(?:.*/)?"
    pattern = pattern.removeprefix("/")
    text, end, seen = "", 0, set()
    for hole in _HOLE.finditer(pattern):
        text += re.escape(pattern[end : hole.start()])
        name = hole[1]
        if not name.isidentifier():
            raise LoraError(f"names: '{pattern}' has {hole[0]}. Write a name in it.")
        text += rf"(?P={name})" if name in seen else rf"(?P<{name}>[^/.]+?)"
        seen.add(name)
        end = hole.end()
    text += re.escape(pattern[end:])
    last = "|".join(PARAMETERS)
    return re.compile(rf"{before}{text}(?:/(?:{last}))?")


def _bound(rule: Rule, values: Mapping[str, str]) -> Rule:
    """The rule with what the leaf's pattern caught."""
    if isinstance(rule, str):
        rule = Module(rule)
    if isinstance(rule, tuple | list):
        return [_bound(part, values) for part in rule]  # type: ignore[misc]
    if not isinstance(rule, Module):
        return rule  # reported with its leaf
    name = _HOLE.sub(lambda h: values.get(h[1], h[0]), rule.name)
    return dataclasses.replace(rule, name=name)


def _slots_of(path: str, rule: Rule, names: Any) -> list[Slot]:
    given = list(rule) if isinstance(rule, tuple | list) else [rule]
    named = [Module(m) if isinstance(m, str) else m for m in given]
    modules = [m for m in named if isinstance(m, Module)]
    if not modules or len(modules) < len(named):
        raise LoraTypeError(
            f"names: '{path}' is given {rule!r}. Write a module's dotted path, a "
            "flora.peft.Module, or a list of them."
        )
    own = PARAMETERS.get(path.rpartition("/")[2].rpartition(".")[2])
    sharing = [m for m in modules if not m.tied]
    slots = []
    for m in modules:
        parameter = own if own and m.parameter == "weight" else m.parameter
        if own == "bias" and m.parameter == "in_proj_weight":
            parameter = "in_proj_bias"  # of nn.MultiheadAttention
        part = (0, 1) if m.tied else (sharing.index(m), len(sharing))
        slots.append(Slot(path, f"{m.name}.{parameter}", m, part))
    return slots


def siblings(slots: Sequence[Slot], paths: Sequence[str]) -> list[Slot]:
    """The slots of biases: they belong to the modules of the weight beside them."""
    named = {s.path for s in slots}
    by_parent: dict[str, list[Slot]] = {}
    for slot in slots:
        by_parent.setdefault(slot.path.rpartition("/")[0], []).append(slot)
    found = []
    for path in paths:
        parent, _, last = path.rpartition("/")
        if path in named or last not in PARAMETERS or parent not in by_parent:
            continue
        beside = by_parent[parent]
        if len({s.path for s in beside}) == 1:
            for s in beside:
                name = f"{split_name(s.name)[0]}.{PARAMETERS[last]}"
                found.append(dataclasses.replace(s, path=path, name=name))
    return found
