"""Which trained array gets which value: `{pattern: value or {part: value}}`."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from flora._train.optimizer import FROZEN, freeze, map_parts
from flora._train.wrappers import widened
from flora._tree.arrays import is_array
from flora._tree.checks import require_adapted
from flora._tree.errors import LoraTypeError, fail
from flora._tree.paths import check_pattern, entries, matches
from flora._tree.selection import idle_entries, shadowed, shown
from flora._tree.weight import base_of

Where = Mapping[Any, Any]
Place = tuple[str, str]  # a leaf's path and a part of it


def partition(
    transforms: Mapping[str, optax.GradientTransformation], groups: Where, adapted: Any
) -> optax.GradientTransformation:
    """Another optax transformation for each group of trained arrays.

    Args:
      transforms: `{group: transformation}`.
      groups: `{pattern: group}` or `{pattern: {part: group}}`.  Patterns are those of
        `LoraConfig`, on the paths of leaves; a part is 'a', 'b', a name in a variant's
        `extra` such as 'magnitude', or 'train' for a leaf that trains whole.  The first
        entry that names an array decides.
      adapted: the adapted tree, or the adapter alone.

    Returns:
      A transformation for the adapter, for the whole tree (frozen leaves stay bit for
      bit), or for use inside `flora.optimizer`.

    Raises:
      LoraError: a pattern or part selects nothing, or only what earlier ones took; a
        trained array is in no group; a group has no transformation, or no arrays.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> params = {"kernel": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
      >>> config = flora.LoraConfig(rank=2, target="kernel", train="head")
      >>> fn = lambda p, x: x @ p["kernel"] @ p["head"]
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, jnp.ones((1, 4)))
      >>> tx = flora.recipes.partition(
      ...     {"head": optax.sgd(0.1), "rest": optax.adamw(1e-3)},
      ...     {"head": "head", "*": "rest"}, adapted)
      >>> state = flora.optimizer(tx, adapted).init(adapted)
    """
    if not isinstance(transforms, Mapping) or FROZEN in transforms:
        raise LoraTypeError(
            f"transforms={transforms!r}. Write {{group: optax transformation}}; the "
            f"group {FROZEN!r} is taken by the leaves that do not train."
        )
    table = resolve("groups", groups, adapted, _group_problem)
    used = set(table.values())
    known = ", ".join(map(repr, transforms))
    fail(
        [
            *(
                f"partition: part {part!r} of '{path}' is in no group. Name it, or add "
                "'*': group as the last entry."
                for path, part in _places(adapted)
                if (path, part) not in table
            ),
            *(
                f"partition: the group {group!r} has no transformation; there are "
                f"{known}."
                for group in sorted(used - {*transforms})
            ),
            *(
                f"partition: the transformation {group!r} has no arrays: nothing in "
                "groups names it. Take it out, or name it."
                for group in transforms
                if group not in used
            ),
        ]
    )

    def labels(tree: Any) -> Any:
        def label(path: str, part: str, x: Any) -> str:
            return FROZEN if part == FROZEN else table[path, part]

        return map_parts(label, tree)

    wide = {group: widened(tx) for group, tx in transforms.items()}
    return optax.multi_transform({**wide, FROZEN: freeze()}, labels)


def scale_rates(rates: Where, adapted: Any) -> optax.GradientTransformation:
    """Multiplies the updates of some arrays: a learning rate for each of them.

    Δp ← rate · Δp.  Chain it behind the optimizer, whose own learning rate it
    multiplies: `optax.chain(optax.adamw(1e-4), scale_rates(...))`.  As in PyTorch's
    parameter groups, a decoupled weight decay is multiplied with it.

    Args:
      rates: `{pattern: factor}` or `{pattern: {part: factor}}`, of numbers or arrays
        `[]`, so that `jax.vmap` can sweep them.  See `partition`.  Arrays that none
        names keep their updates.
      adapted: the adapted tree, or the adapter alone.

    Raises:
      LoraError: a pattern or part selects nothing, or only what earlier ones took; a
        factor is not a finite number of at least 0.

    Example:
      The groups of PEFT's LoRA+: embeddings apart, all B 16 times as fast.

      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> params = {"embedding": jnp.ones((9, 4)), "kernel": jnp.ones((4, 3))}
      >>> fn = lambda p, i: p["embedding"][i] @ p["kernel"]
      >>> config = flora.LoraConfig(rank=2, target="*")
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, jnp.arange(2))
      >>> rates = {"embedding": 1e-6 / 1e-4, "*": {"b": 16.0}}
      >>> tx = optax.chain(optax.adamw(1e-4), flora.recipes.scale_rates(rates, adapted))
      >>> state = flora.optimizer(tx, adapted).init(adapted)
    """
    table = resolve("rates", rates, adapted, factor_problem)

    def scaled(path: str, part: str, update: Any) -> Any:
        return times(table.get((path, part)), update)

    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (map_parts(scaled, updates), state),
    )


def decay_mask(adapted: Any, decay: Where | None = None) -> Callable[[Any], Any]:
    """Which arrays weight decay shrinks, for `optax.adamw(mask=...)`.

    By default A, B, and leaves that train whole and have two axes or more; not norms,
    biases and what a variant has in `extra`.  Frozen leaves never decay.  (Norms
    stacked by a scan have two axes: name them.)

    Args:
      adapted: the adapted tree, or the adapter alone.
      decay: `{pattern: bool}` or `{pattern: {part: bool}}`, see `partition`; what none
        names follows the default.

    Returns:
      A function from a tree to a tree of bools, as optax takes it.

    Raises:
      LoraError: a pattern or part selects nothing, or only what earlier ones took.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> config = flora.LoraConfig(rank=2, target="kernel", train="bias")
      >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, jnp.ones((1, 4)))
      >>> mask = flora.recipes.decay_mask(adapted, {"kernel": {"a": False}})
      >>> shrinks = mask(adapted)
      >>> shrinks["kernel"].b, shrinks["kernel"].a, shrinks["bias"].value
      (True, False, False)
      >>> tx = flora.optimizer(optax.adamw(1e-3, mask=mask), adapted)
    """
    table = resolve("decay", {} if decay is None else decay, adapted, _bool_problem)
    shapes = _places(adapted)

    def decays(path: str, part: str, x: Any) -> bool:
        if part == FROZEN:
            return False
        wide = part == "train" and len(shapes[path, part]) >= 2
        return table.get((path, part), wide or part in ("a", "b"))

    return functools.partial(map_parts, decays)


def resolve(
    name: str, where: Where, adapted: Any, check: Callable[[Any], str | None]
) -> dict[Place, Any]:
    """The value of each trained array that an entry names; the first one decides."""
    if not isinstance(where, Mapping):
        raise LoraTypeError(
            f"{name}={where!r}. Write a dict, {{pattern: value}} or "
            "{pattern: {part: value}}."
        )
    leaves = {p: base_of(x) for p, x in require_adapted(adapted, name)}
    parts: dict[str, list[str]] = {}
    for path, part in _places(adapted):
        parts.setdefault(path, []).append(part)
    named = [(p, leaves[p]) for p in parts]
    table: dict[Place, Any] = {}
    taken: dict[Place, Any] = {}  # by which pattern
    problems: list[str] = []
    for pattern, value in where.items():
        check_pattern(f"{name} key", pattern)
        problems += [
            f"{problem} Only leaves that train count."
            for problem in idle_entries(name, pattern, named)
        ]
        if isinstance(value, Mapping) and not value:
            problems.append(f"{name}: {shown(pattern)} is given {{}}, no part.")
        for part, each in _by_part(value):
            wrong = check(each)
            if wrong:
                problems.append(f"{name}: {shown(pattern)} is given {wrong}")
            new: dict[Place, Any] = {}
            for entry in entries(pattern):
                hit = [p for p, x in named if matches(entry, p, x)]
                places = [(p, q) for p in hit for q in parts[p] if part in (None, q)]
                problems += _idle_problems(name, entry, part, hit, places, parts, taken)
                new |= dict.fromkeys(places, each)
            table = new | table
            taken = dict.fromkeys(new, pattern) | taken
    fail(problems)
    return table


def _idle_problems(
    name: str,
    entry: Any,
    part: str | None,
    hit: Sequence[str],
    places: Sequence[Place],
    parts: Mapping[str, Sequence[str]],
    taken: Mapping[Place, Any],
) -> list[str]:
    """What keeps an entry that selects leaves from deciding for any array of theirs."""
    if hit and not places:
        there = sorted({q for p in hit for q in parts[p]})
        return [
            f"{name}: {shown(entry)} has no part {part!r}; the parts of the "
            f"{len(hit)} leaves that it selects are {', '.join(there)}."
        ]
    if not places or any(place not in taken for place in places):
        return []
    by = {taken[place] for place in places}
    earlier = [pattern for pattern in dict.fromkeys(taken.values()) if pattern in by]
    left = {taken[place] for place in taken if place not in {*places}}
    return [shadowed(name, entry, earlier, more={*earlier} <= left)]


def _places(adapted: Any) -> dict[Place, tuple[int, ...]]:
    """The shape of each array that trains."""
    found: dict[Place, tuple[int, ...]] = {}

    def note(path: str, part: str, x: Any) -> None:
        if part != FROZEN:
            found[path, part] = tuple(getattr(x, "shape", ()))

    map_parts(note, adapted)
    return found


def _by_part(value: Any) -> list[tuple[str | None, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [(None, value)]


def times(factor: chex.Numeric | None, update: chex.Array) -> chex.Array:
    """Factor · update in the update's dtype; `None` leaves it as it is."""
    return update if factor is None else (factor * update).astype(update.dtype)


def factor_problem(x: Any) -> str | None:
    """What keeps x from multiplying a learning rate."""
    real = isinstance(x, numbers.Real) and not isinstance(x, bool)
    scalar = is_array(x) and x.shape == () and jnp.issubdtype(x.dtype, jnp.number)
    concrete = not isinstance(x, Tracer | jax.ShapeDtypeStruct)
    if (real or scalar) and not (concrete and not 0 <= float(x) < math.inf):
        return None
    return f"{x!r}; expected a finite number of at least 0, or an array of shape ()."


def _group_problem(x: Any) -> str | None:
    return None if isinstance(x, str) else f"{x!r}; expected the name of a group."


def _bool_problem(x: Any) -> str | None:
    return None if isinstance(x, bool) else f"{x!r}; expected True or False."
