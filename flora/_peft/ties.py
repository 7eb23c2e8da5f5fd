"""Tied weights: one leaf that an embedding and a head both read.

A change of the leaf reaches both uses.  PEFT's adapter is of one module and changes one
use, unless `ensure_weight_tying` made it adapt both alike.  What cannot be told from
that is refused.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._algebra.variants import Rows
from flora._peft.config import PeftConfig
from flora._peft.file import CONFIG
from flora._peft.keys import Content, Lora
from flora._peft.layouts import leaf_word
from flora._peft.naming.names import Finder, Module, Slot, split_name
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.weight import LoraWeight, Trained, base_of

Readers = Mapping[str, Collection[str]]  # 'embedding', 'linear', 'conv', by path
_BOTH = {"embedding", "linear"}


def without_ties(
    content: Content, finder: Finder, config: PeftConfig, file: Path
) -> tuple[Content, frozenset[str]]:
    """The content without second copies for one leaf, and the leaves that had one."""
    kept, of_base, agreed = [], dict(content.of_base), set()
    for lora in content.loras:
        slots = [slot for slot, _ in finder.all(lora.name)]
        twins = [x for x in content.loras if _are_twins(x, lora)]
        twins = [x for x in twins if _is_own(x, finder)]
        if _is_own(lora, finder) or (not slots and lora.kind != "linear"):
            kept.append(lora)
        elif twins:
            fail(_twin_problems(twins[0], lora, config, file))
            agreed |= {s.path for s, _ in finder.all(twins[0].name)}
            own = f"{lora.module}.base_layer.weight"
            first = of_base.get(f"{twins[0].module}.base_layer.weight")
            if np.array_equal(of_base.get(own, first), first):  # type: ignore[arg-type]
                of_base.pop(own, None)
        elif not slots:
            kept.append(lora)  # reported as lost
        else:
            raise LoraError(
                f"{file}: '{lora.key('b')}' adapts a weight that is tied to "
                f"'{slots[0].path}', but is not the transpose of the other use's "
                "factors. Train with ensure_weight_tying=True, or untie the weights in "
                "the tree."
            )
    whole = dict(content.whole)
    for name, x in content.whole.items():
        slots = [slot for slot, _ in finder.all(name)]
        if x.ndim == 2 and all(s.module.tied for s in slots):
            copies = [
                s.path
                for n, other in whole.items()
                if n != name and np.array_equal(x, other)
                for s, _ in finder.all(n)
                if not s.module.tied
            ]
            if copies:
                agreed |= {*copies}
                del whole[name]
    found = dataclasses.replace(
        content, loras=tuple(kept), whole=whole, of_base=of_base
    )
    return found, frozenset(agreed)


def tied_modules(content: Content, finder: Finder) -> dict[str, str]:
    """The leaf of each module that no name has, and whose changes an embedding has."""
    embeddings = [x for x in content.loras if x.kind == "embedding"]
    twins = [
        (lora.module, twin.name)
        for lora in content.loras
        if lora.kind == "linear" and not finder.all(lora.name)
        for twin in embeddings
        if _is_twin(twin, lora)
    ]
    matrices = [(n, x) for n, x in content.whole.items() if x.ndim == 2]
    twins += [
        (split_name(n)[0], twin)
        for n, x in matrices
        if not finder.all(n)
        for twin, other in matrices
        if n != twin and np.array_equal(x, other)
    ]
    return {module: s.path for module, name in twins for s, _ in finder.all(name)}


def _is_own(lora: Lora, finder: Finder) -> bool:
    """Whether a leaf is its module's, and not another one's that it uses too."""
    slots = [slot for slot, _ in finder.all(lora.name)]
    return bool(slots) and not all(s.module.tied for s in slots)


def _twin_problems(
    own: Lora, other: Lora, config: PeftConfig, file: Path
) -> Iterator[str]:
    """How PEFT changes the two uses of a weight apart, although the factors are one."""
    scales = config.scale(own.site), config.scale(other.site)
    if scales[0] != scales[1]:
        yield (
            f"{file}: '{own.module}' and '{other.module}' are tied and have the scales "
            f"{scales[0]:g} and {scales[1]:g} by {CONFIG}; expected one, since one "
            "weight is changed. Give both the same rank and alpha in rank_pattern and "
            "alpha_pattern and train anew, or untie the weights in the tree."
        )
    if own.magnitude is not None or other.magnitude is not None:
        yield (
            f"{file}: '{own.module}' and '{other.module}' are tied, and DoRA, whose "
            "magnitudes are of the outputs of each; expected plain LoRA, since one "
            "weight is changed. Train without use_dora, or untie the weights in the "
            "tree."
        )


def _are_twins(one: Lora, other: Lora) -> bool:
    kinds = {one.kind, other.kind}
    return kinds == _BOTH and (
        _is_twin(one, other) if one.kind == "embedding" else _is_twin(other, one)
    )


def _is_twin(embedding: Lora, lora: Lora) -> bool:
    return np.array_equal(embedding.a.T, lora.b) and np.array_equal(
        embedding.b.T, lora.a
    )


def load_problems(
    content: Content,
    agreed: Collection[str],
    finder: Finder,
    config: PeftConfig,
    shapes: Mapping[str, tuple[int, ...]],
    readers: Readers | None,
    file: Path,
) -> Iterator[str]:
    """Leaves that the file changes for one of their uses, or may.

    Args:
      content: `without_ties`.
      agreed: the leaves whose second use the file changes alike.
      finder: of the slots of names.
      config: of the adapter.
      shapes: of all leaves, by path.
      readers: how the function reads each leaf; `None` where none was given.
      file: the adapter's.
    """
    if config.ensure_weight_tying:
        return
    changed = [(x.name, _words(x)) for x in content.loras]
    changed += [(n, x.shape[0]) for n, x in content.whole.items() if x.ndim == 2]
    kinds = {x.name: x.kind for x in content.loras}
    for name, words in changed:
        for slot, _ in finder.all(name):
            path = slot.path
            if path in agreed:
                continue
            others = [s.name for s in finder.slots if s.path == path and s.name != name]
            both = any(s.module.tied for s in finder.slots if s.path == path)
            if both or {*(readers or {}).get(path, ())} >= _BOTH:
                other = f"'{others[0]}'" if both and others else "the other use of it"
                yield (
                    f"{file}: '{name}' is adapted and {other} is not, but both lie in "
                    f"'{path}' (tied weights), where a change reaches both. Train with "
                    "ensure_weight_tying=True, or untie the weights in the tree."
                )
            elif readers is None and not config.gives_none:
                is_table = (
                    kinds.get(name) == "embedding" or leaf_word(path) == "embedding"
                )
                if is_table and _is_alone(path, words, shapes):
                    yield (
                        f"{file}: '{name}' is adapted alone, and no other weight of "
                        f"the base has the {words} words of '{path}': tied weights, it "
                        "may be, and PEFT changes one use of them. Pass fn= and args= "
                        "to follow the leaf, or train with ensure_weight_tying=True."
                    )


def _words(lora: Lora) -> int:
    return lora.a.shape[1] if lora.kind == "embedding" else lora.b.shape[0]


def _is_alone(path: str, words: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether no other matrix has as many words: a head of its own would."""
    return words in shapes[path] and not any(
        words in shape and sum(n > 1 for n in shape) > 1
        for other, shape in shapes.items()
        if other != path
    )


