"""What a checkpoint holds of an adapted tree: its arrays by name, and them alone."""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from flora._files.fingerprint import describe, no_values, same_names
from flora._tree.arrays import is_array
from flora._tree.errors import fail
from flora._tree.paths import Pattern, entries, matches, named_leaves, path_of
from flora._tree.selection import idle_entries
from flora._tree.weight import LoraWeight, Trained, is_node
from flora._verbs.split import split


def statistics(tree: Any) -> frozenset[str]:
    """The paths of batch statistics, which training changes without a gradient.

    Those of Linen's collection 'batch_stats' and those of type `nnx.BatchStat`.
    """
    named = [(p, x) for p, x in named_leaves(tree)[0] if not is_node(x)]
    found = {p for p, _ in named if "batch_stats" in p.split("/")}
    nnx: Any = sys.modules.get("flax.nnx")  # no state of NNX without it
    if nnx is not None:
        variables, _ = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        at = tuple(path_of(k) for k, x in variables if isinstance(x, nnx.BatchStat))
        below = tuple(f"{p}/" for p in at)
        found |= {p for p, _ in named if p in at or p.startswith(below)}
    return frozenset(found)


def saved_too(
    also: Pattern, adapted: Any, known: Collection[str] | None = None
) -> Pattern:
    """The frozen leaves that are saved: those of `also`, and batch statistics.

    Args:
      also: what the caller named; each entry must select a frozen leaf.
      adapted: the tree.
      known: leaves that a checkpoint has: the statistics must be among them.
    """
    frozen = [(p, x) for p, x in named_leaves(adapted)[0] if not is_node(x)]
    fail(
        f"{problem} It must match a frozen leaf."
        for problem in idle_entries("also", also, frozen)
    )
    paths = statistics(adapted)
    paths = paths if known is None else paths & {*known}
    return [*entries(also), lambda path, _: path in paths]


def base_leaves(adapted: Any, also: Pattern) -> dict[str, Any]:
    """`{path: W}` of the frozen leaves; those of `also` are not frozen."""
    changed = {
        path
        for path, x in named_leaves(adapted)[0]
        if not is_node(x) and matches(also, path, x)
    }
    base, _ = named_leaves(split(adapted)[0])
    return {path: x for path, x in base if path not in changed}


def items_of(adapted: Any, state: Any, also: Pattern) -> dict[str, dict[str, Any]]:
    """`{'a': {path: A}, 'b': ..., 'extra': ..., 'whole': ..., 'state': ...}`."""
    named, _ = named_leaves(adapted)
    fail(same_names([path for path, _ in named]))
    lora = {path: x for path, x in named if isinstance(x, LoraWeight)}
    whole = {path: _whole(path, x, also) for path, x in named if path not in lora}
    items = {
        "a": {path: x.a for path, x in lora.items()},
        "b": {path: x.b for path, x in lora.items()},
        "extra": {
            f"{path}/{name}": part
            for path, x in lora.items()
            for name, part in (x.extra or {}).items()
        },
        "whole": {path: x for path, x in whole.items() if x is not None},
    }
    if state is not None:
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
        fail(same_names(paths))
        items["state"] = dict(zip(paths, (x for _, x in leaves), strict=True))
    return items


def moments_of(state: Any) -> dict[str, Any]:
    """What an optimizer's state keeps for each trained leaf, by path."""
    nodes = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_node)[0]
    return {
        f"state of {jax.tree_util.keystr((*at, *part), simple=True, separator='/')}": x
        for at, node in nodes
        if is_node(node)
        for part, x in jax.tree_util.tree_flatten_with_path(node)[0]
    }


def _whole(path: str, x: Any, also: Pattern) -> Any:
    """What is saved of a leaf without factors, or `None`."""
    if isinstance(x, Trained):
        return x.value
    return x if matches(also, path, x) else None


def described(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: describe(x) for path, x in leaves.items()}


def filled(
    adapted: Any, state: Any, arrays: dict[str, dict[str, Any]]
) -> tuple[Any, Any]:
    """The given trees with what was read in its place."""
    named, treedef = named_leaves(adapted)
    a, b, whole = arrays["a"], arrays["b"], arrays["whole"]

    def fill(path: str, x: Any) -> Any:
        if isinstance(x, LoraWeight):
            extra = x.extra and {k: arrays["extra"][f"{path}/{k}"] for k in x.extra}
            return dataclasses.replace(x, a=a[path], b=b[path], key=None, extra=extra)
        if isinstance(x, Trained):
            return Trained(whole[path], x.origin)
        return whole.get(path, x)

    adapted = treedef.unflatten([fill(path, x) for path, x in named])
    if state is None:
        return adapted, None
    return adapted, jax.tree.structure(state).unflatten(arrays["state"].values())


# --- One leaf -------------------------------------------------------------------------


def unsavable(path: str, x: Any) -> list[str]:
    """What keeps a leaf from being saved."""
    if is_array(x) or isinstance(x, bool | int | float | complex):
        return no_values(path, x)
    return [
        f"'{path}' is a {describe(x)}; expected an array or a number. Leave it out of "
        "what is saved, or pass it as metadata=."
    ]


def _is_key(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_empty(x: Any) -> bool:
    return is_array(x) and x.size == 0  # Orbax does not take them


def copied(x: Any) -> Any:
    """The leaf as Orbax takes it; NumPy's can change later, so they are copied."""
    if _is_key(x):
        x = jax.random.key_data(x)
    # Orbax refuses arrays of one process among several: such as tx.init's counts.
    local = jax.process_count() > 1 and getattr(x, "is_fully_addressable", False)
    return x if isinstance(x, jax.Array) and not local else np.array(x)


def is_sharded(x: Any) -> bool:
    """Whether Orbax reads it shard by shard, to where the given leaf lies."""
    sharding = sharding_of(x)
    if sharding is None or _is_weak(x):
        return False
    return jax.process_count() == 1 or not sharding.is_fully_addressable


def sharding_of(x: Any) -> Any:
    """Where a leaf has to lie; `None` where it may move (JAX: not committed)."""
    committed = x.committed if isinstance(x, jax.Array) else True
    return getattr(x, "sharding", None) if committed else None


def unlike(read: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where arrays that were read have other shapes or dtypes than the given ones.

    Orbax hands on whatever lies there.
    """
    wanted = {k: _as_stored(x) for k, x in given.items() if is_array(x)}
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(
            {k: read[k] for k in wanted}, wanted
        )
    except AssertionError as error:
        return [str(error).rpartition("differ in ")[2]]
    return []


def _as_stored(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x


def placed(x: Any, value: Any) -> Any:
    """What was read, as the given leaf x is; `None` was read if x has no elements."""
    if value is None:
        value = np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    kind: Any = type(x)
    if not is_array(x):
        return kind(value.item())
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return value if isinstance(x, np.ndarray) else value[()]
    if not isinstance(value, jax.Array):
        value, sharding = value.item() if _is_weak(x) else value, sharding_of(x)
        weak = sharding is None and not isinstance(value, np.ndarray)
        value = jnp.asarray(value) if weak else jax.device_put(value, sharding)
    if _is_key(x) and not _is_key(value):
        impl = jax.random.key_impl(jnp.zeros((), x.dtype))
        return jax.random.wrap_key_data(value, impl=impl)
    return value


def _is_weak(x: Any) -> bool:
    """A scalar that takes the dtype of what it meets, such as optax's rates."""
    return x.ndim == 0 and getattr(x, "weak_type", False)
