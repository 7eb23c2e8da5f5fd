"""g = dy Qᵀ and dQ = zᵀ dy by one Pallas kernel that reads dy once.

XLA makes two kernels of the two products, each of which reads dy, an array as large
as y.  Here a block of dy comes into a TPU core's vector memory and both products take
it from there.  z and g are stored with the rank before the tokens, so that a rank of 16
is not padded to the 128 lanes of a TPU's tiles.  Of dy the longer of its two axes comes
last, which is how XLA tends to lay it out: a kernel's operands are copied if they lie
otherwise.

The kernel is written for TPUs (Mosaic); elsewhere Pallas interprets it: right, and
slow.  No partitioner splits it: `custom_partitioning` has no support in libtpu
(https://github.com/jax-ml/jax/issues/38196).  So on a mesh it stands in a `shard_map`,
each device has its part of the tokens, and of the outputs if told so, and what it sums
over those is summed over the mesh.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flora._algebra.axes import RANK, Named
from flora._tree.errors import LoraError

LANES = 128
# Elements of a block of dy, and bytes of all blocks, two of each.
_BLOCK, _VMEM = 2**20, 20 * 2**20
_WIDEST = 4096  # outputs of a block
_ROWS = 8  # of a tile: a block has as many tokens and ranks, or more
_PRECISIONS = (
    None,
    *((p, p) for p in (lax.Precision.DEFAULT, lax.Precision.HIGHEST)),
)


class Axes(NamedTuple):
    """How many axes dy has of each kind, in this order."""

    stack: int
    tokens: int
    out: int


class Sizes(NamedTuple):
    """Of what one device computes.

    Attributes:
      stack: of products.
      groups: into which the tokens are divided.
      tokens: of a group.
      out, rank: lengths.
      turned: whether dy is `[stack, groups, out, tokens]`, not `[..., tokens, out]`.
    """

    stack: int
    groups: int
    tokens: int
    out: int
    rank: int
    turned: bool = False


class Blocks(NamedTuple):
    """What the kernel holds at a time."""

    tokens: int
    out: int


def by_kernel(
    z: Named,
    dy: Named,
    q: Named,
    *,
    precision: Any = None,
    out_axes: tuple[str, ...] = (),
) -> tuple[Named, Named] | None:
    """`(g, dQ)` of one reading of dy; `None` for what the kernel is not made for.

    g = dy Qᵀ has z's dtype, dQ = zᵀ dy float32 or wider.  On a mesh the first axis of
    the tokens is divided over all of its axes but `out_axes`, the first of the outputs
    over those.  Arrays that lie otherwise are moved.

    Args:
      z: x P, with the tokens' axes and the rank.
      dy: of any dtype; it is cast to z's.
      q: the factor, in z's dtype.
      precision: as of `lax.dot_general`.
      out_axes: of the mesh.
    """
    stack = [n for n in dy.names if n in z.names and n in q.names]
    tokens = [n for n in dy.names if n in z.names and n not in q.names]
    out = [n for n in dy.names if n in q.names and n not in z.names]
    ranked = [{*u.names} - {*dy.names} for u in (z, q)]
    sizes = dy.sizes
    divided = _divided(out_axes)
    if (
        ranked != [{RANK}, {RANK}]
        or len(dy.names) != len([*stack, *tokens, *out])
        or not tokens
        or not out
        or precision not in _PRECISIONS
        or 0 in dy.array.shape
        or sizes[tokens[0]] % math.prod(n for _, n in divided.tokens)
        or sizes[out[0]] % math.prod(n for _, n in divided.out)
    ):
        return None
    axes = Axes(len(stack), len(tokens), len(out))
    g, dq = _operation(axes, divided, precision)(
        z.ordered([*stack, *tokens, RANK]),
        dy.ordered([*stack, *tokens, *out]),
        q.ordered([*stack, RANK, *out]),
    )
    return Named(g, (*stack, *tokens, RANK)), Named(dq, (*stack, RANK, *out))


class Divided(NamedTuple):
    """The mesh axes, each with its size, that the tokens and the outputs are over."""

    tokens: tuple[tuple[str, int], ...] = ()
    out: tuple[tuple[str, int], ...] = ()


def _divided(out_axes: Sequence[str]) -> Divided:
    """By the mesh that is set; axes of size 1 do not count."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Divided()
    if unknown := [a for a in out_axes if a not in mesh.axis_names]:
        raise LoraError(
            f"form={'kernel:' + ','.join(out_axes)!r} names the mesh axes {unknown}; "
            f"the mesh that is set has {mesh.axis_names}. Name those over which the "
            "outputs of products are sharded, or write form='kernel'."
        )
    found = {a: n for a, n in mesh.shape.items() if n > 1}
    tokens = tuple((a, n) for a, n in found.items() if a not in out_axes)
    return Divided(tokens, tuple((a, n) for a, n in found.items() if a in out_axes))


