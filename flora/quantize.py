"""Frozen weights in fewer bits (QLoRA): int8, int4, NF4 and fp8, coded as by qwix.

    params = flora.quantize.quantize(params, "nf4", target="*/kernel", donate=True)
    adapted = flora.init(key, config, model.apply, params, x)

W ≈ q ⊙ scale, with one scale an output, or one a block.  A scale an output is applied
to what the codes multiply to, and costs next to nothing:

    y = (x q) ⊙ scale,   dx = (dy ⊙ scale) qᵀ

In blocks a weight is dequantized where an operation reads it, one layer at a time
inside a scan, and again for the backward pass, so that no dense copy is kept.

References: Dettmers et al. 2023 (QLoRA). https://arxiv.org/abs/2305.14314
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flora._algebra.dense import delta
from flora._tree.arrays import is_array, shown
from flora._tree.errors import LoraError, fail
from flora._tree.finite import require_finite
from flora._tree.matrices import folded, nearest
from flora._tree.paths import (
    Pattern,
    check_pattern,
    entries,
    exactly,
    matches,
    named_leaves,
)
from flora._tree.placement import mesh_of, places_of_parts, spec_of
from flora._tree.quantized import LEVELS, Codes, Quantized, is_quantized, of_codes
from flora._tree.selection import idle_entries, nothing_selected
from flora._tree.weight import LoraWeight, Trained

__all__ = ["QTYPES", "Quantized", "dequantize", "loftq", "quantize"]

# The types in which a weight can be stored.
QTYPES = ("int8", "int4", "nf4", "float8_e4m3fn", "float8_e5m2")


def quantize(
    params: Any,
    qtype: str,
    *,
    target: Pattern = "kernel",
    exclude: Pattern = (),
    block: int | None = None,
    dtype: Any = None,
    donate: bool = False,
    allow_nonfinite: bool = False,
) -> Any:
    """The tree with each targeted weight as a `Quantized`, leaf by leaf.

    Args:
      params: a parameter tree, adapted or not, of arrays, sharded or not, or of
        `ShapeDtypeStruct`s.  Leaves that train whole stay as they are.
      qtype: one of `QTYPES`.
      target: which leaves, as in `LoraConfig`; leaves with fewer than two axes stay as
        they are.
      exclude: which of the targeted leaves to leave as they are.
      block: how many neighbors share a scale, along the last axis but one or, where
        that does not divide, the last.  Every index of the other axes has its own.
        `None` is one scale an output, for each index of a stack: an adapted leaf's
        layout says which axes these are, any other leaf's shape is taken for
        `[*stack, in, out]`.  Quantize what `flora.init` returned where kernels have
        several in or out axes: scales that vary along in are right, too, but their
        weight is dequantized before it multiplies.  For nf4, whose levels are made for
        blocks, `None` is 64.
      dtype: of the dequantized weight; by default the weight's own.
      donate: whether to delete each array as soon as it is quantized, so that no more
        than one leaf is ever held twice.
      allow_nonfinite: True to quantize NaN and infinity too; all that share a scale
        with them are lost.

    Returns:
      The tree.  The arrays of a quantized weight are sharded as the weight was.

    Raises:
      LoraError: the type is unknown, nothing is selected, or a leaf does not divide
        into blocks or holds NaN or infinity; every such leaf is named.

    Example:
      >>> import jax, jax.numpy as jnp, flora.quantize
      >>> w = jax.random.normal(jax.random.key(0), (128, 4))
      >>> quantized = flora.quantize.quantize({"kernel": w}, "int8")
      >>> quantized["kernel"]
      Quantized(float32[128,4] as int8+float32)
      >>> bool(abs(flora.quantize.dequantize(quantized)["kernel"] - w).max() < 0.02)
      True
    """
    block = _require(qtype, block)
    _require_dtype(dtype)
    named, treedef = named_leaves(params)
    bases = _selected(named, target, exclude)
    chosen = {p: x for p, x in bases.items() if len(getattr(x, "shape", ())) >= 2}
    fail(_idle(target, bases, chosen))
    fail(_problems(chosen, block, "Write exclude={}"))
    require_finite("quantize", chosen, allow_nonfinite)
    made: dict[Any, Quantized] = {}  # one array may stand in several places
    left = collections.Counter(map(id, chosen.values()))

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        x = chosen[path]
        in_ = _summed(leaf, len(x.shape))
        if (id(x), in_) not in made:
            made[id(x), in_] = _quantized(x, qtype, block, in_, dtype)
        quantized = made[id(x), in_]
        left[id(x)] -= 1
        if donate and not left[id(x)]:
            _delete(x, quantized)
        if isinstance(leaf, LoraWeight):
            return dataclasses.replace(leaf, base=quantized)
        return quantized

    return treedef.unflatten([one(path, leaf) for path, leaf in named])


def _summed(leaf: Any, ndim: int) -> tuple[int, ...]:
    """The axes that products sum over."""
    known = leaf.layout.in_ if isinstance(leaf, LoraWeight) else ()
    return tuple(known) or (ndim - 2,)


def _selected(
    named: list[tuple[str, Any]], target: Pattern, exclude: Pattern
) -> dict[str, Any]:
    """The bases of the leaves that are targeted and not excluded."""
    check_pattern("target", target)
    check_pattern("exclude", exclude)
    fail(idle_entries("target", target, named))
    hit = [(p, x) for p, x in named if matches(target, p, x)]
    if not hit:
        raise LoraError(nothing_selected("target", target, [p for p, _ in named]))
    fail(
        f"{problem} It must match a leaf that target selects."
        for problem in idle_entries("exclude", exclude, hit)
    )
    bases = {p: _base(x) for p, x in hit if not matches(exclude, p, x)}
    if not bases:
        raise LoraError(
            f"exclude={exclude!r} takes out all of the {len(hit)} leaves that "
            f"target={target!r} selects. Narrow exclude."
        )
    return bases


def _idle(
    target: Pattern, bases: dict[str, Any], chosen: dict[str, Any]
) -> Iterator[str]:
    """Entries that select nothing which can be stored in fewer bits."""
    for entry in entries(target):
        hit = [p for p, x in bases.items() if matches(entry, p, x)]
        if hit and not any(p in chosen for p in hit):
            yield _nothing_to_store(hit[0], bases[hit[0]])


def _nothing_to_store(path: str, x: Any) -> str:
    if isinstance(x, Trained):
        return f"'{path}' trains whole and stays as it is. Select frozen weights."
    return (
        f"'{path}' has shape {tuple(getattr(x, 'shape', ()))}; only leaves of at least "
        "2 axes are stored in fewer bits. Select others."
    )


def _base(leaf: Any) -> Any:
    return leaf.base if isinstance(leaf, LoraWeight) else leaf


def dequantize(tree: Any) -> Any:
    """The tree with each `Quantized` as the dense array that it stands for."""
    return jax.tree.map(
        lambda x: x.dense() if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def loftq(adapted: Any, qtype: str, *, block: int | None = None, steps: int = 5) -> Any:
    """Quantized bases, with factors that compensate for the rounding (LoftQ).

    Alternates `steps` times between Q = quantized(W − scale A B) and scale A B = the
    best approximation of W − Q of that rank, by singular values, and returns the pair
    nearest to W.  The adapted model starts nearer to the pretrained one than with
    B = 0.

    Args:
      adapted: an adapted tree of dense arrays, tracers or `ShapeDtypeStruct`s; of its
        factors only the shardings are read.
      qtype: as for `quantize`.
      block: as for `quantize`.
      steps: how many times to alternate.

    Returns:
      The tree with quantized bases and new factors; leaves not adapted are shared.

    Raises:
      LoraError: no leaf is adapted, a base is quantized already, or as for `quantize`.

    References: Li et al. 2023 (LoftQ), algorithm 1. https://arxiv.org/abs/2310.08659
    """
    block = _require(qtype, block)
    named, treedef = named_leaves(adapted)
    chosen = {p: x.base for p, x in named if isinstance(x, LoraWeight)}
    if not chosen or not isinstance(steps, int) or steps < 1:
        raise LoraError(
            f"loftq: {len(chosen)} leaves are adapted and steps={steps!r}. Pass the "
            "tree that flora.init returned, and steps of 1 or more."
        )
    fail(_problems(chosen, block, "Adapt other leaves"))
    require_finite("loftq", chosen, remedy="Start from finite weights.")

    def one(w: LoraWeight) -> LoraWeight:
        w = dataclasses.replace(w, start="flora.quantize.loftq")
        found = functools.partial(_nearest, qtype=qtype, block=block, steps=steps)
        if not isinstance(w.base, jax.ShapeDtypeStruct):
            return _placed_as(w, found(w))
        in_ = _summed(w, len(w.base.shape))
        quantized = _quantized(w.base, qtype, block, in_, None)
        return dataclasses.replace(w, base=quantized)

    return treedef.unflatten(
        [one(x) if isinstance(x, LoraWeight) else x for _, x in named]
    )


def _nearest(w: LoraWeight, *, qtype: str, block: int | None, steps: int) -> LoraWeight:
    """The pair of quantized base and factors that is nearest to the weight."""
    in_ = _summed(w, len(w.base.shape))
    make = _maker(qtype, block, jnp.dtype(w.base.dtype), in_)
    wide = w.base.astype(jnp.promote_types(w.base.dtype, jnp.float32))
    best, least, change = w, jnp.inf, jnp.zeros_like(wide)
    for step in range(steps):
        quantized = make((wide - change).astype(w.base.dtype))
        rest = wide - quantized.dense().astype(wide.dtype)
        a, b = folded(w, *nearest(w, rest))
        change = delta(dataclasses.replace(w, a=a, b=b))
        made = dataclasses.replace(w, base=quantized, a=a, b=b)
        left = jnp.linalg.norm(rest - change)
        if step == 0:
            best, least = made, left
            continue
        nearer = left < least
        best = jax.tree.map(functools.partial(_either, nearer), made, best)
        least = jnp.minimum(left, least)
    return best


def _either(first: Any, x: Any, y: Any) -> Any:
    return jnp.where(first, x, y)


def _placed_as(w: LoraWeight, made: LoraWeight) -> LoraWeight:
    """`made`, its factors with the shardings of those of w."""
    if spec_of(w.a) is None or isinstance(w.a, Tracer):
        return made
    a, b = jax.device_put((made.a, made.b), (w.a.sharding, w.b.sharding))
    return dataclasses.replace(made, a=a, b=b)


def _require(qtype: str, block: int | None) -> int | None:
    """The block to use."""
    if qtype not in QTYPES:
        raise LoraError(f"qtype={qtype!r}. Write one of {', '.join(QTYPES)}.")
    if block is None:
        return 64 if qtype == "nf4" else None
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise LoraError(
            f"block={block!r}. Write a positive number, such as 64, or None for one "
            "scale an output."
        )
    return block


def _require_dtype(dtype: Any) -> None:
    try:
        floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise LoraError(
            f"dtype={dtype!r}. Write a floating dtype that weights open to, such as "
            "jnp.bfloat16."
        )


def _problems(chosen: dict[str, Any], block: int | None, remedy: str) -> list[str]:
    """What keeps leaves from being stored; the remedy's {} is the leaf's pattern."""
    problems = []
    for path, x in chosen.items():
        without = remedy.format(repr(exactly(path)))
        if not _is_wide(x):
            kind = shown(x) if is_array(x) else repr(x)
            problems.append(
                f"'{path}' is {kind}; only floating arrays of more than 8 bits an "
                f"element can be quantized. {without}."
            )
        elif block is not None and _blocked_axis(x.shape, block) is None:
            problems.append(
                f"'{path}' has shape {tuple(x.shape)}; neither of the last two axes "
                f"divides into blocks of {block}. {without}, or write another block."
            )
    return problems


def _is_wide(x: Any) -> bool:
    """Whether x is an array of more than 8 bits an element, and floating."""
    floating = is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return floating and jnp.dtype(x.dtype).itemsize > 1


def _blocked_axis(shape: Any, block: int) -> int | None:
    """The axis along which neighbors share a scale."""
    axes = [len(shape) - 2, len(shape) - 1]
    return next((i for i in axes if shape[i] and shape[i] % block == 0), None)


def _quantized(
    x: Any, qtype: str, block: int | None, in_: tuple[int, ...], dtype: Any
) -> Quantized:
    make = _maker(qtype, block, jnp.dtype(dtype or x.dtype), in_)
    if isinstance(x, jax.ShapeDtypeStruct):
        return _lying_as(x, jax.eval_shape(make, x))
    return _lying_as(x, make(x))


def _delete(x: Any, made: Quantized) -> None:
    """Deletes an array, once what is made of it is there."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        jax.block_until_ready(made)
        x.delete()


