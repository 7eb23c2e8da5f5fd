"""`init`: from a plain tree to an adapted one."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flora._algebra.norms import zero_problems
from flora._algebra.variants import DoRA
from flora._trace.discover import Finding, discover
from flora._trace.interpret import remedy
from flora._trace.roles import parts_in, vocabulary
from flora._trace.stage import Staged, stage
from flora._tree.arrays import is_array
from flora._tree.checks import weight_problems
from flora._tree.config import PATTERN_FIELDS, LoraConfig, require_config
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.initializers import ByKind, Initializer
from flora._tree.keys import path_salt, require_key
from flora._tree.layout import Layout
from flora._tree.paths import (
    entries,
    exactly,
    first,
    is_static,
    matches,
    named_leaves,
)
from flora._tree.placement import placed_as_base
from flora._tree.quantized import abstract, is_quantized
from flora._tree.selection import idle_entries, idle_keys, nothing_selected, shown
from flora._tree.weight import LoraWeight, Trained, is_node, within_blocks
from flora._verbs import indices, rows
from flora._verbs.draw import drawn, kind_of, root_of
from flora._verbs.lora import returned_raw

Named = list[tuple[str, Any]]


def init(
    key: Any, config: LoraConfig, fn: Callable, tree: Any, *args: Any, **kwargs: Any
) -> Any:
    """The adapted tree: targeted leaves become `LoraWeight(base, a, b)`.

    ΔW = scale A B with A ~ N(0, 1/(3·in)) and B = 0, or as `config.init` has it, so the
    adapted model starts as the pretrained one.  `fn(tree, *args, **kwargs)` is traced
    once, abstractly, to find out which axes of each weight are stacked, contracted and
    produced; it never runs.

    Args:
      key: a PRNG key, of `jax.random.key` or `PRNGKey`, consumed.  Each leaf's draw
        depends on the key and the leaf's path only.
      config: what to adapt and how.
      fn: the function that the adapted tree will run in, such as `model.apply`.
      tree: its parameter tree: Linen variables, an NNX state, any pytree.  Arrays,
        tracers or `jax.ShapeDtypeStruct`s.
      *args: the other arguments of one call, arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      `tree` with `LoraWeight` nodes where `config.target` selects and `Trained` nodes
      where `config.train` does.  Bases and other leaves are the very same arrays.

    Raises:
      LoraError: a pattern, or an entry of several, selects nothing; a selected leaf is
        not used, has no factored rule, has two layouts, or is not floating; the tree is
        empty or adapted already.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> adapted = flora.init(jax.random.key(0), flora.LoraConfig(rank=2),
      ...                      lambda p, x: x @ p["kernel"], params, jnp.ones((2, 4)))
      >>> adapted["kernel"].a.shape, adapted["kernel"].b.shape
      ((4, 2), (2, 3))

    References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
    """
    require_key(key, "init")
    config = require_config(config)
    if not callable(fn):
        raise LoraTypeError(
            f"fn is a {type(fn).__name__}; expected the function to run. "
            "The order is flora.init(key, config, fn, tree, *args)."
        )
    named, treedef = named_leaves(tree)
    config = indices.read(config, named)
    targets, trained = _selection(config, named)
    words = rows.chosen(config, named, targets | trained)
    fail(
        f"rows: '{p}' {why}. Take it out of rows=."
        for p, x in named
        if p in words and (why := _unadaptable(x))
    )
    given = _given_layouts(config, [(p, x) for p, x in named if p in targets])
    leaves = [abstract(leaf) for _, leaf in named]
    staged = stage(fn, leaves, treedef, args, kwargs, verb="flora.init")
    mine = targets | {*words}
    followed = {i: path for i, (path, _) in enumerate(named) if path in mine}
    found = discover(staged, leaves, followed, given)
    layouts = _layouts(config, dict(named), found)
    own = {path: layouts.pop(path) for path in words}
    adapters = indices.adapters(config, named, layouts)
    root = root_of(key, [x for p, x in named if p in mine])
    starts = _starts(config, dict(named), layouts, found, staged, followed)
    wanted = [
        (p, x, layouts[p], adapters[p].rank, starts[p])
        for p, x in named
        if p in adapters
    ]
    factors = drawn(root, jnp.dtype(config.dtype), wanted)

    def adapt(path: str, leaf: Any) -> Any:
        if path in trained:
            return Trained(leaf)
        if path in words:
            known = words[path], own[path], found[path]
            return _started(root, path, rows.weight(config, path, leaf, *known))
        if path not in adapters:
            return leaf
        weight = LoraWeight(
            leaf,
            *factors[path],
            layout=layouts[path],
            rank=adapters[path].rank,
            alpha=adapters[path].alpha,
            rank_stabilized=config.rank_stabilized,
            dropout=float(config.dropout),
            fallback=config.fallback,
            form=first(config.form_pattern, config.form, path, leaf),
            variant=config.variant,
            blocks=adapters[path].blocks,
        )
        if config.variant is not None:
            weight = _started(root, path, weight)
        return within_blocks(weight)

    made = [adapt(path, leaf) for path, leaf in named]
    fail(
        problem
        for (path, _), x in zip(named, made, strict=True)
        if isinstance(x, LoraWeight) and isinstance(x.variant, DoRA)
        for problem in zero_problems(path, x, x.extra["magnitude"])
    )
    return treedef.unflatten(made)


def _selection(config: LoraConfig, named: Named) -> tuple[set[str], set[str]]:
    """The paths that get factors and those that train whole."""
    paths = [path for path, _ in named]
    if not named:
        raise LoraError(
            "The tree is empty: it has no leaves. Pass the parameters, such as "
            "the variables that model.init returned."
        )
    fail(
        f"'{path}' is adapted already. Adapt the tree that flora.merge or flora.split "
        "returns."
        for path, leaf in named
        if is_node(leaf)
    )
    fail(_static_entries(config, named))
    named = [(p, x) for p, x in named if not is_static(x)]
    hit = [(p, x) for p, x in named if matches(config.target, p, x)]
    exclude = indices.whole(config.exclude)
    chosen = [(p, x) for p, x in hit if not matches(exclude, p, x)]
    trained = {p for p, x in named if matches(config.train, p, x)}
    other = trained or entries(config.train) or config.rows
    if not entries(config.target) and not other:
        raise LoraError(nothing_selected("target", config.target, paths))
    fail(
        p
        for name in ("target", "train")
        for p in idle_entries(name, getattr(config, name), named)
    )
    if hit and not chosen:
        raise LoraError(
            f"exclude={config.exclude!r} takes out all of the {len(hit)} leaves "
            f"that target={config.target!r} selects. Narrow exclude."
        )
    wide = [(p, x) for p, x in chosen if len(getattr(x, "shape", ())) >= 2]
    fail(_narrow_entries(config, chosen, wide, trained))
    fail(_leaf_problems(wide, [(p, x) for p, x in named if p in trained]))
    fail(_scope_problems(config, hit, wide))
    return {p for p, _ in wide}, trained


def _static_entries(config: LoraConfig, named: Named) -> Iterable[str]:
    """Entries that select nothing but what is no array."""
    for name in ("target", "train"):
        for entry in entries(getattr(config, name)):
            hit = [(p, x) for p, x in named if matches(entry, p, x)]
            if hit and all(is_static(x) for _, x in hit):
                path, leaf = hit[0]
                yield (
                    f"{name}: {shown(entry)} selects '{path}', {_kind(leaf)}; expected "
                    f"arrays. Take it out of {name}=."
                )


def _narrow_entries(
    config: LoraConfig, chosen: Named, wide: Named, trained: Collection[str]
) -> Iterable[str]:
    """Entries of `target` that select vectors alone, which do not train whole."""
    for entry in entries(config.target):
        if any(matches(entry, p, x) for p, x in wide):
            continue
        vectors = {p: x for p, x in chosen if matches(entry, p, x) and p not in trained}
        if not vectors:
            continue
        (path, leaf), more = next(iter(vectors.items())), len(vectors) - 1
        globs = [exactly(p) for p in vectors]
        train = globs[0] if not more else entry if more > 2 else globs
        yield (
            f"'{path}' has shape {tuple(getattr(leaf, 'shape', ()))}; LoRA needs at "
            f"least 2 axes, and {shown(entry)} selects none that has"
            f"{f' ({more} more have not)' if more else ''}. Take it out of target=, or "
            f"write train={train!r} to train {'them' if more else 'it'} whole."
        )


def _leaf_problems(targets: Named, trained: Named) -> Iterable[str]:
    train = {p for p, _ in trained}
    bad = {p: why for p, x in targets if (why := _unadaptable(x))}
    for p, _ in targets:
        if p in train:
            yield (
                f"'{p}' is named in both target and train. Write "
                f"exclude={exactly(p)!r}, or take it out of train."
            )
        if p in bad:
            yield f"'{p}' {bad[p]}. {_without(p, bad, targets)}."
    for p, x in trained:
        if not _floating(x) or is_quantized(x):
            yield f"'{p}' is {_kind(x)} and cannot train. Take it out of train=."


def _unadaptable(x: Any) -> str:
    if not _floating(x):
        return f"is {_kind(x)}; LoRA needs a floating weight"
    return "" if 0 not in x.shape else f"has shape {tuple(x.shape)}, no elements"


def _without(path: str, bad: Collection[str], targets: Collection[Any]) -> str:
    """What leaves a leaf out, if that leaves any."""
    if len(bad) == len(targets):
        return "Select others in target="
    return f"Write exclude={exactly(path)!r}"


def _scope_problems(config: LoraConfig, hit: Named, targets: Named) -> Iterable[str]:
    """Entries that have nothing to do with what `target` selects."""
    found = idle_entries("exclude", config.exclude, hit)
    for name in PATTERN_FIELDS:
        found += idle_keys(name, getattr(config, name), targets)
    for problem in found:
        idle = " selects none " in problem
        yield problem + " It must match a leaf that target selects." * idle


def _floating(x: Any) -> bool:
    return (is_array(x) or is_quantized(x)) and jnp.issubdtype(x.dtype, jnp.inexact)


def _kind(x: Any) -> str:
    if is_quantized(x):
        return repr(x)
    return kind_of(x)


def _given_layouts(config: LoraConfig, targets: Named) -> dict[str, Layout]:
    """The layouts that the config names, checked."""
    given = {}
    for path, leaf in targets:
        layout = first(config.layouts, None, path, leaf)
        if layout is not None:
            given[path] = layout
    fail(
        f"layouts: '{path}' has {len(leaf.shape)} axes and was given {given[path]}. "
        f"Name each of 0 to {len(leaf.shape) - 1} once, with at least one in and one "
        "out axis."
        for path, leaf in targets
        if path in given and not (given[path].in_ and given[path].fits(len(leaf.shape)))
    )
    return given


def _layouts(
    config: LoraConfig, leaves: dict[str, Any], found: Mapping[str, Finding]
) -> dict[str, Layout]:
    """The layout of each target; all that have none are reported at once."""
    bad = [p for p, f in found.items() if _finding_problems(config, p, f, "")]
    fail(
        problem
        for path in bad
        for problem in _finding_problems(
            config, path, found[path], _without(path, bad, found)
        )
    )
    layouts = {}
    for path, finding in found.items():
        last = len(leaves[path].shape) - 1
        layouts[path] = finding.layout or Layout((), tuple(range(last)), (last,))
    return layouts


def _finding_problems(
    config: LoraConfig, path: str, finding: Finding, without: str
) -> list[str]:
    strict = config.fallback == "error"
    if finding.returned and strict:
        return [returned_raw(path)]
    if finding.status == "unused":
        return [
            f"'{path}' is targeted, but the function never uses it. {without}, or pass "
            "the arguments of a call that does."
        ]
    if finding.conflict:
        return [
            f"'{path}' has no one layout: {finding.conflict}. {without}, or choose: "
            f"layouts={{{exactly(path)!r}: flora.Layout(...)}}."
        ]
    return [f"{use}. {remedy(use)}." for use in finding.dense] if strict else []


def _starts(
    config: LoraConfig,
    leaves: dict[str, Any],
    layouts: Mapping[str, Layout],
    found: Mapping[str, Finding],
    staged: Staged,
    followed: Mapping[int, str],
) -> dict[str, Initializer]:
    """The initializer of each target, where it depends on the kind that of its kind."""
    starts = {p: first(config.init_pattern, config.init, p, leaves[p]) for p in layouts}
    kinds = {p: x for p, x in starts.items() if isinstance(x, ByKind)}
    if not kinds:
        return starts
    parts = parts_in(staged, followed, found)
    return starts | {
        p: x.of(vocabulary(parts, p, found[p], layouts[p], tuple(leaves[p].shape)))
        for p, x in kinds.items()
    }


def _started(root: Any, path: str, weight: LoraWeight) -> LoraWeight:
    """The weight as its variant starts it; abstract where it is abstract."""
    variant: Any = weight.variant
    salt = path_salt(f"variant of {path}")

    def start(root: Any, weight: LoraWeight) -> LoraWeight:
        return variant.start(jax.random.fold_in(root, salt), weight)

    if any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((root, weight))
    ):
        made = jax.eval_shape(start, root, weight)
        made = dataclasses.replace(made, base=weight.base, a=weight.a, b=weight.b)
    else:  # its constants go to the device
        with jax.transfer_guard_host_to_device("allow"):
            made = start(root, weight)
    fail(weight_problems(path, made))
    return placed_as_base(made)