@functools.cache
def _operation(axes: Axes, divided: Divided, precision: Any) -> Any:
    """`(z, dy, q)` to `(g, dQ)`: batched, and differentiable as what it stands for."""

    @jax.custom_batching.custom_vmap
    def operation(z: Any, dy: Any, q: Any) -> Any:
        return _on_mesh(axes, divided, precision)(z, dy, q)

    @operation.def_vmap
    def batched(size: int, is_batched: Sequence[bool], *args: Any) -> Any:
        args = tuple(
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(args, is_batched, strict=True)
        )
        more = axes._replace(stack=axes.stack + 1)
        return _operation(more, divided, precision)(*args), (True, True)

    differentiable = jax.custom_jvp(operation)

    @differentiable.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        by_xla = functools.partial(_by_xla, axes, precision)
        return differentiable(*primals), jax.jvp(by_xla, primals, tangents)[1]

    return differentiable


def _by_xla(axes: Axes, precision: Any, z: Any, dy: Any, q: Any) -> tuple[Any, Any]:
    """The two products as XLA computes them."""
    letters = iter("abcdefghijklmnopqstuvwxyz")
    s, t, o = ("".join(next(letters) for _ in range(n)) for n in axes)
    dy, times = dy.astype(z.dtype), functools.partial(jnp.einsum, precision=precision)
    g = times(f"{s}{t}{o},{s}r{o}->{s}{t}r", dy, q)
    wide = {"preferred_element_type": _wide(z.dtype)}
    return g, times(f"{s}{t}r,{s}{t}{o}->{s}r{o}", z, dy, **wide)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _on_mesh(axes: Axes, divided: Divided, precision: Any) -> Any:
    """The operation, of which each device of the mesh that is set does a part."""
    local = functools.partial(_local, axes, precision)
    if not any(divided):
        return local
    tokens, out = (tuple(a for a, _ in part) for part in divided)

    def of_shard(z: Any, dy: Any, q: Any) -> Any:
        g, dq = local(z, dy, q)
        return lax.psum(g, out), lax.psum(dq, tokens)

    stack, rest = (None,) * axes.stack, (None,) * (axes.tokens - 1)
    thin = PartitionSpec(*stack, tokens)
    whole = PartitionSpec(*stack, tokens, *rest, out)
    factor = PartitionSpec(*stack, None, out)
    return jax.shard_map(
        of_shard,
        in_specs=(thin, whole, factor),
        out_specs=(thin, factor),
        check_vma=False,
    )


def _local(axes: Axes, precision: Any, z: Any, dy: Any, q: Any) -> tuple[Any, Any]:
    """The operation on one device."""
    first = axes.stack + axes.tokens
    stack, tokens = dy.shape[: axes.stack], dy.shape[axes.stack : first]
    sizes = _sizes(stack, tokens, dy.shape[first:], z.shape[-1])
    if sizes.tokens < _ROWS:
        return _by_xla(axes, precision, z, dy, q)
    if more := max(_ROWS - sizes.rank, 0):  # Mosaic refuses some that are fewer
        same, wider = (0, 0), (0, more)
        z = jnp.pad(z, [*[same] * first, wider])
        q = jnp.pad(q, [*[same] * axes.stack, wider, *[same] * axes.out])
        g, dq = _local(axes, precision, z, dy, q)
        return g[..., :-more], lax.slice_in_dim(dq, 0, sizes.rank, axis=axes.stack)
    lead, (t, o, r) = sizes[:2], (sizes.tokens, sizes.out, sizes.rank)
    dy, thin = dy.reshape(*lead, t, o), z.reshape(*lead, t, r).swapaxes(2, 3)
    args = thin, dy.swapaxes(2, 3) if sizes.turned else dy, q.reshape(sizes.stack, r, o)
    call = functools.partial(_call, sizes, precision)
    g, dq = lax.platform_dependent(
        *args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )
    return g.swapaxes(2, 3).reshape(z.shape), dq.reshape(q.shape)