def _lying_as(x: Any, quantized: Quantized) -> Quantized:
    """The quantized arrays or shapes, sharded as the weight if that says how.

    Inside jit the compiler sees to it.
    """
    spec = None if isinstance(x, Tracer) else spec_of(x)
    if spec is None:
        return quantized
    places = places_of_parts(mesh_of(x), quantized, spec)
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jax.device_put(quantized, places)
    return jax.tree.map(
        lambda part, place: jax.ShapeDtypeStruct(
            part.shape, part.dtype, sharding=place
        ),
        quantized,
        places,
    )


@functools.cache
def _maker(qtype: str, block: int | None, dtype: Any, in_: tuple[int, ...]) -> Any:
    """Quantizes an array; compiled once for leaves of one shape and place."""

    @jax.jit
    def make(x: jax.Array) -> Quantized:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if block is None:
            codes, scale = _coded(x, qtype, in_)
        else:
            axis: Any = _blocked_axis(x.shape, block)
            apart = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
            codes, scale = _coded(apart, qtype, (axis + 1,))
            codes, scale = codes.reshape(x.shape), scale.squeeze(axis + 1)
        # Float16 would make zeros of small scales, by which a form may divide.
        least = jnp.finfo(dtype).smallest_subnormal.astype(scale.dtype)
        scale = jnp.maximum(scale, least).astype(dtype)
        return Quantized(Codes(codes, scale, qtype), of_codes)

    return make


