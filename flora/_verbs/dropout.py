"""`with_dropout`: dropout keys for one training step."""

import dataclasses
from typing import Any

import jax

from flora._tree.checks import require_adapted
from flora._tree.errors import LoraError
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, is_leaf


def with_dropout(adapted: Any, key: Any) -> Any:
    """The same tree with dropout keys attached, for one training step.

    y = x W + scale (dropout(x) A) B.  Masks differ per leaf, per stacked layer, per
    step of an inner loop and per use.  They are hashes of the key and of an element's
    place: the same in every form, made again where they are read, and not kept.  Rows
    that an embedding looks up are not dropped.  Without keys a call is evaluation; its
    gradients for A and B are an error, as a step that forgot its keys would train
    without dropout.

    Args:
      adapted: an adapted tree whose config has `dropout > 0`.
      key: a PRNG key, consumed; another one each step; `None` for no dropout
        on purpose, as in gradients of an evaluation.

    Returns:
      The tree, sharing all arrays.  Attach keys inside the loss: `jax.grad` does not
      take trees that hold keys (`flora.value_and_grad` does).

    Raises:
      LoraError: the tree is not adapted, or no leaf has a dropout rate.
    """
    named = require_adapted(adapted, "with_dropout")
    if key is None:
        return jax.tree.map(_undropped, adapted, is_leaf=is_leaf)
    require_key(key, "with_dropout")
    if not any(isinstance(x, LoraWeight) and x.dropout for _, x in named):
        raise LoraError(
            "with_dropout: no leaf has a dropout rate. Write "
            "flora.LoraConfig(dropout=0.1, ...) at init."
        )
    _, treedef = named_leaves(adapted)
    with jax.transfer_guard_host_to_device("allow"):  # of the numbers folded in
        return treedef.unflatten(_keyed(key, named))


def _keyed(key: Any, named: list[tuple[str, Any]]) -> list[Any]:
    root = jax.random.fold_in(consumed(key), path_salt("dropout"))

    def attach(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight) or not leaf.dropout:
            return leaf
        stack = leaf.a.shape[: len(leaf.layout.stack)]
        own = jax.random.fold_in(root, path_salt(path))
        return dataclasses.replace(leaf, key=jax.random.split(own, stack))

    return [attach(path, leaf) for path, leaf in named]


def _undropped(leaf: Any) -> Any:
    if not isinstance(leaf, LoraWeight):
        return leaf
    return dataclasses.replace(leaf, dropout=0.0, key=None)
