"""y = x W + z Q with z = x P, form by form, and its gradient.

    direct, thin_first, thin_last    x W + z Q, one or the other written first
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

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.low_rank import Labelled, Labels, contract
from flora._algebra.views import RANK
from flora._tree.config import COPIES

Arrays = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a product.

    Attributes:
      forward: the form of y, one of `SUMS`.
      backward: the form of dx.
      x, w, p, q, y: the labels of the operands' axes and of the result's.
      dtype: of y.
      precision: as of `lax.dot_general`.
      scope: the name of the product within that of what it is computed with.
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
    scope: str = ""

    @property
    def z(self) -> tuple[Hashable, ...]:
        """Of x P: x's axes but those that P sums over."""
        return (*(n for n in self.x if n not in self.p or n in self.q), RANK)

    def reversed(self, dtype: Any) -> "Plan":
        """The plan of dx, whose activations are dy, and whose P is Q."""
        return dataclasses.replace(
            self, x=self.y, y=self.x, p=self.q, q=self.p, dtype=dtype
        )

    def named(self) -> contextlib.AbstractContextManager:
        """Gives what runs inside the product's own name."""
        return jax.named_scope(self.scope) if self.scope else contextlib.nullcontext()

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
    "concat": _concat,
    "merged": _merged,
    "dithered": _dithered,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(
    plans: tuple[Plan, ...], x: Any, ws: Arrays, ps: Arrays, qs: Arrays
) -> Arrays:
    """X W + (x P) Q for each W, with the axes `plan.y`.  Reverse mode only.

    What products of one x share is computed once: z = x [P₁ P₂ …], xᵀ [g₁ g₂ …], and
    [g₁ g₂ …] [P₁ P₂ …]ᵀ, which is added to the first product's dy Wᵀ.

    Args:
      plans: one a product: forms, labels, dtype, precision.  All are `alike`.
      x: activations.
      ws: the frozen weights; they get no gradient.
      ps: the factors that x meets.
      qs: the other ones, with the scale in them.
    """
    return _forward(plans, x, ws, ps, qs)[0]


def alike(one: Plan, other: Plan) -> bool:
    """Whether two products of one x can be computed together."""
    if {one.forward, one.backward} & {"merged", "dithered"}:
        return False
    free = {"forward": "", "backward": "", "w": (), "q": (), "y": (), "scope": ""}
    return dataclasses.replace(one, **free) == dataclasses.replace(other, **free)


def _forward(
    plans: tuple[Plan, ...], x: Any, ws: Arrays, ps: Arrays, qs: Arrays
) -> tuple[Arrays, Any]:
    plan = plans[0]
    x = lax.optimization_barrier(x)  # written once: W, P and dP read it
    p = _joined([p.astype(x.dtype) for p in ps], plan.p)
    z = plan.times((x, plan.x), (p, plan.p), plan.z)
    ys = []
    for args in zip(plans, ws, _parts(plans, z, plan.z, qs), ps, qs, strict=True):
        own, w, part, *factors = args
        with own.named():
            ys.append(SUMS[own.forward](own, x, w, part, *factors))
    return tuple(ys), (x, ws, z, ps, qs)


def _backward(plans: tuple[Plan, ...], saved: Any, dys: Arrays) -> tuple[Any, ...]:
    x, ws, z, ps, qs = saved
    plan, dtype = plans[0], x.dtype
    if any(p.backward in COPIES for p in plans):
        # or XLA keeps the forward pass's copy of W until here
        ws, ps, qs = lax.optimization_barrier((ws, ps, qs))
    dys = [lax.optimization_barrier(dy) for dy in dys]  # written once: W, Q, dQ read it
    thin = [dy.astype(dtype) for dy in dys]
    backs = [p.reversed(dtype) for p in plans]
    gs = [
        own.times((dy, own.y), (q.astype(dtype), own.q), back.z)
        for own, back, dy, q in zip(plans, backs, thin, qs, strict=True)
    ]
    g, p = _joined(gs, backs[0].z), _joined(ps, plan.p)
    dx = _summed(plan, backs, dys, ws, g, qs[0], p)
    dp = plan.times((x, plan.x), (g, backs[0].z), plan.p, ps[0].dtype)
    dqs = [
        own.times((part, own.z), (dy, own.y), own.q, q.dtype)
        for own, part, dy, q in zip(
            plans, _parts(plans, z, plan.z, qs), thin, qs, strict=True
        )
    ]
    return dx, (None,) * len(ws), _parts(plans, dp, plan.p, qs), tuple(dqs)


products.defvjp(_forward, _backward)


def _summed(
    plan: Plan, backs: Any, dys: Any, ws: Arrays, g: Any, q: Any, p: Any
) -> Any:
    """Σ dy Wᵀ + g Pᵀ, the low-rank term with the first product, in its form.

    In the direct form it comes last: on a mesh XLA then reduces the rest in one go.
    """
    direct = plan.backward == "direct"
    if direct:
        dx = backs[0].base(dys[0], ws[0])
    else:
        dx = SUMS[plan.backward](backs[0], dys[0], ws[0], g, q, p)
    for back, dy, w in zip(backs[1:], dys[1:], ws[1:], strict=True):
        dx = dx + back.base(dy, w)
    return dx + backs[0].change(g, p) if direct else dx


def _joined(arrays: Sequence[Any], labels: Labels) -> Any:
    """Side by side along the rank."""
    if len(arrays) == 1:
        return arrays[0]
    return lax.concatenate(arrays, labels.index(RANK))


def _parts(plans: Sequence[Plan], array: Any, labels: Labels, qs: Arrays) -> Arrays:
    """What `_joined` had joined; each product's rank is read off its Q."""
    if len(plans) == 1:
        return (array,)
    ranks = [q.shape[own.q.index(RANK)] for own, q in zip(plans, qs, strict=True)]
    return tuple(lax.split(array, ranks, labels.index(RANK)))
