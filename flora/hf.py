"""Base weights in the files of Hugging Face: safetensors, one or in shards.

    like = jax.eval_shape(model.init, key, ids)  # shapes, dtypes, shardings
    tensors = {"layers_0/q_proj/kernel": Tensor(...), ...}
    params = flora.hf.load("/models/llama", like, tensors)

No file is read whole: each device's part of a leaf comes straight out of the mapped
file.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._files.atomic import alone, replace, steadily, sync
from flora._files.fingerprint import describe, no_values, same_names
from flora._files.items import sharding_of
from flora._files.parsed import misfit, parsed
from flora._files.safetensors import (
    File,
    checked_path,
    no_dtype,
    read,
    unwritable_name,
    write,
)
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.nearest import Nearest
from flora._tree.paths import Pattern, check_pattern, matches, named_leaves
from flora._tree.selection import alone as glob_of
from flora._tree.weight import is_node

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-([0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a leaf's values lie: `tensor.reshape(split).transpose(axes).reshape(leaf)`.

    Attributes:
      keys: the tensor's name; a tuple of names is stacked along a new first axis.
      axes: the order in which the leaf takes the tensor's axes; `None` for as they are.
      shape: the shape of the tensor, where the leaf splits or joins axes of it.
      split: its axes once they are split, where they are to be split first; `axes` is
        the order of these.

    Example:
      >>> kernel = Tensor("q_proj.weight", axes=(1, 0))  # (out, in) in PyTorch
      >>> heads = Tensor("q_proj.weight", (1, 0), shape=(64, 32))  # a leaf (32, 4, 16)
      >>> stack = Tensor(("layers.0.norm.weight", "layers.1.norm.weight"))
      >>> first = Tensor("q.weight", (0, 2, 1), (64, 32), split=(4, 16, 32))
    """

    keys: str | tuple[str, ...]
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    split: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.keys,) if isinstance(self.keys, str) else tuple(self.keys)

    def of_one(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what one tensor gives, from that of the leaf."""
        return leaf if isinstance(self.keys, str) else leaf[1:]

    def source(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor, from that of the leaf."""
        if self.shape is not None:
            return self.shape
        one = self.of_one(leaf)
        order = range(len(one)) if self.axes is None else self.axes
        return tuple(one[list(order).index(i)] for i in range(len(one)))

    def given(self, tensor: np.ndarray, leaf: tuple[int, ...]) -> np.ndarray:
        """A leaf's values (one of its stack), `[...]`, of a tensor's."""
        if self.split is not None:
            tensor = tensor.reshape(self.split)
        order = range(tensor.ndim) if self.axes is None else self.axes
        return tensor.transpose(order).reshape(self.of_one(leaf))

    def taken(self, leaf: np.ndarray) -> np.ndarray:
        """A tensor's values of a leaf's (one of its stack): the inverse of `given`."""
        before = self.shape if self.split is None else self.split
        if self.axes is not None:
            if before is not None:
                leaf = leaf.reshape([before[i] for i in self.axes])
            leaf = leaf.transpose(np.argsort(self.axes))
        return leaf if self.shape is None else leaf.reshape(self.shape)


def load(
    path: str | os.PathLike[str],
    like: Any,
    tensors: Mapping[str, Tensor],
    *,
    unused: Pattern = (),
) -> Any:
    """A parameter tree with the weights of a checkpoint, each lying where `like` says.

    Args:
      path: the folder, its `model.safetensors.index.json`, or one `.safetensors` file.
      like: a tree of `jax.ShapeDtypeStruct`s (`jax.eval_shape` of the model's init) or
        arrays.  Each leaf gets its shape, dtype and sharding; floating values are cast.
      tensors: `{path of a leaf: Tensor(...)}`, for every leaf.
      unused: a pattern of tensors in the checkpoint that no leaf needs, such as
        `*.rotary_emb.inv_freq`; one list may serve several checkpoints, so its entries
        need not match.

    Returns:
      A tree of the structure of `like`.

    Raises:
      LoraError: files are missing, cut off or of another kind; or tensors are missing,
        unexpected, or of another shape or kind of dtype; all of them are named.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> tree, folder = {"kernel": jnp.ones((3, 2))}, tempfile.mkdtemp()
      >>> names = {"kernel": Tensor("linear.weight", axes=(1, 0))}
      >>> save(folder, tree, names)
      >>> load(folder, jax.eval_shape(lambda: tree), names)["kernel"].shape
      (3, 2)
    """
    check_pattern("unused", unused)
    path = checked_path(path, _no_path("load", path))
    watched = [path / _INDEX, path / _ONE] if path.is_dir() else [path]
    files = steadily(watched, lambda: _files(path))
    named, treedef = named_leaves(like)
    leaves = _checked("like", named, tensors)
    fail(f"{path}: {p}" for p in _problems(files, leaves, tensors, unused))
    made = [_made(files, x, tensors[p]) for p, x in leaves.items()]
    return treedef.unflatten(made)


def save(
    path: str | os.PathLike[str],
    tree: Any,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = 5 * 10**9,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a plain tree, such as what `flora.merge` returns, as a checkpoint.

    A reader, and whatever stops the process, sees the weights of before or the new
    ones: shards have names of their own, the index makes them count, and what the
    folder held before, an interrupted save's too, is removed after that.

    Args:
      path: the folder; `config.json` and the tokenizer are the caller's to put there.
      tree: arrays with values.
      tensors: as for `load`.
      shard_bytes: no shard is larger, unless one tensor is.
      allow_nonfinite: True to write NaN and infinity too, such as a mask of -inf.

    Raises:
      LoraError: the tree is adapted, a leaf has no values or no entry in `tensors`,
        holds NaN or infinity, or its dtype is none of the format's.
    """
    folder = checked_path(path, _no_path("save", path))
    if (
        isinstance(shard_bytes, bool)
        or not isinstance(shard_bytes, int)
        or shard_bytes < 1
    ):
        raise LoraError(f"save: shard_bytes={shard_bytes!r}. Write an int above 0.")
    leaves = _checked("tree", named_leaves(tree)[0], tensors)
    fail(f"save: {p}" for k, x in leaves.items()
         for p in no_values(k, x) or no_dtype(k, x.dtype))  # fmt: skip
    require_finite("save", leaves, allow_nonfinite)
    shards: list[dict[str, tuple[str, int]]] = [{}]
    size = total = 0
    for leaf, x in leaves.items():
        names = tensors[leaf].names
        for i, name in enumerate(names):
            bytes_ = x.size * x.dtype.itemsize // len(names)
            if shards[-1] and size + bytes_ > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = leaf, i
            size, total = size + bytes_, total + bytes_
    _write(folder, shards, leaves, tensors, total)


def _write(
    folder: pathlib.Path, shards: list[dict], leaves: Any, tensors: Any, total: int
) -> None:
    """The shards, one in memory at a time, and last the index that makes them count.

    No file that the present index names is written over: either index finds its own.
    """
    with alone(folder) as folder:
        before, named = _weights(folder)
        run = f"{secrets.token_hex(4)}-" if before or named else ""
        names = [
            f"model-{run}{i + 1:05}-of-{len(shards):05}.safetensors"
            for i in range(len(shards))
        ]
        if len(shards) == 1 and _ONE not in named:
            names = [_ONE]
        try:
            for name, shard in zip(names, shards, strict=True):
                arrays = {
                    k: _taken(leaves[p], tensors[p], i) for k, (p, i) in shard.items()
                }
                write(folder / name, arrays, {"format": "pt"})
        except BaseException:
            _remove(folder, {*names} - before)
            raise
        if names == [_ONE]:
            (folder / _INDEX).unlink(missing_ok=True)
            sync(folder)
        else:
            pairs = zip(names, shards, strict=True)
            where = {k: name for name, shard in pairs for k in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            text = json.dumps(index, indent=2).encode()
            replace(folder / _INDEX, lambda: [text])
        _remove(folder, before - {*names})


def _remove(folder: pathlib.Path, names: set[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _weights(folder: pathlib.Path) -> tuple[set[str], set[str]]:
    """The files of weights in the folder, and those among them that its index names."""
    names = {path.name for path in folder.iterdir() if not path.is_dir()}
    index: set[str] = set()
    with contextlib.suppress(OSError, ValueError):
        found = parsed((folder / _INDEX).read_bytes())
        where = {} if misfit(found, {"weight_map": {str: str}}) else found["weight_map"]
        index = {name for name in where.values() if name.endswith(".safetensors")}
    shards = {name for name in names if name == _ONE or _SHARD.fullmatch(name)}
    return shards | (index & names), index


def _taken(leaf: Any, tensor: Tensor, i: int) -> np.ndarray:
    return tensor.taken(np.asarray(leaf if isinstance(tensor.keys, str) else leaf[i]))


# --- Files ----------------------------------------------------------------------------


def _no_path(verb: str, path: Any) -> str:
    return (
        f"{verb}: path={path!r}. Write the folder of a checkpoint. The order is "
        f"flora.hf.{verb}(path, tree, tensors)."
    )


def _files(path: pathlib.Path) -> dict[str, File]:
    """`{name of a tensor: the file that holds it}`."""
    if path.is_dir():
        found = [path / name for name in (_INDEX, _ONE) if (path / name).is_file()]
        if not found:
            raise LoraError(_no_weights(path))
        path = found[0]
    if path.suffix != ".json":
        file = read(path)
        return dict.fromkeys(file.infos, file)
    try:
        index = parsed(path.read_bytes())
    except ValueError as error:
        raise LoraError(f"{path} is no index: {error}. Download it again.") from error
    if wrong := misfit(index, {"weight_map": {str: str}}):
        raise LoraError(f"{path} is no index: {wrong}. Download it again.")
    where = index["weight_map"]
    names = sorted({*where.values()})
    fail(f"{path} names the file {n!r}, outside of its folder."
         for n in names if pathlib.PurePath(n).name != n)  # fmt: skip
    fail(f"{path} names {n!r}, which is no name of a file. Download it again."
         for n in names if unwritable_name(n) or len(n.encode()) > 255)  # fmt: skip
    fail(f"{path} names {n}, which is not there. Download it too."
         for n in names if not (path.parent / n).is_file())  # fmt: skip
    files = {n: read(path.parent / n) for n in names}
    fail(
        f"{files[n].path} lacks '{key}', which {path.name} says it holds. "
        "Download both again."
        for key, n in where.items()
        if key not in files[n].infos
    )
    return {key: files[n] for key, n in where.items()}  # the index rules


def _no_weights(path: pathlib.Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    holds = ", ".join((pickles or names)[:5]) or "nothing"
    why = " Pickles are never read: save the model with safe_serialization=True."
    return f"{path} holds no {_ONE} and no {_INDEX}; it holds {holds}." + (
        why if pickles else " Pass the folder of a checkpoint."
    )


# --- What does not fit ----------------------------------------------------------------


def _checked(
    what: str, named: list[tuple[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The leaves by name, each with an entry in `tensors` that fits its shape."""
    if not isinstance(tensors, Mapping) or not all(
        isinstance(t, Tensor) for t in tensors.values()
    ):
        raise LoraTypeError(
            "tensors: expected a dict {path of a leaf: flora.hf.Tensor(...)}."
        )
    fail(same_names([p for p, _ in named]))
    leaves = dict(named)
    if not leaves:
        raise LoraError(f"{what}: the tree is empty. Pass the model's parameters.")
    fail([
        *(f"{what}: '{p}' is "
          f"{'adapted: write flora.merge' if is_node(x) else 'no array'}."
          for p, x in leaves.items() if is_node(x) or not is_array(x)),
        *(f"tensors: no entry for '{p}', {describe(x)}. Write where its values lie."
          for p, x in leaves.items() if p not in tensors),
        *(f"tensors: '{p}' is no leaf of the tree. Leave it out."
          for p in tensors if p not in leaves),
    ])  # fmt: skip
    fail(p for k, x in leaves.items() for p in _entry_problems(k, x, tensors[k]))
    names = [n for t in tensors.values() for n in t.names]
    fail(same_names(names))
    return leaves


def _entry_problems(path: str, leaf: Any, tensor: Tensor) -> Iterator[str]:
    shape, count = tuple(leaf.shape), len(tensor.names)
    if not isinstance(tensor.keys, str) and shape[:1] != (count,):
        yield (
            f"tensors: '{path}' has shape {shape}, and {count} tensors would be "
            "stacked along its first axis. Name as many as it is long."
        )
        return
    one = tensor.of_one(shape)
    given = [x for x in (tensor.split, tensor.shape) if x is not None]
    ndim = len(given[0] if given else one)
    order = tensor.axes
    fits = all(math.prod(x) == math.prod(one) for x in given)
    fits = fits and (tensor.split is None or tensor.shape is not None)
    if not fits or (order is not None and sorted(order) != list(range(ndim))):
        yield (
            f"tensors: '{path}' has shape {shape}; {tensor} cannot give it. Write "
            "axes= as an order of the tensor's axes (of split=, where that is given), "
            "shape= of as many elements, and split= beside shape= alone."
        )


def _problems(
    files: Mapping[str, File],
    leaves: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    unused: Pattern,
) -> Iterator[str]:
    """One line for each tensor that is missing, unexpected, or another one."""
    wanted = {name for t in tensors.values() for name in t.names}
    spare = [k for k in files if k not in wanted and not matches(unused, k, files[k])]
    near = Nearest(spare)
    for path, leaf in leaves.items():
        expected = tensors[path].source(tuple(leaf.shape))
        for name in tensors[path].names:
            where = f"for '{path}', {describe(leaf)}"
            if name not in files:
                closest = f" Closest: '{hit[0]}'." if (hit := near.to(name)) else ""
                yield (
                    f"no file holds '{name}'; expected one of shape {expected} {where}."
                    f"{closest}"
                )
                continue
            info = files[name].infos[name]
            if info.shape != expected:
                yield (
                    f"{files[name].path.name}: '{name}' has shape {info.shape}; "
                    f"expected {expected} {where}. "
                    "Check the model's sizes against config.json."
                )
            elif info.dtype != leaf.dtype and not _cast(info.dtype, leaf.dtype):
                yield (
                    f"{files[name].path.name}: '{name}' is {info.dtype}; expected a "
                    f"floating dtype {where}."
                )
    for n, name in enumerate(spare):
        own = glob_of(name, spare) if n < 20 else repr(name)  # no more are shown
        yield (
            f"{files[name].path.name}: '{name}', {files[name].infos[name]}, is for no "
            f"leaf of the model. Write unused={own} to leave it."
        )


def _cast(found: Any, expected: Any) -> bool:
    return jnp.issubdtype(found, jnp.floating) and jnp.issubdtype(
        expected, jnp.floating
    )


# --- One leaf -------------------------------------------------------------------------


def _made(files: Mapping[str, File], leaf: Any, tensor: Tensor) -> jax.Array:
    """The leaf, of which each device gets its part alone."""
    shape, dtype = tuple(leaf.shape), leaf.dtype
    views = [tensor.given(files[k].array(k), shape) for k in tensor.names]
    read: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        spans = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if spans not in read:
            read[spans] = _part(views, index, dtype, not isinstance(tensor.keys, str))
        return read[spans]

    sharding = sharding_of(leaf)
    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


def _part(
    views: list[np.ndarray], index: tuple[slice, ...], dtype: Any, stacked: bool
) -> np.ndarray:
    """A copy of some of a leaf; what is not asked for is not read."""
    if not stacked:
        return np.array(views[0][index], dtype, order="C")
    first, rest = index[0], index[1:]
    return np.stack([view[rest].astype(dtype) for view in views[first]])
