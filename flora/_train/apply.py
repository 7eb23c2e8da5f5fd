"""`apply_updates`: what trains moves, all else stays the very same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora._tree.arrays import is_array, shown
from flora._tree.errors import LoraError, fail
from flora._tree.paths import path_of
from flora._tree.weight import (
    LoraWeight,
    Trained,
    is_leaf,
    is_node,
    on_parts,
    parts_of,
    trained_parts,
)


def apply_updates(tree: Any, updates: Any) -> Any:
    """p + Δp for what trains; every other leaf is returned as the very same object.

    In the place of `optax.apply_updates`, which adds to every leaf: that turns -0.0
    into +0.0, moves the base where a transformation that is not inside
    `flora.optimizer` touches it, and fails on typed PRNG keys.

    Args:
      tree: an adapted tree, or its adapter: A, B, what a variant trains and `Trained`
        leaves move.  Of any other tree all leaves of floating numbers move; integers
        and PRNG keys stay.
      updates: what `update` of an optax transformation returned: of the tree or of its
        adapter.  What it holds for frozen leaves is ignored.

    Returns:
      The tree; each leaf has the dtype that it had.

    Raises:
      LoraError: tree and updates have other structures, or a leaf that trains has no
        update or one of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora
      >>> fn = lambda p, x: jnp.sum(x @ p["kernel"])
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> tx = flora.optimizer(optax.adamw(1e-3), adapted)
      >>> loss, grads = flora.value_and_grad(flora.lora(fn))(adapted, x)
      >>> updates, state = tx.update(grads, tx.init(adapted), adapted)
      >>> adapted = flora.apply_updates(adapted, updates)
      >>> adapted["kernel"].base is params["kernel"], bool(adapted["kernel"].b.any())
      (True, True)
    """
    pairs, treedef = paired(tree, updates, "apply_updates: tree and updates")
    whole = not any(is_node(p) for _, p, _ in pairs)
    problems: list[str] = []

    def move(path: str, p: Any, u: Any) -> Any:
        if is_hole(u) or np.shape(u) != np.shape(p):
            found = "no update" if is_hole(u) else f"an update {shown(u)}"
            problems.append(
                f"apply_updates: '{path}', {shown(p)}, trains and has {found}. Pass "
                "what update(grads, state, tree) returned for this tree."
            )
            return p
        return jnp.asarray(p + u).astype(jnp.result_type(p))

    moved = [_moved(move, path, p, u, whole) for path, p, u in pairs]
    fail(problems)
    return treedef.unflatten(moved)


def _moved(
    move: Callable[[str, Any, Any], Any], path: str, p: Any, u: Any, whole: bool
) -> Any:
    """The leaf with each array that trains moved."""
    if isinstance(p, LoraWeight):
        moving = trained_parts(p)
        given = parts_of(u) if isinstance(u, LoraWeight) else {}
        return on_parts(
            lambda name, x: (
                move(f"{path}/{name}", x, given.get(name)) if name in moving else x
            ),
            p,
        )
    if isinstance(p, Trained):
        return Trained(move(path, p.value, u.value if isinstance(u, Trained) else None))
    return move(path, p, u) if whole and not is_hole(u) and _moves(p) else p


def _moves(p: Any) -> bool:
    floating = is_array(p) and jnp.issubdtype(p.dtype, jnp.inexact)
    return floating or isinstance(p, float | complex)


def paired(tree: Any, other: Any, names: str) -> tuple[list[tuple[str, Any, Any]], Any]:
    """`([(path, leaf, what other has in its place)], treedef)`; `None` is a leaf."""
    named, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_one)
    try:
        given = treedef.flatten_up_to(other)
    except ValueError as error:
        raise LoraError(
            f"{names} have other structures. Pass those of the adapted tree, or of its "
            "adapter."
        ) from error
    pairs = zip(named, given, strict=True)
    return [(path_of(keys), leaf, x) for (keys, leaf), x in pairs], treedef


def _is_one(x: Any) -> bool:
    return x is None or is_leaf(x)


def is_hole(x: Any) -> bool:
    """Whether x stands for nothing, in trees of flora's or of optax's."""
    return x is None or isinstance(x, optax.MaskedNode)