def _coded(
    x: jax.Array, qtype: str, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Codes of the nearest levels, and scales, which those along the axes share.

    As qwix has them for float32, here for every floating dtype, and element by
    element, so that they lie where x does.
    """
    scale = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0) / _bound(qtype)
    small = jnp.sqrt(jnp.finfo(scale.dtype).tiny)
    scale = jnp.where(scale < small, jnp.ones_like(scale), scale)
    unit = x / scale
    if qtype == "nf4":
        codes = _nearest_level(unit)
    elif qtype.startswith("int"):
        codes = jnp.round(unit).astype(qtype)  # the cast clips
    else:
        codes = jnp.clip(unit, -_bound(qtype), _bound(qtype)).astype(qtype)
    return codes, scale


def _bound(qtype: str) -> float:
    """The level of the largest element of a block."""
    if qtype == "nf4":
        return 1.0
    if qtype.startswith("int"):
        return jnp.iinfo(qtype).max + 0.5  # half a step of its own, as the others have
    return float(jnp.finfo(qtype).max)


def _nearest_level(unit: jax.Array) -> jax.Array:
    code, least = jnp.zeros(unit.shape, jnp.uint4), jnp.abs(LEVELS[0] - unit)
    for k, level in enumerate(LEVELS[1:], 1):
        far = jnp.abs(level - unit)
        code = jnp.where(far < least, jnp.uint4(k), code)
        least = jnp.minimum(far, least)
    return code
