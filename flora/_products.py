"""y = x W + z Q with z = x P, form by form, and its gradient.

    direct, thin_first, thin_last    x W + z Q, one or the other written first
    unrolled                         one outer product for each unit of rank
    concat                           [x | z] [W ; Q]
    merged, dithered                 x (W + P Q), rounded to W's dtype

P is the factor that x meets first; Q is the other, scale included.  The backward pass
is low-rank in every form:

    g = dy Qᵀ,   dx = dy Wᵀ + g Pᵀ,   dP = xᵀ g,   dQ = zᵀ dy

so dx is the same kind of sum as y with other letters, and it has a form of its own.
Nothing of W's shape is saved: fences (`lax.optimization_barrier`) keep XLA from sharing
one copy between both passes.

XLA puts no two products into one kernel.  What the low-rank term costs is therefore set
by what is written to memory between the two, and that is what the forms fix.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._choice import COPIES
from flora._forms import Labelled, Labels, contract
from flora._views import RANK


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a product.

    Attributes:
      forward: the form of y, one of `SUMS`.
      backward: the form of dx.
      x, w, p, q, y: the labels of the operands' axes and of the result's.
      dtype: of y.
      precision: as of `lax.dot_general`.
    """

    forward: str
    backward: str
    x: tuple[Hashable, ...]
    w: tuple[Hashable, ...]
    p: tuple[Hashable, ...]
    q: tuple[Hashable, ...]
    y: tuple[Hashable, ...]
    dtype: Any
    precision: Any = None

    @property
    def z(self) -> tuple[Hashable, ...]:
        """Of x P: x's axes but those that P sums over."""
        return (*(n for n in self.x if n not in self.p or n in self.q), RANK)

    def times(self, u: Any, v: Any, out: Labels, dtype: Any = None) -> Any:
        """u·v, summed over what `out` lacks; u and v are `(array, labels)`."""
        return contract(
            Labelled(*u), Labelled(*v), out, precision=self.precision, dtype=dtype
        ).array

    def base(self, x: Any, w: Any, dtype: Any = None) -> Any:
        """X W."""
        return self.times((w, self.w), (x, self.x), self.y, dtype or self.dtype)

    def change(self, z: Any, q: Any) -> Any:
        """Z Q."""
        return self.times((z, self.z), (q.astype(z.dtype), self.q), self.y, self.dtype)


