"""y = x W + z Q with z = x P, form by form, and its gradient.

    direct, thin_first, thin_last    x W + z Q, one or the other written first
    concat                           [x | z] [W ; Q]
    merged, dithered                 x (W + P Q), rounded to W's dtype

P is the factor that x meets first; Q is the other, scale included.  The backward pass
is low-rank in every form:

    g = dy Qᵀ,   dx = dy Wᵀ + g Pᵀ,   dP = xᵀ g,   dQ = zᵀ dy

so dx is the same kind of sum as y with other letters, and it has a form of its own.
With dropout z, dP and what g Pᵀ adds to dx meet the mask of each P (`dropout`).
Nothing of W's shape is saved: fences (`lax.optimization_barrier`) keep XLA from sharing
one copy between both passes.

XLA puts no two products into one kernel.  What the low-rank term costs is therefore set
by what is written to memory between the two, and that is what the forms fix.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import RANK, Name, Named
from flora._algebra.codes import Stored, scaled
from flora._algebra.dropout import Seed, masked
from flora._algebra.hashes import hashed
from flora._algebra.kernels import by_kernel
from flora._algebra.low_rank import SCOPE, Names, contract
from flora._tree.config import COPIES

Arrays = Sequence[Named]
Seeds = Sequence[Seed | None]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a product, but for the names of its operands.

    Attributes:
      forward: the form of y, one of `SUMS`.
      backward: the form of dx.
      y: the names of the result's axes.
      dtype: of y.
      precision: as of `lax.dot_general`.
      scope: the name of the product within that of what it is computed with.
      kernel: the mesh axes that outputs are sharded over, if one kernel is to read dy
        for both g and dQ.
      written: whether x goes to memory for all that read it.
      sliced: whether W is the slice of a stack that a step of a loop takes.
      rate: of dropout on the low-rank term; what is kept is scaled in Q.
      columns: elements of x that a row of a mask has.
    """

    forward: str
    backward: str
    y: tuple[Name, ...]
    dtype: Any
    precision: Any = None
    scope: str = ""
    kernel: tuple[str, ...] | None = None
    written: bool = True
    sliced: bool = False
    rate: float = 0.0
    columns: int = 1

    def scoped(self) -> contextlib.AbstractContextManager:
        """Names the product in profiles."""
        return jax.named_scope(self.scope) if self.scope else contextlib.nullcontext()

    def times(self, u: Named, v: Named, out: Names, dtype: Any = None) -> Named:
        """u·v, summed over what `out` lacks."""
        return contract(u, v, out, precision=self.precision, dtype=dtype)

    def base(self, x: Named, w: Any) -> Named:
        """X W; (x C) ⊙ s or (x ⊙ s) C of codes."""
        c, by = (w.opened(), w.scale) if isinstance(w, Stored) else (w, None)
        if by and not self.scales_y(by):
            x = scaled(x, by)
        y = self.times(c, x, self.y, self.dtype)
        return scaled(y, by) if by and self.scales_y(by) else y

    def term(self, z: Named, q: Named) -> Named:
        """Z Q."""
        with jax.named_scope(SCOPE):
            return self.times(z, q.astype(z.dtype), self.y, self.dtype)

    def change(self, z: Named, q: Named) -> Named:
        """Z Q, which policies of `jax.checkpoint` that save products do not save.

        They save x W, as of the frozen model, and z; of these y is soon made again.
        """
        return _no_product(self.term, z, q)

    def dropped(self, x: Named, seed: Seed | None) -> Named:
        """What the low-rank term sees of x; of what it gives back to x, too."""
        if seed is None:
            return x
        return Named(masked(x.array, seed, self.rate, self.columns), x.names)

    def scales_y(self, by: Named) -> bool:
        """Whether a scale of codes meets the result, not x."""
        return {*by.names} <= {*self.y}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _no_product(fn: Callable, *args: Any) -> Any:
    """`fn(*args)`, in a jaxpr as one equation that is no product."""
    return fn(*args)


