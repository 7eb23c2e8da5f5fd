"""g = dy Qᵀ and dQ = zᵀ dy by one Pallas kernel that reads dy once.

XLA makes two kernels of the two products, each of which reads dy, an array as large
as y.  Here a block of dy comes into a TPU core's vector memory and both products take
it from there.  z, g and the factors are stored with the rank before the tokens, so that
a rank of 16 is not padded to the 128 lanes of a TPU's tiles.

The kernel is written for TPUs (Mosaic).  On other devices Pallas interprets it: right,
and slow.  It is one operation to the partitioner, which splits it like the products
that it stands for: over any of its axes, with sums over those that meet.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flora._algebra.axes import RANK, Name, Named

LANES = 128
# Elements of a block of dy, and bytes of all blocks, two of each.  The compiler gives a
# kernel 16 MiB of vector memory on v5e and v5p if nothing else is said.
_BLOCK, _VMEM = 2**20, 12 * 2**20
_WIDEST = 2048  # outputs of a block
_PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)


class Axes(NamedTuple):
    """How many axes dy has of each kind, in this order."""

    stack: int
    tokens: int
    out: int


class Sizes(NamedTuple):
    """Of what one device computes: dy is `[stack, tokens, out]`."""

    stack: int
    tokens: int
    out: int
    rank: int


class Blocks(NamedTuple):
    """What the kernel holds at a time."""

    tokens: int
    out: int


def by_kernel(
    z: Named, dy: Named, q: Named, precision: Any = None
) -> tuple[Named, Named] | None:
    """`(g, dQ)` of one reading of dy; `None` for what the kernel is not made for.

    g = dy Qᵀ has z's dtype, dQ = zᵀ dy float32 or wider.

    Args:
      z: x P, with the tokens' axes and the rank.
      dy: of any dtype; it is cast to z's.
      q: the factor, in z's dtype.
      precision: as of `lax.dot_general`.
    """
    stack = [n for n in dy.names if n in z.names and n in q.names]
    tokens = [n for n in dy.names if n in z.names and n not in q.names]
    out = [n for n in dy.names if n in q.names and n not in z.names]
    axes = Axes(len(stack), len(tokens), len(out))
    ranked = [{*u.names} - {*dy.names} for u in (z, q)]
    if (
        ranked != [{RANK}, {RANK}]
        or sum(axes) != len(dy.names)
        or precision not in _PRECISIONS
        or 0 in dy.array.shape
    ):
        return None
    g, dq = _operation(axes, precision)(
        z.ordered([*stack, RANK, *tokens]),
        dy.ordered([*stack, *tokens, *out]),
        q.ordered([*stack, RANK, *out]),
    )
    return Named(g, (*stack, RANK, *tokens)), Named(dq, (*stack, RANK, *out))


@functools.cache
def _operation(axes: Axes, precision: Any) -> Any:
    """`(z, dy, q)` to `(g, dQ)`: differentiable once more, batched and partitioned."""

    @jax.custom_batching.custom_vmap
    def operation(z: Any, dy: Any, q: Any) -> Any:
        return _partitioned(axes, precision)(z, dy, q)

    @operation.def_vmap
    def batched(size: int, is_batched: Sequence[bool], *args: Any) -> Any:
        args = tuple(
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(args, is_batched, strict=True)
        )
        more = axes._replace(stack=axes.stack + 1)
        return _operation(more, precision)(*args), (True, True)

    differentiable = jax.custom_jvp(operation)

    @differentiable.defjvp
    def tangents(primals: Any, tangents: Any) -> Any:
        by_xla = functools.partial(_by_xla, axes, precision)
        return differentiable(*primals), jax.jvp(by_xla, primals, tangents)[1]

    return differentiable


def _names(axes: Axes) -> tuple[tuple[Name, ...], ...]:
    """Of the stack, tokens and outputs."""
    return tuple(
        tuple(f"{kind}{i}" for i in range(n))
        for kind, n in zip("sto", axes, strict=True)
    )


def _by_xla(axes: Axes, precision: Any, z: Any, dy: Any, q: Any) -> tuple[Any, Any]:
    """The two products as XLA computes them."""
    s, t, o = _letters(axes)
    dy = dy.astype(z.dtype)
    times = functools.partial(jnp.einsum, precision=precision)
    g = times(f"{s}{t}{o},{s}r{o}->{s}r{t}", dy, q)
    dq = times(
        f"{s}r{t},{s}{t}{o}->{s}r{o}", z, dy, preferred_element_type=_wide(z.dtype)
    )
    return g, dq


def _letters(axes: Axes) -> list[str]:
    letters = iter("abcdefghijklmnopqstuvwxyz")
    return ["".join(next(letters) for _ in range(n)) for n in axes]


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@functools.cache
def _partitioned(axes: Axes, precision: Any) -> Any:
    """The operation, which the partitioner splits over any of its axes."""
    from jax.experimental.custom_partitioning import custom_partitioning

    local = functools.partial(_local, axes, precision)
    operation = custom_partitioning(lambda z, dy, q: local(z, dy, q))
    s, t, o = _names(axes)

    def partition(_: Any, args: Any, results: Any) -> Any:
        del results
        dy = args[1].sharding
        if not isinstance(dy, NamedSharding):  # no mesh to name: each device does all
            raise NotImplementedError(dy)
        spec = [*dy.spec, *(None,) * (len(args[1].shape) - len(dy.spec))]
        stack, tokens = spec[: axes.stack], spec[axes.stack : -axes.out or None]
        out = spec[axes.stack + axes.tokens :]
        thin, factor = [*stack, None, *tokens], [*stack, None, *out]
        places = [
            NamedSharding(dy.mesh, PartitionSpec(*x)) for x in (thin, spec, factor)
        ]

        def of_shard(z: Any, dy: Any, q: Any) -> Any:
            g, dq = local(z, dy, q)
            return _summed(g, out), _summed(dq, tokens)

        return dy.mesh, of_shard, (places[0], places[2]), tuple(places)

    def joined(*names: Any) -> str:
        return " ".join(n for group in names for n in group)

    thin, factor = joined(s, "r", t), joined(s, "r", o)
    operation.def_partition(
        partition, sharding_rule=f"{thin}, {joined(s, t, o)}, {factor} -> {thin}, {factor}"
    )
    return operation


def _summed(x: Any, entries: Sequence[Any]) -> Any:
    """The sum over the mesh axes that those entries of a spec name."""
    axes = [
        a for e in entries if e for a in (e if isinstance(e, tuple) else (e,))
    ]
    return lax.psum(x, tuple(axes)) if axes else x


def _local(axes: Axes, precision: Any, z: Any, dy: Any, q: Any) -> tuple[Any, Any]:
    """The operation on one device."""
    ends = axes.stack, axes.stack + axes.tokens
    stack, tokens, out = (
        dy.shape[: ends[0]], dy.shape[ends[0] : ends[1]], dy.shape[ends[1] :]
    )  # fmt: skip
    rank = z.shape[axes.stack]
    sizes = Sizes(*(math.prod(x) for x in (stack, tokens, out)), rank)
    args = (
        z.reshape(sizes.stack, rank, sizes.tokens),
        dy.reshape(sizes.stack, sizes.tokens, sizes.out),
        q.reshape(sizes.stack, rank, sizes.out),
    )
    call = functools.partial(_call, sizes, precision)
    g, dq = lax.platform_dependent(
        *args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )
    return g.reshape(*stack, rank, *tokens), dq.reshape(*stack, rank, *out)


def blocks_of(sizes: Sizes, itemsize: int) -> Blocks:
    """How much of dy the kernel reads at a time.

    Outputs are cut in two at least, for chips with two cores (v5p).

    Args:
      sizes: of dy.
      itemsize: bytes of an element of dy.
    """
    per_output = 2 * sizes.rank * (4 + 4) + 2 * itemsize * LANES
    most = min(_WIDEST, _VMEM // 2 // per_output, -(-sizes.out // 2))
    out = _block(sizes.out, most)
    per_token = 2 * out * itemsize + 2 * sizes.rank * (4 + 4)
    most = min(_BLOCK // out, (_VMEM - out * 2 * sizes.rank * 8) // per_token)
    return Blocks(_block(sizes.tokens, most), out)


def _block(size: int, most: int) -> int:
    """A multiple of 128 of at most `most`, that divides the size if a large one does.

    The size itself, if that is not larger.
    """
    if size <= max(most, LANES):
        return size
    most = max(most // LANES, 1)
    fits = [n for n in range(most, most // 2, -1) if size % (n * LANES) == 0]
    return LANES * (fits or [most])[0]


class Plan(NamedTuple):
    """The arguments of `pallas_call` that say what is moved when."""

    grid: tuple[int, ...]
    in_specs: Sequence[Any]
    out_specs: Sequence[Any]


def plan(sizes: Sizes, blocks: Blocks) -> Plan:
    """Outputs outside, tokens inside: dQ is summed in place, g in one part for each.

    dy comes in once.  z comes in and a part of g goes out for each block of outputs.
    """
    from jax.experimental import pallas as pl

    tokens, out, rank = blocks.tokens, blocks.out, sizes.rank
    grid = sizes.stack, -(-sizes.out // out), -(-sizes.tokens // tokens)
    factor = pl.BlockSpec((None, rank, out), lambda s, o, t: (s, 0, o))
    return Plan(
        grid,
        [
            pl.BlockSpec((None, rank, tokens), lambda s, o, t: (s, 0, t)),
            pl.BlockSpec((None, tokens, out), lambda s, o, t: (s, t, o)),
            factor,
        ],
        [
            pl.BlockSpec((None, None, rank, tokens), lambda s, o, t: (o, s, 0, t)),
            factor,
        ],
    )


def _call(
    sizes: Sizes, precision: Any, z: Any, dy: Any, q: Any, *, interpret: bool
) -> tuple[Any, Any]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks = blocks_of(sizes, dy.dtype.itemsize)
    moved, wide = plan(sizes, blocks), _wide(z.dtype)
    parts = moved.grid[1]
    shapes = [
        jax.ShapeDtypeStruct(
            (parts, *z.shape), z.dtype if parts == 1 else wide
        ),
        jax.ShapeDtypeStruct(q.shape, wide),
    ]
    g, dq = pl.pallas_call(
        functools.partial(_kernel, sizes, blocks, precision),
        grid=moved.grid,
        in_specs=moved.in_specs,
        out_specs=moved.out_specs,
        out_shape=shapes,
        name="lora_dy_once",
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(sizes),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (z, dy, q, *shapes)),
            transcendentals=0,
        ),
    )(z, dy, q)
    return g.sum(0).astype(z.dtype), dq


def _kernel(
    sizes: Sizes, blocks: Blocks, precision: Any, z: Any, dy: Any, q: Any, g: Any, dq: Any
) -> None:
    """A block of dy: its part of g is written, its part of dQ added to the others'."""
    from jax.experimental import pallas as pl

    # What lies beyond an array's end is not zero but unknown.
    o, t = (
        functools.partial(_cut, size=size, block=block, at=pl.program_id(axis))
        for axis, size, block in (
            (1, sizes.out, blocks.out), (2, sizes.tokens, blocks.tokens)
        )
    )  # fmt: skip
    block = o(t(dy[...].astype(z.dtype), axis=0), axis=1)

    def times(u: Any, v: Any, axis: int) -> Any:
        return lax.dot_general(
            u,
            v,
            (((1,), (axis,)), ((), ())),
            precision=precision if u.dtype == jnp.float32 else None,
            preferred_element_type=_wide(u.dtype),
        )

    g[...] = times(o(q[...], axis=1), block, 1).astype(g.dtype)
    change = times(t(z[...], axis=1), block, 0)
    first = pl.program_id(2) == 0
    pl.when(first)(lambda: dq.__setitem__(..., change))
    pl.when(~first)(lambda: dq.__setitem__(..., dq[...] + change))


def _cut(x: Any, *, axis: int, size: int, block: int, at: Any) -> Any:
    """X, and zeros where the last block goes beyond the array's end."""
    if size % block == 0:
        return x
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < size - at * block, x, jnp.zeros_like(x))
