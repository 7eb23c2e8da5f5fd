"""Products with W + scale A B that never form A B.

`contract` sums over every name that is neither in the result nor needed later.  The
order of the two thin products follows from sizes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from flora._algebra.axes import (
    RANK,
    Factored,
    Name,
    Named,
    Sizes,
    fused,
    renamed,
    require_linear,
    reshaped,
)
from flora._algebra.codes import with_scale
from flora._algebra.dropout import masked, seed
from flora._tree.arrays import compute_dtype
from flora._tree.errors import LoraError, Unfactorable
from flora._tree.quantized import dequantized

Names = Sequence[Name]

SCOPE = "lora"  # what profiles call the low-rank products, within the base's own names


def sizes_of(u: Named | Factored) -> dict[Name, int]:
    """The length along each name of an operand."""
    if isinstance(u, Named):
        return u.sizes
    return {x.name: x.size for x in u.pieces}


def named(x: Any, sizes: Sizes) -> Any:
    """x, an array or a weight, with its axes split and named as `sizes` say."""
    names, shape = tuple(n for n, _ in sizes), [size for _, size in sizes]
    if not isinstance(x, Factored):
        return Named(lax.reshape(x, shape), names)
    base = None if x.base is None else lax.reshape(x.base, shape)
    x = fused(reshaped(x, base, shape))
    if any(len(axis) > 1 for axis in x.axes) or x.settings.between is not None:
        raise Unfactorable("a product of two weights with joined axes or a variant")
    new = {axis[0].name: n for axis, n in zip(x.axes, names, strict=True) if axis}
    return renamed(x, {**new, RANK: "other rank"})


def contract(
    u: Named | Factored,
    v: Named,
    out: Names,
    *,
    precision: Any = None,
    dtype: Any = None,
) -> Named:
    """u·v, summed over the names that `out` lacks; u may be a weight, v is an array."""
    if isinstance(u, Factored):
        return _of_weight(u, v, out, precision, dtype)
    shared = [n for n in u.names if n in v.names]
    batch = [n for n in out if n in shared]
    summed = [n for n in shared if n not in out]
    free_u = [n for n in u.names if n not in shared]
    free_v = [n for n in v.names if n not in shared]
    first, second, names = u, v, [*batch, *free_u, *free_v]
    if list(out) == [*batch, *free_v, *free_u]:
        first, second, names = v, u, list(out)

    def positions(side: Named, group: Names) -> list[int]:
        return [side.names.index(n) for n in group]

    dims = (
        (positions(first, summed), positions(second, summed)),
        (positions(first, batch), positions(second, batch)),
    )
    y = lax.dot_general(
        *_placed_alike(first.array, second.array, dims[1]),
        dims,
        precision=precision,
        preferred_element_type=dtype,
    )
    return Named(lax.transpose(y, [names.index(n) for n in out]), tuple(out))


def _of_weight(w: Factored, x: Named, out: Names, precision: Any, dtype: Any) -> Named:
    """W x + scale (A B) x."""
    options = {"precision": precision}
    if w.base is None:
        return low_rank(x, w, out, dtype=dtype or x.array.dtype, **options)
    held = Named(w.base, w.names)
    y = contract(held, x, out, dtype=dtype, **options)
    change = low_rank(x, w, out, dtype=y.array.dtype, **options)
    return Named(y.array + change.array, y.names)


def _placed_alike(x: Any, y: Any, batch: Any) -> tuple[Any, Any]:
    """The operands with batch axes sharded alike, which explicit meshes ask for."""
    here, there = jax.typeof(x).sharding, jax.typeof(y).sharding
    if here.mesh.empty or not here.mesh.explicit_axes:
        return x, y
    wanted = list(here.spec), list(there.spec)
    for i, j in zip(*batch, strict=True):
        entry = here.spec[i] if here.spec[i] is not None else there.spec[j]
        wanted[0][i] = wanted[1][j] = entry
    return tuple(
        x if list(s.spec) == spec else jax.sharding.reshard(x, P(*spec))
        for x, s, spec in zip((x, y), (here, there), wanted, strict=True)
    )


def low_rank(
    x: Named | Factored, w: Factored, out: Names, *, precision: Any, dtype: Any
) -> Named:
    """Scale (x A) B with whichever thin product first that costs less.

    Args:
      x: activations, or another weight; shares names with W where it meets W.
      w: the weight, `fused`.
      out: names of the result.
      precision: as of `lax.dot_general`.
      dtype: dtype of the result.
    """
    held = x.array if isinstance(x, Named) else x.base
    thin = compute_dtype_of(dtype if held is None else held.dtype, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        thin = jnp.result_type(thin, w.a.array.dtype, w.b.array.dtype)
    if isinstance(x, Factored) and held is not None:
        x = dataclasses.replace(x, base=held.astype(thin))
    orders = ((w.a, w.b), (w.b, w.a))
    if w.settings.between is not None:  # the rank stands between: x first, at any cost
        orders = tuple(o for o in orders if _meets(x, *o))
        if len(orders) != 1:
            require_linear(w, "a product over both in and out axes, or over neither")
    first, second = min(orders, key=lambda pair: _cost(x, pair, out))
    wide = second.astype(jnp.promote_types(second.array.dtype, thin)).array
    second = Named((widened(wide) * w.settings.scale).astype(thin), second.names)
    z = _kept(sizes_of(x), first.names, {*second.names, *out})
    times = functools.partial(contract, out=z, precision=precision)
    z = with_cast(times, x, first.astype(thin), thin)
    return contract(on_hidden(w, z), second, out, precision=precision, dtype=dtype)


def _meets(x: Named | Factored, first: Named, second: Named) -> bool:
    """Whether x shares an axis with one factor that the other does not have."""
    return bool({*sizes_of(x)} & ({*first.names} - {*second.names}))


def on_hidden(w: Factored, z: Named) -> Named:
    """What the variant makes of z = x A, whose rank comes last for it."""
    if w.settings.between is None:
        return z
    at = z.names.index(RANK)
    made = w.settings.between(jnp.moveaxis(z.array, at, -1))
    return Named(jnp.moveaxis(made, -1, at), z.names)


def _kept(u: Mapping[Name, int], v: Names, needed: set[Name]) -> Names:
    return [n for n in dict.fromkeys([*u, *v]) if n in needed]


def _cost(x: Named | Factored, pair: tuple[Named, Named], out: Names) -> int:
    """Multiplications of (x first) second."""
    first, second = pair
    own = sizes_of(x)
    size = own | first.sizes | second.sizes
    z = _kept(own, first.names, {*second.names, *out})
    steps = ({*own, *first.names}, {*z, *second.names})
    return sum(math.prod(size[n] for n in step) for step in steps)


def widened(factor: Any, *others: Any) -> Any:
    """A factor in float32 or wider, before it is scaled."""
    dtypes = [x.dtype for x in others if jnp.issubdtype(x.dtype, jnp.inexact)]
    return factor.astype(jnp.result_type(factor.dtype, jnp.float32, *dtypes))


def with_cast(fn: Callable, x: Any, factor: Any, dtype: Any) -> Any:
    """`fn(x, factor)` with x in that dtype; what is saved is x as it was."""
    if isinstance(x, Factored) or x.dtype == dtype:
        return fn(x, factor)
    cast = jax.checkpoint(lambda x, f: fn(x.astype(dtype), f), prevent_cse=False)
    return cast(x, factor)


def compute_dtype_of(x: Any, result: Any) -> Any:
    """The activations' dtype; float32 for integers, for 8 bits and for float16.

    Float16 ends at 65504 and at 6e-8: too soon for x A and for scale B.
    """
    for dtype in (x, result):
        if jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1:
            return jnp.float32 if dtype == jnp.float16 else dtype
    return jnp.float32


def sum_dtype(result: Any) -> Any:
    """The dtype in which the low-rank term is added to x W."""
    return compute_dtype_of(result, result)


def densified(w: Factored) -> Any:
    """W + scale A B as one dense array: the fallback, never taken silently."""
    w = with_scale(w)
    base = dequantized(w.base)
    if not w.factors:
        return base
    w = fused(w)
    kind = (w.a.array.dtype, w.b.array.dtype) if base is None else (base.dtype,)
    dtype = compute_dtype(*kind)
    if w.settings.between is not None:
        raise LoraError(
            f"'{w.settings.path}' would have to be formed, and its variant puts a "
            "function between A and B. Exclude it, or choose another variant."
        )
    highest = lax.Precision.HIGHEST
    change = contract(w.a.astype(dtype), w.b.astype(dtype), w.names, precision=highest)
    change = lax.reshape(change.array, w.shape) * jnp.asarray(w.settings.scale, dtype)
    whole = change if base is None else base.astype(dtype) + change
    if w.output_scale is not None:
        whole = with_output_scale(whole, w.output_scale, [*sizes_of(w).items()])
    return whole if base is None else whole.astype(base.dtype)


def with_output_scale(y: Any, scale: Named, sizes: Sizes) -> Any:
    """Y ⊙ scale; `sizes` has name and length of each axis that y's axes are made of.

    Both passes multiply in float32 or wider, and y is saved in its own dtype.
    """
    names = [n for n, _ in sizes]
    if not {*scale.names} <= {*names}:
        raise Unfactorable("scaled outputs along axes that the result does not have")

    def times(y: Any, scale: Any) -> Any:
        wide = jnp.result_type(y.dtype, scale.dtype, jnp.float32)
        return (y.astype(wide) * scale.astype(wide)).astype(y.dtype)

    apart = lax.reshape(y, [size for _, size in sizes])
    scaled = jax.checkpoint(times, prevent_cse=False)(apart, scale.aligned(names))
    return lax.reshape(scaled, y.shape)


def nonzero(scale: Any) -> Any:
    """A scale, 1e-30 where it is nearer to zero: to divide by."""
    tiny = jnp.copysign(jnp.asarray(1e-30, scale.dtype), scale)
    return scale + lax.stop_gradient(jnp.where(jnp.abs(scale) < 1e-30, tiny - scale, 0))


@jax.custom_vjp
def without_gradient(x: Any) -> Any:
    """X, as a constant to the first derivative; others go through it."""
    return x


without_gradient.defvjp(lambda x: (x, None), lambda _, dx: (jnp.zeros_like(dx),))


@jax.custom_vjp
def with_gradient_of_scale(y: Any, scale: Any) -> Any:
    """Y = y₀ ⊙ scale, as it is, with the gradient of the scale.  Reverse mode only.

    That is Σ dy ⊙ y₀ = Σ dy ⊙ y / scale: nothing but y is kept for it.

    Args:
      y: of bfloat16's range or a wider one; made with the scale `without_gradient`.
      scale: of as many axes as y, of length 1 where it is constant; nowhere zero.
    """
    return y


def _back_to_scale(saved: Any, dy: Any) -> tuple[Any, Any]:
    y, scale = saved
    wide = jnp.result_type(y.dtype, scale.dtype, jnp.float32)
    over = [i for i, size in enumerate(scale.shape) if size != y.shape[i]]
    total = jnp.sum(dy.astype(wide) * y.astype(wide), over, keepdims=True)
    return dy, (total / scale).astype(scale.dtype)


with_gradient_of_scale.defvjp(
    lambda y, scale: (y, (y, scale)),
    _back_to_scale,
)


def drop(x: Any, w: Factored, salt: int) -> Any:
    """Dropout on the input of the low-rank path; x itself without keys."""
    if isinstance(x, Factored) or (own := seed_of(w, salt)) is None:
        return x
    rate, dtype = w.settings.dropout, compute_dtype_of(x.dtype, jnp.float32)

    def scaled(x: Any, own: Any) -> Any:
        kept = masked(x, own, rate, math.prod(x.shape[-1:]))
        return (widened(kept) / (1 - rate)).astype(dtype)

    # What is saved of it is the seed, no mask.
    return jax.checkpoint(scaled, prevent_cse=False)(x.astype(dtype), own)


def seed_of(w: Factored, salt: int) -> Any:
    """That of a weight's mask; `None` without keys."""
    return None if w.key is None else seed(key_of(w.key, salt))


def key_of(keys: Named, salt: int) -> Any:
    """The key of one use of a weight."""
    return jax.random.fold_in(keys.array.reshape(-1)[0], salt)
