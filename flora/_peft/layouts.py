"""Which axes of a leaf are stacked, in and out, as an adapter's sizes imply.

Sizes alone cannot tell the axes of a square weight apart: there the convention of the
leaf's name decides, `[*stack, *in, *out]` for Flax and `[*stack, *out, *in]` for a
`weight` of PyTorch.  Where neither decides, the leaf is refused by name.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from flora._tree.layout import Layout


def leaf_word(path: str) -> str:
    """The last word of a leaf's path."""
    return path.rpartition("/")[2].rpartition(".")[2]


def turned(leaves: Iterable[tuple[str, Any]]) -> bool:
    """Whether some kernel beside a bias is `[out, in]`, as HF's FlaxConv1D has them."""
    shapes = {path: tuple(getattr(x, "shape", ())) for path, x in leaves}
    for path, shape in shapes.items():
        head, _, last = path.rpartition("/")
        bias = shapes.get(f"{head}/bias", ())
        matrix = last == "kernel" and len(shape) == 2 and shape[0] != shape[1]
        if matrix and bias == shape[:1]:
            return True
    return False


def is_conv1d(path: str, layout: Layout) -> bool:
    """Whether a leaf is a kernel `[out, in]`, as HF's FlaxConv1D has them."""
    matrix = len(layout.in_) == len(layout.out) == 1
    return leaf_word(path) == "kernel" and matrix and layout.in_ > layout.out


def conv_layout(
    path: str, shape: Sequence[int], holes: int, window: Sequence[int], out: int
) -> Layout | None:
    """Of a kernel `[*stack, *window, in, out]`, or `[*stack, out, in, *window]`."""
    n = len(window)
    if len(shape) != holes + n + 2:
        return None
    stack, rest = tuple(range(holes)), tuple(range(holes, len(shape)))
    flax = Layout(stack, rest[:-1], rest[-1:])
    torch = Layout(stack, rest[1:], rest[:1])
    for layout in (torch, flax) if leaf_word(path) == "weight" else (flax, torch):
        at = layout.in_[:n] if layout is flax else layout.in_[1:]
        if tuple(shape[i] for i in at) == tuple(window) and shape[layout.out[0]] == out:
            return layout
    return None


def layouts(
    path: str,
    shape: Sequence[int],
    stack: int,
    sizes: tuple[int, int],
    *,
    out_first: bool = False,
) -> list[Layout]:
    """The layouts that those sizes allow: one, none, or several if nothing decides.

    Args:
      path: the leaf.
      shape: its shape.
      stack: how many of its axes are stacked.
      sizes: how many in and out features there are.
      out_first: whether out axes come first by the leaf's convention.
    """
    found = _candidates(tuple(shape), stack, sizes)
    order = "soi" if out_first else "sio"
    usual = [x for x in found if _is_ordered(x, len(shape), order)]
    if usual:
        return [min(usual, key=lambda x: len(x.in_))]
    apart = {}
    for layout in found:  # axes of size 1 make no difference
        apart.setdefault(
            tuple(layout.role(i) for i, n in enumerate(shape) if n > 1), layout
        )
    return list(apart.values())


def _is_ordered(layout: Layout, ndim: int, order: str) -> bool:
    roles = [layout.role(i)[0] for i in range(ndim)]
    return roles == sorted(roles, key=order.index)


@functools.lru_cache(maxsize=1024)
def _candidates(
    shape: tuple[int, ...], stack: int, sizes: tuple[int, int]
) -> tuple[Layout, ...]:
    """All layouts with as many stacked axes and features."""
    axes = range(len(shape))
    found = []
    for stacked in itertools.combinations(axes, stack):
        rest = [i for i in axes if i not in stacked]
        for chosen in itertools.product((True, False), repeat=len(rest)):
            in_ = tuple(i for i, yes in zip(rest, chosen, strict=True) if yes)
            out = tuple(i for i in rest if i not in in_)
            if not in_ or not out:
                continue
            if tuple(math.prod(shape[i] for i in a) for a in (in_, out)) == sizes:
                found.append(Layout(stacked, in_, out))
    return tuple(found)
