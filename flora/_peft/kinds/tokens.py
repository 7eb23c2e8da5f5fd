"""Trainable tokens: rows of an embedding, or of a head, that train alone.

PEFT's tensor of them is called a delta and holds the new rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._algebra.variants import Rows
from flora._peft.config import PeftConfig
from flora._peft.file import CONFIG
from flora._peft.ignored import Ignored
from flora._peft.keys import PREFIX, TOKENS, Content
from flora._peft.layouts import leaf_word
from flora._peft.naming.names import Finder, Slot, split_name
from flora._tree.errors import LoraError, fail
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, base_of


def without_copies(content: Content, finder: Finder) -> Content:
    """The content without what a head that is tied to an embedding has of it again."""
    kept, of_base = dict(content.tokens), dict(content.of_base)
    for module, x in content.tokens.items():
        slots = [slot for slot, _ in finder.all(f"{module}.weight")]
        alike = any(np.array_equal(x, y) for m, y in kept.items() if m != module)
        if alike and all(slot.module.tied for slot in slots):
            del kept[module]
            of_base.pop(f"{module}.base_layer.weight", None)
    return dataclasses.replace(content, tokens=kept, of_base=of_base)


def nodes(
    content: Content,
    config: PeftConfig,
    finder: Finder,
    leaves: Mapping[str, Any],
    given: Mapping[str, Layout],
    file: Path,
    ignored: Ignored,
) -> dict[str, LoraWeight]:
    """The node of each leaf some of whose rows train, its factors NumPy arrays."""
    found: dict[str, LoraWeight] = {}
    problems = [*_missing(content, config, file, ignored)]
    for module, x in content.tokens.items():
        key = f"'{PREFIX}{module}.token_adapter.{TOKENS}'"
        rows = config.tokens_of(module)
        if rows is None:
            problems.append(
                f"{file}: {key} is there, but trainable_token_indices of {CONFIG} "
                f"names no '{module}'. Name it there."
            )
            continue
        if len(rows) != len(x) or x.ndim != 2:
            problems.append(
                f"{file}: {key} has shape {x.shape}; {CONFIG} names {len(rows)} tokens "
                f"of '{module}', so expected ({len(rows)}, features). Correct "
                "trainable_token_indices."
            )
            continue
        for slot, index in finder.all(f"{module}.weight"):
            base = base_of(leaves[slot.path])
            weight, problem = _node(slot, index, base, given.get(slot.path), rows, x)
            problem = problem or _unlike(module, slot, finder, leaves)
            if problem:
                problems.append(f"{file}: {key} {x.shape}: '{slot.path}': {problem}")
            elif slot.path in found:
                problems.append(f"{file}: {key}: '{slot.path}' has other rows already.")
            else:
                found[slot.path] = weight
    fail(problems)
    return found


def _missing(
    content: Content, config: PeftConfig, file: Path, ignored: Ignored
) -> Iterator[str]:
    wanted = config.trainable_token_indices
    if not wanted:
        return
    if not isinstance(wanted, Mapping):
        if not content.tokens and not ignored(f"{PREFIX}token_adapter.{TOKENS}"):
            yield (
                f"{file}: no tensor '….token_adapter.{TOKENS}'; {CONFIG} names "
                f"{len(wanted)} tokens as trainable_token_indices. PEFT would leave "
                "them as they are in the base. Save the adapter anew."
            )
        return
    held = [rows for m in content.tokens if (rows := config.tokens_of(m)) is not None]
    for name, rows in wanted.items():
        own = any(module.endswith(name) for module in content.tokens)
        lost = not own and tuple(rows) not in held and rows
        if lost and not ignored(f"{PREFIX}{name}.token_adapter.{TOKENS}"):
            yield (
                f"{file}: no tensor '{PREFIX}…{name}.token_adapter.{TOKENS}'; "
                f"trainable_token_indices of {CONFIG} names {len(rows)} tokens of "
                f"'{name}'. Save the adapter anew."
            )


def _unlike(module: str, slot: Slot, finder: Finder, leaves: Mapping[str, Any]) -> str:
    """Why PEFT does not compute what the leaf would; or ''."""
    own = slot.module
    if own.tied:
        return (
            f"the rows of '{module}' alone are other ones, but a change of the leaf "
            "reaches the other module that uses it too (tied weights). Train the rows "
            "of the embedding, which PEFT ties, or untie the weights in the tree."
        )
    if own.order is not None or own.columns is not None or slot.part[1] > 1:
        return "its features are in another order. Train without these tokens."
    if leaf_word(slot.path) == "kernel" and finder.all(f"{module}.bias"):
        return (
            f"'{module}' has a bias, which PEFT leaves out where rows of a linear "
            "layer train. Train the module whole instead (modules_to_save)."
        )
    return ""


def _node(
    slot: Slot,
    index: Sequence[int],
    base: Any,
    given: Layout | None,
    rows: Sequence[int],
    x: np.ndarray,
) -> tuple[LoraWeight, str]:
    """The node, or what is wrong."""
    shape, word = tuple(base.shape), leaf_word(slot.path)
    weight = LoraWeight(base, None, None)
    if index or len(shape) != 2:
        return weight, f"is {shape}; expected a matrix of its own. Unstack it."
    axis = 1 if word == "kernel" else 0
    layout = given or Layout((), (0,), (1,))
    variant = Rows(tuple(rows), "in" if axis in layout.in_ else "out")
    if shape[1 - axis] != x.shape[1]:
        return weight, (
            f"has shape {shape}; expected {x.shape[1]} along axis {1 - axis}. Is it "
            "the adapter of another base?"
        )
    if problem := variant.problem(layout, shape):
        return weight, problem
    weight = dataclasses.replace(weight, layout=layout)
    held = x if variant.along == "in" else x.T
    return variant.node(weight, held), ""


def rows_of(node: LoraWeight) -> np.ndarray:
    """The rows that a node holds, `[rank, features]`, as PEFT has them."""
    variant = node.variant
    assert isinstance(variant, Rows)
    held = node.b if variant.along == "in" else node.a.T
    return np.asarray(held).reshape(len(variant.rows), -1)


def written(
    nodes: Mapping[str, LoraWeight],
    by_path: Mapping[str, Sequence[Slot]],
    everything: Sequence[str],
    *,
    serving: bool,
) -> tuple[dict[str, list[int]], dict[str, tuple[str, np.ndarray]]]:
    """`{module: indices}` and `{module: (leaf, its rows)}` of those that train alone.

    Args:
      nodes: these leaves, by path.
      by_path: the slots of all.
      everything: the modules of the base.
      serving: whether a server shall read it.
    """
    indices, tensors = {}, {}
    for path, node in nodes.items():
        slots = [slot for slot in by_path[path] if not slot.module.tied]
        module = split_name(slots[0].name)[0]
        rest = [m for m in everything if m != module and m.endswith(module)]
        axis = node.variant.along  # type: ignore[union-attr]
        first = 1 if leaf_word(path) == "kernel" else 0
        where = node.layout.in_ if axis == "in" else node.layout.out
        if serving:
            raise LoraError(
                f"save: '{module}' has rows that train alone (flora.variants.Rows), "
                "which vLLM and SGLang do not read. Ship flora.merge(adapted)."
            )
        if len(slots) > 1 or slots[0].holes or where != (first,):
            raise LoraError(
                f"save: '{path}' ({node.layout}) has rows along '{axis}' that train, "
                "and they are no rows of one PyTorch module. Ship flora.merge(adapted)."
            )
        if rest:
            raise LoraError(
                f"save: PEFT would take the trained rows of '{module}' for those of "
                f"'{rest[0]}' too, whose name ends so. Rename one of them."
            )
        indices[module] = [*node.variant.rows]  # type: ignore[union-attr]
        tensors[module] = path, rows_of(node)
    return indices, tensors


def alone(indices: Mapping[str, list[int]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an adapter that has nothing but trained rows."""
    lists = [*indices.values()]
    if any(rows != lists[0] for rows in lists):
        raise LoraError(
            f"save: {', '.join(map(repr, indices))} have other rows that train and "
            "nothing else is adapted, for which PEFT has one list of tokens. Adapt a "
            "module, or train the same rows."
        )
    return {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_weights": True,
        "target_modules": [*indices],
        "token_indices": lists[0],
    } | dict(about)
