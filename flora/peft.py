"""Adapters of Hugging Face PEFT: read into a Flax tree, written for PEFT and servers.

    adapted = flora.peft.load("adapters/run1", params)
    flora.peft.save("adapters/run2", adapted, base_model_name_or_path="org/model")

PEFT's y = x Wᵀ + scale (x Aᵀ) Bᵀ: its A and B are flora's a and b transposed.  A leaf
is found by its path, which is the parameter's name in PyTorch by the convention of HF's
Flax models: `model.layers.0.mlp.up_proj.weight` is `model/layers/0/mlp/up_proj/kernel`.
A list of Linen's, `layers_0`, `layers_1`, … with the same modules in each, is
`layers.0`; in a tree that writes lists as `layers/0`, `wi_0` is a module's own name.
Other trees need `names=`.

What was loaded remembers names, dtype and base model of its file, through training,
`jax.jit`, `flora.split` and `flora.save`, and is saved as it came.

References: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora._algebra.norms import compiled_norms, zero_problems
from flora._algebra.variants import DoRA, MiCA
from flora._files.atomic import steadily
from flora._peft.config import PeftConfig, read
from flora._peft.factors import magnitude, node
from flora._peft.file import CONFIG, WEIGHTS, directory, read_tensors, write
from flora._peft.ignored import Ignored
from flora._peft.keys import PREFIX, Content, sort_out
from flora._peft.kinds.activated import Activated, activate
from flora._peft.kinds.bias import Added, with_bias
from flora._peft.kinds.bias import Biased as Biased
from flora._peft.kinds.diagonal import BlockDiagonal as BlockDiagonal
from flora._peft.kinds.diagonal import variant_of
from flora._peft.kinds.groups import AcrossGroups as AcrossGroups
from flora._peft.kinds.kasa import KaSA, diagonal, truncated
from flora._peft.kinds.residual import (
    Starts,
    is_changed,
    read_starts,
    residual,
    start_of,
    without_start,
)
from flora._peft.kinds.twice import AddedTwice as AddedTwice
from flora._peft.load import (
    AdaptedLeaf,
    Assignment,
    assign,
    coverage_problems,
    expected_layouts,
)
from flora._peft.naming.names import Module, Names, Slot
from flora._peft.naming.names_match import match_names
from flora._peft.save import written
from flora._peft.targets import listed
from flora._peft.whole import put
from flora._trace.discover import Finding, discover
from flora._trace.stage import stage
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.layout import Layout
from flora._tree.paths import Pattern, named_leaves
from flora._tree.placement import mesh_of, spec_of, specs
from flora._tree.quantized import abstract, is_quantized
from flora._tree.weight import LoraWeight, Trained, base_of, is_node, uniform

__all__ = [
    "Activated",
    "Module",
    "Names",
    "activate",
    "load",
    "match_names",
    "save",
]


def load(
    dir: str | os.PathLike[str],
    tree: Any,
    *,
    names: Any = None,
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    start: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    ignore: Pattern = (),
    allow_nonfinite: bool = False,
) -> Any:
    """The tree with PEFT's adapter in it, ready to run and to train on.

    Args:
      dir: where adapter_config.json and adapter_model.safetensors lie.
      tree: the base model's parameters: arrays or `jax.ShapeDtypeStruct`s.  If it is
        adapted already, its nodes' layouts are used and its factors replaced.
      names: which module lies in which leaf, where HF's convention does not say:
        `{leaf pattern: module}`, where `{i}` in both stands for what varies, and in the
        module alone for what is stacked in the leaf.  A pattern is the end of a path,
        or a whole path after a '/'; the first that matches a leaf decides.  A module is
        a dotted path, a `Module`, or a list of those that share the leaf's out
        features.  Or a callable path -> module, or what `match_names` returned.
      fn: the function that the tree will run in; it is traced on `args` and `kwargs`
        to find each leaf's layout instead of inferring it from sizes and names.
      args: the other positional arguments of one call of `fn`.
      kwargs: its keyword arguments.
      start: the directory of the same adapter as it was saved before training, for
        starts that changed the base and cannot be repeated (pissa_niter, CorDA,
        LoRA-GA): PEFT's `path_initial_model_for_weight_conversion`.  Its scale B A is
        taken off the base.
      dtype: of the factors; by default float32, or float64 where the file has it.
      ignore: a pattern (see `LoraConfig`; dots in the place of '/') of what to pass
        over: keys that the file has and this base or config does not, keys that it
        lacks, and entries of the config, such as 'vision_tower.*' or 'use_qalora'.
      allow_nonfinite: True to take NaN and infinity too.

    Returns:
      The tree with `LoraWeight`s, and `Trained` leaves for `modules_to_save` and
      biases, which remember the file.  The bases are the arrays of `tree` themselves,
      except for adapters whose start changed the base, PiSSA and OLoRA among them:
      those need the base minus what was taken out of it.

    Raises:
      LoraError: a file is missing, damaged or not a LoRA adapter; or config, tensors
        and base do not agree in every name, shape, rank and flag.  PEFT accepts most
        such mismatches silently.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, flora, flora.peft
      >>> fn = lambda p, x: x @ p["lin"]["kernel"]
      >>> params, x = {"lin": {"kernel": jnp.ones((4, 3))}}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2, target="lin/kernel")
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> flora.peft.save(path := tempfile.mkdtemp(), adapted)
      >>> loaded = flora.peft.load(path, params)
      >>> bool((loaded["lin"]["kernel"].a == adapted["lin"]["kernel"].a).all())
      True
    """
    folder = directory("load", dir)
    named, treedef = named_leaves(tree)
    leaves = dict(named)
    fail(_tree_problems(named))
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise LoraTypeError(
            f"flora.peft.load: dtype={dtype!r}. Write a floating dtype."
        )
    ignored = Ignored(ignore)
    starts = None if start is None else directory("load", start)
    try:
        config, tensors = steadily(
            (folder / CONFIG, folder / WEIGHTS),
            lambda: (
                read(folder, ignored, started=start is not None),
                read_tensors(folder, ignored),
            ),
        )
        taken = None if starts is None else (read_starts(starts, ignored), starts)
    except OSError as error:
        raise LoraError(
            f"{error.filename or folder}: cannot be read: {error.strerror}. Pass a "
            "directory that this user may read."
        ) from error
    content = _in_dtype(sort_out(tensors, config, folder), dtype)
    require_finite(f"{folder / WEIGHTS}", tensors, allow_nonfinite)
    given = expected_layouts(leaves)
    uses = (
        {} if fn is None else _followed(fn, named, treedef, args, kwargs or {}, given)
    )
    given |= {path: f.layout for path, f in uses.items() if f.layout is not None}
    readers = None if fn is None else {p: _readers(f) for p, f in uses.items()}
    found = assign(
        folder,
        config,
        content,
        leaves,
        names,
        given,
        readers=readers,
        ignored=ignored,
    )
    ignored.require_used(tensors)
    fail(coverage_problems(leaves, found, folder / WEIGHTS))
    new = {p: _node(site, config, folder, taken) for p, site in found.adapted.items()}
    new |= {p: _rows(x, dtype) for p, x in found.rows.items()}
    fail(_base_problems(found, leaves, config, folder))
    new |= _whole(found, leaves, folder)
    new |= {
        path: dataclasses.replace(new[path], origin=memory.origin(path))
        for path, memory in found.memories.items()
        if is_node(new[path])
    }
    return treedef.unflatten(
        [new.get(p, x if is_quantized(x) else base_of(x)) for p, x in named]
    )


def _tree_problems(named: Sequence[tuple[str, Any]]) -> list[str]:
    if not named:
        return ["flora.peft.load: the tree is empty. Pass the base model's parameters."]
    counts: dict[str, int] = {}
    for path, _ in named:
        counts[path] = counts.get(path, 0) + 1
    return [
        f"flora.peft.load: '{path}' names two leaves of the tree. Pass a tree whose "
        "paths differ."
        for path, n in counts.items()
        if n > 1
    ] + [
        f"flora.peft.load: '{path}' is an adapter without its base. Pass the base "
        "model's parameters."
        for path, x in named
        if isinstance(x, LoraWeight) and x.base is None
    ]


def _in_dtype(content: Content, dtype: Any) -> Content:
    """Factors in float32 at least, as PEFT has them, or as asked for."""
    parts = ("a", "b", "magnitude", "bias", "diag")
    loras = tuple(
        dataclasses.replace(x, **{n: _cast(getattr(x, n), dtype) for n in parts})
        for x in content.loras
    )
    return dataclasses.replace(content, loras=loras)


def _cast(x: Any, dtype: Any) -> Any:
    if x is None:
        return None
    wide = np.float64 if x.dtype == np.float64 else np.float32
    return x.astype(wide if dtype is None else dtype)


def _rows(node: LoraWeight, dtype: Any) -> LoraWeight:
    """The node of a leaf some of whose rows train, with factors as `_in_dtype`."""
    a, b = (_cast(np.asarray(x), dtype) for x in (node.a, node.b))
    node = dataclasses.replace(node, a=a, b=b)
    return dataclasses.replace(node, **_placed(node))


def _followed(
    fn: Callable,
    named: Sequence[tuple[str, Any]],
    treedef: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Layout],
) -> dict[str, Finding]:
    """What a call of `fn` does with each leaf."""
    leaves = [abstract(base_of(leaf)) for _, leaf in named]
    paths = {
        i: path
        for i, (path, _) in enumerate(named)
        if is_array(leaves[i]) and len(leaves[i].shape) > 1
    }
    staged = stage(fn, leaves, treedef, args, kwargs, verb="flora.peft")
    return discover(staged, leaves, paths, given)


def _readers(finding: Finding) -> set[str]:
    """The kinds of PyTorch modules that would read a leaf as the function does."""
    kinds = {"gather": "embedding", "conv_general_dilated": "conv"}
    return {kinds.get(use.primitive, "linear") for use in finding.uses if use.binding}


def _node(
    site: AdaptedLeaf, config: PeftConfig, folder: Any, taken: tuple[Starts, Any] | None
) -> LoraWeight:
    """The node of a leaf, sharded as its base is."""
    base = site.base
    kasa = config.kasa_config is not None
    if site.layout.in_ and (config.residual or taken or kasa):
        if isinstance(base, jax.ShapeDtypeStruct) or is_quantized(base):
            raise LoraError(
                f"{folder / CONFIG}: the start of the adapter (init_lora_weights "
                f"{config.init_lora_weights!r}{' and KaSA' * kasa}) changed the base, "
                f"but '{site.path}' is {base!r}. Pass arrays."
            )
        known = base, site.layout, site.pieces, site.beside
        left = (
            without_start(*known, *taken)
            if taken
            else truncated(*known, folder / CONFIG)
            if kasa
            else residual(*known, config.residual)
        )
        base = jax.device_put(
            left, base.sharding if isinstance(base, jax.Array) else None
        )
    made = node(site.path, site.base, site.layout, site.pieces, site.beside)
    if not site.layout.in_:  # a bias
        return dataclasses.replace(made, variant=Added(), **_placed(made))
    if (config.residual or taken) and any(is_changed(p.lora) for p in site.pieces):
        scales = ((p.rank, p.scale) for p in site.pieces)
        how = config.init_lora_weights
        how = how if isinstance(how, str) else "start"
        how = f"PEFT's {how}" if taken else start_of(config.residual, scales)
        made = dataclasses.replace(made, start=how)
    made = with_bias(made, site.pieces, site.beside)
    new = dataclasses.replace(
        made, base=base, dropout=float(config.lora_dropout), **_placed(made)
    )
    if config.kasa_config is not None:
        e = jax.device_put(diagonal(made, site.pieces))
        if spec_of(base) is not None:
            e = jax.device_put(e, NamedSharding(mesh_of(base), PartitionSpec()))
        named = {k: v for k, v in config.kasa_config.items() if k in ("beta", "gamma")}
        return dataclasses.replace(new, variant=KaSA(**named), extra={"e": e})
    if config.use_bdlora:
        variant = variant_of(new, site.pieces, folder / CONFIG)
        return new if variant is None else dataclasses.replace(new, variant=variant)
    if config.alora_invocation_tokens:
        return _activated(new, site, config, folder)
    if config.init_lora_weights == "mica" and new.variant is None:
        if site.pieces[0].lora.kind == "embedding" and site.layout.in_ > (
            site.layout.out
        ):
            raise LoraError(
                f"'{site.path}' has the layout {site.layout}, of a product, and the B "
                "that MiCA keeps is of a lookup. Pass the plain tree, and no fn=."
            )
        return dataclasses.replace(new, variant=MiCA())
    if not config.use_dora:
        return new
    m = magnitude(site.layout, base.shape, site.pieces, site.beside)
    m = jax.device_put(m)
    spec = spec_of(base)
    if spec is not None:
        found = specs(site.layout, spec, len(base.shape))
        stack = len(site.layout.stack)
        parts = (*found.b[:stack], *found.b[stack + 1 :])
        m = jax.device_put(m, NamedSharding(mesh_of(base), PartitionSpec(*parts)))
    new = dataclasses.replace(new, extra={"magnitude": m}, variant=DoRA())
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(new)):
        fail(zero_problems(site.path, new, compiled_norms(uniform(new))))
    return new


def _activated(
    new: LoraWeight, site: AdaptedLeaf, config: PeftConfig, folder: Any
) -> LoraWeight:
    """The node as one that acts from its invocation tokens on."""
    lora = site.pieces[0].lora
    plain = lora.kind == "linear" and not lora.raw and new.variant is None
    if not plain or config.use_dora or config.init_lora_weights == "mica":
        raise LoraError(
            f"{folder / CONFIG}: alora_invocation_tokens is "
            f"{[*config.alora_invocation_tokens]}, and '{lora.name}' is no plain LoRA "
            "of a linear layer, the only one that PEFT activates. Train without it."
        )
    variant = Activated(config.alora_invocation_tokens)
    return dataclasses.replace(new, variant=variant)


def _placed(made: LoraWeight) -> dict[str, Any]:
    """The factors as JAX arrays, sharded as the weight is."""
    spec = spec_of(made.base)
    if spec is None:
        return jax.device_put({"a": made.a, "b": made.b})
    found, mesh = specs(made.layout, spec, len(made.base.shape)), mesh_of(made.base)
    return {
        "a": jax.device_put(made.a, NamedSharding(mesh, found.a)),
        "b": jax.device_put(made.b, NamedSharding(mesh, found.b)),
    }


def _whole(found: Assignment, leaves: Mapping[str, Any], folder: Any) -> dict[str, Any]:
    """The leaves that train whole, with the values of the file."""
    new, problems = {}, []
    for path, parts in found.whole.items():
        base = base_of(leaves[path])
        if is_quantized(base):
            problems.append(f"'{path}' is {base!r} and cannot train whole.")
            continue
        if isinstance(base, jax.ShapeDtypeStruct):
            value = np.zeros(base.shape, base.dtype)
        else:
            value = np.array(base)
        beside = tuple(slot for slot, _, _ in parts)
        for slot, index, x in parts:
            try:
                put(value, slot, index, x.astype(value.dtype), beside)
            except ValueError as error:
                problems.append(
                    f"{folder / WEIGHTS}: '{PREFIX}{slot.at(index)}' has shape "
                    f"{x.shape}, which does not fit the base's '{path}' "
                    f"{tuple(base.shape)}: {error}. Is it the adapter of another base?"
                )
        statistics = path.rpartition("/")[2] in ("mean", "var")
        array = jax.device_put(value, getattr(base, "sharding", None))
        new[path] = array if statistics else Trained(array)
    fail(problems)
    return new


def _base_problems(
    found: Assignment, leaves: Mapping[str, Any], config: PeftConfig, folder: Any
) -> Iterator[str]:
    """Weights of the base in the file that differ from this base's."""
    for path, parts in found.of_base.items():
        for slot, index, x in parts:
            if gap := _gap(base_of(leaves[path]), slot, index, x):
                yield (
                    f"{folder / WEIGHTS}: the base weight of '{slot.at(index)}' {gap}. "
                    "The adapter was trained on another base, or with a vocabulary of "
                    "another size: resize the base as the adapter's was."
                )
    for path, parts in found.unnamed.items():
        for slot, index, x in parts:
            name, base = slot.at(index), base_of(leaves[path])
            gap = _gap(base, slot, index, x)
            if not is_array(base) or isinstance(base, jax.ShapeDtypeStruct):
                gap = f"cannot be compared with '{path}', which has no values"
            if gap:
                yield (
                    f"{folder / WEIGHTS}: '{PREFIX}{name}' {gap}, and is not part of "
                    f"the adapter by {CONFIG}: modules_to_save is "
                    f"{listed(config.modules_to_save)} and bias is '{config.bias}'. "
                    f"Name its module there, or write ignore={name!r}."
                )


