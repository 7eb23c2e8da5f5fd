"""NaN and infinity are refused by name wherever something is kept or baked in."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._tree.errors import LoraTypeError, fail
from flora._tree.quantized import dequantized, is_quantized


def require_finite(
    verb: str,
    leaves: Mapping[str, Any],
    allow: bool = False,
    *,
    before: Mapping[str, Any] | None = None,
    remedy: str = "Write allow_nonfinite=True to insist.",
) -> None:
    """Raises for arrays that hold NaN or infinity, all of which are named.

    Each array is counted where it lies, sharded or not, and no copy is made.  What has
    no values to look at (tracers, shapes, integers, keys) passes.

    Args:
      verb: whose message it is.
      leaves: `{name: array}`, or quantized weights.
      allow: the user's `allow_nonfinite`.
      before: for some of the names an array that the new one was made of, whose own NaN
        and infinities are not counted.
      remedy: what to write.
    """
    if not isinstance(allow, bool):
        raise LoraTypeError(f"{verb}: allow_nonfinite={allow!r}. Write True or False.")
    if not allow:
        fail(f"{verb}: {p} {remedy}" for p in _problems(leaves, before or {}))


def _problems(leaves: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    held = {name: x for name, x in leaves.items() if _has_values(x)}
    found = jax.device_get({name: _bad(x) for name, x in held.items()})
    for name, (some, count) in found.items():
        old = 0
        if some and _has_values(before.get(name)):
            old = int(jax.device_get(_bad(before[name]))[1])
        if some and int(count) != old:
            yield (
                f"'{name}' holds NaN or infinity in {int(count) - old:,} of "
                f"{math.prod(held[name].shape):,} places; expected finite values."
            )


def _has_values(x: Any) -> bool:
    if is_quantized(x):
        return all(map(_is_concrete, jax.tree.leaves(x)))
    return _is_concrete(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(
        x, Tracer
    )


def _bad(x: Any) -> tuple[Any, Any]:
    """Whether there are any, and how many."""
    if isinstance(x, np.ndarray | np.generic):
        count = np.size(x) - np.count_nonzero(np.isfinite(x))
        return count > 0, count
    with jax.ensure_compile_time_eval():  # also while something else is traced
        return _counted(x)


@jax.jit
def _counted(x: Any) -> tuple[jax.Array, jax.Array]:
    bad = ~jnp.isfinite(dequantized(x))
    return bad.any(), bad.sum(dtype=jnp.uint32)
