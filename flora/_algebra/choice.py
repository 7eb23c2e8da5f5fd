"""Which form computes a product: what the caller named, or what costs least there."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Form:
    """How a product and its gradient are computed.

    Attributes:
      forward: y = x W + z Q.
      backward: dx = dy Wᵀ + g Pᵀ.
      together: whether products of one x share their low-rank terms.
      in_heads: whether axes that a reshape beside the product divides, into heads, are
        divided within.
      written: whether x goes to memory for all that read it.
      kernel: the mesh axes that outputs are sharded over, if one kernel is to read dy
        for both dy Qᵀ and zᵀ dy.
      by_platform: whether it is a GPU's, where the program is lowered for one; a TPU
        then takes what several TPUs take, a CPU what JAX derives.
    """

    forward: str
    backward: str
    together: bool = True
    in_heads: bool = False
    written: bool = True
    kernel: tuple[str, ...] | None = None
    by_platform: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a product: x is `[tokens, in]`, W `[in, out]`.

    Attributes:
      tokens, in_, out, rank: lengths.
      sliced: whether W is the slice of a stack that a step of a loop takes.
      stored: whether W is stored in fewer bits.
      scaled: whether its outputs are, as DoRA's.
    """

    tokens: int
    in_: int
    out: int
    rank: int
    sliced: bool = False
    stored: bool = False
    scaled: bool = False


def named_form(name: str) -> Form | None:
    """The form of that name in both passes; `None` for what JAX derives itself."""
    return None if name == "direct" else Form(name, name)


def with_kernel(form: Form | None, axes: tuple[str, ...]) -> Form:
    """The form of form="kernel": y and dx are as in form="auto"."""
    like = form or Form("direct", "direct")
    return dataclasses.replace(like, kernel=axes, by_platform=False)


# Narrower products have little to gain.
_MIN_TOKENS, _MIN_WIDTH, _MAX_RANK, _MAX_RANK_IN_A_LOOP = 1024, 1024, 64, 256
_ON_CHIP = 64 * 2**20  # bytes that can stay in a TPU core's vector memory
_V5E, _V5P = ("v5 lite", "v5e"), ("v5", "v5p")
_WIDE = 4096  # inputs of a layer whose weight a loop's product reads by itself
_HEAD = 7  # outputs to inputs; above it a product gives logits of a vocabulary


@dataclasses.dataclass(frozen=True)
class Target:
    """What a trace is for.

    Attributes:
      kind: a device kind, as `jax.devices()[0].device_kind` gives it.
      devices: how many there are; arrays may be sharded over them.
      certain: whether it is known, or else another platform can still be lowered for.
    """

    kind: str
    devices: int = 1
    certain: bool = True


def cheapest(sizes: Sizes, target: Target) -> Form | None:
    """The rule of form="auto"; `None` is the direct form as JAX differentiates it.

    The low-rank term is cheap to compute and dear to add: one pass over the larger of
    two arrays.  Nine things decide who pays it:

    - A product that widens (in < out) lets its own kernel add z Q; one that narrows is
      added in the kernel of z Q.  For dx the two change places.
    - Products of one x that are computed together pay for one pass instead of several.
    - Longer operands, [x | z] [W ; Q], need no pass, but a copy of W: free where the
      compiler joins them on the way in (v5e), cheap where W stays on the chip.
    - The slice of a stack must be written before it can be joined.  On v6e that costs
      more than the pass; on v5p it pays in narrow layers, if dx is not joined.  In
      layers of 4096 inputs and more a loop's product reads its weight out of the stack
      by itself, as long as XLA may not order the sum: x W goes to memory first, and so
      does dx.  But on v6e XLA finds a better order for a product that widens, be it y
      or dx; and where in = out, dx is a sum that the kernel of dy Wᵀ adds up.
    - In such layers a reshape beside the product, which makes heads or joins them,
      would lay its result out anew: there heads are axes of the product.
    - A head's logits are dearer to write and read again than a copy of W is, and their
      gradient is slow to come by: longer operands forward, XLA's own order backward.
      In blocks of fewer tokens than inputs the copy is the larger one, and is made but
      where it is free.
    - dy and x are written once instead of being computed anew by each of their readers.
      But in such layers a norm, which q, k and v read, costs less when it is made anew;
      on v5p, which is fast for its memory, so does that which gate and up read.
    - A weight in fewer bits is cast on the product's own way in, and joining keeps it
      from that: it is never joined.  In a loop on v5e, its product adds z Q where it
      widens; so does that of a weight whose outputs are scaled.  On other chips x W is
      written first where W is too large to stay on the chip.
    - Arrays that may be sharded are never joined: two shards side by side are no shard
      of the whole, and moving them costs more than all else.

    How much each weighs differs between generations of TPU.  The rule was read off the
    TPU compiler's estimates (`examples/benchmarks/compare.py`), not off clocks.  On a
    CPU the direct form is taken.  One GPU writes x W and adds z Q in a later pass: by
    its clock (`examples/benchmarks/gpu.py`) no order is much better than another.
    Where a program may still be lowered for a TPU, it takes what several TPUs of any
    generation do.

    Args:
      sizes: of the product.
      target: what the product runs on.
    """
    kind = target.kind
    narrow = min(sizes.in_, sizes.out) < _MIN_WIDTH or sizes.tokens < _MIN_TOKENS
    in_a_loop = sizes.sliced and _is_of_a_wide_layer(sizes)
    most = _MAX_RANK_IN_A_LOOP if in_a_loop else _MAX_RANK
    if not may_be_tpu(target) or narrow or sizes.rank > most:
        return None
    if not is_tpu(kind):
        one_gpu = kind != "cpu" and target.devices == 1
        form = "thin_last" if one_gpu else "direct"
        return Form(form, form, by_platform=True)
    if target.devices > 1:
        return Form("direct", "direct")
    generation = _generation(kind)
    if in_a_loop:
        return _in_a_loop(sizes, generation)
    widens, fits = sizes.in_ < sizes.out, sizes.in_ * sizes.out * 2 <= _ON_CHIP
    first, last = ("thin_first", "thin_last")[:: 1 if widens else -1]
    if sizes.stored and not fits and generation not in _V5E:
        return Form("thin_last", "thin_last" if widens else "direct")
    if sizes.stored and generation.startswith("v6"):
        return Form("direct", "direct")
    if sizes.stored:
        return Form(first, last)
    if not fits and sizes.out > _HEAD * sizes.in_:
        few = sizes.tokens < sizes.in_ and generation not in _V5E
        return Form("thin_last" if few else "concat", "direct")
    if generation in _V5E:
        return Form("concat", "concat" if widens and fits else "thin_last")
    if generation.startswith("v6"):
        if fits:
            return Form("direct" if sizes.sliced else "concat", "direct")
        return Form(first, last, together=False)
    if sizes.sliced:
        return Form("concat", "direct")
    if fits:
        return Form("concat", "concat" if widens else "thin_first")
    return Form("direct", "direct", together=False)


