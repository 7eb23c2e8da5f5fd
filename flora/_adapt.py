"""The verbs on adapted trees: split, join, merge, with_dropout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flora._errors import LoraError, Unfactorable, fail
from flora._keys import consumed, path_salt, require_key
from flora._select import named_leaves, path_of
from flora._transform import weight_problems
from flora._weight import LoraWeight, Trained, is_leaf, is_node, materialize


def _on_nodes(fn: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(fn, tree, is_leaf=is_leaf)


def require_adapted(tree: Any, verb: str) -> list[tuple[str, Any]]:
    """The named leaves, of which at least one is adapted."""
    named, _ = named_leaves(tree)
    if not any(is_node(leaf) for _, leaf in named):
        raise LoraError(
            f"{verb}: none of the tree's {len(named)} leaves is adapted. Pass "
            "the tree that flora.init or flora.join returned."
        )
    return named


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
        f"split: '{path}' is an adapter without its base. Split the tree that flora.join "
        "returns."
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


def merge(adapted: Any) -> Any:
    """The plain tree with W + scale A B in each adapted leaf's place, to ship.

    The sum is formed in float32 or wider and rounded once to W's dtype; in bfloat16,
    changes below half a unit in the last place of W vanish.

    Args:
      adapted: an adapted tree: arrays, tracers or `ShapeDtypeStruct`s.

    Returns:
      A tree of the structure that `init` was given.  Leaves that are not adapted are
      shared.

    Raises:
      LoraError: the tree is not adapted, or holds an adapter without its base.
    """
    named = require_adapted(adapted, "merge")
    fail(p for path, leaf in named for p in weight_problems(path, leaf))

    def plain(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return leaf.value
        if not isinstance(leaf, LoraWeight):
            return leaf
        if isinstance(leaf.base, jax.ShapeDtypeStruct):
            return leaf.base
        try:
            return materialize(leaf)
        except Unfactorable as reason:
            raise LoraError(f"merge: '{path}': {reason}. Ship the adapter.") from None

    _, treedef = named_leaves(adapted)
    return treedef.unflatten([plain(path, leaf) for path, leaf in named])


def with_dropout(adapted: Any, key: Any) -> Any:
    """The same tree with dropout keys attached, for one training step.

    y = x W + scale (dropout(x) A) B.  Masks differ per leaf, per stacked layer, per step
    of an inner loop and per use.  Without keys a call is evaluation.  Rows that an
    embedding looks up are not dropped.

    Args:
      adapted: an adapted tree whose config has `dropout > 0`.
      key: a typed PRNG key, consumed; another one each step.

    Returns:
      The tree, sharing all arrays.  Attach keys inside the loss: `jax.grad` does not
      take trees that hold keys (`flora.value_and_grad` does).

    Raises:
      LoraError: the tree is not adapted, or no leaf has a dropout rate.
    """
    require_key(key, "with_dropout")
    named = require_adapted(adapted, "with_dropout")
    if not any(isinstance(x, LoraWeight) and x.dropout for _, x in named):
        raise LoraError(
            "with_dropout: no leaf has a dropout rate. Write "
            "flora.LoraConfig(dropout=0.1, ...) at init."
        )
    _, treedef = named_leaves(adapted)
    root = jax.random.fold_in(consumed(key), path_salt("dropout"))

    def attach(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight) or not leaf.dropout:
            return leaf
        stack = leaf.a.shape[: len(leaf.layout.stack)]
        own = jax.random.fold_in(root, path_salt(path))
        return dataclasses.replace(leaf, key=jax.random.split(own, stack))

    return treedef.unflatten([attach(path, leaf) for path, leaf in named])
