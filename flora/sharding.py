"""How the arrays of an adapted tree are sharded over a mesh.

    adapted = flora.init(key, config, model.apply, params, x)    # factors follow params
    places = flora.sharding.shardings(adapted)                   # for jit, checkpoints
    step = jax.jit(step, in_shardings=(places, ...), out_shardings=(places, ...))

A factor is sharded as its weight is: A takes the mesh axes of W's in axes, B those of
its out axes, and both those of its stack axes.  So x A is reduced where x W is, z B has
the sharding of x W, and a step gathers nothing more than the frozen model's step does,
except the factors themselves.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.linen.spmd import logical_to_mesh
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.nearest import Nearest
from flora._tree.paths import named_leaves, path_of
from flora._tree.placement import (
    names,
    places_of_parts,
    spec_of,
    spec_of_extra,
    spec_problems,
    specs,
)
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, Trained, base_of, is_leaf

__all__ = ["of_state", "shardings"]

Rules = Sequence[tuple[str, Any]]
Named = list[tuple[str, Any]]

NOTHING = Spec()  # of a leaf that says nothing, told apart by identity


def shardings(
    tree: Any,
    like: Any = None,
    *,
    mesh: Any = None,
    rules: Rules | None = None,
    rank: str | None = None,
) -> Any:
    """A tree of `NamedSharding`s with the structure of `tree`.

    Args:
      tree: an adapted tree, an adapter or a base, of arrays, tracers or
        `jax.ShapeDtypeStruct`s.
      like: the base's shardings: `NamedSharding`s or `PartitionSpec`s in a tree with
        the base's paths, or with fewer (one for a whole module).  By default each
        leaf's own sharding, or else the names that `nn.Partitioned`,
        `nn.LogicallyPartitioned` or an `nnx.Variable` give its axes; leaves without
        either are replicated.
      mesh: a `jax.sharding.Mesh`; by default that of `like` or of the leaves, or the
        one that is set.
      rules: `(logical name, mesh axes)` pairs; by default Flax's current ones.
      rank: a mesh axis over which to shard the rank too, in each factor that does not
        use that axis already.

    Returns:
      Each array replaced by its sharding: for `jax.jit`, `jax.device_put`,
      `jax.lax.with_sharding_constraint` and checkpoints.

    Raises:
      LoraError: there is no mesh; a mesh axis is unknown; `like` has a path that the
        tree lacks; or an axis does not divide.  Every such leaf is named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tp"))
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> adapted = flora.init(jax.random.key(0), flora.LoraConfig(rank=2),
      ...                      lambda p, x: x @ p["kernel"], params, jnp.ones((2, 8)))
      >>> like = {"kernel": P("fsdp", "tp")}
      >>> places = flora.sharding.shardings(adapted, like, mesh=mesh)
      >>> places["kernel"].a.spec == P("fsdp", None)
      True
      >>> places["kernel"].b.spec == P(None, "tp")
      True
    """
    named, treedef = named_leaves(tree)
    given = _given(tree, named, like)
    mesh = _mesh(named, like) if mesh is None else mesh
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise LoraTypeError(
            f"shardings: mesh is a {type(mesh).__name__}. Pass a jax.sharding.Mesh, "
            'such as jax.make_mesh((4, 2), ("fsdp", "tp")).'
        )
    sizes = dict(mesh.shape)
    if rank is not None and rank not in sizes:
        raise LoraError(f"rank={rank!r} is no axis of the mesh: {', '.join(sizes)}.")
    rules = nn.get_logical_axis_rules() if rules is None else rules
    parts = [
        _parts(path, leaf, _on_mesh(given[path], sizes, rules), rank)
        for path, leaf in named
    ]
    fail(
        problem
        for each in parts
        for what, x, spec in each.values()
        for problem in spec_problems(what, getattr(x, "shape", ()), spec, sizes)
    )
    placed = [
        {name: _where(mesh, x, spec) for name, (_, x, spec) in each.items()}
        for each in parts
    ]
    return treedef.unflatten(
        [_in_place(leaf, x) for (_, leaf), x in zip(named, placed, strict=True)]
    )


def of_state(state: Any, tree: Any, places: Any) -> Any:
    """Shardings of an optimizer's state: each moment has that of its parameter.

    Args:
      state: what `tx.init(tree)` or `jax.eval_shape(tx.init, tree)` returned.
      tree: the adapted tree or the adapter that `tx.init` was given.
      places: `shardings(tree)`.

    Returns:
      `state` with each array replaced by its sharding.  An array that has the shape of
      an array of the tree, and a path that ends in that array's path, has its sharding;
      all others, such as counts, are replicated.

    Raises:
      LoraError: `places` are not the shardings of `tree`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    where, _ = jax.tree_util.tree_flatten_with_path(places)
    fits = [keys for keys, _ in flat] == [keys for keys, _ in where]
    if not flat or not fits or not all(isinstance(x, NamedSharding) for _, x in where):
        raise LoraError(
            f"of_state: places has {len(where)} leaves for the {len(flat)} arrays of "
            "the tree, or other ones. Pass the tree of tx.init and its shardings(tree)."
        )
    found = {
        (keys, tuple(getattr(x, "shape", ()))): place
        for (keys, x), (_, place) in zip(flat, where, strict=True)
    }
    replicated = NamedSharding(next(iter(found.values())).mesh, Spec())

    def place(keys: Any, x: Any) -> NamedSharding:
        shape = tuple(getattr(x, "shape", ()))
        ends = (found.get((keys[i:], shape)) for i in range(len(keys) + 1))
        return next((end for end in ends if end is not None), replicated)

    return jax.tree_util.tree_map_with_path(place, state)


