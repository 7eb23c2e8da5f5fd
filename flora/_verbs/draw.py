"""How A and B are drawn: at `flora.init`, and anew at `flora.recipes.restart`.

A leaf's draw depends on the key and on the leaf's path only.  What depends on its shape
and its place, and not on its path, is found once for all leaves that share them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from flora._tree.arrays import is_array
from flora._tree.errors import LoraError
from flora._tree.initializers import Initializer
from flora._tree.keys import consumed, path_salt
from flora._tree.layout import Layout
from flora._tree.notes import note_call
from flora._tree.placement import mesh_of, spec_of, specs
from flora._tree.weight import LoraWeight

Pair = tuple[Any, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Draw:
    """What the draws of equal leaves have in common.

    Attributes:
      initializer: draws one pair.
      dtype: that it is asked for.
      stack: how many pairs there are.
      in_, rank, out: the sizes of each.
      shapes: of A and B, with all axes of the weight.
    """

    initializer: Initializer
    dtype: Any
    stack: int
    in_: int
    rank: int
    out: int
    shapes: tuple[Shape, Shape]


def draw_of(
    initializer: Initializer, dtype: Any, layout: Layout, shape: Shape, rank: int
) -> Draw:
    """The draw for a weight of that layout and shape."""
    stack, in_, out = layout.matrix(shape)
    shapes = layout.factor_shapes(shape, rank)
    return Draw(initializer, dtype, stack, in_, rank, out, shapes)


def root_of(key: Any, leaves: Sequence[Any]) -> Any:
    """A key derived from `key`; abstract if nothing is drawn, as all leaves are."""
    if all(map(_is_abstract, leaves)):
        return jax.eval_shape(consumed, key)
    return consumed(key)


def drawn(root: Any, dtype: Any, leaves: Iterable[Any]) -> dict[str, Pair]:
    """A and B of each leaf, lying as it does; abstract where it is abstract.

    Args:
      root: a key, consumed by nothing else.
      dtype: of A and B.
      leaves: `(path, leaf, layout, rank, initializer)` of each.
    """
    shapes: dict[Draw, Any] = {}
    found = {}
    for path, leaf, layout, rank, initializer in leaves:
        draw = draw_of(initializer, dtype, layout, tuple(leaf.shape), rank)
        place = _place(layout, leaf)
        if not _is_abstract((leaf, root)):
            traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(leaf))
            found[path] = _at(root, path, draw, place, traced)
            continue
        if draw not in shapes:
            salt = np.uint32(0)
            cast = functools.partial(_cast, draw, False)
            shapes[draw] = jax.eval_shape(cast, root, salt)
        a, b = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for x, where in zip(shapes[draw], place or (None, None), strict=True)
        )
        found[path] = a, b
    return found


def redrawn(root: Any, initializer: Initializer, path: str, leaf: LoraWeight) -> Pair:
    """New factors of an adapted leaf, lying as the old ones do."""
    shape = tuple(leaf.base.shape)
    draw = draw_of(initializer, leaf.a.dtype, leaf.layout, shape, leaf.rank)
    a, b = stacked(draw, root, path_salt(path))
    return _like(a, leaf.a), _like(b, leaf.b)


def stacked(draw: Draw, root: Any, salt: Any, in_turn: bool = False) -> Pair:
    """One pair for each matrix of a stack, of the weight's shapes.

    Args:
      draw: of each matrix.
      root: a key.
      salt: of the leaf's path.
      in_turn: whether matrices are drawn one after the other.  On a CPU that compiles
        four times as fast; it is for stacks that are not divided over devices.
    """
    keys = jax.random.split(jax.random.fold_in(root, salt), draw.stack)
    one = functools.partial(_one, draw)
    if not str(jax.random.key_impl(root)).startswith("threefry"):
        a, b = jax.vmap(one)(keys)  # other generators give a batch other bits
    elif draw.stack == 1:
        a, b = one(keys[0])
    else:
        a, b = lax.map(one, keys) if in_turn else jax.vmap(one)(keys)
    return a.reshape(draw.shapes[0]), b.reshape(draw.shapes[1])


def _one(draw: Draw, key: Any) -> Pair:
    shapes = (draw.in_, draw.rank), (draw.rank, draw.out)
    try:
        made = draw.initializer(key, *shapes, draw.dtype)
    except Exception as error:
        given = (*shapes, str(draw.dtype))
        note_call(error, "flora", draw.initializer, given, {}, first="key")
        raise
    if not _are_factors(made, shapes):
        raise LoraError(
            f"The initializer {draw.initializer!r} gave {_described(made)}; expected "
            f"arrays (A, B) of shapes {shapes[0]} and {shapes[1]}."
        )
    return made[0], made[1]


def _cast(draw: Draw, in_turn: bool, root: Any, salt: Any) -> Pair:
    a, b = stacked(draw, root, salt, in_turn)
    return a.astype(draw.dtype), b.astype(draw.dtype)


def _at(root: Any, path: str, draw: Draw, place: Any, traced: bool) -> Pair:
    """The draw of one leaf; a tracer's lies only where its mesh has explicit axes."""
    salt: Any = np.uint32(path_salt(path))
    if not isinstance(root, Tracer):
        salt = jax.device_put(salt)  # as `jax.transfer_guard` wants it said
    if traced and place:
        return jax.sharding.reshard(_compiled(None)(draw, False, root, salt), place)
    whole = place is None or not any(place[0].spec[: len(place[0].spec) - 2])
    return _compiled(place)(draw, whole and not traced, root, salt)


@functools.cache
def _compiled(place: Any) -> Callable[[Draw, bool, Any, Any], Pair]:
    """`_cast`, compiled once for leaves of one shape and one place."""
    return jax.jit(_cast, static_argnums=(0, 1), out_shardings=place)


def _place(layout: Layout, leaf: Any) -> tuple[NamedSharding, NamedSharding] | None:
    """Where A and B go, if the leaf says where it lies."""
    if (spec := spec_of(leaf)) is None:
        return None
    found, mesh = specs(layout, spec, len(leaf.shape)), mesh_of(leaf)
    return NamedSharding(mesh, found.a), NamedSharding(mesh, found.b)


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _like(new: jax.Array, old: Any) -> jax.Array:
    """`new` in the dtype and place of `old`, whose shape it has."""
    new = new.astype(old.dtype)
    if not isinstance(old, Tracer):
        return jax.device_put(new, old.sharding)
    place = jax.typeof(old).sharding  # on a mesh with explicit axes, a part of its type
    explicit = not place.mesh.empty and place.mesh.explicit_axes
    return jax.sharding.reshard(new, place) if explicit else new


def _are_factors(made: Any, shapes: tuple[Shape, Shape]) -> bool:
    return (
        isinstance(made, tuple | list)
        and len(made) == 2
        and all(isinstance(x, jax.Array) for x in made)
        and tuple(x.shape for x in made) == shapes
    )


def kind_of(x: Any) -> str:
    """What x is, such as 'float32[4, 3]' or 'a str'."""
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else f"a {type(x).__name__}"


def _described(made: Any) -> str:
    parts = made if isinstance(made, tuple | list) else [made]
    shown = [kind_of(x) for x in parts]
    return f"({', '.join(shown)})" if isinstance(made, tuple | list) else shown[0]
