"""Adapter files: what was trained, how it is to be computed, and on which base."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from flora._files.compare import base_problems
from flora._files.fingerprint import fingerprint, no_values, same_names
from flora._files.items import base_leaves, placed, saved_too
from flora._files.parsed import install, misfit, of_later, parsed
from flora._files.records import (
    foreign_settings,
    origin_of,
    record_of,
    record_problem,
    unknown_settings,
    weight_of,
)
from flora._files.safetensors import (
    File,
    checked_path,
    no_dtype,
    read,
    unwritable_name,
    write,
)
from flora._tree.arrays import is_array
from flora._tree.checks import require_adapted, weight_problems
from flora._tree.errors import LoraError, fail
from flora._tree.finite import require_finite
from flora._tree.paths import Pattern, check_pattern, matches, path_of
from flora._tree.placement import mesh_of, spec_of, spec_of_part, specs
from flora._tree.quantized import abstract
from flora._tree.version import __version__
from flora._tree.weight import LoraWeight, Trained, is_leaf, is_node, on_parts

_FORMAT = 1


def save(
    path: str | os.PathLike[str],
    adapted: Any,
    *,
    also: Pattern = (),
    allow_nonfinite: bool = False,
) -> None:
    """Writes the adapter of a tree to one .safetensors file: whole, or not at all.

    The file holds A, B, further trained arrays, the leaves that train whole and batch
    statistics (Linen's collection 'batch_stats', `nnx.BatchStat`); in its header each
    leaf's layout and settings, flora's version and a fingerprint of the base.  The
    base's weights are not in it.  With several processes all of them make the call, and
    the first one writes.

    Args:
      path: where to, such as 'adapter.safetensors'; a file of that name is replaced,
        and keeps its mode.  A link is followed.
      adapted: the adapted tree, base and all, with values.
      also: a pattern of other frozen leaves that training changed all the same, such
        as `counters/*`.  They are saved whole, and are no part of the base.  What is
        left out is refused at `load` by name: the base then has other values.
      allow_nonfinite: True to write NaN and infinity too, which `load` must be told.

    Raises:
      LoraError: the tree is not adapted, or a leaf holds no values, NaN or infinity, or
        has a dtype that the format lacks; or an entry of `also` selects no frozen leaf.
      OSError: the file cannot be written; the one before it is still there.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, flora
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
      >>> flora.save(path, adapted)
      >>> flora.load(path, params)["kernel"]
      LoraWeight(float32[4,3], in=0 out=1, rank=2, scale=8)
    """
    path = checked_path(path, _no_path("save", path))
    check_pattern("also", also)
    require_adapted(adapted, "save")
    also = saved_too(also, adapted)
    leaves, frozen = _leaves(adapted), base_leaves(adapted, also)
    trained = {
        name: x
        for leaf_path, leaf in leaves.items()
        for name, x in _arrays(leaf_path, leaf, also).items()
    }
    fail(f"save: {p}" for name, x in trained.items() for p in _unwritable(name, x))
    require_finite("save", trained, allow_nonfinite)
    arrays = {name: _on_host(x) for name, x in trained.items()}
    records = {p: record_of(p, x, also) for p, x in leaves.items()}
    fail(
        f"save: '{p}' has {name}={text}, which no file can hold. "
        "Use one of flora's own, or flora.checkpoint."
        for p, x in records.items()
        for name, text in foreign_settings(x)
    )
    record = {
        "format": _FORMAT,
        "flora": __version__,
        "leaves": records,
        "base": fingerprint(frozen),
        "arrays": fingerprint(arrays, signed_zeros=True),
    }
    text = json.dumps(record)
    if jax.process_index() == 0:
        write(path, arrays, {"flora": text, "flora_sha256": _digest(text)})
    if jax.process_count() > 1:  # the file is there once any of them returns
        multihost_utils.sync_global_devices(f"flora.save {path}")


def load(
    path: str | os.PathLike[str],
    base: Any,
    *,
    check_base: bool = True,
    allow_nonfinite: bool = False,
) -> Any:
    """The adapted tree of a base and an adapter that `save` wrote.

    No model code runs and nothing is traced: layouts are in the file.

    Args:
      path: the file.
      base: the plain tree that the adapter was trained on, in any sharding; factors lie
        as `flora.init` would lay them.  Where a leaf trains whole, whatever is there is
        replaced; `None` will do.
      check_base: False to put the adapter on other values: weights in another dtype or
        in fewer bits, or `jax.ShapeDtypeStruct`s.  Leaves without factors may then have
        other shapes too, such as an embedding that was padded since.
      allow_nonfinite: True to take NaN and infinity too.

    Returns:
      The adapted tree; the base's arrays are shared.  Dropout keys belong to one step:
      it has none.

    Raises:
      LoraError: the file is missing, cut off, damaged, not of flora's, of another
        format, or holds NaN or infinity; or the base has other leaves, shapes or
        values.
    """
    path = checked_path(path, _no_path("load", path))
    file, record = _opened(path)
    stop = jax.tree_util.tree_flatten_with_path(base, is_leaf=_is_leaf_or_none)
    named, treedef = [(path_of(keys), x) for keys, x in stop[0]], stop[1]
    fail(same_names([p for p, _ in named]))
    given, saved = dict(named), record["leaves"]
    fail(f"{path}: {p}" for p in _structure_problems(saved, given, check_base))
    if check_base:
        frozen = {p: given[p] for p in saved if saved[p]["kind"] in ("lora", "frozen")}
        absent = [f"{p} Or write check_base=False." for q, x in frozen.items()
                  for p in no_values(q, x)]  # fmt: skip
        free = {p for p in frozen if saved[p]["kind"] == "frozen"}
        problems = absent or base_problems(record["base"], frozen, free)
        fail(f"{path}: {p}" for p in problems)
    arrays = _verified(file, record["arrays"])
    for p, x in saved.items():
        if f"whole/{p}" in arrays and arrays[f"whole/{p}"].shape != (*x["shape"],):
            _damaged(path, f"'whole/{p}' is not of the shape {x['shape']}")
    require_finite(str(path), arrays, allow_nonfinite)
    filled = [_filled(p, x, saved.get(p), arrays) for p, x in named]
    fail(f"{path}: {p}" for (q, _), x in zip(named, filled, strict=True)
         for p in weight_problems(q, x))  # fmt: skip
    return treedef.unflatten(filled)


# --- What is written ------------------------------------------------------------------


def _no_path(verb: str, path: Any) -> str:
    return (
        f"{verb}: path={path!r}. Write a file name, such as 'adapter.safetensors'. The "
        f"order is flora.{verb}(path, tree)."
    )


def _is_leaf_or_none(x: Any) -> bool:
    return x is None or is_leaf(x)


def _leaves(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named = [(path_of(keys), x) for keys, x in found]
    fail(same_names([p for p, _ in named]))
    return dict(named)


def _arrays(path: str, leaf: Any, also: Pattern) -> dict[str, Any]:
    """What is written of a leaf, under the names that it has in the file."""
    if isinstance(leaf, LoraWeight):
        parts = {"a": leaf.a, "b": leaf.b}
        parts |= {f"extra/{name}": x for name, x in (leaf.extra or {}).items()}
        return {f"{part}/{path}": x for part, x in parts.items()}
    if isinstance(leaf, Trained):
        return {f"whole/{path}": leaf.value}
    return {f"whole/{path}": leaf} if matches(also, path, leaf) else {}


def _unwritable(name: str, x: Any) -> list[str]:
    if not is_array(x):
        return [f"'{name}' is a {type(x).__qualname__}; expected an array."]
    if unwritable_name(name):
        return [f"{name!r} is no name for a file. Rename the leaf."]
    if problems := no_values(name, x):
        return problems
    return no_dtype(name, x.dtype)


def _on_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --- What is read ---------------------------------------------------------------------


def _opened(path: pathlib.Path) -> tuple[File, dict[str, Any]]:
    """The file and its record."""
    file = read(path)
    text = file.metadata.get("flora")
    if text is None:
        raise LoraError(
            f"{path} was not written by flora.save: its header has "
            f"{', '.join(map(repr, file.metadata)) or 'no metadata'}, no 'flora'. "
            "Files of PEFT are for flora.peft.load, base weights for flora.hf.load."
        )
    whole = _digest(text) == file.metadata.get("flora_sha256")
    try:
        record = parsed(text)
    except ValueError:
        record = None
    if isinstance(record, dict) and (later := of_later(record, _FORMAT)):
        other = "" if whole else " Or it is damaged: its checksum is another."
        raise LoraError(f"{path} {later}{other}")
    if not whole or record is None:
        _damaged(path, "its header was changed")
    if lacking := unknown_settings(record):
        raise LoraError(
            f"{path} was written by flora {record['flora']} with the settings "
            f"{', '.join(lacking)}, which flora {__version__} lacks. "
            f"{install(record['flora'])}"
        )
    wrong = misfit(record, _RECORD) or next(
        (e for p, x in record["leaves"].items() if (e := record_problem(p, x))), ""
    )
    if not wrong and record["format"] != _FORMAT:
        wrong = f"its format is {record['format']}"
    wanted = (
        {n for p, x in record["leaves"].items() for n in _names(p, x)}
        if not wrong
        else set()
    )
    if wrong or wanted != {*record["arrays"]}:
        _damaged(path, wrong or "its arrays are others than its leaves need")
    return file, record


_RECORD = {
    "format": int, "flora": str, "leaves": {str: dict}, "base": {str: str},
    "arrays": {str: str},
}  # fmt: skip


def _names(path: str, record: Mapping[str, Any]) -> list[str]:
    """What the arrays of a leaf are called in the file."""
    if record["kind"] == "lora":
        extra = (f"extra/{name}" for name in record["extra"])
        return [f"{part}/{path}" for part in ("a", "b", *extra)]
    return [] if record["kind"] == "frozen" else [f"whole/{path}"]


def _damaged(path: pathlib.Path, what: str) -> NoReturn:
    raise LoraError(
        f"{path} is damaged: {what} after flora.save wrote it. "
        "Copy it again, or save the adapter anew."
    )


def _verified(file: File, saved: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays, read into memory, as they were written."""
    if missing := sorted({*saved} ^ {*file.infos}):
        _damaged(file.path, f"{', '.join(map(repr, missing[:3]))} came or went")
    arrays = {name: np.array(file.array(name)) for name in saved}
    found = fingerprint(arrays, signed_zeros=True)
    if changed := [name for name in saved if found[name] != saved[name]]:
        _damaged(file.path, f"{', '.join(map(repr, changed[:3]))} changed")
    fail(
        f"{file.path}: '{k}' is {x.dtype}, which this JAX makes {was}. Write "
        "jax.config.update('jax_enable_x64', True)."
        for k, x in arrays.items()
        if (was := jax.dtypes.canonicalize_dtype(x.dtype)) != x.dtype
    )
    return arrays


def _structure_problems(
    saved: Mapping[str, Any], given: Mapping[str, Any], check_base: bool
) -> Iterator[str]:
    """One line for each leaf that is not what the adapter was trained on."""
    for path in dict.fromkeys((*saved, *given)):
        if path in given and is_node(given[path]):
            yield (
                f"'{path}' of the given base is adapted already. Pass the base that "
                "flora.split returned."
            )
            continue
        kind = saved.get(path, {}).get("kind")
        whole = kind in ("trained", "also")
        replaced = whole and path in given  # whatever is there, or None
        if given.get(path) is None and (replaced or path not in saved):
            continue
        free = kind == "frozen" and given.get(path) is not None
        if free and not check_base:
            continue
        was = _shape_text(saved, path, lambda record: record["shape"])
        now = _shape_text(given, path, lambda leaf: np.shape(abstract(leaf)))
        if was != now:
            yield (
                f"'{path}': the adapter was trained with {was}; the given base has "
                f"{now}. Pass the tree of the model that it was trained on"
                f"{', or write check_base=False' if free else ''}."
            )


def _shape_text(leaves: Mapping[str, Any], path: str, shape: Any) -> str:
    if leaves.get(path) is None:
        return "no such leaf"
    return f"shape {tuple(shape(leaves[path]))}"


def _filled(
    path: str, leaf: Any, record: Mapping[str, Any] | None, arrays: Mapping[str, Any]
) -> Any:
    """The leaf of the adapted tree, each array where it belongs."""
    if record is None or record["kind"] == "frozen":
        return leaf
    if record["kind"] != "lora":
        value = arrays[f"whole/{path}"]
        value = jax.device_put(value) if leaf is None else placed(leaf, value)
        trains = record["kind"] == "trained"
        return Trained(value, origin_of(record)) if trains else value
    extra = {k: arrays[f"extra/{k}/{path}"] for k in record["extra"]} or None
    a, b = arrays[f"a/{path}"], arrays[f"b/{path}"]
    return _laid(weight_of(record, leaf, a, b, extra))


def _laid(weight: LoraWeight) -> LoraWeight:
    """Each part where the weight lies, as `flora.init` would lay it."""
    spec, mesh = spec_of(weight.base), mesh_of(weight.base)
    if spec is None:
        return on_parts(lambda _, x: jax.device_put(x), weight)
    found = specs(weight.layout, spec, len(weight.base.shape))

    def lay(name: str, x: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of_part(found, weight, name, x.shape))
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return on_parts(lay, weight)