def _given(tree: Any, named: Named, like: Any) -> dict[str, Spec]:
    """The spec of each leaf's base, in the names of the mesh or logical ones."""
    if like is not None:
        parts = [x for _, x in named if not isinstance(x, Trained)]
        based = any(base_of(x) is not None for x in parts)  # not an adapter alone
        return _looked_up([path for path, _ in named], like, complete=based)
    has_variables = any(
        isinstance(x, nnx.Variable)
        for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), bool), tree, is_leaf=is_leaf)
    told = (nnx if has_variables else nn).get_partition_spec(bare)
    by_name = _looked_up([path for path, _ in named], told)
    lies = {path: spec_of(base_of(leaf)) for path, leaf in named}
    return {path: lies[path] or by_name[path] or NOTHING for path in by_name}


def _looked_up(
    paths: Sequence[str], like: Any, *, complete: bool = False
) -> dict[str, Spec]:
    """For each path the spec in `like` with that path, or for the module around it.

    `complete`: these are all the paths, and `like` may have no others.
    """

    def stop(x: Any) -> bool:
        return x is None or isinstance(x, Spec | jax.sharding.Sharding)

    flat, _ = jax.tree_util.tree_flatten_with_path(like, is_leaf=stop)
    by_path = {path_of(keys): x for keys, x in flat}
    fail(
        f"like: '{path}' is {x!r}. Write a NamedSharding or a PartitionSpec."
        for path, x in by_path.items()
        if x is not None and not isinstance(x, Spec | NamedSharding)
    )
    found, problems, used, near = {}, [], set(), Nearest(by_path)
    for path in paths:
        parts = path.split("/")
        around = ["/".join(parts[:i]) for i in range(len(parts), -1, -1)]
        hit = next((p for p in around if p in by_path), None)
        if hit is None:
            problems.append(f"like has no sharding for '{path}'.{_nearest(path, near)}")
        else:
            x = by_path[hit]
            used.add(hit)
            found[path] = (x.spec if isinstance(x, NamedSharding) else x) or Spec()
    fail(problems)
    near, words = Nearest(paths), [path.split("/") for path in paths]
    around = {"/".join(x[:i]) for x in words for i in range(len(x) + 1)}
    fail(
        f"like: '{path}' is no leaf or module of the tree.{_nearest(path, near)}"
        for path in by_path
        if complete and path not in used and path not in around
    )
    return found


def _nearest(path: str, near: Nearest) -> str:
    close = near.to(path)
    return f" Closest: '{close[0]}'." if close else ""


def _mesh(named: Named, like: Any) -> Any:
    """The mesh of what is given, or the one that is set."""
    arrays = [getattr(x, "sharding", None) for x in jax.tree.leaves(named)]
    for x in (*jax.tree.leaves(like), *arrays):
        if isinstance(x, NamedSharding):
            return x.mesh
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise LoraError(
            "shardings: nothing says which mesh. Pass mesh=, or call it under "
            "jax.set_mesh(mesh)."
        )
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # inside jit the devices are not known
        return mesh


def _on_mesh(spec: Spec, sizes: Mapping[str, int], rules: Rules) -> Spec:
    """A spec in the names of the mesh; logical names go through the rules."""
    if spec is NOTHING:
        return spec
    if set(names(spec)) <= set(sizes):
        return Spec(*(None if x is Spec.UNCONSTRAINED else x for x in spec))
    return logical_to_mesh(spec, rules) if rules else spec


def _parts(
    path: str, leaf: Any, spec: Spec, rank: str | None
) -> dict[str, tuple[str, Any, Spec]]:
    """`{attribute: (what it is called, array, spec)}` of a leaf."""
    if not isinstance(leaf, LoraWeight):
        return {"": (f"'{path}'", base_of(leaf), spec)}
    layout = leaf.layout
    found = specs(layout, spec, len(layout.order), rank)
    alone = leaf.base is None and spec is NOTHING
    if alone:  # an adapter lies where it lies
        own = {x: spec_of(getattr(leaf, x)) or Spec() for x in ("a", "b")}
        found = dataclasses.replace(found, **own)
    called = {"base": f"'{path}'", "a": f"a of '{path}'", "b": f"b of '{path}'"}
    called["key"] = f"key of '{path}'"
    parts = {
        name: (what, getattr(leaf, name), getattr(found, name))
        for name, what in called.items()
        if getattr(leaf, name) is not None
    }
    for name, x in (leaf.extra or {}).items():
        own = spec_of(x) or Spec() if alone else spec_of_extra(found, leaf, x.shape)
        parts[f"extra {name}"] = (f"{name} of '{path}'", x, own)
    return parts


def _where(mesh: Any, x: Any, spec: Spec) -> Any:
    """The sharding of an array, or of each array of a quantized weight."""
    return (
        places_of_parts(mesh, x, spec) if is_quantized(x) else NamedSharding(mesh, spec)
    )


def _in_place(leaf: Any, placed: dict[str, NamedSharding]) -> Any:
    if isinstance(leaf, LoraWeight):
        extra = {k.removeprefix("extra "): v for k, v in placed.items() if " " in k}
        parts = {k: v for k, v in placed.items() if " " not in k}
        return dataclasses.replace(leaf, **parts, extra=extra or leaf.extra)
    return Trained(placed[""]) if isinstance(leaf, Trained) else placed[""]
