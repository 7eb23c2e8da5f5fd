"""Bases that PEFT changes as an adapter starts: W − scale B₀ A₀ in W's place.

References: Meng et al. 2024 (PiSSA). https://arxiv.org/abs/2404.02948
  Büyükakyüz 2024 (OLoRA). https://arxiv.org/abs/2406.01775
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora._peft.config import read
from flora._peft.factors import Piece, positions
from flora._peft.file import WEIGHTS, read_tensors
from flora._peft.ignored import Ignored
from flora._peft.keys import Lora, sort_out
from flora._peft.naming.names import Slot
from flora._tree.errors import LoraError
from flora._tree.layout import Layout


def start(weight: np.ndarray, rank: int, how: str) -> np.ndarray:
    """Scale B₀ A₀ of one matrix `[out, in]`, float64.

    'pissa': its best approximation of that rank, U_r S_r V_rᵀ.  'olora': Q_r R_r of its
    QR decomposition.
    """
    w = weight.astype(np.float64)
    if how == "pissa":
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]
    q, r = np.linalg.qr(w)
    return q[:, :rank] @ r[:rank]


def start_of(how: str, scales: Iterable[tuple[int, float]]) -> str:
    """What a node says of a base that PEFT can change in the same way again.

    Args:
      how: 'pissa' or 'olora'.
      scales: `(rank, scale)` of each adapter in the leaf.
    """
    shown = sorted({f"rank {rank} and scale {scale:g}" for rank, scale in scales})
    return f"PEFT's {how} of {', '.join(shown)}"


def is_changed(lora: Lora) -> bool:
    """Whether those starts change a module's base; PEFT starts others as plain LoRA."""
    return lora.kind == "linear" and not lora.raw


Starts = Mapping[str, np.ndarray]  # scale B₀ A₀ `[out, in]`, by parameter


def read_starts(folder: Path, ignored: Ignored) -> Starts:
    """What the adapter of a directory, saved as it started, took out of the base."""
    config = read(folder, ignored, started=True)
    tensors = read_tensors(folder, ignored)
    found = {}
    for lora in sort_out(tensors, config, folder).loras:
        if is_changed(lora):
            a, b = lora.a.astype(np.float64), lora.b.astype(np.float64)
            if a.shape[0] != b.shape[1]:
                raise LoraError(
                    f"{folder / WEIGHTS}: '{lora.key('a')}' has shape {a.shape} and "
                    f"'{lora.key('b')}' {b.shape}; expected one rank. Save it anew."
                )
            found[lora.name] = config.scale(lora.site) * (b @ a)
    return found


def without_start(
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    starts: Starts,
    folder: Path,
) -> np.ndarray:
    """The base of a leaf without what the start took out of it."""

    def change(piece: Piece, weight: np.ndarray) -> np.ndarray:
        taken = starts.get(piece.lora.name)
        if taken is None or taken.shape != weight.shape:
            has = "lacks it" if taken is None else f"has one of {taken.shape}"
            raise LoraError(
                f"start: the adapter has '{piece.lora.module}' of {weight.shape}, and "
                f"{folder / WEIGHTS} {has}. Pass the directory of the same adapter, "
                "saved before training."
            )
        return taken

    return changed(base, layout, pieces, beside, change)


def residual(
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    how: str,
) -> np.ndarray:
    """The base of a leaf as PEFT has it after the start of the adapter.

    OLoRA does not divide B₀ A₀ by the scale before it takes off scale B₀ A₀.
    """

    def change(piece: Piece, weight: np.ndarray) -> np.ndarray:
        taken = start(weight, piece.rank, how)
        return taken * (piece.scale if how == "olora" else 1.0)

    return changed(base, layout, pieces, beside, change)


def changed(
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    change: Callable[[Piece, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The base minus `change(piece, W [out, in])` of every piece."""
    value = np.asarray(base)
    stack, (_, in_, out) = layout.sizes(value.shape)[0], layout.matrix(value.shape)
    turned = value.transpose(layout.order)
    flat = turned.reshape(*stack, in_, out).copy()
    for piece in pieces:
        if not is_changed(piece.lora):
            continue
        slot = piece.slot
        at = positions(slot, beside, flat.shape[-1])
        rows = np.asarray(slot.module.order or range(len(at)))
        if len(at) != piece.lora.b.shape[0]:
            raise LoraError(
                f"'{slot.path}' holds {len(at)} of the {piece.lora.b.shape[0]} rows of "
                f"'{piece.lora.module}', whose base was changed as a whole. Save the "
                "adapter as plain LoRA in PEFT: "
                "path_initial_model_for_weight_conversion=."
            )
        columns = np.asarray(slot.module.columns or range(flat.shape[-2]))
        matrix = flat[piece.index]
        own = np.empty((len(at), flat.shape[-2]), value.dtype)
        own[np.ix_(rows, columns)] = matrix[:, at].T
        left = own.astype(np.float64) - change(piece, own)
        matrix[:, at] = left[np.ix_(rows, columns)].T.astype(value.dtype)
    return flat.reshape(turned.shape).transpose(np.argsort(layout.order))