@_no_product.defjvp
def _jvp(fn: Callable, args: Any, tangents: Any) -> Any:
    return jax.jvp(fn, args, tangents)


class Sum(NamedTuple):
    """The operands of x W + z Q with z = x P; W may be `Stored`.

    With a seed, z Q meets the mask of it.
    """

    spec: Spec
    x: Named
    w: Any
    z: Named
    p: Named
    q: Named
    seed: Seed | None = None

    def base(self, x: Named | None = None, w: Any = None) -> Any:
        """X W, or of what stands for x and W."""
        return self.spec.base(x or self.x, w or self.w).array

    def dense(self) -> "Sum":
        """With W as an array."""
        w = self.w.dense() if isinstance(self.w, Stored) else self.w
        return self._replace(w=w)

    def change(self) -> Any:
        """Z Q."""
        change = self.spec.change(self.z, self.q)
        return self.spec.dropped(change, self.seed).array

    def weight(self) -> Any:
        """W + P Q, in float32 or wider."""
        dtype = jnp.promote_types(self.w.array.dtype, jnp.float32)
        p, q = self.p.astype(dtype), self.q.astype(dtype)
        change = self.spec.times(p, q, self.w.names, dtype)
        return self.w.array.astype(dtype) + change.array


def _direct(s: Sum) -> Any:
    """XLA chooses the order."""
    return s.base() + s.change()


def _thin_first(s: Sum) -> Any:
    """Z Q goes to memory; the kernel of x W adds it to what it writes."""
    return s.base() + lax.optimization_barrier(s.change())


def _thin_last(s: Sum) -> Any:
    """X W goes to memory; the kernel of z Q adds it to what it writes."""
    return lax.optimization_barrier(s.base()) + s.change()


def _concat(s: Sum) -> Any:
    """[x | z] [W ; Q]: one product of longer operands.

    Of codes that scale the result, [x | z] [C ; Q ⊘ s] ⊙ s.
    """
    summed = [n for n in s.x.names if n not in s.spec.y]
    if len(summed) != 1 or s.seed is not None:
        return _thin_last(s)
    (axis,) = summed

    def longer(first: Named, thin: Named) -> Named:
        more = thin.renamed({RANK: axis}).ordered(first.names)
        pair = [first.array, more.astype(first.array.dtype)]
        return first.along(axis, lambda _, at: lax.concatenate(pair, at))

    x, w, q, by = s.x, s.w, s.q, None
    if isinstance(w, Stored):
        by, w = w.scale, w.opened().astype(x.dtype)
    if by and s.spec.scales_y(by):
        y = s.spec.base(longer(x, s.z), longer(w, scaled(q, by, lax.div)))
        return scaled(y, by).array
    x = scaled(x, by) if by else x
    return s.base(longer(x, s.z), longer(w, q))


def _merged(s: Sum) -> Any:
    """X (W + P Q), rounded to W's dtype: what is under half its last place vanishes."""
    s = s.dense()
    return _by_copy(s, s.weight().astype(s.w.array.dtype))


def _dithered(s: Sum) -> Any:
    """X (W + P Q), rounded so that it is right on average."""
    s = s.dense()
    return _by_copy(s, stochastically_rounded(s.weight(), s.w.array.dtype))


def _by_copy(s: Sum, weight: Any) -> Any:
    return s.base(w=Named(lax.optimization_barrier(weight), s.w.names))


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
        position = hashed(position + index)
    noise = hashed(bits ^ position) >> 16
    cut = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), x.dtype)
    return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)


ROUNDED = frozenset({"merged", "dithered"})  # W and the low-rank term are one array
SUMS: Mapping[str, Callable[..., Any]] = {
    "direct": _direct,
    "thin_first": _thin_first,
    "thin_last": _thin_last,
    "concat": _concat,
    "merged": _merged,
    "dithered": _dithered,
}


