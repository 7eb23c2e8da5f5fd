"""`init`: from a plain tree to an adapted one."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from flora._trace.discover import Finding, discover
from flora._trace.interpret import remedy
from flora._trace.stage import stage
from flora._tree.arrays import is_array
from flora._tree.checks import weight_problems
from flora._tree.config import LoraConfig, require_config
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.layout import Layout
from flora._tree.paths import matches, named_leaves, nothing_selected
from flora._tree.placement import placed_as_base
from flora._tree.quantized import abstract, is_quantized
from flora._tree.weight import LoraWeight, Trained, is_node
from flora._verbs.draw import drawn, kind_of
from flora._verbs.lora import returned_raw

Named = list[tuple[str, Any]]
T = TypeVar("T")


def init(
    key: Any, config: LoraConfig, fn: Callable, tree: Any, *args: Any, **kwargs: Any
) -> Any:
    """The adapted tree: targeted leaves become `LoraWeight(base, a, b)`.

    ΔW = scale A B with A ~ N(0, 1/(3·in)) and B = 0, so the adapted model starts as the
    pretrained one.  `fn(tree, *args, **kwargs)` is traced once, abstractly, to find out
    which axes of each weight are stacked, contracted and produced; it never runs.

    Args:
      key: a typed PRNG key (`jax.random.key`), consumed.  Each leaf's draw depends on
        the key and the leaf's path only.
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
      LoraError: the selection is empty; a selected leaf is not used, has no factored
        rule, has two layouts, is not floating, or is smaller than the rank; the tree is
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
    targets, trained = _selection(config, named)
    given = _given_layouts(config, [(p, x) for p, x in named if p in targets])
    leaves = [abstract(leaf) for _, leaf in named]
    found = discover(
        stage(fn, leaves, treedef, args, kwargs),
        leaves,
        {i: path for i, (path, _) in enumerate(named) if path in targets},
        given,
    )
    layouts = _layouts(config, dict(named), found)
    ranks = {
        p: _pick(config.rank_pattern, config.rank, p, leaf)
        for p, leaf in named
        if p in layouts
    }
    fail(_rank_problems(dict(named), layouts, ranks))
    root = consumed(key)
    wanted = [(p, x, layouts[p], ranks[p]) for p, x in named if p in layouts]
    factors = drawn(root, config.init, jnp.dtype(config.dtype), wanted)

    def adapt(path: str, leaf: Any) -> Any:
        if path in trained:
            return Trained(leaf)
        if path not in layouts:
            return leaf
        alpha = _pick(config.alpha_pattern, config.alpha, path, leaf)
        weight = LoraWeight(
            leaf,
            *factors[path],
            layout=layouts[path],
            rank=int(ranks[path]),
            alpha=float(alpha),
            rank_stabilized=config.rank_stabilized,
            dropout=float(config.dropout),
            fallback=config.fallback,
            form=_pick(config.form_pattern, config.form, path, leaf),
            variant=config.variant,
        )
        return weight if config.variant is None else _started(root, path, weight)

    return treedef.unflatten([adapt(path, leaf) for path, leaf in named])


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
    hit = [(p, x) for p, x in named if matches(config.target, p, x)]
    chosen = [(p, x) for p, x in hit if not matches(config.exclude, p, x)]
    trained = {p for p, x in named if matches(config.train, p, x)}
    if not hit and (config.target or not config.train):
        raise LoraError(nothing_selected("target", config.target, paths))
    if hit and not chosen:
        raise LoraError(
            f"exclude={config.exclude!r} takes out all of the {len(hit)} leaves "
            f"that target={config.target!r} selects. Narrow exclude."
        )
    if config.train and not trained:
        raise LoraError(nothing_selected("train", config.train, paths))
    wide = [(p, x) for p, x in chosen if len(getattr(x, "shape", ())) >= 2]
    fail([] if wide else [_too_few_axes(p, x) for p, x in chosen])
    fail(_leaf_problems(wide, [(p, x) for p, x in named if p in trained]))
    _check_scopes(config, hit, wide)
    return {p for p, _ in wide}, trained


