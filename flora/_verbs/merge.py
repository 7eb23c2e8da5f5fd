"""`merge`: the plain tree, to ship."""

from typing import Any

import jax

from flora._algebra.dense import materialize
from flora._tree.checks import require_adapted, weight_problems
from flora._tree.errors import LoraError, Unfactorable, fail
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, Trained

_materialized = jax.jit(materialize)  # no constant goes to the device on its own


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
            return _materialized(leaf)
        except Unfactorable as reason:
            raise LoraError(f"merge: '{path}': {reason}. Ship the adapter.") from None

    _, treedef = named_leaves(adapted)
    return treedef.unflatten([plain(path, leaf) for path, leaf in named])
