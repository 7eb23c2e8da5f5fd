"""Products of factors with themselves: rank × rank matrices that stand for large ones.

‖A B‖² = tr(Aᵀ A · B Bᵀ): nothing here has the shape of a weight.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec


def columns(x: Any, y: Any, stack: int) -> jax.Array:
    """Xᵀ Y over the in axes, `[*stack, rank, rank]`, of `[*stack, *in, rank]`."""
    axes = tuple(range(stack, x.ndim - 1))
    return _product(x, y, axes, stack)


def rows(x: Any, y: Any, stack: int) -> jax.Array:
    """X Yᵀ over the out axes, `[*stack, rank, rank]`, of `[*stack, rank, *out]`."""
    axes = tuple(range(stack + 1, x.ndim))
    return _product(x, y, axes, stack)


def _product(x: Any, y: Any, axes: tuple[int, ...], stack: int) -> jax.Array:
    batch = tuple(range(stack))
    return lax.dot_general(
        whole(x, stack),
        whole(y, stack),
        ((axes, axes), (batch, batch)),
        precision=lax.Precision.HIGHEST,
    )


def whole(x: Any, stack: int) -> jax.Array:
    """X with all axes but its stack on every device, where a mesh has explicit axes.

    Elsewhere XLA divides such products by itself.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.mesh.explicit_axes:
        return x
    place = NamedSharding(sharding.mesh, Spec(*sharding.spec[:stack]))
    return jax.sharding.reshard(x, place)
