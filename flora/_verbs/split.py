"""`split` and `join`: an adapted tree as its frozen base and its adapter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flora._tree.checks import require_adapted, weight_problems
from flora._tree.errors import LoraError, fail
from flora._tree.paths import path_of
from flora._tree.weight import LoraWeight, Trained, is_leaf, is_node


def _on_nodes(fn: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(fn, tree, is_leaf=is_leaf)


def split(adapted: Any) -> tuple[Any, Any]:
    """The frozen base and the adapter: `adapted == join(*split(adapted))`.

    Args:
      adapted: an adapted tree.

    Returns:
      `(base, adapter)`, both with the structure of the tree; arrays are shared, not
      copied.  `base` holds plain weights, and `None` where a leaf trains whole.
      `adapter` holds `LoraWeight(None, a, b)` and `Trained(value)`, and `None`
      elsewhere.  Dropout keys belong to one step and are in neither.

    Raises:
      LoraError: the tree is not adapted, or is an adapter already.
    """
    fail(
        f"split: '{path}' is an adapter without its base. "
        "Split the tree that flora.join returns."
        for path, leaf in require_adapted(adapted, "split")
        if isinstance(leaf, LoraWeight) and leaf.base is None
    )

    def base(leaf: Any) -> Any:
        if isinstance(leaf, LoraWeight):
            return leaf.base
        return None if isinstance(leaf, Trained) else leaf

    def adapter(leaf: Any) -> Any:
        if isinstance(leaf, LoraWeight):
            return dataclasses.replace(leaf, base=None, key=None)
        return leaf if isinstance(leaf, Trained) else None

    return _on_nodes(base, adapted), _on_nodes(adapter, adapted)


def join(base: Any, adapter: Any) -> Any:
    """The adapted tree of a base and an adapter that `split` returned.

    Args:
      base: frozen weights; one base serves any number of adapters.
      adapter: the trained leaves.

    Returns:
      The adapted tree; arrays are shared, not copied.

    Raises:
      LoraError: the trees have other structures, or a factor's shape does not fit its
        base; every such leaf is named.
    """

    def stop(x: Any) -> bool:
        return x is None or is_leaf(x)

    bases, treedef = jax.tree_util.tree_flatten_with_path(base, is_leaf=stop)
    trained, adapter_def = jax.tree_util.tree_flatten_with_path(adapter, is_leaf=stop)
    if treedef != adapter_def:
        raise LoraError(_other_structure(base, adapter, stop))
    if not any(is_node(x) for _, x in trained):
        raise LoraError(
            "join: the adapter holds no trained leaf. The order is "
            "flora.join(base, adapter)."
        )
    joined, problems = [], []
    for (keys, w), (_, x) in zip(bases, trained, strict=True):
        path = path_of(keys)
        if is_node(w):
            problems.append(
                f"join: '{path}' of the base is adapted. Pass the base that "
                "flora.split returned."
            )
        elif isinstance(x, LoraWeight):
            whole = dataclasses.replace(x, base=w)
            problems += (
                [f"join: '{path}' has factors, but no weight in the base."]
                if w is None
                else _join_problems(path, whole)
            )
            joined.append(whole)
        elif isinstance(x, Trained) and w is not None:
            problems.append(
                f"join: '{path}' trains whole in the adapter, but is in the base "
                "too. Pass base and adapter of the same flora.split."
            )
        else:
            joined.append(w if x is None else x)
    fail(problems)
    return treedef.unflatten(joined)


def _join_problems(path: str, whole: LoraWeight) -> list[str]:
    # Gradients, masks and updates can be joined as well: they have no shapes to check.
    if any(getattr(x, "shape", None) is None for x in (whole.base, whole.a, whole.b)):
        return []
    return [f"join: {p}" for p in weight_problems(path, whole)]


def _other_structure(base: Any, adapter: Any, stop: Callable[[Any], bool]) -> str:
    def paths(tree: Any) -> set[str]:
        leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]
        return {path_of(keys) for keys, _ in leaves}

    ours, theirs = paths(base), paths(adapter)
    parts = [
        f"only {name} has {', '.join(map(repr, sorted(some)[:3]))}"
        for name, some in (("the base", ours - theirs), ("the adapter", theirs - ours))
        if some
    ]
    return (
        "join: base and adapter have other structures"
        + (
            f": {'; '.join(parts)}"
            if parts
            else f": a {type(base).__name__} and a {type(adapter).__name__}"
        )
        + ". Pass base and adapter of the same flora.split."
    )
