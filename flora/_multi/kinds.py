"""One leaf of several adapters, made of one kind: what one adapter lacks is zeros.

Kinds are factors (`LoraWeight`, with or without a variant), a leaf that trains whole
(`Trained`), and none (`None`).  Whatever a variant makes of W is a product
(W + scale A B) ⊙ columns, so that all of them fit one node of plain factors, or of
`flora.variants.Columns` where any has columns.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._algebra.dense import materialize
from flora._algebra.norms import column_norms
from flora._algebra.variants import Columns, DoRA
from flora._multi.conform import RankAndScale, on_arrays
from flora._tree.checks import weight_problems
from flora._tree.errors import LoraError, fail
from flora._tree.paths import named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import (
    LoraWeight,
    Trained,
    base_of,
    factor_sizes,
    product_of,
)

Values = Mapping[str, Any]


def values_of(base: Any) -> Values:
    """The plain weights by path; none where no base was given."""
    if base is None:
        return {}
    return {path: base_of(leaf) for path, leaf in named_leaves(base)[0]}


def each_leaf(
    verb: str, leaves: Sequence[tuple[str, Any]], fn: Callable[[str, Any], Any]
) -> list[tuple[str, Any]]:
    """`fn(path, nodes)` in the place of nodes; what fails is reported at once."""
    made, problems = [], []
    for path, nodes in leaves:
        try:
            made.append((path, fn(path, nodes)))
        except LoraError as error:
            problems.append(f"{verb}: {error}")
    fail(problems)
    return made


def united(path: str, nodes: Sequence[Any], base: Values) -> list[Any]:
    """The nodes of one leaf as one kind, or all `None`.

    Raises:
      LoraError: as of `worked_out_alike`.
    """
    if _is_one_kind(nodes):
        require_one_start(path, nodes)
        return list(nodes)
    made = worked_out_alike(path, nodes, base)
    like = next((x for x in made if x is not None), None)
    return [zeros(like) if x is None and like is not None else x for x in made]


def worked_out_alike(path: str, nodes: Sequence[Any], base: Values) -> list[Any]:
    """The nodes of one leaf without variants, `None` where an adapter has none.

    All have columns where one has, and all are whole where one trains whole.

    Raises:
      LoraError: the base's weight is needed and not there, or a variant has a function
        between A and B; or starts changed the base of some.
    """
    require_one_start(path, nodes)
    like = next((x for x in nodes if isinstance(x, Trained)), None)
    if like is not None:
        return [whole(path, x, base, like) for x in nodes]
    made = [None if x is None else fixed(path, x, base) for x in nodes]
    if any(x is not None and x.variant is not None for x in made):
        return [None if x is None else with_columns(x) for x in made]
    return made


def require_one_start(path: str, nodes: Sequence[Any]) -> None:
    """Raises where a start changed the base of some adapters and not of the others."""
    starts = {
        (x.start, x.start and x.rank) if isinstance(x, LoraWeight) else ("", "")
        for x in nodes
    }
    if len(starts) > 1:
        what = " and ".join(sorted(f"{s} of rank {r}" for s, r in starts if s))
        raise LoraError(
            f"'{path}' was started by {what} in some of the adapters, which took a "
            "part of W into A and B: the adapters are of different bases. Write "
            "flora.starts.to_plain(adapter, start, original) for each of these."
        )


def _is_one_kind(nodes: Sequence[Any]) -> bool:
    """Whether nodes fit one node as they are, but for zeros and a factor in B."""
    if not all(isinstance(x, LoraWeight) for x in nodes):
        return False
    if len({x.variant for x in nodes}) > 1 or any(x.blocks for x in nodes):
        return False
    if all(isinstance(x.variant, DoRA | Columns | None) for x in nodes):
        return True
    return len({RankAndScale.of(x) for x in nodes}) == 1


def zeros(like: LoraWeight) -> LoraWeight:
    """A node that changes nothing, beside one of plain factors or of `Columns`."""
    a, b = on_arrays(
        lambda a, b: (jnp.zeros_like(a), jnp.zeros_like(b)), like.a, like.b
    )
    new = dataclasses.replace(like, a=a, b=b, extra=None, variant=None)
    return new if like.variant is None else with_columns(new)


def with_columns(node: LoraWeight) -> LoraWeight:
    """The node with columns of its own: of ones where it has none."""
    if node.variant is not None:
        return node
    stack, _, out = factor_sizes(node)
    ones = on_arrays(lambda b: jnp.ones((*stack, *out), jnp.float32), node.b)
    return dataclasses.replace(node, variant=Columns(), extra={"columns": ones})


def fixed(path: str, node: LoraWeight, base: Values) -> LoraWeight:
    """The node as plain factors, or with `Columns`: what its variant makes of W."""
    if isinstance(node.variant, Columns | None) and not node.blocks:
        return node
    made = on_arrays(_product, _on_base(path, node, base, f"is a {node.variant}"))
    if made is None:
        raise LoraError(
            f"'{path}' is a {node.variant}, which puts a function between A and B: it "
            "fits no other kind. Run it alone, by flora.lora."
        )
    a, b, columns = made
    new = dataclasses.replace(node, a=a, b=b, extra=None, variant=None, blocks=())
    if node.blocks:  # their scales are in b
        new = dataclasses.replace(new, alpha=float(node.rank), rank_stabilized=False)
    if columns is None:
        return new
    return dataclasses.replace(new, variant=Columns(), extra={"columns": columns})


@jax.jit
def _product(weight: LoraWeight) -> Any:
    product = product_of(weight)
    return None if product.between is not None else product[:3]


def as_dora(path: str, node: LoraWeight, variant: DoRA, base: Values) -> LoraWeight:
    """A node as a DoRA: the magnitude that gives the columns which it has."""
    node = fixed(path, node, base)
    whole = _on_base(path, node, base, f"is a {variant} in the stack")
    columns = (node.extra or {}).get("columns", 1.0)

    def magnitude(weight: LoraWeight, columns: Any) -> Any:
        return column_norms(weight) * columns

    whole = dataclasses.replace(whole, variant=None, extra=None)
    m = on_arrays(magnitude, whole, columns)
    return dataclasses.replace(node, variant=variant, extra={"magnitude": m})


def fitted(path: str, node: Any, like: Any, base: Values) -> Any:
    """The node of an adapter as a stack holds that leaf.

    Args:
      path: of the leaf.
      node: what the adapter has of it.
      like: a node of the stack, abstract.
      base: the plain weights.

    Raises:
      LoraError: a stack of that structure cannot hold it, or the base is needed.
    """
    require_one_start(path, [node, *([] if like is None else [like])])
    if like is None:
        if node is not None:
            raise LoraError(f"'{path}' has no place in the stack: all of it is frozen.")
        return None
    if isinstance(like, Trained):
        return whole(path, node, base, like)
    if isinstance(node, Trained):
        raise LoraError(f"'{path}' trains whole, and the stack holds factors for it.")
    if node is None:
        bare = dataclasses.replace(like, variant=None, extra=None)
        node = zeros(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bare))
    elif node.variant == like.variant and not node.blocks:
        return node
    if isinstance(like.variant, DoRA):
        return as_dora(path, node, like.variant, base)
    node = fixed(path, node, base)
    if isinstance(like.variant, Columns):
        return with_columns(node)
    if node.variant != like.variant:
        raise LoraError(
            f"'{path}' is {node.variant or 'plain LoRA'}, and the stack holds "
            f"{like.variant or 'plain LoRA'}."
        )
    return node


def whole(path: str, node: Any, base: Values, like: Trained) -> Trained:
    """A leaf that trains whole in another adapter, as this adapter has it."""
    if isinstance(node, Trained):
        return node
    what = "trains whole in one adapter, and another has "
    what += "no value of it" if node is None else "factors for it"
    value = _needed(path, base, what)
    if is_quantized(value):
        raise LoraError(f"'{path}' {what}: it cannot train whole on {value!r}.")
    if np.shape(value) != np.shape(like.value):
        raise LoraError(
            f"'{path}' has shape {np.shape(like.value)} in an adapter that trains it "
            f"whole, and {np.shape(value)} in base. Pass the base of the adapters."
        )
    if node is not None:
        value = on_arrays(materialize, _on_base(path, node, base, what))
    return Trained(on_arrays(lambda x: jnp.asarray(x, like.value.dtype), value))


def _on_base(path: str, node: LoraWeight, base: Values, why: str) -> LoraWeight:
    """The node with its weight, checked to fit."""
    weight = dataclasses.replace(node, base=_needed(path, base, why))
    fail(weight_problems(path, weight))
    return weight


def _needed(path: str, base: Values, why: str) -> Any:
    value = base.get(path)
    if value is None:
        raise LoraError(
            f"'{path}' {why}, which needs its weight W here. Pass base=, the plain "
            "tree that the adapters were trained on."
        )
    return value
