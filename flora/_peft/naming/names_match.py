"""Names found by comparing a PyTorch model's weights with a Flax tree's, by values."""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flora._peft.naming.names import PARAMETERS, Module, Names, Slot, split_name
from flora._tree.errors import LoraError, fail
from flora._tree.paths import named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import base_of

_VECTORS = ("bias", "scale", "mean", "var")
# A row of a weight: which parameter it is of, and which row.
Row = tuple[str, int]


def match_names(weights: Mapping[str, Any], tree: Any) -> Names:
    """The names of a Flax tree's leaves, found by values.

    Every out feature of a leaf, a vector over its in features, is looked up among the
    rows of the weights.  This finds weights whatever their names, even if they were
    transposed, split into heads, reordered (RoPE), fused or stacked.

    Args:
      weights: `{name: array}` of the PyTorch model, as in its safetensors file.
      tree: the same weights as the Flax model has them.

    Returns:
      The names, for `load` and `save`.

    Raises:
      LoraError: a leaf with two axes or more is found nowhere, or in several places.
        Every such leaf is named.
    """
    leaves = {p: base_of(x) for p, x in named_leaves(tree)[0]}
    fail(
        f"match_names: '{path}' is {leaf!r}; expected an array with values. Load it "
        f"first."
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.ShapeDtypeStruct) or is_quantized(leaf)
    )
    arrays = {p: np.asarray(x) for p, x in leaves.items() if hasattr(x, "shape")}
    dense = {n: np.asarray(x) for n, x in weights.items() if len(np.shape(x)) >= 2}
    if not dense:
        raise LoraError(
            "match_names: weights holds no array of two axes. The order is "
            "match_names(weights, tree), weights {name: array} of the PyTorch model."
        )
    slots, problems = [], []
    rows: dict[str, dict[bytes, list[Row]]] = {}
    for path, leaf in arrays.items():
        if leaf.ndim < 2 or path.rpartition("/")[2] in _VECTORS:
            continue
        kind = str(leaf.dtype)
        if kind not in rows:
            rows[kind] = _rows(dense, leaf.dtype)
        try:
            slots += _slots(path, leaf, rows[kind], dense)
        except LookupError as error:
            problems.append(f"match_names: '{path}' {leaf.shape}: {error.args[0]}")
    fail(problems)
    return Names((*slots, *_beside(slots, arrays, weights)))


def _rows(dense: Mapping[str, np.ndarray], dtype: Any) -> dict[bytes, list[Row]]:
    """Every row of every weight by its content."""
    found: dict[bytes, list[Row]] = collections.defaultdict(list)
    for name, weight in dense.items():
        flat = weight.astype(dtype).reshape(weight.shape[0], -1)
        if weight.ndim == 3:  # experts, or a convolution's window: either may be meant
            for k, one in enumerate(weight.astype(dtype)):
                for r, row in enumerate(one):
                    found[_digest(row)].append((f"{name}#{k}", r))
        window_first = np.moveaxis(weight, 1, -1).astype(dtype).reshape(flat.shape)
        for seen in (flat,) if weight.ndim == 2 else (flat, window_first):
            for r, row in enumerate(seen):
                found[_digest(row)].append((name, r))
    return found


def _digest(row: np.ndarray) -> bytes:
    row = np.ascontiguousarray(row) + row.dtype.type(0)  # -0.0 is 0.0
    return hashlib.blake2b(row.tobytes(), digest_size=12).digest()


def _slots(
    path: str,
    leaf: np.ndarray,
    rows: Mapping[bytes, list[Row]],
    dense: Mapping[str, np.ndarray],
) -> list[Slot]:
    """The slots of one leaf."""
    last = path.rpartition("/")[2]
    if last in ("embedding", "weight") or last not in PARAMETERS:
        hits = [
            n
            for n, w in dense.items()
            if w.shape == leaf.shape and np.array_equal(w.astype(leaf.dtype), leaf)
        ]
        hits = [n for n in hits if split_name(n)[1] == last] or hits
        if hits:
            first, *tied = sorted(hits, key=lambda n: ("head" in n, n))
            return [_slot(path, first)] + [_slot(path, n, tied=True) for n in tied]
    found = []
    for stack, in_, out in _splits(leaf.ndim):
        order = (*stack, *out, *in_)
        sizes = [int(np.prod([leaf.shape[i] for i in a])) for a in (stack, out, in_)]
        flat = leaf.transpose(order).reshape(sizes)
        if _digest(flat[0, 0]) not in rows or _digest(flat[-1, -1]) not in rows:
            continue
        grid = tuple(leaf.shape[i] for i in stack)
        made = _stacked(path, flat, grid, rows, dense)
        if made is not None:
            found.append(made)
    if not found:
        raise LookupError(
            "its values are in none of the weights, or each row in several. Write its "
            "names={leaf: module}."
        )
    fewest = min(map(len, found))  # stacked layers could also pass for fused ones
    found = [f for f in found if len(f) == fewest]
    if len({tuple((s.name, s.module.rows, s.part) for s in f) for f in found}) > 1:
        raise LookupError(
            f"it may be {' or '.join(f[0].name for f in found[:2])}. Write its "
            "names={leaf: module}."
        )
    return found[0]


