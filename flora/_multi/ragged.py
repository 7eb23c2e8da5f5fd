"""`ragged_dot` under `vmap`: experts that all rows of a mixed batch share.

JAX maps it only where each row has experts of its own.  Here the tokens of all rows are
sorted by expert, so that each expert still meets its tokens in one product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def ragged_dot(
    x: Any, w: Any, sizes: Any, *, group_offset: Any = None, **options: Any
) -> jax.Array:
    """`lax.ragged_dot`, which `vmap` can map over any operands; for reverse mode.

    Args:
      x: tokens `[m, k]`, sorted by group.
      w: `[g, k, n]`.
      sizes: how many tokens each group has, `[g]`.
      group_offset: as of `lax.ragged_dot`; with one, JAX's own limits hold.
      **options: precision and preferred_element_type.
    """
    if group_offset is not None:
        return lax.ragged_dot(x, w, sizes, group_offset=group_offset, **options)
    return _product(tuple(sorted(options.items())), x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: tuple[Any, ...], x: Any, w: Any, sizes: Any) -> jax.Array:
    return _mapped_product(options)(x, w, sizes)


def _forward(options: Any, x: Any, w: Any, sizes: Any) -> Any:
    return _mapped_product(options)(x, w, sizes), (x, w, sizes)


def _backward(options: Any, residuals: Any, dy: Any) -> Any:
    """Of a frozen w, dw is dropped; a compiled step does not compute it."""
    x, w, sizes = residuals
    precision = tuple((k, v) for k, v in options if k == "precision")
    turned = jnp.swapaxes(w, 1, 2)
    dx = _mapped_product(precision)(dy.astype(x.dtype), turned, sizes)
    dw = _mapped_outer(precision)(x, dy.astype(x.dtype), sizes)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


@functools.cache
def _mapped_product(options: tuple[Any, ...]) -> Any:
    """Y[t] = x[t] w[g] for token t of group g."""
    run = functools.partial(lax.ragged_dot, **dict(options))
    mapped = jax.custom_batching.custom_vmap(lambda x, w, sizes: run(x, w, sizes))

    @mapped.def_vmap
    def _(rows: int, batched: Any, x: Any, w: Any, sizes: Any) -> Any:
        x, sizes = _each(rows, batched[0], x), _each(rows, batched[2], sizes)
        if batched[1]:
            return jax.vmap(run)(x, w, sizes), True
        groups, m = sizes.shape[1], x.shape[1]
        ends = jnp.cumsum(sizes, 1)
        of_token = jax.vmap(lambda e: jnp.searchsorted(e, jnp.arange(m), side="right"))
        group = jnp.minimum(of_token(ends), groups)  # those behind the last have none
        order = jnp.argsort(group.reshape(-1), stable=True)
        y = mapped(x.reshape(rows * m, -1)[order], w, jnp.sum(sizes, 0))
        return y[jnp.argsort(order)].reshape(rows, m, -1), True

    return mapped


@functools.cache
def _mapped_outer(options: tuple[Any, ...]) -> Any:
    """Dw[g] = Σ x[t]ᵀ dy[t] over the tokens of group g."""
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    run = functools.partial(
        lax.ragged_dot_general, ragged_dot_dimension_numbers=dims, **dict(options)
    )
    mapped = jax.custom_batching.custom_vmap(lambda x, dy, sizes: run(x, dy, sizes))

    @mapped.def_vmap
    def _(rows: int, batched: Any, *args: Any) -> Any:
        each = [_each(rows, b, x) for b, x in zip(batched, args, strict=True)]
        return jax.vmap(run)(*each), True

    return mapped


def _each(rows: int, batched: bool, x: Any) -> Any:
    return x if batched else jnp.broadcast_to(x, (rows, *x.shape))