def _sizes(
    stack: Sequence[int], tokens: Sequence[int], out: Sequence[int], rank: int
) -> Sizes:
    """Dy is turned where its last axis of tokens is as long as its outputs."""
    width, whole = math.prod(out), math.prod(tokens)
    turned = tokens[-1] >= max(width, LANES)
    last = tokens[-1] if turned else whole
    return Sizes(math.prod(stack), whole // last, last, width, rank, turned)


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
    steps = -(-sizes.out // out), sizes.groups, -(-sizes.tokens // tokens)
    if sizes.turned:
        dy = pl.BlockSpec((None, None, out, tokens), lambda s, o, n, t: (s, n, o, t))
    else:
        dy = pl.BlockSpec((None, None, tokens, out), lambda s, o, n, t: (s, n, t, o))
    thin = (None, rank, tokens)
    z = pl.BlockSpec((None, *thin), lambda s, o, n, t: (s, n, 0, t))
    g = pl.BlockSpec((None, None, *thin), lambda s, o, n, t: (o, s, n, 0, t))
    factor = pl.BlockSpec((None, rank, out), lambda s, o, n, t: (s, 0, o))
    return Plan((sizes.stack, *steps), [z, dy, factor], [g, factor])


def _call(
    sizes: Sizes, precision: Any, z: Any, dy: Any, q: Any, *, interpret: bool
) -> tuple[Any, Any]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks = blocks_of(sizes, dy.dtype.itemsize)
    moved, wide = plan(sizes, blocks), _wide(z.dtype)
    parts = moved.grid[1]
    shapes = [
        jax.ShapeDtypeStruct((parts, *z.shape), z.dtype if parts == 1 else wide),
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
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM + _VMEM // 2,  # and what stands between them
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(sizes[:5]),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (z, dy, q, *shapes)),
            transcendentals=0,
        ),
    )(z, dy, q)
    return g.sum(0).astype(z.dtype), dq


def _kernel(
    sizes: Sizes,
    blocks: Blocks,
    precision: Any,
    z: Any,
    dy: Any,
    q: Any,
    g: Any,
    dq: Any,
) -> None:
    """A block of dy: its part of g is written, its part of dQ added to the others'."""
    from jax.experimental import pallas as pl

    # What lies beyond an array's end is not zero but unknown.
    o, t = (
        functools.partial(_cut, size=size, block=block, at=pl.program_id(axis))
        for axis, size, block in (
            (1, sizes.out, blocks.out), (3, sizes.tokens, blocks.tokens)
        )
    )  # fmt: skip
    of_tokens, of_out = (1, 0) if sizes.turned else (0, 1)
    block = t(o(dy[...].astype(z.dtype), axis=of_out), axis=of_tokens)

    def times(u: Any, axis: int) -> Any:
        return lax.dot_general(
            u,
            block,
            (((1,), (axis,)), ((), ())),
            precision=None if u.dtype == jnp.bfloat16 else precision,
            preferred_element_type=_wide(u.dtype),
        )

    g[...] = times(o(q[...], axis=1), of_out).astype(g.dtype)
    change = times(t(z[...], axis=1), of_tokens)
    first = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)
    pl.when(first)(lambda: dq.__setitem__(..., change))
    pl.when(~first)(lambda: dq.__setitem__(..., dq[...] + change))


def _cut(x: Any, *, axis: int, size: int, block: int, at: Any) -> Any:
    """X, and zeros where the last block goes beyond the array's end."""
    if size % block == 0:
        return x
    index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < size - at * block, x, jnp.zeros_like(x))