def _is_of_a_wide_layer(sizes: Sizes) -> bool:
    """Whether a layer has 4096 inputs or more; what narrows to less makes few heads."""
    few_heads = sizes.out * 4 <= sizes.in_
    wide = sizes.in_ >= _WIDE and (sizes.out >= _WIDE or few_heads)
    return wide and sizes.out <= _HEAD * sizes.in_


def _in_a_loop(sizes: Sizes, generation: str) -> Form:
    """The form of a product whose weight is the slice of a stack."""
    in_, out = sizes.in_, sizes.out
    widens, narrows = in_ < out, in_ > out >= _WIDE
    first = last = "thin_last"
    if in_ == out:
        last = "thin_first"
    elif generation.startswith("v6"):
        first, last = "direct" if widens else first, "direct" if narrows else last
    if widens and (sizes.stored or sizes.scaled) and generation in _V5E:
        first = "thin_first"
    is_down, is_up = in_ >= 2 * out >= 2 * _WIDE, 2 * in_ <= out
    written = is_down or (is_up and generation not in _V5P)
    return Form(first, last, together=not widens, in_heads=True, written=written)


def may_make_again(forms: Collection[str], target: Target) -> bool:
    """Whether inputs of products may be made again for dP, where that is cheap.

    Args:
      forms: those that the weights ask for; what names a form gets no more than that.
      target: what the products run on.
    """
    return {*forms} == {"auto"} and is_tpu(target.kind)


def makes_again(target: Target, size: int, widens: bool) -> bool:
    """Whether the input of a product is.

    What can stay on the chip is better kept.  Where a product narrows, its input is the
    larger array: v5e gains by that alone, and on v6e XLA makes it again by itself.

    Args:
      target: what the product runs on.
      size: bytes of the input.
      widens: whether the product has at least as many outputs as inputs.
    """
    generation = _generation(target.kind)
    if generation in _V5E:
        return size >= 2 * _ON_CHIP and not widens
    return size >= _ON_CHIP and (widens or not generation.startswith("v6"))


def _generation(kind: str) -> str:
    return kind.removeprefix("TPU ")


def is_tpu(kind: str) -> bool:
    """Whether a device kind is a TPU's."""
    return kind.startswith("TPU")


def target() -> Target:
    """What a trace is for: the mesh that is set, or else the default device.

    With no mesh set, arrays may be sharded over all devices that there are: a trace
    does not see where its arguments lie, nor what it will be lowered for.  For the
    form of a generation of TPU that is not there, trace under `jax.set_mesh(mesh)` with
    a mesh of its topology.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if device := getattr(mesh, "abstract_device", None):
        return Target(device.device_kind, mesh.size)
    device = jax.config.jax_default_device  # pyright: ignore
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return Target(device.device_kind, jax.device_count(device.platform), False)


def may_differ(name: str) -> bool:
    """Whether a form can be another than the plain direct one, as far as is known."""
    if name != "auto":
        return name != "direct"
    return may_be_tpu(target())


def may_be_tpu(target: Target) -> bool:
    """Whether a program may be lowered for a TPU."""
    return is_tpu(target.kind) or not target.certain


def is_large(*shapes: Sequence[int]) -> bool:
    """Whether `cheapest` may find anything for a product of operands of such shapes.

    Of symbolic lengths, as `jax.export` has them, nothing is known.
    """
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return False
    return min(map(math.prod, shapes)) >= _MIN_WIDTH * min(_MIN_TOKENS, _MIN_WIDTH)
