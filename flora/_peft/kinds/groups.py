"""PEFT's adapter of a convolution in groups, which reads the channels of all of them.

y_k = conv(x_k, W_k) + scale B_k u_k with u = Σⱼ conv(xⱼ, Aⱼ), u_k the k-th part of u's
ranks.  That is no change of W, which has no weights from one group to another, so it
cannot be merged.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from flora._tree.weight import LoraWeight, Product


@dataclasses.dataclass(frozen=True)
class AcrossGroups:
    """The variant: a holds Aⱼ as ranks of their own, `[*window, in/g, g·r]`.

    b, `[g·r, out]`, has B_k in the k-th of the first r ranks, and zeros elsewhere that
    get no gradient.

    Attributes:
      groups: g.
    """

    groups: int
    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b, None, Summed(self.groups))


@dataclasses.dataclass(frozen=True)
class Summed:
    """From every group's convolution with every Aⱼ, `[..., g, g·r]`, to u_k."""

    groups: int

    def __call__(self, z: Any) -> Any:
        g, r = self.groups, z.shape[-1] // self.groups
        apart = z.reshape(*z.shape[:-1], g, r)
        u = jnp.einsum("...kkr->...r", apart)
        own = jnp.arange(r) // (r // g) == jnp.arange(g)[:, None]
        parts = jnp.where(own, u[..., None, :], 0)
        return jnp.zeros_like(apart).at[..., 0, :].set(parts).reshape(z.shape)


def spread(a: np.ndarray, b: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """`[g·r, in/g, *window]` and `[g·r, out]` of A `[r, in, *window]` and B."""
    r, channels, *window = a.shape
    first = a.reshape(r, groups, channels // groups, *window).swapaxes(0, 1)
    second = np.zeros((groups * r, b.shape[0]), b.dtype)
    second[:r] = blocks(b, groups)
    return first.reshape(groups * r, channels // groups, *window), second


def blocks(b: np.ndarray, groups: int) -> np.ndarray:
    """`[r, out]` of B `[out, r/g]`: each group's outputs read its own ranks."""
    out, r = b.shape[0], b.shape[1] * groups
    found = np.zeros((r, out), b.dtype)
    for k in range(groups):
        rows = slice(k * r // groups, (k + 1) * r // groups)
        columns = slice(k * out // groups, (k + 1) * out // groups)
        found[rows, columns] = b[columns].T
    return found


def gathered(
    a: np.ndarray, b: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """The reverse of `spread`."""
    total, channels, *window = a.shape
    r, out = total // groups, b.shape[1]
    first = a.reshape(groups, r, channels, *window).swapaxes(0, 1)
    own = b[:r].reshape(groups, r // groups, groups, out // groups)
    second = np.concatenate([own[k, :, k].T for k in range(groups)])
    return first.reshape(r, groups * channels, *window), second
