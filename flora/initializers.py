"""How factors start.  An initialiser maps `(key, a_shape, b_shape, dtype)` to (A, B).

It draws one matrix pair, `a` `[in, rank]` and `b` `[rank, out]`; `flora.init` maps it
over stack axes and folds the in and out axes back.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora._errors import LoraError

Shape = tuple[int, ...]
Initializer = Callable[[Any, Shape, Shape, Any], tuple[jax.Array, jax.Array]]


def gaussian(variance: float = 1 / 3) -> Initializer:
    """A ~ N(0, variance/in), B = 0: training starts at the pretrained model.

    1/3 is PEFT's variance, so its learning rates carry over; 2 is qwix's, whose A is
    2.45 times as large.

    References: Hu et al. 2021, section 4.1. https://arxiv.org/abs/2106.09685
    """
    _require_variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return _normal(key, a, variance / a[0], dtype), jnp.zeros(b, dtype)

    return init


def a_zero(variance: float = 1 / 3) -> Initializer:
    """A = 0, B ~ N(0, variance/rank): the reversed start, for study.

    References: Hayou et al. 2024. https://arxiv.org/abs/2406.08447
    """
    _require_variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(a, dtype), _normal(key, b, variance / b[0], dtype)

    return init


def both_random(variance: float = 1 / 3) -> Initializer:
    """A and B random: training does not start at the pretrained model.  For study."""
    _require_variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        key_a, key_b = jax.random.split(key)
        return (
            _normal(key_a, a, variance / a[0], dtype),
            _normal(key_b, b, variance / b[0], dtype),
        )

    return init


def both_zero() -> Initializer:
    """A = B = 0: no gradient ever reaches either.  For study."""

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(a, dtype), jnp.zeros(b, dtype)

    return init


def _require_variance(variance: Any) -> None:
    real = isinstance(variance, numbers.Real) and not isinstance(variance, bool)
    if not real or not 0 < float(variance) < math.inf:
        raise LoraError(
            f"variance={variance!r}. It must be a finite number above 0, such as 1/3."
        )


def _normal(key: Any, shape: Shape, variance: float, dtype: Any) -> jax.Array:
    draw = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
    return (math.sqrt(variance) * draw).astype(dtype)
