"""What must hold of an adapted tree before a verb works on it."""

from typing import Any

from flora._tree.blocks import problem
from flora._tree.errors import LoraError
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, is_node


def weight_problems(path: str, leaf: Any) -> list[str]:
    """What is wrong with a `LoraWeight` that a function is about to run on."""
    if not isinstance(leaf, LoraWeight):
        return []
    if leaf.base is None:
        return [
            f"'{path}' is an adapter without its base. Write flora.join(base, adapter)."
        ]
    if not all(hasattr(x, "shape") for x in (leaf.base, leaf.a, leaf.b)):
        return [
            f"'{path}' is a LoraWeight that holds no arrays. Pass the tree that "
            "flora.init or flora.join returned."
        ]
    base, a, b = (tuple(x.shape) for x in (leaf.base, leaf.a, leaf.b))
    if not leaf.layout.fits(len(base)):
        return [
            f"'{path}' has shape {base}, but its layout is for "
            f"{len(leaf.layout.order)} axes ({leaf.layout}). Pass the tree with the "
            "shapes that flora.init saw."
        ]
    if leaf.extra is not None and not isinstance(leaf.extra, dict):
        return [
            f"'{path}' has extra={leaf.extra!r}; expected a dict of arrays by name, or "
            "None. A variant's start returns dataclasses.replace(weight, extra={...})."
        ]
    wanted = leaf.layout.factor_shapes(base, leaf.rank)
    if (a, b) != wanted:
        return [
            f"'{path}' has base {base}, a {a} and b {b}; layout {leaf.layout} and rank "
            f"{leaf.rank} ask for a {wanted[0]} and b {wanted[1]}. Pass base and "
            "adapter of the same flora.init."
        ]
    stack, out = leaf.layout.sizes(base)[0], leaf.layout.matrix(base)[2]
    if found := problem(leaf.blocks, stack, leaf.rank, out):
        return [
            f"'{path}' of shape {base}: {found}. Pass base and adapter of one init."
        ]
    return []


def blocks_problem(verb: str, path: str, leaf: Any) -> list[str]:
    """Why a verb that needs one rank and one scale cannot take a leaf."""
    if not isinstance(leaf, LoraWeight) or not leaf.blocks:
        return []
    return [
        f"{verb}: '{path}' holds {len(leaf.blocks)} adapters with ranks or scales of "
        f"their own, and {verb} takes one of each. Leave that leaf out, or adapt all "
        "of its stack alike."
    ]


def require_adapted(tree: Any, verb: str) -> list[tuple[str, Any]]:
    """The named leaves, of which at least one is adapted."""
    named, _ = named_leaves(tree)
    if not any(is_node(leaf) for _, leaf in named):
        raise LoraError(
            f"{verb}: none of the tree's {len(named)} leaves is adapted. Pass "
            "the tree that flora.init or flora.join returned."
        )
    return named