def _splits(ndim: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Axes as stack, in and out, few stacked ones first."""
    for n in range(ndim - 1):
        for stack in itertools.combinations(range(ndim), n):
            rest = [i for i in range(ndim) if i not in stack]
            for k in range(1, len(rest)):
                for in_ in itertools.combinations(rest, k):
                    yield stack, in_, tuple(i for i in rest if i not in in_)


def _stacked(
    path: str,
    flat: np.ndarray,
    grid: tuple[int, ...],
    rows: Mapping[bytes, list[Row]],
    dense: Mapping[str, np.ndarray],
) -> list[Slot] | None:
    """The slots of a leaf seen as `[stack, out, in]`, `None` if it is not that."""
    layers = []
    for matrix in flat:
        options = [rows.get(_digest(row)) for row in matrix]
        if any(not o for o in options):
            return None
        layer = _runs(options)  # type: ignore[arg-type]
        if layer is None:
            return None
        layers.append(layer)
    first = layers[0]
    parts = [[n for n, _ in layer] for layer in layers]
    if any([r for _, r in layer] != [r for _, r in first] for layer in layers):
        return None
    slots = []
    for k, (_, order) in enumerate(first):
        template = _template([names[k] for names in parts], grid)
        if template is None:
            return None
        name, _, _ = parts[0][k].partition("#")
        height = dense[name].shape[1 if "#" in parts[0][k] else 0]
        in_order = list(order) == list(range(height)) and len(first) == 1
        own = None if in_order else tuple(order)
        slot = _slot(path, template)
        slots.append(
            dataclasses.replace(
                slot,
                module=dataclasses.replace(slot.module, rows=own),
                part=(k, len(first)),
            )
        )
    return slots


def _runs(options: Sequence[list[Row]]) -> list[tuple[str, tuple[int, ...]]] | None:
    """Rows as modules one after the other; `None` if several could be meant."""
    common = set.intersection(*({n for n, _ in o} for o in options))
    if len(common) > 1:
        return None
    runs: list[tuple[str, list[int]]] = []
    for option in options:
        known = [o for o in option if o[0] in common] or option
        if len({n for n, _ in known}) > 1:
            return None
        name, row = known[0]
        if len(known) > 1:  # equal rows of one weight: the next in order
            taken = {*runs[-1][1]} if runs and runs[-1][0] == name else set()
            row = next((r for _, r in known if r not in taken), row)
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(row)
    if len({n for n, _ in runs}) != len(runs):
        return None
    return [(n, tuple(r)) for n, r in runs]


def _template(names: Sequence[str], grid: tuple[int, ...]) -> str | None:
    """The names of a stack as one, with a placeholder for each axis that varies."""
    inner = [n.partition("#")[2] for n in names]
    if len(names) == 1:
        return None if inner[0] else names[0]
    plain = [n.partition("#")[0] for n in names]
    grids = list(np.ndindex(*grid))
    if inner[0]:  # the last axis counts within each parameter
        size = grid[-1]
        if inner != [str(i[-1]) for i in grids]:
            return None
        plain, grids, grid = plain[::size], grids[::size], grid[:-1]
        if len({*plain}) == 1 and not grid:
            return plain[0]
    words = [re.split(r"(\d+)", n) for n in plain]
    if len({len(w) for w in words}) != 1:
        return None
    shown, axes = list(words[0]), []
    for i in range(len(shown)):
        column = [w[i] for w in words]
        if len({*column}) == 1:
            continue
        axis = [k for k in range(len(grid)) if column == [str(g[k]) for g in grids]]
        if not axis:
            return None
        axes.append(axis[0])
        shown[i] = f"{{{'ijklmn'[axis[0]]}}}"
    return "".join(shown) if axes == list(range(len(grid))) else None


def _slot(path: str, name: str, *, tied: bool = False) -> Slot:
    module, parameter = split_name(name)
    return Slot(path, name, Module(module, parameter=parameter, tied=tied))


def _beside(
    slots: Iterable[Slot], arrays: Mapping[str, np.ndarray], weights: Mapping[str, Any]
) -> list[Slot]:
    """Biases and norms: beside a weight that has a name, or by their values."""
    found = []
    parents = collections.defaultdict(list)
    for slot in slots:
        parents[slot.path.rpartition("/")[0]].append(slot)
    for path, leaf in arrays.items():
        parent, _, last = path.rpartition("/")
        if last not in _VECTORS:
            continue
        for s in parents[parent]:
            name = f"{split_name(s.name)[0]}.{PARAMETERS[last]}"
            known = dataclasses.replace(s, path=path, name=name)
            if known.at((0,) * s.holes) in weights:
                found.append(known)
        if not parents[parent]:
            found += _by_value(path, leaf, weights)
    return found


def _by_value(path: str, leaf: np.ndarray, weights: Mapping[str, Any]) -> list[Slot]:
    """The slot of a vector, or of a stack of them, if one name fits."""
    vectors: dict[bytes, list[str]] = collections.defaultdict(list)
    parameter = PARAMETERS[path.rpartition("/")[2]]
    for name, x in weights.items():
        if len(np.shape(x)) == 1 and split_name(name)[1] == parameter:
            vectors[_digest(np.asarray(x).astype(leaf.dtype))].append(name)
    for n in range(leaf.ndim):
        grid, flat = leaf.shape[:n], leaf.reshape(*leaf.shape[:n], -1)
        hits = [vectors[_digest(row)] for row in flat.reshape(-1, flat.shape[-1])]
        if all(len(h) == 1 for h in hits):
            name = _template([h[0] for h in hits], grid)
            return [] if name is None else [_slot(path, name)]
    return []
