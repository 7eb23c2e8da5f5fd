"""What a checkpoint says of an adapted tree, and where two of them differ."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._files.fingerprint import describe, no_values, same_names
from flora._tree.arrays import is_array
from flora._tree.errors import fail
from flora._tree.paths import Pattern, matches, named_leaves
from flora._tree.weight import LoraWeight, Trained, is_node
from flora._verbs.split import split


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


def _whole(path: str, x: Any, also: Pattern) -> Any:
    """What is saved of a leaf without factors, or `None`."""
    if isinstance(x, Trained):
        return x.value
    return x if matches(also, path, x) else None


def leaf_records(adapted: Any, also: Pattern) -> dict[str, dict[str, Any]]:
    records = {}
    for path, x in named_leaves(adapted)[0]:
        if isinstance(x, LoraWeight):
            records[path] = {
                "layout": str(x.layout),
                "rank": x.rank,
                "alpha": float(x.alpha),
                "rank_stabilized": x.rank_stabilized,
                "a": describe(x.a),
                "b": describe(x.b),
            }
            if x.variant is not None:
                extra = {name: describe(part) for name, part in (x.extra or {}).items()}
                records[path] |= {"variant": repr(x.variant), "extra": extra}
        elif isinstance(x, Trained):
            records[path] = {"trained": describe(x.value)}
        elif matches(also, path, x):
            records[path] = {"also": describe(x)}
    return records


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
            return Trained(whole[path])
        return whole.get(path, x)

    adapted = treedef.unflatten([fill(path, x) for path, x in named])
    if state is None:
        return adapted, None
    return adapted, jax.tree.structure(state).unflatten(arrays["state"].values())


# --- What does not fit ---------------------------------------------------------------


def leaf_problems(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One line for each leaf that the two adapt otherwise."""
    return [
        _leaf_problem(path, saved.get(path, {}), given.get(path, {}))
        for path in _both(saved, given)
        if saved.get(path) != given.get(path)
    ]


def _leaf_problem(path: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old or not new:
        where = "the checkpoint" if old else "the given tree"
        return (
            f"'{path}' is trained in {where} alone ({_fields(old or new)}). Write the "
            "target=, exclude= and train= of LoraConfig, and the also= of Checkpointer, "
            "that it was saved with."
        )
    differ = [k for k in _both(old, new) if old.get(k) != new.get(k)]
    return (
        f"'{path}': the checkpoint has {_fields(old, differ)}; the given tree has "
        f"{_fields(new, differ)}. {_remedy(path, old, new, differ)}"
    )


def _fields(record: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    shown = {k: record[k] for k in names or record if k in record}
    return ", ".join(f"{k}={v}" for k, v in shown.items()) or "none of that"


def _remedy(path: str, old: dict, new: dict, differ: list[str]) -> str:
    """What to write in the config."""
    if "rank" not in old or "rank" not in new:
        return "Write the target= and train= of LoraConfig that it was saved with."
    settings = []
    if "rank" in differ:
        settings.append(f"rank_pattern={{'{path}': {old['rank']}}}")
    if "alpha" in differ:
        settings.append(f"alpha_pattern={{'{path}': {old['alpha']:g}}}")
    if "rank_stabilized" in differ:
        settings.append(f"rank_stabilized={old['rank_stabilized']}")
    if "layout" in differ:
        settings.append(f"layouts={{'{path}': flora.Layout({_axes(old['layout'])})}}")
    if "variant" in differ:
        settings.append(f"variant={old.get('variant')}")
    dtype, other = (r["a"].partition("[")[0] for r in (old, new))
    if dtype != other:
        settings.append(f"dtype='{dtype}'")
    if settings:
        return f"Write LoraConfig({', '.join(settings)})."
    return "Pass the model that it was trained with."


def _axes(layout: str) -> str:
    """'stack=0 in=1,2 out=3' as arguments."""
    pairs = (part.partition("=") for part in layout.split())
    return ", ".join(f"{'in_' if k == 'in' else k}=({v},)" for k, _, v in pairs)


def base_problems(saved: dict[str, str], given: dict[str, str]) -> list[str]:
    """One line for each leaf of the base whose fingerprint is another."""
    return [
        f"'{path}': the checkpoint was trained on a base of "
        f"{saved.get(path, 'no such leaf')}; the given base has "
        f"{given.get(path, 'no such leaf')}. Load the weights that it was trained on, "
        "or write check_base=False to put it on others."
        for path in _both(saved, given)
        if saved.get(path) != given.get(path)
    ]


def state_problems(saved: Any, given: Any, step: int) -> list[str]:
    """One line for each leaf of the optimizer's state that is another or not there."""
    if given is None:
        return []
    if saved is None:
        return [
            f"state: step {step} was saved without one. Write restore(adapted), and "
            "tx.init of what it returns."
        ]
    new = described(given)
    return [
        f"state '{path}': the checkpoint has {saved.get(path, 'no such leaf')}; the given "
        f"state has {new.get(path, 'no such leaf')}. Pass tx.init(adapted) of the "
        "optimizer that it was saved with, or no state."
        for path in _both(saved, new)
        if saved.get(path) != new.get(path)
    ]


def _both(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*one, *other)))


def some(names: Iterable[Any]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(str, names[-10:])) + more


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
        value = (
            jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)
        )
    if _is_key(x) and not _is_key(value):
        impl = jax.random.key_impl(jnp.zeros((), x.dtype))
        return jax.random.wrap_key_data(value, impl=impl)
    return value


def _is_weak(x: Any) -> bool:
    """A scalar that takes the dtype of what it meets, such as optax's rates."""
    return x.ndim == 0 and getattr(x, "weak_type", False)
