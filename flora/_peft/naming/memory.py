"""What a loaded leaf remembers of its file, so that it is saved as it came.

Names, kinds and nesting of its modules, the dtype of their tensors, and of the config
what says nothing about how it computes.  It is JSON, in the leaf's `Origin`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._peft.config import ABOUT
from flora._peft.naming.convention import matched_slots
from flora._peft.naming.names import Module, Slot, siblings, split_name
from flora._peft.parts import slots_beside
from flora._peft.whole import taken
from flora._tree.errors import LoraError
from flora._tree.origin import Origin
from flora._tree.weight import LoraWeight, Trained, base_of

_MODULE = ("rows", "columns", "kind", "groups", "tied")
_PLAIN = Module("-")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one leaf.

    Attributes:
      slots: the parameters that lie in it.
      dtype: of its tensors in the file.
      depth: how many adapters of other parameters of its module lie outside of its own.
      kept: the dtypes of base weights in the file, by module.
      about: the fields of the config.
    """

    slots: tuple[Slot, ...]
    dtype: str
    depth: int = 0
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def origin(self, path: str) -> Origin:
        """As JSON, of the leaf of that path."""
        record = {
            "format": "peft",
            "path": path,
            "slots": [_slot_record(s) for s in self.slots],
            "dtype": self.dtype,
            "depth": self.depth,
            "kept": self.kept,
            "about": self.about,
        }
        return Origin(json.dumps({k: v for k, v in record.items() if v}))


def _slot_record(slot: Slot) -> dict[str, Any]:
    module = slot.module
    own = {k: getattr(module, k) for k in _MODULE}
    own = {k: _short(v) for k, v in own.items() if v != getattr(_PLAIN, k)}
    named = {} if module.name == "-" else {"module": module.name}
    part = {} if slot.part == (0, 1) else {"part": slot.part}
    return {"name": slot.name, **named, **own, **part}


def _short(value: Any) -> Any:
    """Rows that count up by ones as their first and their number."""
    if isinstance(value, tuple) and value == (*range(value[0], value[0] + len(value)),):
        return {"from": value[0], "count": len(value)}
    return value


def memories(path: str, leaf: Any) -> list[Memory]:
    """What the leaf remembers, once for each file that it may have come from.

    What other leaves do, which a compiled function took it for, does not count.
    """
    if not isinstance(leaf, LoraWeight | Trained):
        return []
    found = [x for text in leaf.origin.texts if (x := _of(path, text)) is not None]
    whole, part = f"/{path}", [x for x in found if f"/{path}".endswith(f"/{x[0]}")]
    part += [x for x in found if f"/{x[0]}".endswith(whole)]
    exact = [x for x in part if x[0] == path]
    own = [memory for _, memory in exact or part]
    return [m for i, m in enumerate(own) if m not in own[:i]]


def _of(path: str, text: str) -> tuple[str, Memory] | None:
    """The leaf that it is of, and what it is."""
    try:
        record = json.loads(text)
        if record.get("format") != "peft":
            return None
        return record["path"], Memory(
            tuple(_slot(path, x) for x in record.get("slots", ())),
            str(record.get("dtype", "")),
            int(record.get("depth", 0)),
            {k: str(v) for k, v in dict(record.get("kept", {})).items()},
            {k: v for k, v in dict(record.get("about", {})).items() if k in ABOUT},
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise LoraError(
            f"'{path}': what it remembers of its file is damaged. Pass names=."
        ) from error


_LONGEST = 2**24  # rows of a module


def _slot(path: str, record: Mapping[str, Any]) -> Slot:
    given = {k: record[k] for k in _MODULE if k in record}
    for name in ("rows", "columns"):
        if isinstance(given.get(name), dict):
            first, count = (int(given[name][k]) for k in ("from", "count"))
            given[name] = range(first, first + min(count, _LONGEST))
    k, n = record.get("part", (0, 1))
    module = Module(record.get("module", "-"), **given)
    if split_name(record["name"])[1] != "weight":
        module = dataclasses.replace(module, parameter=split_name(record["name"])[1])
    return Slot(path, str(record["name"]), module, (int(k), int(n)))


def remembered_slots(paths: Sequence[str], known: Mapping[str, Memory]) -> list[Slot]:
    """The slots of all leaves: as remembered, or in the manner of those that are.

    Those of raw parameters come as their adapters are nested, the inner ones first.
    """
    own = [s for m in sorted(known.values(), key=lambda m: -m.depth) for s in m.slots]
    own += siblings([s for s in own if not s.module.tied], paths)
    first = [s.at((0,) * s.holes) for s in own]
    taken = {x for s in own for x in (s.name, s.path)}
    rest = matched_slots(paths, first)
    return own + [s for s in rest if not {s.name, s.path} & taken]


def conflicts(found: Mapping[str, Sequence[Memory]]) -> Iterator[str]:
    """Leaves that a compiled function took for those of a file of other names."""
    for path, (first, *rest) in found.items():
        other = next((m for m in rest if not _are_alike(m, first)), None)
        if other is not None:
            named = " or ".join(
                f"'{s.name}'" for m in (first, other) for s in m.slots[:1]
            )
            yield (
                f"save: '{path}' ran in a compiled function with that of another file, "
                f"and may come from either: it is {named}. Write names=."
            )


def _are_alike(one: Memory, other: Memory) -> bool:
    """Whether they name the same parameters; what trains whole has no kind."""

    def about(memory: Memory) -> list[Any]:
        rest = [k for k in _MODULE if k != "kind"]
        modules = ([getattr(s.module, k) for k in rest] for s in memory.slots)
        return [(s.name, s.part, x) for s, x in zip(memory.slots, modules, strict=True)]

    kinds = zip(_kinds(one), _kinds(other), strict=False)
    return about(one) == about(other) and all(x == y for x, y in kinds if x and y)


def _kinds(memory: Memory) -> list[str]:
    return [s.module.kind for s in memory.slots]


def fullest(some: Sequence[Memory]) -> Memory:
    """The one that knows the kinds of its modules."""
    return max(some, key=lambda m: sum(map(bool, _kinds(m))))


def widest(some: Sequence[Memory]) -> Any:
    """The dtype in which no leaf that this one may be of is rounded."""
    return functools.reduce(jnp.promote_types, [m.dtype for m in some])


def agreed(found: Mapping[str, Sequence[Memory]]) -> dict[str, Any]:
    """The fields of the config in which all leaves agree."""
    every = [some[0].about for some in found.values()]
    return {
        k: every[0][k]
        for k in ABOUT
        if every and all(k in x and x[k] == every[0].get(k) for x in every)
    }


def base_weights(
    found: Mapping[str, Sequence[Memory]],
    named: Sequence[tuple[str, Any]],
    by_path: Mapping[str, Sequence[Slot]],
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Module, value and dtype of weights of the base that the file had too.

    Those of an adapter without its base are left out: the file's user has them, unless
    the vocabulary was resized.
    """
    for path, leaf in named:
        kept = found[path][0].kept if path in found else {}
        base = base_of(leaf)
        if not kept or not isinstance(base, jax.Array | np.ndarray):
            continue
        for slot in by_path[path]:
            for i in np.ndindex(*base.shape[: slot.holes]):
                module = split_name(slot.at(i))[0]
                if module in kept:
                    value = taken(base, slot, i, slots_beside(by_path[path]))
                    yield module, value, kept[module]
