"""One module made what another one is, in place."""

from typing import Any

import jax
from flax import nnx

from flora._nnx.parts import items, put, remove

_MISSING = object()


def become(old: Any, new: Any) -> None:
    """Gives `old` the attributes, classes and values of `new`, at every depth.

    Modules and variables that both have stay the same objects.
    """
    _become(old, new, set())
    nnx.update(old, nnx.state(new))


def _become(old: Any, new: Any, seen: set[int]) -> None:
    if id(new) in seen:
        return
    seen.add(id(new))
    have, want = items(old), items(new)
    for key in have.keys() - want.keys():
        remove(old, (key,))
    for key, value in want.items():
        if not _kept(have.get(key, _MISSING), value, seen):
            put(old, (key,), _with_status(value))
    if type(old) is not type(new):
        object.__setattr__(old, "__class__", type(new))


def _kept(old: Any, new: Any, seen: set[int]) -> bool:
    """Whether the old value can stay, made what the new one is."""
    if old is new:
        return True
    if isinstance(new, nnx.Variable):
        return type(old) is type(new)
    same = type(old) is type(new) and items(old).keys() == items(new).keys()
    is_module = isinstance(old, nnx.Pytree) and isinstance(new, nnx.Pytree)
    if is_module and not isinstance(new, nnx.List | nnx.Dict):
        _become(old, new, seen)
        return True
    if same and items(new) and not isinstance(new, tuple):
        _become(old, new, seen)
        return True
    return False


def _with_status(value: Any) -> Any:
    """The value, marked as data if it holds any; variables and modules need no mark."""
    if isinstance(value, nnx.Variable | nnx.Pytree):
        return value
    leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nnx.Variable))
    has_data = any(isinstance(x, nnx.Variable | jax.Array) for x in leaves)
    return nnx.data(value) if has_data else nnx.static(value)
