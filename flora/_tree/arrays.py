"""What counts as an array, and its dtypes."""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def compute_dtype(*dtypes: Any) -> Any:
    """The widest of the dtypes, float32 at least (or its complex twin)."""
    return jnp.result_type(
        jnp.float32, *(d for d in dtypes if jnp.dtype(d).itemsize > 1)
    )


def is_array(x: Any) -> TypeGuard[Any]:
    """Whether x is an array, a tracer or a `ShapeDtypeStruct`."""
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def bits_of(dtype: Any) -> int:
    """Bits of an element."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 8
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize


def shown(x: Any) -> str:
    """Dtype and shape, such as 'float32[4,3]'; what is no array as it prints."""
    shape = ",".join(map(str, getattr(x, "shape", ())))
    return f"{x.dtype}[{shape}]" if hasattr(x, "dtype") else repr(x)