Again = Callable[[Sequence[Any]], Named] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def products(
    each: tuple[Spec, ...],
    again: Again,
    x: Named,
    sources: Sequence[Any],
    ws: Sequence[Any],
    ps: Arrays,
    qs: Arrays,
    seeds: Seeds,
) -> Sequence[Any]:
    """X W + (x P) Q for each W, with the axes `spec.y`.  Reverse mode only.

    What products of one x share is computed once: z = x [P₁ P₂ …], xᵀ [g₁ g₂ …], and
    [g₁ g₂ …] [P₁ P₂ …]ᵀ, which is added to the first product's dy Wᵀ.  With dropout
    each of them sees another x.

    Args:
      each: forms, dtype and precision of each product.  All are `alike`.
      again: makes x of the sources once more, for dP; x is kept if `None`.
      x: activations.
      sources: these get no gradient, as x gets all of it.
      ws: the frozen weights, some may be `Stored`; they get no gradient.
      ps: the factors that x meets.
      qs: the other ones, with the scale in them.
      seeds: of the masks of dropout; `None` for none, of all or of no product.
    """
    return _forward(each, again, x, sources, ws, ps, qs, seeds)[0]


def alike(one: tuple[Spec, Named], other: tuple[Spec, Named]) -> bool:
    """Whether two products of one x, each with its P, can be computed together."""
    if {one[0].forward, one[0].backward} & ROUNDED:
        return False
    like = [(spec.dtype, spec.precision, spec.rate) for spec, _ in (one, other)]
    same = like[0] == like[1]
    p, other_p = one[1], other[1]
    return (
        same
        and p.names == other_p.names
        and all(p.sizes[n] == other_p.sizes[n] for n in p.names if n != RANK)
    )


def _forward(
    each: tuple[Spec, ...],
    again: Again,
    x: Named,
    sources: Sequence[Any],
    ws: Sequence[Any],
    ps: Arrays,
    qs: Arrays,
    seeds: Seeds,
) -> tuple[Sequence[Any], Any]:
    if any(spec.written for spec in each):  # once: W, P and dP read it
        x = lax.optimization_barrier(x)
    z = hidden_terms(each, x, [p.astype(x.array.dtype) for p in ps], qs, seeds)
    ys = []
    for spec, w, part, own, q in zip(each, ws, apart(z, qs), ps, qs, strict=True):
        with spec.scoped():
            ys.append(SUMS[spec.forward](Sum(spec, x, w, part, own, q)))
    return tuple(ys), (x if again is None else sources, ws, z, ps, qs, seeds)


def hidden_terms(
    each: Sequence[Spec], x: Named, ps: Arrays, qs: Arrays, seeds: Seeds
) -> Arrays:
    """X P, `shared` by all products or of each."""
    seen = _seen(each, x, seeds)
    with jax.named_scope(SCOPE):
        return [
            each[0].times(own, p, hidden(own, p, qs))
            for own, p in zip(seen, shared(ps, seeds), strict=True)
        ]


def _seen(each: Sequence[Spec], x: Named, seeds: Seeds) -> Arrays:
    """The x that all low-rank terms see, or each."""
    if seeds[0] is None:
        return [x]
    return [spec.dropped(x, seed) for spec, seed in zip(each, seeds, strict=True)]


def shared(factors: Arrays, seeds: Seeds) -> Arrays:
    """One array of all products, side by side along the rank; with dropout each."""
    return [joined(factors)] if seeds[0] is None else factors


def apart(found: Arrays, qs: Arrays) -> Arrays:
    """What `shared` may have joined; each product's rank is that of its Q."""
    return parts(found[0], qs) if len(found) == 1 else found


def hidden(x: Named, p: Named, qs: Arrays) -> Names:
    """The names of x P: x's but those that P sums over, and the rank."""
    return (*(n for n in x.names if n not in p.names or n in qs[0].names), RANK)


