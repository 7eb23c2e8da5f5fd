"""The low-rank term of a product, scale (x A) B, and the means to write it.

Arrays carry one label an axis, and `contract` sums over every label that is neither in
the result nor needed later.  The order of the two thin products follows from sizes.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from flora._algebra.factored import Factored, relayout, split_axes
from flora._algebra.views import RANK, Views, views
from flora._tree.errors import LoraError, Unfactorable
from flora._tree.quantized import dequantized

Labels = Sequence[Hashable]
Segments = Sequence[Sequence[tuple[Hashable, int]]]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An operand with one label an axis.

    Attributes:
      array: the operand; `None` for a pure A B.
      labels: one an axis.
      weight: the factored weight that it is, if it is one.
    """

    array: Any
    labels: Labels
    weight: tuple[Factored, Views] | None = None

    @property
    def sizes(self) -> dict[Hashable, int]:
        whole = self.weight[0] if self.weight else self.array
        return dict(zip(self.labels, whole.shape, strict=True))


def relabel(x: Any, segments: Segments) -> Labelled:
    """x, an array or a weight, with its axes split and named as the segments say."""
    flat = [pair for axis in segments for pair in axis]
    labels, sizes = [label for label, _ in flat], [size for _, size in flat]
    if not isinstance(x, Factored):
        return Labelled(lax.reshape(x, sizes), labels)
    base = None if x.base is None else lax.reshape(x.base, sizes)
    x = relayout(x, base, split_axes(x.axes, sizes))
    v = views(x, "x")
    names = {
        mine[0][0]: label
        for mine, label in zip(v.segments, labels, strict=True)
        if mine
    }
    if any(len(s) > 1 for s in v.segments):
        raise Unfactorable("a product of two weights with joined axes")
    v = dataclasses.replace(
        v,
        a_labels=tuple(names.get(n, ("x", n)) for n in v.a_labels),
        b_labels=tuple(names.get(n, ("x", n)) for n in v.b_labels),
    )
    return Labelled(base, labels, (x, v))


def contract(
    u: Labelled, v: Labelled, out: Labels, *, precision: Any = None, dtype: Any = None
) -> Labelled:
    """Sums u·v over the labels that `out` lacks.  u may be a weight, v is an array."""
    if u.array is None and u.weight:
        dtype = dtype or v.array.dtype
        y = low_rank_product(v, *u.weight, out, precision=precision, dtype=dtype)
        return Labelled(y, out)
    shared = [x for x in u.labels if x in v.labels]
    batch = [x for x in out if x in shared]
    summed = [x for x in shared if x not in out]
    free_u = [x for x in u.labels if x not in shared]
    free_v = [x for x in v.labels if x not in shared]
    first, second, labels = u, v, [*batch, *free_u, *free_v]
    if list(out) == [*batch, *free_v, *free_u]:
        first, second, labels = v, u, list(out)

    def axes_of(side: Labelled, group: Sequence[Hashable]) -> list[int]:
        return [side.labels.index(x) for x in group]

    dims = (
        (axes_of(first, summed), axes_of(second, summed)),
        (axes_of(first, batch), axes_of(second, batch)),
    )
    y = lax.dot_general(
        *_placed_alike(first.array, second.array, dims[1]),
        dims,
        precision=precision,
        preferred_element_type=dtype,
    )
    y = lax.transpose(y, [labels.index(x) for x in out])
    if u.weight:
        y = y + low_rank_product(v, *u.weight, out, precision=precision, dtype=y.dtype)
    return Labelled(y, out)


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


