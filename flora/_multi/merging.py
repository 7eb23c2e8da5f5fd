"""An adapter in the base's place (`merge`), and the base again, bit for bit.

W + scale A B, rounded, minus scale A B is not W.  What is between the two, counted in
floating-point numbers that lie between them, is small for almost every element, so
that a byte holds it.  With that and the adapter the base need not be kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flora._algebra.dense import materialize
from flora._algebra.variants import Columns
from flora._multi.conform import flattened
from flora._multi.kinds import each_leaf, fixed
from flora._tree.arrays import compute_dtype
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.paths import named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, Trained
from flora._verbs.split import join


@dataclasses.dataclass(frozen=True)
class Rest:
    """What leads from a guess at W to W itself.

    Attributes:
      steps: how many numbers of W's dtype W is above the guess, int8 in W's shape.
      at: the places, in row-major order, of what a byte does not hold.
      wide: the steps there.
      check: the sum of W's bits.
    """

    steps: Any
    at: Any
    wide: Any
    check: Any


@dataclasses.dataclass(frozen=True)
class Merged:
    """A base with an adapter in it, which can be taken out again.

    Attributes:
      tree: the plain tree, for the function itself.
      adapter: what is in it; DoRA with its norms divided out.
      rest: for each adapted leaf what `unmerge` needs besides: a byte an element, and
        all of it where the leaf trains whole or is of fewer bits.
    """

    tree: Any
    adapter: Any
    rest: Mapping[str, Any]

    def __repr__(self) -> str:
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.rest))
        return f"Merged({len(self.rest)} leaves, {size} bytes to take them out again)"


for _node in (Rest, Merged):
    jax.tree_util.register_dataclass(
        _node, data_fields=[f.name for f in dataclasses.fields(_node)], meta_fields=[]
    )


def merge(base: Any, adapter: Any, *, donate: bool = False) -> Merged:
    """The base with an adapter merged in, which `unmerge` takes out bit for bit.

    It serves one adapter at the base's own cost.  What is kept besides is a byte an
    element of the adapted leaves: half of a bfloat16 base, a quarter of a float32 one.

    Args:
      base: the plain tree.
      adapter: what `flora.split(adapted)[1]` returns.
      donate: True to free each weight of `base` once it is merged, so that no second
        base is ever in memory.  `base` cannot be used after.

    Returns:
      The `Merged`, whose `tree` is what `flora.merge` gives.

    Raises:
      LoraError: base and adapter do not fit, are tracers or have no values, or NaN or
        infinity comes out.

    Example:
      >>> import jax.numpy as jnp, flora, flora.multi
      >>> base = {"w": jnp.ones((2, 2))}
      >>> one = {"w": flora.LoraWeight(None, jnp.ones((2, 1)), jnp.ones((1, 2)) / 3)}
      >>> merged = flora.multi.merge(base, one)
      >>> bool((flora.multi.unmerge(merged)["w"] == base["w"]).all())
      True
    """
    nodes, _ = flattened(adapter, "merge", blocks=True)
    old, base_def = named_leaves(base)
    whole = {path for path, x in nodes if isinstance(x, Trained)}
    frozen = base_def.unflatten([None if path in whole else x for path, x in old])
    named, treedef = named_leaves(join(frozen, adapter))
    old = dict(old)
    fail(
        f"merge: '{path}' is {x!r}, no array with values. Merge outside of jax.jit."
        for path, leaf in named
        for x in jax.tree.leaves((leaf, old.get(path)))
        if isinstance(x, jax.ShapeDtypeStruct | Tracer)
    )
    rest: dict[str, Any] = {}

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            rest[path] = old[path]
            return leaf.value, leaf
        if not isinstance(leaf, LoraWeight):
            return leaf, None
        bare = dataclasses.replace(leaf, base=None, key=None)
        node = fixed(path, bare, {path: leaf.base})
        merged = _materialized(dataclasses.replace(node, base=leaf.base))
        require_finite("merge", {path: merged}, before={path: leaf.base})
        rest[path] = _rest(leaf.base, merged, node)
        if donate and isinstance(rest[path], Rest):
            leaf.base.delete()
        return merged, node

    made = each_leaf("merge", named, one)
    return Merged(
        treedef.unflatten([x for _, (x, _) in made]),
        treedef.unflatten([node for _, (_, node) in made]),
        rest,
    )


def unmerge(merged: Merged) -> Any:
    """The base that `merge` was given, bit for bit.

    Raises:
      LoraTypeError: it is no `Merged`.
      LoraError: a leaf of its tree has changed since, or this machine computes other
        bits than the one that merged.
    """
    if not isinstance(merged, Merged):
        raise LoraTypeError(
            f"unmerge: merged is a {type(merged).__name__}; expected what "
            "flora.multi.merge returned."
        )
    nodes = dict(named_leaves(merged.adapter)[0])
    named, treedef = named_leaves(merged.tree)

    def one(path: str, leaf: Any) -> Any:
        found = merged.rest.get(path)
        if not isinstance(found, Rest):
            return leaf if found is None else found
        w = _restored(leaf, nodes[path], found)
        if int(_checked(w)) != int(found.check):
            raise LoraError(
                f"'{path}' is not what merge made of it, or this machine rounds "
                "otherwise than the one that merged. Load the base anew."
            )
        return w

    return treedef.unflatten([w for _, w in each_leaf("unmerge", named, one)])


def _rest(w: Any, merged: Any, node: LoraWeight) -> Any:
    if is_quantized(w) or w.dtype.itemsize == 1:
        return w
    steps = _steps(w, merged, node)
    narrow = jnp.clip(steps, -127, 127).astype(jnp.int8)
    at = jnp.flatnonzero(narrow != steps)
    return Rest(narrow, at, steps.reshape(-1)[at], _checked(w))


_materialized = jax.jit(materialize)


@jax.jit
def _steps(w: Any, merged: Any, node: LoraWeight) -> jax.Array:
    return _ordered(w) - _ordered(_guess(merged, node))


@jax.jit
def _restored(merged: Any, node: LoraWeight, rest: Rest) -> jax.Array:
    guess = _ordered(_guess(merged, node))
    steps = rest.steps.astype(guess.dtype).reshape(-1)
    steps = steps.at[rest.at].set(rest.wide).reshape(guess.shape)
    return _unordered(guess + steps, merged.dtype)


def _guess(merged: Any, node: LoraWeight) -> jax.Array:
    """W as far as floating point leads back to it: merged / columns - scale A B."""
    wide = compute_dtype(merged.dtype)
    of_zero = dataclasses.replace(node, base=jnp.zeros(merged.shape, wide))
    plain = dataclasses.replace(of_zero, variant=None, extra=None)
    total = merged.astype(wide)
    if isinstance(node.variant, Columns):
        ones = jnp.ones(merged.shape, wide)
        b = jnp.zeros_like(node.b)
        columns = materialize(dataclasses.replace(of_zero, base=ones, b=b))
        total = total / jnp.where(columns == 0, 1, columns)
    return (total - materialize(plain)).astype(merged.dtype)


def _signed(dtype: Any) -> Any:
    return jnp.dtype(f"int{8 * jnp.dtype(dtype).itemsize}")


def _ordered(x: Any) -> jax.Array:
    """Floats as ints in the same order, neighbors one apart."""
    bits = lax.bitcast_convert_type(x, _signed(x.dtype))
    return jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits - 1, bits)


def _unordered(bits: Any, dtype: Any) -> jax.Array:
    bits = jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits - 1, bits)
    return lax.bitcast_convert_type(bits, dtype)


@jax.jit
def _checked(w: Any) -> jax.Array:
    """A sum of W's bits, each times an odd number of its place."""
    bits = lax.bitcast_convert_type(w, _signed(w.dtype)).reshape(-1)
    at = lax.iota(jnp.uint32, bits.size) * np.uint32(2654435761) | np.uint32(1)
    if bits.dtype.itemsize == 8:
        bits = bits ^ (bits >> 32)
    return jnp.sum(bits.astype(jnp.uint32) * at)