def _backward(
    each: tuple[Spec, ...], again: Again, saved: Any, dys: Sequence[Any]
) -> tuple[Any, ...]:
    x, ws, z, ps, qs, seeds = saved
    nothing = None
    if again is not None:  # fenced, or XLA keeps what it made of them
        nothing, x = [None] * len(x), again(lax.optimization_barrier(x))
    dtype = x.array.dtype
    copied = any(spec.backward in COPIES for spec in each)
    opened = [isinstance(w, Stored) and w.in_blocks for w in ws]
    from_stack = [own and spec.sliced for spec, own in zip(each, opened, strict=True)]
    if copied or opened != from_stack:
        # or XLA keeps the forward pass's copy of W until here
        ws, ps, qs = lax.optimization_barrier((ws, ps, qs))
    ws, dys = list(ws), list(dys)
    for i, dy in enumerate(dys):
        if from_stack[i]:  # or it keeps the slice of the stack
            ws[i], dys[i] = ws[i].after(dy)
        else:  # written once: W, Q, dQ read it
            dys[i] = lax.optimization_barrier(dy)
    dys = [Named(dy, spec.y) for spec, dy in zip(each, dys, strict=True)]
    with jax.named_scope(SCOPE):
        thin = [
            _of_dy(spec, part, dy, q, hidden(dy, q, ps))
            for spec, part, dy, q in zip(each, apart(z, qs), dys, qs, strict=True)
        ]
    gs, own = shared([g for g, _ in thin], seeds), shared(ps, seeds)
    backs = [dataclasses.replace(one, y=x.names, dtype=dtype) for one in each]
    held = zip(backs, dys, ws, gs, qs, own, seeds, strict=False)
    more = zip(dys[len(gs) :], ws[len(gs) :], strict=True)
    dx = _summed([Sum(*one) for one in held], more)
    seen = _seen(each, x, seeds)
    with jax.named_scope(SCOPE):
        dps = [
            each[0].times(u, g, p.names, ps[0].array.dtype)
            for u, g, p in zip(seen, gs, own, strict=True)
        ]
        dqs = tuple(dq() for _, dq in thin)
    return Named(dx, x.names), nothing, None, tuple(apart(dps, qs)), dqs, None


products.defvjp(_forward, _backward)


def _of_dy(
    spec: Spec, z: Named, dy: Named, q: Named, names: Names
) -> tuple[Named, Callable[[], Named]]:
    """G = dy Qᵀ with axes of these names, and what gives dQ = zᵀ dy."""
    factor, dtype = q.astype(z.array.dtype), q.array.dtype
    if spec.kernel is not None:
        options = {"precision": spec.precision, "out_axes": spec.kernel}
        if both := by_kernel(z, dy, factor, **options):
            g, dq = (
                Named(u.ordered(order), tuple(order))
                for u, order in zip(both, (names, q.names), strict=True)
            )
            return g, lambda: dq.astype(dtype)
    dy = dy.astype(z.array.dtype)
    g = spec.times(dy, factor, names)
    return g, lambda: spec.times(z, dy, q.names, dtype)


def _summed(sums: Sequence[Sum], more: Iterable[tuple[Named, Any]]) -> Any:
    """Σ dy Wᵀ + g Pᵀ, the first with its low-rank term in its form.

    In the direct form these terms come last: on a mesh XLA then reduces the rest in one
    go.

    Args:
      sums: those that have a low-rank term.
      more: dy and W of others.
    """
    (first, *rest), base = sums, sums[0].base
    direct = first.spec.backward == "direct"
    dx = base() if direct else SUMS[first.spec.backward](first)
    for dy, w in [*((s.x, s.w) for s in rest), *more]:
        dx = dx + base(dy, w)
    for s in sums if direct else rest:
        dx = dx + s.change()
    return dx


def joined(factors: Arrays) -> Named:
    """Side by side along the rank."""
    arrays = [f.array for f in factors]
    if len(arrays) == 1:
        return factors[0]
    return factors[0].along(RANK, lambda _, at: lax.concatenate(arrays, at))


def parts(whole: Named, qs: Arrays) -> Arrays:
    """What was joined."""
    if len(qs) == 1:
        return (whole,)
    ranks = [q.sizes[RANK] for q in qs]
    found = lax.split(whole.array, ranks, whole.names.index(RANK))
    return tuple(Named(x, whole.names) for x in found)