def low_rank_product(
    x: Labelled, w: Factored, w_views: Views, out: Labels, *, precision: Any, dtype: Any
) -> Any:
    """Scale (x A) B with whichever thin product first that costs less.

    Args:
      x: activations, labelled; shares labels with the axes of W that it meets.
      w: the weight.
      w_views: its labelled factors.
      out: labels of the result.
      precision: as of `lax.dot_general`.
      dtype: dtype of the result.
    """
    given = dtype if x.array is None else x.array.dtype
    thin = compute_dtype_of(given, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        thin = jnp.result_type(thin, w_views.a.dtype, w_views.b.dtype)
    if x.array is not None:
        x = dataclasses.replace(x, array=x.array.astype(thin))
    a = Labelled(w_views.a, w_views.a_labels)
    b = Labelled(w_views.b, w_views.b_labels)
    orders = ((a, b), (b, a))
    if (
        w.site.between is not None
    ):  # the rank stands between: x first, whatever it costs
        orders = tuple(o for o in orders if _meets(x, *o)) or orders
    first, second = min(orders, key=lambda pair: _cost(x, pair, out))
    wide = jnp.promote_types(second.array.dtype, thin)
    scaled = widened(second.array.astype(wide)) * w.site.scale
    first = dataclasses.replace(first, array=first.array.astype(thin))
    second = dataclasses.replace(second, array=scaled.astype(thin))
    z_labels = _kept(x.labels, first.labels, {*second.labels, *out})
    z = contract(x, first, z_labels, precision=precision)
    z = dataclasses.replace(z, array=between_factors(w, z.array, z.labels))
    return contract(z, second, out, precision=precision, dtype=dtype).array


def _meets(x: Labelled, first: Labelled, second: Labelled) -> bool:
    """Whether x shares an axis with one factor that the other does not have."""
    own = {*first.labels} - {*second.labels}
    return any(label in own for label in x.labels)


def between_factors(w: Factored, z: Any, labels: Labels) -> Any:
    """What the variant makes of z = x A, whose rank comes last for it."""
    if w.site.between is None:
        return z
    at = list(labels).index(RANK)
    return jnp.moveaxis(w.site.between(jnp.moveaxis(z, at, -1)), -1, at)


def _kept(u: Labels, v: Labels, needed: set[Hashable]) -> Labels:
    return [x for x in dict.fromkeys([*u, *v]) if x in needed]


def _cost(x: Labelled, pair: tuple[Labelled, Labelled], out: Labels) -> int:
    """Multiplications of (x first) second."""
    first, second = pair
    size = x.sizes | first.sizes | second.sizes
    z = _kept(x.labels, first.labels, {*second.labels, *out})
    steps = ({*x.labels, *first.labels}, {*z, *second.labels})
    return sum(math.prod(size[n] for n in step) for step in steps)


def widened(factor: Any, *others: Any) -> Any:
    """A factor in float32 or wider, before it is scaled."""
    dtypes = [x.dtype for x in others if jnp.issubdtype(x.dtype, jnp.inexact)]
    return factor.astype(jnp.result_type(factor.dtype, jnp.float32, *dtypes))


def compute_dtype_of(x: Any, result: Any) -> Any:
    """The activations' dtype, unless it is an integer or narrower than 16 bits."""
    for dtype in (x, result):
        if jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1:
            return dtype
    return jnp.float32


def materialized(w: Factored) -> Any:
    """W + scale A B as one dense array: the fallback, never taken silently."""
    base = dequantized(w.base)
    if w.a is None:
        return base
    seen = views(w, "w")
    out = [label for runs in seen.segments for label, _ in runs]
    dtype = jnp.float32 if base is None else jnp.promote_types(base.dtype, jnp.float32)
    a = Labelled(seen.a.astype(dtype), seen.a_labels)
    b = Labelled(seen.b.astype(dtype), seen.b_labels)
    if w.site.between is not None:
        raise LoraError(
            f"'{w.site.path}' would have to be formed, and its variant puts a function "
            "between A and B. Exclude it, or choose another variant."
        )
    change = contract(a, b, out, precision=lax.Precision.HIGHEST).array
    change = lax.reshape(change, w.shape) * jnp.asarray(w.site.scale, dtype)
    whole = change if base is None else base.astype(dtype) + change
    whole = on_columns(whole, seen, [run for runs in seen.segments for run in runs])
    return whole if base is None else whole.astype(base.dtype)


def on_columns(y: Any, v: Views, out: Sequence[tuple[Hashable, int]]) -> Any:
    """Y ⊙ columns; `out` has label and size of each axis that y's axes are made of.

    Both passes multiply in float32 or wider, and y is saved in its own dtype.
    """
    if v.columns is None:
        return y
    labels = [label for label, _ in out]
    if not {*v.column_labels} <= {*labels}:
        raise Unfactorable("scaled columns along axes that the result does not have")
    held = [n for n in labels if n in v.column_labels]
    columns = lax.transpose(v.columns, [v.column_labels.index(n) for n in held])
    columns = lax.expand_dims(
        columns, [i for i, n in enumerate(labels) if n not in held]
    )

    def times(y: Any, columns: Any) -> Any:
        wide = jnp.result_type(y.dtype, columns.dtype, jnp.float32)
        return (y.astype(wide) * columns.astype(wide)).astype(y.dtype)

    apart = lax.reshape(y, [size for _, size in out])
    scaled = jax.checkpoint(times, prevent_cse=False)(apart, columns)
    return lax.reshape(scaled, y.shape)


def with_columns(
    w: Factored,
    x: Any,
    salt: int,
    run: Callable[[Factored, Any], Any],
    out: Sequence[tuple[Hashable, int]],
    v: Views | None = None,
    x_axes: Sequence[tuple[Hashable, int]] = (),
) -> Any:
    """(x (W + scale A B)) ⊙ columns, for a linear `run(weight, x)`.

    Where x meets the out axes, as with Wᵀ, (x ⊙ columns) (W + scale A B)ᵀ; `x_axes` are
    label and size of its axes.  Dropout acts on what adapting changes: x W keeps the x
    that was dropped.

    References: Liu et al. 2024 (DoRA), section 4.3 and its implementation in PEFT.
      https://arxiv.org/abs/2402.09353
    """
    dropped = drop(x, w, salt)
    plain = dataclasses.replace(w, columns=None, key=None)
    v = v or views(w, "w")
    if {*v.column_labels} <= {label for label, _ in x_axes}:
        y = run(plain, on_columns(dropped, v, x_axes))
    else:
        y = on_columns(run(plain, dropped), v, out)
    if dropped is x or w.base is None:
        return y
    frozen = dataclasses.replace(plain, a=None, b=None)
    return y + run(frozen, x.astype(dropped.dtype) - dropped).astype(y.dtype)


def drop(x: Any, w: Factored, salt: int) -> Any:
    """Dropout on the input of the low-rank path; x itself without keys."""
    if w.key is None or isinstance(x, Factored):
        return x
    x = x.astype(compute_dtype_of(x.dtype, jnp.float32))
    key = jax.random.fold_in(w.key.reshape(-1)[0], salt)
    keep = jax.random.bernoulli(key, 1.0 - w.site.dropout, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - w.site.dropout, x.dtype), 0)