def tied_slots(tied: Any, paths: Collection[str]) -> list[Slot]:
    """The slots of `save(..., tied={leaf: module})`."""
    if not isinstance(tied, Mapping):
        raise LoraTypeError(
            f"save: tied is a {type(tied).__name__}. Write {{leaf: module}}, such as "
            "{'model/embed_tokens/embedding': 'lm_head'}."
        )
    found = []
    for path, modules in tied.items():
        if path not in paths:
            raise LoraError(
                f"save: tied: '{path}' is no leaf of the tree. Write a leaf's path."
            )
        several = isinstance(modules, list | tuple)
        for module in modules if several else [modules]:
            if not isinstance(module, str):
                raise LoraTypeError(
                    f"save: tied: '{path}' is given {modules!r}. Write a module's "
                    "dotted path, such as 'lm_head'."
                )
            found.append(Slot(path, f"{module}.weight", Module(module, tied=True)))
    return found


def save_problems(
    named: Sequence[tuple[str, Any]],
    by_path: Mapping[str, Sequence[Slot]],
    readers: Readers | None,
    known: bool,
    sure: Collection[str] = (),
) -> Iterator[str]:
    """Leaves of which a file without `ensure_weight_tying` would hold one use, or may.

    Args:
      named: all leaves.
      by_path: the slots of each.
      readers: how the function reads each leaf; `None` where none was given.
      known: whether all shared weights are, those of `by_path` alone.
      sure: leaves of which that is known.
    """
    shapes = {p: tuple(getattr(base_of(x), "shape", ())) for p, x in named}
    for path, leaf in named:
        if not isinstance(leaf, LoraWeight | Trained) or not by_path.get(path):
            continue
        if any(slot.module.tied for slot in by_path[path]):
            continue
        if isinstance(leaf, LoraWeight) and isinstance(leaf.variant, Rows):
            continue  # PEFT ties those of the embedding itself
        first = by_path[path][0]
        if {*(readers or {}).get(path, ())} >= _BOTH:
            yield (
                f"save: '{path}' is read as an embedding and as a head (tied weights), "
                f"and '{first.name}' alone would be saved, which PEFT takes for one "
                f"use. Write tied={{'{path}': 'lm_head'}}, with the other module."
            )
            continue
        table = leaf_word(path) == "embedding" or first.module.kind == "embedding"
        if readers is not None or known or path in sure or not table:
            continue
        shape = _shape(leaf)
        if shape and _is_alone(path, shape[0], shapes):
            yield (
                f"save: '{path}' may be read by a head too (tied weights): no other "
                f"weight has its {shape[0]} words, and '{first.name}' alone would be "
                "saved. Pass fn= and args= to follow the leaf, or write "
                f"tied={{'{path}': 'lm_head'}}, or tied={{}} if it has no other use."
            )


def _shape(leaf: Any) -> tuple[int, ...]:
    """Of an adapted embedding or one that trains whole, without its stack."""
    if isinstance(leaf, Trained):
        return tuple(leaf.value.shape)
    stack = len(leaf.layout.stack)
    words = leaf.layout.in_[0] < leaf.layout.out[0]
    return leaf.a.shape[stack:-1] if words else leaf.b.shape[stack + 1 :]
