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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from flora._files.atomic import steadily
from flora._peft.config import read
from flora._peft.file import CONFIG, WEIGHTS, directory, read_tensors, write
from flora._peft.ignored import Ignored
from flora._peft.keys import sort_out
from flora._peft.kinds.activated import Activated, activate
from flora._peft.kinds.bias import Added as Added
from flora._peft.kinds.bias import Biased as Biased
from flora._peft.kinds.diagonal import BlockDiagonal as BlockDiagonal
from flora._peft.kinds.groups import AcrossGroups as AcrossGroups
from flora._peft.kinds.kasa import KaSA as KaSA
from flora._peft.kinds.residual import read_starts
from flora._peft.kinds.twice import AddedTwice as AddedTwice
from flora._peft.load import assign, coverage_problems, expected_layouts
from flora._peft.naming.names import Module, Names
from flora._peft.naming.names_match import match_names
from flora._peft.nodes import base_problems, in_dtype, node_of, placed_rows, whole_of
from flora._peft.save import written
from flora._trace.discover import Finding, discover
from flora._trace.stage import stage
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.layout import Layout
from flora._tree.paths import Pattern, named_leaves
from flora._tree.quantized import abstract, is_quantized
from flora._tree.weight import LoraWeight, base_of, is_node

# AcrossGroups, Added and the other variants are what adapter files name by this module.
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
    content = in_dtype(sort_out(tensors, config, folder), dtype)
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
    new = {p: node_of(site, config, folder, taken) for p, site in found.adapted.items()}
    new |= {p: placed_rows(x, dtype) for p, x in found.rows.items()}
    fail(base_problems(found, leaves, config, folder))
    new |= whole_of(found, leaves, folder)
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
