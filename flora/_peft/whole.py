"""Parameters kept whole (heads, norms, biases), between PyTorch and leaves."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flora._peft.factors import positions
from flora._peft.layouts import leaf_word
from flora._peft.naming.names import Slot
from flora._tree.errors import LoraError
from flora._tree.quantized import is_quantized


def put(
    target: np.ndarray,
    slot: Slot,
    index: Sequence[int],
    value: np.ndarray,
    beside: Sequence[Slot],
) -> None:
    """Writes a parameter of PyTorch into its place in a leaf, `[*stack, ...]`."""
    shape = target.shape[slot.holes :]
    if any(i >= n for i, n in zip(index, target.shape, strict=False)):
        raise ValueError(
            f"index {tuple(index)} of a stack {target.shape[: slot.holes]}"
        )
    view = target[tuple(index)] if index else target
    if slot.module.order is None and slot.part[1] == 1:
        as_it_is = slot.module.kind == "conv1d" and value.shape == shape
        view[...] = value if as_it_is else _turned(slot.path, value, shape)
        return
    rows = slice(None) if slot.module.order is None else list(slot.module.order)
    wide = (
        int(np.prod(shape))
        if value.ndim == 1
        else int(np.prod(shape)) // value.shape[1]
    )
    at, flat = positions(slot, beside, wide), view.reshape(-1, wide)
    if not np.shares_memory(flat, view):
        raise ValueError("a leaf whose features do not lie in a row")
    flat[:, at] = value[rows] if value.ndim == 1 else value[rows].T


def is_conv1d(slot: Slot, base: Any, value: np.ndarray) -> bool:
    """Whether a matrix `[in, out]` is in the file as it is in the leaf, a kernel.

    Of a square one the base's own values tell, if the file's are near them.
    """
    shape = tuple(getattr(base, "shape", ()))
    if leaf_word(slot.path) != "kernel" or value.ndim != 2 or shape != value.shape:
        return False
    if len({*shape}) > 1:
        return True
    if isinstance(base, jax.ShapeDtypeStruct) or is_quantized(base):
        return False
    own, x = np.asarray(base, np.float64), value.astype(np.float64)
    return bool(np.linalg.norm(x - own) < np.linalg.norm(x.T - own) / 2)


def _turned(path: str, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A whole parameter in the shape of its leaf."""
    shape = tuple(shape)
    is_matrix = leaf_word(path) in ("kernel", "embedding", "weight")
    if leaf_word(path) == "kernel" and value.ndim > 2:
        value = np.moveaxis(value, (0, 1), (-1, -2))  # [o, i, *window]
    elif leaf_word(path) == "kernel" and value.ndim == 2:
        if value.T.shape == shape or value.shape != shape:
            value = value.T
            value = value.reshape(shape) if value.size == np.prod(shape) else value
    elif value.ndim == 1 and value.size == np.prod(shape) and not is_matrix:
        value = value.reshape(shape)  # a bias of heads
    if value.shape != shape:
        raise ValueError(f"expected {shape}, found {value.shape} in Flax's order")
    return value


def taken(
    leaf: Any, slot: Slot, index: Sequence[int], beside: Sequence[Slot]
) -> np.ndarray:
    """A parameter of PyTorch, or those of its rows that lie in the leaf."""
    array = np.asarray(leaf)
    value, kind = array[tuple(index)] if index else array, slot.module.kind
    word = leaf_word(slot.path)
    parts = slot.part[1] > 1
    if word == "kernel" and value.ndim == 2:
        value = value if kind == "conv1d" else value.T
        if parts:
            value = value[positions(slot, beside, value.shape[0])]
    elif word == "kernel" and (kind == "conv" or value.ndim >= 4):
        value = np.moveaxis(value, (-1, -2), (0, 1))
    elif word == "kernel" and value.ndim == 3:
        raise LoraError(
            f"save: '{slot.path}' {array.shape} trains whole, and its shape does not "
            f"tell "
            "a convolution from split heads. Write names={leaf: "
            "flora.peft.Module(..., kind='conv')}, or train it with a 2-D kernel."
        )
    elif word in ("bias", "scale"):
        value = value.reshape(-1)
        if parts:
            value = value[positions(slot, beside, value.size)]
    if slot.module.order is not None:
        ordered = np.empty_like(value)
        rows = np.argsort(slot.module.order)
        ordered[...] = value[rows]
        value = ordered
    return value
