"""From a call to a jaxpr: arrays become inputs, everything else stays as it is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flora._tree.arrays import is_array
from flora._tree.notes import note_call


@dataclasses.dataclass(frozen=True)
class Staged:
    """A traced call.

    Attributes:
      jaxpr: the closed jaxpr.
      tree_inputs: for each leaf of the parameter tree the position of its input, or
        `None` for a leaf that is no array.
      args: the arrays among the other arguments: the inputs after those of the tree.
      finish: turns the jaxpr's outputs into what the function returns.
      outputs: the paths of the jaxpr's outputs.
    """

    jaxpr: Any
    tree_inputs: Sequence[int | None]
    args: Sequence[Any]
    finish: Callable[[Sequence[Any]], Any]
    outputs: Sequence[str]


def stage(
    fn: Callable,
    leaves: Sequence[Any],
    treedef: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    verb: str,
) -> Staged:
    """Traces `fn(tree, *args, **kwargs)` once, abstractly.

    Arrays of the tree and JAX arrays among the other arguments become inputs.  Other
    values (NumPy arrays, bools, strings, None) reach `fn` unchanged.  What `fn` raises
    carries a note of the verb that called it.
    """
    rest, rest_def = jax.tree.flatten((tuple(args), dict(kwargs)))
    in_tree = [i for i, x in enumerate(leaves) if is_array(x)]
    in_rest = [
        i for i, x in enumerate(rest) if isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    ]
    outs: dict[str, Any] = {}  # no tracer outlives the trace in it

    def flat(tree_arrays: list[Any], rest_arrays: list[Any]) -> list[Any]:
        tree = treedef.unflatten(filled(leaves, in_tree, tree_arrays))
        args, kwargs = rest_def.unflatten(filled(rest, in_rest, rest_arrays))
        try:
            result = fn(tree, *args, **kwargs)
        except Exception as error:
            how = f"{verb}, which traces with abstract arrays,"
            note_call(error, how, fn, args, kwargs)
            raise
        found, outs["def"] = jax.tree_util.tree_flatten_with_path(result)
        outs["at"] = [i for i, (_, x) in enumerate(found) if isinstance(x, jax.Array)]
        outs["paths"] = [jax.tree_util.keystr(p) for p, _ in found]
        outs["static"] = [None if isinstance(x, jax.Array) else x for _, x in found]
        return [found[i][1] for i in outs["at"]]

    arrays = [rest[i] for i in in_rest]
    jaxpr = jax.make_jaxpr(flat)([leaves[i] for i in in_tree], arrays)
    at, out_def, static = outs["at"], outs["def"], outs["static"]

    def finish(values: Sequence[Any]) -> Any:
        return out_def.unflatten(filled(static, at, values))

    position = {i: k for k, i in enumerate(in_tree)}
    inputs = [position.get(i) for i in range(len(leaves))]
    return Staged(jaxpr, inputs, arrays, finish, [outs["paths"][i] for i in at])


def filled(values: Sequence[Any], at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The values, with those at the positions `at` replaced by `new`."""
    result = list(values)
    for i, x in zip(at, new, strict=True):
        result[i] = x
    return result
