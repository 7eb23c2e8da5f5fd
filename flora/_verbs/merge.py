"""`merge`: the plain tree, to ship."""

import dataclasses
from typing import Any

import jax

from flora._algebra.dense import materialize
from flora._tree.checks import require_adapted, weight_problems
from flora._tree.errors import LoraError, Unfactorable, fail
from flora._tree.finite import require_finite
from flora._tree.origin import Origin
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, Trained, is_node

_materialized = jax.jit(materialize)  # no constant goes to the device on its own


def merge(adapted: Any, *, allow_nonfinite: bool = False) -> Any:
    """The plain tree with W + scale A B in each adapted leaf's place, to ship.

    The sum is formed in float32 or wider and rounded once to W's dtype; in bfloat16,
    changes below half a unit in the last place of W vanish.

    A run that diverged is refused: NaN and infinity in what trained, or that W's dtype
    makes of the sum.  Those that W held before (a mask of -inf) stay, and leaves that
    are not adapted are not looked at; nor are tracers, which have no values.

    Args:
      adapted: an adapted tree: arrays, tracers or `ShapeDtypeStruct`s.
      allow_nonfinite: True to merge all the same.

    Returns:
      A tree of the structure that `init` was given.  Leaves that are not adapted are
      shared.

    Raises:
      LoraError: the tree is not adapted, or holds an adapter without its base, or NaN
        or infinity comes out, in leaves that are named.
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
            return _materialized(dataclasses.replace(leaf, origin=Origin()))
        except Unfactorable as reason:
            raise LoraError(f"merge: '{path}': {reason}. Ship the adapter.") from None

    _, treedef = named_leaves(adapted)
    made = [plain(path, leaf) for path, leaf in named]
    baked = {p: y for (p, x), y in zip(named, made, strict=True) if is_node(x)}
    bases = {p: x.base for p, x in named if isinstance(x, LoraWeight)}
    require_finite("merge", baked, allow_nonfinite, before=bases)
    return treedef.unflatten(made)
