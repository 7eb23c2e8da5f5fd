"""Activated LoRA: ΔW acts from the last occurrence of the invocation tokens on.

References: https://arxiv.org/abs/2504.12397
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from flora._tree.checks import require_adapted
from flora._tree.errors import LoraError, LoraTypeError
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, Product


@dataclasses.dataclass(frozen=True)
class Activated:
    """The variant: y = x W + scale m (x A) B, m 1 at active positions and else 0.

    Where these are, `flora.peft.activate` tells a tree for each call.  No weight is
    that: `flora.merge` refuses.

    Attributes:
      tokens: that invoke the adapter.

    References: https://arxiv.org/abs/2504.12397
    """

    tokens: tuple[int, ...]
    frozen = ("active",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(int(i) for i in self.tokens))

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        active = (weight.extra or {}).get("active")
        if active is None:
            raise LoraError(
                f"{weight!r} acts from its invocation tokens {[*self.tokens]} on and "
                "needs to know where they are. Write flora.peft.activate(adapted, "
                "tokens) inside the loss. No merged weight is that: ship the adapter."
            )
        return Product(weight.a, weight.b, None, _Masked(active))


@dataclasses.dataclass(frozen=True, eq=False)
class _Masked:
    """Zeros in x A, `[..., rank]`, at positions that are not active.

    Two are equal if their arrays are one and the same, so that layers that call one
    jitted function share its trace.
    """

    active: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Masked) and self.active is other.active

    def __hash__(self) -> int:
        return hash(id(self.active))

    def __call__(self, z: Any) -> Any:
        own, lead = tuple(self.active.shape), z.shape[:-1]
        if lead[len(lead) - len(own) :] == own:
            mask = self.active
        elif math.prod(lead) == math.prod(own):  # positions in a row
            mask = self.active.reshape(lead)
        else:
            raise LoraError(
                f"activate: the positions have shape {own}, and a product of the "
                f"function has x of shape {(*lead, '…')}. Pass the tokens of this very "
                "call, [batch, length]."
            )
        return jnp.where(mask[..., None], z, 0)


def activate(adapted: Any, tokens: Any) -> Any:
    """The same tree, its activated LoRAs told at which positions they act.

    Those are the positions from the start of the last occurrence of the adapter's
    invocation tokens on, as in PEFT; a row without them is the base's.

    Args:
      adapted: a tree that `flora.peft.load` made of an adapter with
        `alora_invocation_tokens`.
      tokens: the ids of this call, int `[batch, length]`; or the positions themselves,
        bool, of the shape that x has before its features: all `True` for a step of
        decoding after the invocation.

    Returns:
      The tree, sharing all arrays.  Write it inside the loss, as `flora.with_dropout`.

    Raises:
      LoraError: nothing in the tree is an activated LoRA.

    Example:
      >>> import jax.numpy as jnp
      >>> positions(jnp.asarray([[5, 1, 2, 7], [1, 2, 1, 2], [1, 0, 2, 0]]), (1, 2))
      Array([[False,  True,  True,  True],
             [False, False,  True,  True],
             [False, False, False, False]], dtype=bool)

    References: https://arxiv.org/abs/2504.12397
    """
    named = require_adapted(adapted, "activate")
    if not hasattr(tokens, "dtype") or not tokens.ndim:
        raise LoraTypeError(
            f"activate: tokens is {tokens!r}. Pass an array of ids, [batch, length], "
            "or a bool array of positions."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer) and tokens.dtype != bool:
        raise LoraTypeError(
            f"activate: tokens has dtype {tokens.dtype}. Pass ids or bool positions."
        )
    held: dict[tuple[int, ...], Any] = {}

    def told(leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight) or not isinstance(leaf.variant, Activated):
            return leaf
        own = leaf.variant.tokens
        if own not in held:
            known = tokens.dtype == bool
            held[own] = jnp.asarray(tokens) if known else positions(tokens, own)
        return dataclasses.replace(leaf, extra={"active": held[own]})

    _, treedef = named_leaves(adapted)
    made = [told(leaf) for _, leaf in named]
    if not held:
        raise LoraError(
            "activate: no leaf is an activated LoRA. Run the tree as it is, or load an "
            "adapter with alora_invocation_tokens."
        )
    return treedef.unflatten(made)


def positions(tokens: Any, invocation: Sequence[int]) -> Any:
    """Which positions are active, bool `[..., length]`."""
    length, count = tokens.shape[-1], len(invocation)
    at = jnp.arange(length)
    padded = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, count)])
    found = at <= length - count
    for i, token in enumerate(invocation):
        found = found & (padded[..., i : i + length] == token)
    first = jnp.where(found, at, -1).max(-1, keepdims=True)
    return (first >= 0) & (at >= first)
