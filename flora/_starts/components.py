"""Components of A B, one a rank, and how a budget is divided among leaves."""

import dataclasses
import glob
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora._algebra.variants import AdaLoRA
from flora._starts.residual import nothing_adapted, variant_problem
from flora._tree.arrays import is_array
from flora._tree.checks import blocks_problem
from flora._tree.errors import LoraError, fail
from flora._tree.matrices import replicated
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight

Sizes = Mapping[str, tuple[int, int, int]]


def nodes_of(verb: str, tree: Any) -> dict[str, LoraWeight]:
    """The adapted leaves by path, one at least."""
    named, _ = named_leaves(tree)
    found = {path: x for path, x in named if isinstance(x, LoraWeight)}
    if not found:
        raise LoraError(nothing_adapted(verb, named))
    return found


def components_of(verb: str, tree: Any) -> dict[str, LoraWeight]:
    """The adapted leaves, all of which have arrays and one component a rank."""
    found = nodes_of(verb, tree)
    fail(p for path, w in found.items() for p in _component_problems(verb, path, w))
    return found


def _component_problems(verb: str, path: str, w: LoraWeight) -> list[str]:
    if not (is_array(w.a) and is_array(w.b)):
        return [f"{verb}: '{path}' is {w!r} and holds no arrays."]
    problem = variant_problem(verb, path, w, AdaLoRA)
    return [problem] if problem else blocks_problem(verb, path, w)


def gated(w: LoraWeight) -> bool:
    """Whether components have a number e `[*stack, rank]` of their own."""
    return isinstance(w.variant, AdaLoRA)


def on_components(fn: Callable, w: LoraWeight, *others: LoraWeight) -> LoraWeight:
    """A node of `fn(part, *parts of the others)` for A, B and e, without a base."""
    a = fn(w.a, *(x.a for x in others))
    b = fn(w.b, *(x.b for x in others))
    extra = None
    if gated(w):
        extra = {"e": fn(w.extra["e"], *(x.extra["e"] for x in others))}
    return dataclasses.replace(w, base=None, a=a, b=b, key=None, extra=extra)


def alpha_at(w: LoraWeight, rank: int) -> float:
    """The alpha that keeps the scale at another rank."""
    share = rank / w.rank
    return w.alpha * (math.sqrt(share) if w.rank_stabilized else share)


def replaced(tree: Any, new: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some paths."""
    named, treedef = named_leaves(tree)
    return treedef.unflatten([new.get(path, leaf) for path, leaf in named])


def require_paths(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Raises unless something is given for each adapted leaf, and for no other."""
    given, wanted = set(given), set(wanted)
    fail(
        [f"{what} has nothing for '{path}'." for path in sorted(wanted - given)]
        + [
            f"{what} has '{path}', which is no adapted leaf."
            for path in sorted(given - wanted)
        ]
    )


def by_path(values: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns of which the first that matches a leaf is the leaf's own.

    A glob also matches the end of a longer path: the longer ones come first.
    """
    order = sorted(values, key=lambda path: -len(path))
    return {glob.escape(path): values[path] for path in order}


def shares(importance: Any, sizes: Sizes) -> dict[str, float]:
    """What each leaf's rank is proportional to."""
    if isinstance(importance, str):
        if importance == "equal":
            return dict.fromkeys(sizes, 1.0)
        if importance == "parameters":
            return {p: i * o / (i + o) for p, (_, i, o) in sizes.items()}
    if not isinstance(importance, Mapping):
        raise LoraError(
            f"importance={importance!r}. Write 'equal', 'parameters' or "
            "{path: number}."
        )
    require_paths("importance", importance, sizes)
    fail(
        f"importance['{p}']={x!r}. Write a finite number of 0 or more."
        for p, x in importance.items()
        if jnp.ndim(x) != 0 or not 0 <= float(x) < math.inf
    )
    if not any(float(x) for x in importance.values()):
        raise LoraError("importance is 0 for every leaf.")
    return {p: float(importance[p]) for p in sizes}


def budget_problems(parameters: Any, smallest: Any, largest: Any) -> Iterator[str]:
    """What is wrong with the numbers of a budget."""
    numbers_ = {"parameters": parameters, "smallest": smallest}
    if largest is not None:
        numbers_["largest"] = largest
    for name, x in numbers_.items():
        if isinstance(x, bool) or not isinstance(x, numbers.Integral) or x < 1:
            yield f"{name}={x!r}. Write an int of at least 1."
            return
    if largest is not None and largest < smallest:
        yield f"largest={largest} is below smallest={smallest}."


def within_budget(
    parameters: int,
    share: Mapping[str, float],
    cost: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, float]:
    """Ranks min(max(level · share, least), most), with the highest level in budget."""

    def ranks(level: float) -> dict[str, float]:
        return {p: min(max(level * share[p], least[p]), most[p]) for p in share}

    low = 0.0
    high = max(most.values()) / min(x for x in share.values() if x > 0)
    if sum(r * cost[p] for p, r in ranks(high).items()) <= parameters:
        return ranks(high)
    for _ in range(100):
        level = (low + high) / 2
        fits = sum(r * cost[p] for p, r in ranks(level).items()) <= parameters
        low, high = (level, high) if fits else (low, level)
    return ranks(low)


def best(found: Mapping[str, Any], count: Any) -> dict[str, jax.Array]:
    """Which numbers of all leaves are the `count` largest; of equals, the first."""
    flat = jnp.concatenate([replicated(s).reshape(-1) for s in found.values()])
    order = jnp.argsort(-flat, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    keep, kept, at = place < count, {}, 0
    for path, s in found.items():
        kept[path] = keep[at : at + s.size].reshape(s.shape)
        at += s.size
    return kept
