"""KaSA: a base without its smallest singular values, and ΔW = scale A diag(e) B.

References: Wang et al. 2024. https://arxiv.org/abs/2412.06071
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora._peft.factors import Piece
from flora._peft.kinds.residual import changed
from flora._peft.naming.names import Slot
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, Product


@dataclasses.dataclass(frozen=True)
class KaSA:
    """The variant, over a base that PEFT truncates as the adapter starts.

    e, `extra["e"]` `[*stack, rank]`, trains.

    Attributes:
      beta: the weight of ‖e‖² in the loss that the paper adds, for the config.
      gamma: of ‖BᵀB − I‖ + ‖AAᵀ − I‖ there.
    """

    beta: float = 1e-4
    gamma: float = 1e-3
    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        raise LoraError(
            f"{self!r} needs a base without its smallest singular values, which "
            "flora.init does not change. Start it in PEFT, and load what it saves."
        )

    def product(self, weight: LoraWeight) -> Product:
        stack, in_ = len(weight.layout.stack), len(weight.layout.in_)
        e = jnp.expand_dims(weight.extra["e"], range(stack, stack + in_))
        return Product(weight.a * e, weight.b)


def truncated(
    base: Any,
    layout: Layout,
    pieces: Sequence[Piece],
    beside: Sequence[Slot],
    file: Path,
) -> np.ndarray:
    """The base of a leaf without the `rank` smallest singular values of each module."""

    def change(piece: Piece, weight: np.ndarray) -> np.ndarray:
        if piece.rank >= min(weight.shape):
            raise LoraError(
                f"{file}: KaSA takes {piece.rank} singular values from "
                f"'{piece.lora.module}' of {weight.shape}, which has "
                f"{min(weight.shape)}. Is it the adapter of another base?"
            )
        u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        n = len(s) - piece.rank
        return (u[:, n:] * s[n:]) @ v[n:]

    if any(p.lora.kind != "linear" or p.lora.raw for p in pieces):
        raise LoraError(
            f"{file}: '{pieces[0].lora.name}' is no linear layer, the only one that "
            "PEFT's kasa_config takes. Save the adapter anew."
        )
    return changed(base, layout, pieces, beside, change)


def diagonal(new: LoraWeight, pieces: Sequence[Piece]) -> np.ndarray:
    """E, `[*stack, rank]`, of the node of pieces that lie behind each other in it."""
    stack = new.a.shape[: len(new.layout.stack)]
    dtype = np.result_type(*(np.asarray(p.lora.diag).dtype for p in pieces))
    e, ends = np.zeros((*stack, new.a.shape[-1]), dtype), {}
    for p in pieces:
        start = ends.get(p.index, 0)
        ends[p.index] = start + p.rank
        e[p.index][..., start : start + p.rank] = p.lora.diag
    return e