def _leaf_problems(targets: Named, trained: Named) -> Iterable[str]:
    train = {p for p, _ in trained}
    for p, x in targets:
        if p in train:
            yield f"'{p}' is named in both target and train. Name it in one of them."
        if not _floating(x):
            yield f"'{p}' is {_kind(x)}; LoRA needs a floating weight. Exclude it."
        elif 0 in x.shape:
            yield f"'{p}' has shape {tuple(x.shape)}, no elements. Exclude it."
    for p, x in trained:
        if not _floating(x) or is_quantized(x):
            yield f"'{p}' is {_kind(x)} and cannot train. Take it out of train=."


def _check_scopes(config: LoraConfig, hit: Named, targets: Named) -> None:
    """Raises for a pattern that matches nothing which `target` selects."""
    patterns: list[tuple[str, Any, Named]] = []
    if config.exclude:
        patterns.append(("exclude", config.exclude, hit))
    for name in ("rank_pattern", "alpha_pattern", "layouts"):
        patterns += [(name, pattern, targets) for pattern in getattr(config, name)]
    for name, pattern, scope in patterns:
        if not any(matches(pattern, p, x) for p, x in scope):
            raise LoraError(
                nothing_selected(name, pattern, [p for p, _ in scope])
                + " It must match a leaf that target selects."
            )


def _floating(x: Any) -> bool:
    return (is_array(x) or is_quantized(x)) and jnp.issubdtype(x.dtype, jnp.inexact)


def _kind(x: Any) -> str:
    if is_quantized(x):
        return repr(x)
    return kind_of(x)


def _too_few_axes(path: str, leaf: Any) -> str:
    shape = getattr(leaf, "shape", ())
    return (
        f"'{path}' has shape {shape}; LoRA needs at least 2 axes. "
        "Exclude it, or name it in train= to train it whole."
    )


def _pick(patterns: Mapping[Any, T], default: T, path: str, leaf: Any) -> T:
    for pattern, value in patterns.items():
        if matches(pattern, path, leaf):
            return value
    return default


def _given_layouts(config: LoraConfig, targets: Named) -> dict[str, Layout]:
    """The layouts that the config names, checked."""
    given = {}
    for path, leaf in targets:
        layout = _pick(config.layouts, None, path, leaf)
        if layout is not None:
            given[path] = layout
    fail(
        f"layouts: '{path}' has {len(leaf.shape)} axes and was given {given[path]}. "
        f"Name each of 0 to {len(leaf.shape) - 1} once, with at least one in and one "
        "out axis."
        for path, leaf in targets
        if path in given and not given[path].fits(len(leaf.shape))
    )
    return given


def _layouts(
    config: LoraConfig, leaves: dict[str, Any], found: Mapping[str, Finding]
) -> dict[str, Layout]:
    """The layout of each target; all that have none are reported at once."""
    fail(p for path, f in found.items() for p in _finding_problems(config, path, f))
    layouts = {}
    for path, finding in found.items():
        last = len(leaves[path].shape) - 1
        layouts[path] = finding.layout or Layout((), tuple(range(last)), (last,))
    return layouts


def _finding_problems(config: LoraConfig, path: str, finding: Finding) -> list[str]:
    strict = config.fallback == "error"
    if finding.returned and strict:
        return [returned_raw(path)]
    if finding.status == "unused":
        return [
            f"'{path}' is targeted, but the function never uses it. "
            "Exclude it, or pass the arguments of a call that does."
        ]
    if finding.conflict:
        return [
            f"'{path}' has no one layout: {finding.conflict}. Exclude it, or choose: "
            f"layouts={{'{path}': flora.Layout(...)}}."
        ]
    return [f"{use}. {remedy(use)}." for use in finding.dense] if strict else []


def _rank_problems(
    leaves: dict[str, Any], layouts: Mapping[str, Layout], ranks: Mapping[str, int]
) -> Iterable[str]:
    for path, layout in layouts.items():
        shape = tuple(leaves[path].shape)
        _, in_, out = layout.matrix(shape)
        if ranks[path] > min(in_, out):
            yield (
                f"'{path}' has shape {shape} ({layout}), a matrix of {in_}×{out}; rank "
                f"{ranks[path]} is above {min(in_, out)}. Lower rank, exclude it, or "
                f"write rank_pattern={{'{path}': {min(in_, out)}}}."
            )


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