def _gap(base: Any, slot: Slot, index: Sequence[int], x: np.ndarray) -> str:
    """How a weight in the file differs from the base's; '' if it does not."""
    if not is_array(base) or isinstance(base, jax.ShapeDtypeStruct):
        return ""
    want = np.zeros(base.shape, np.float64)
    have = np.asarray(base).astype(np.float64)
    try:
        put(want, slot, index, x.astype(np.float64), (slot,))
    except ValueError as error:
        return f"does not fit '{slot.path}' {tuple(base.shape)}: {error}"
    at = tuple(index)
    gap = np.abs(want[at] - have[at]).max() / max(np.abs(have[at]).max(), 1e-30)
    if gap <= 2**-7:  # bfloat16 keeps 8 bits
        return ""
    return (
        f"differs from '{slot.path}' of the base by {gap:.1e} of its largest value; "
        "expected the same"
    )


def save(
    dir: str | os.PathLike[str],
    adapted: Any,
    *,
    names: Any = None,
    fn: Callable | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    tied: Mapping[str, Any] | None = None,
    base: Any = None,
    serving: bool = False,
    layer_replication: Sequence[Sequence[int]] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    dtype: Any = None,
    ignore: Pattern = (),
    allow_nonfinite: bool = False,
) -> None:
    """Writes the adapter as PEFT does: whatever stops it leaves the old one or the new.

    The config names every module in full, with its rank and alpha where they differ.
    Other files in the directory stay, as do links and modes.  `load` sees one of the
    two at any time.  PEFT, which opens both files one after the other, refuses the
    directory where a save was stopped between them: a note lies there for the config.

    Args:
      dir: the directory; it is made if it does not exist.
      adapted: an adapted tree, or the adapter that `flora.split` returned.
      names: as for `load`.  Adapters of several raw parameters of one module are nested
        in the order of the names.  By default those of the file that the tree was
        loaded from, or else HF's convention, which may not tell: `dense_0` is a name,
        or the first of a list.
      fn: the function that the tree runs in, traced on `args` and `kwargs` to tell
        convolutions and embeddings from linear layers, and to find weights that two
        modules share.  Without it a kernel with three in axes, or with two in a module
        called something with 'conv', is a convolution.
      args: the other positional arguments of one call of `fn`.
      kwargs: its keyword arguments.
      tied: `{leaf: module}`, such as `{'model/embed_tokens/embedding': 'lm_head'}`, the
        other modules of PyTorch that use a leaf's weight; the file then changes all of
        them alike, with `ensure_weight_tying`.  `{}` says that there are none.
      base: the plain base that the file's user will have, if the adapted tree's own
        base was changed at the start (PiSSA, OLoRA, LoRA-GA…).  The difference, which
        must be of low rank, is written as further rows of A and columns of B.
      serving: write what vLLM and SGLang apply in full: one rank, and a scale of
        alpha/r for all modules.
      layer_replication: the ranges of the base's layers that the tree's layers are,
        where PEFT shall repeat them, such as `[[0, 2], [1, 3]]`; by default those of
        the file that the tree was loaded from, `()` for none.
      base_model_name_or_path: of the model, for the config; by default that of the file
        that the tree was loaded from.
      task_type: such as 'CAUSAL_LM', for the config; by default the same.
      dtype: of the tensors; by default that of the file that the tree was loaded from,
        bfloat16 too if it was trained in float32 since, or else each array's own.
      ignore: a pattern (see `LoraConfig`) of batch statistics that the files shall
        lack.  PEFT saves those of modules that train whole, and no others.
      allow_nonfinite: True to write NaN and infinity too, which `load` must be told.

    Raises:
      LoraError: a leaf has no name or not a unique one; it holds NaN or infinity, or
        would in `dtype`; it is of a kind that PEFT, or a server if `serving`, does not
        support; or it is a batch statistic that the files would lack, and `base` does
        not show that it is as it was; or its base was changed at the start, in a way
        that PEFT cannot repeat, and `base` is not there.
    """
    folder = directory("save", dir)
    readers = None
    if fn is not None:
        named, treedef = named_leaves(adapted)
        given = expected_layouts(dict(named))
        uses = _followed(fn, named, treedef, args, kwargs or {}, given)
        readers = {path: _readers(f) for path, f in uses.items()}
    config, tensors = written(
        adapted,
        names=names,
        tied=tied,
        readers=readers,
        base=base,
        serving=serving,
        layer_replication=layer_replication,
        dtype=dtype,
        ignore=ignore,
        about={
            "base_model_name_or_path": base_model_name_or_path,
            "task_type": task_type,
        },
        allow_nonfinite=allow_nonfinite,
    )
    write(folder, config, tensors)