def _direct(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """XLA chooses the order."""
    return plan.base(x, w) + plan.change(z, q)


def _thin_first(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """Z Q goes to memory; the kernel of x W adds it to what it writes."""
    return plan.base(x, w) + lax.optimization_barrier(plan.change(z, q))


def _thin_last(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """X W goes to memory; the kernel of z Q adds it to what it writes."""
    return lax.optimization_barrier(plan.base(x, w)) + plan.change(z, q)


def _unrolled(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """The kernel of x W adds one outer product for each unit of rank."""
    wide = jnp.promote_types(plan.dtype, jnp.float32)
    y = plan.base(x, w, wide)
    for r in range(q.shape[plan.q.index(RANK)]):
        row = _spread(q.astype(z.dtype), plan.q, r, plan.y, wide)
        y = y + _spread(z, plan.z, r, plan.y, wide) * row
    return y.astype(plan.dtype)


def _spread(factor: Any, labels: Labels, r: int, out: Labels, dtype: Any) -> Any:
    """One column of z or row of q, with axes of size 1 where it has none of `out`."""
    column = lax.index_in_dim(factor, r, labels.index(RANK), keepdims=False)
    held = [n for n in labels if n != RANK]
    column = lax.transpose(column, [held.index(n) for n in out if n in held])
    sizes = dict(zip(labels, factor.shape, strict=True))
    return lax.reshape(column, [sizes.get(n, 1) for n in out]).astype(dtype)


def _concat(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """[x | z] [W ; Q]: one product of longer operands."""
    axes = [n for n in plan.x if n in plan.w and n not in plan.y]
    if len(axes) != 1:
        return _thin_last(plan, x, w, z, p, q)

    def joined(first: Any, labels: Labels, second: Any, thin_labels: Labels) -> Any:
        order = [thin_labels.index(RANK if n == axes[0] else n) for n in labels]
        thin = lax.transpose(second, order).astype(first.dtype)
        return lax.concatenate([first, thin], labels.index(axes[0]))

    return plan.base(joined(x, plan.x, z, plan.z), joined(w, plan.w, q, plan.q))


def _merged(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """X (W + P Q), rounded to W's dtype: what is under half its last place vanishes."""
    weight = _sum_of_weights(plan, w, p, q).astype(w.dtype)
    return plan.base(x, lax.optimization_barrier(weight))


def _dithered(plan: Plan, x: Any, w: Any, z: Any, p: Any, q: Any) -> Any:
    """X (W + P Q), rounded so that it is right on average."""
    weight = stochastically_rounded(_sum_of_weights(plan, w, p, q), w.dtype)
    return plan.base(x, lax.optimization_barrier(weight))


def _sum_of_weights(plan: Plan, w: Any, p: Any, q: Any) -> Any:
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    p, q = p.astype(dtype), q.astype(dtype)
    return w.astype(dtype) + plan.times((p, plan.p), (q, plan.q), plan.w, dtype)


def stochastically_rounded(x: Any, dtype: Any) -> Any:
    """X in bfloat16, rounded up or down with odds that keep the mean.

    Adds 16 bits of noise below bfloat16's last place and cuts the sum off there.  The
    noise is a hash of the position and of x's own bits: no key is needed, both passes
    round alike, and as long as x stays the same, so does what it is rounded to.  What
    bfloat16 can hold, infinities and NaN stay as they are.

    Args:
      x: any shape; float32 to be rounded at random.
      dtype: bfloat16; to any other, x is rounded to the nearest.

    References: Croci et al. 2022, "Stochastic rounding: implementation, error analysis
      and applications". https://doi.org/10.1098/rsos.211631
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or x.dtype != jnp.float32:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = _hashed(position + index)
    noise = _hashed(bits ^ position) >> 16
    cut = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), x.dtype)
    return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)


def _hashed(bits: Any) -> Any:
    """A hash of 32 bits in which each bit of the input changes half of the output's.

    References: Wellons 2018, "Prospecting for hash functions".
      https://nullprogram.com/blog/2018/07/31/
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


SUMS: Mapping[str, Callable[..., Any]] = {
    "direct": _direct,
    "thin_first": _thin_first,
    "thin_last": _thin_last,
    "unrolled": _unrolled,
    "concat": _concat,
    "merged": _merged,
    "dithered": _dithered,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(plan: Plan, x: Any, w: Any, p: Any, q: Any) -> Any:
    """X W + (x P) Q, with the axes `plan.y`.  Reverse mode only.

    Args:
      plan: forms, labels, dtype, precision.
      x: activations.
      w: the frozen weight; it gets no gradient.
      p: the factor that x meets.
      q: the other one, with the scale in it.
    """
    return _forward(plan, x, w, p, q)[0]


def _forward(plan: Plan, x: Any, w: Any, p: Any, q: Any) -> tuple[Any, Any]:
    x = lax.optimization_barrier(x)  # written once: W, P and dP read it
    z = plan.times((x, plan.x), (p.astype(x.dtype), plan.p), plan.z)
    return SUMS[plan.forward](plan, x, w, z, p, q), (x, w, z, p, q)


def _backward(plan: Plan, saved: Any, dy: Any) -> tuple[Any, ...]:
    x, w, z, p, q = saved
    back = dataclasses.replace(
        plan, x=plan.y, y=plan.x, p=plan.q, q=plan.p, dtype=x.dtype
    )
    if plan.backward in COPIES:  # or XLA keeps the forward pass's copy of W until here
        w, p, q = lax.optimization_barrier((w, p, q))
    dy = lax.optimization_barrier(dy)  # written once: W, Q and dQ read it
    thin = dy.astype(x.dtype)
    g = plan.times((thin, plan.y), (q.astype(x.dtype), plan.q), back.z)
    dx = SUMS[plan.backward](back, dy, w, g, q, p)
    dp = plan.times((x, plan.x), (g, back.z), plan.p, p.dtype)
    dq = plan.times((z, plan.z), (thin, plan.y), plan.q, q.dtype)
    return dx, None, dp, dq


product.defvjp(_forward, _backward)
