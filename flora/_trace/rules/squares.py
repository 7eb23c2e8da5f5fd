"""Rules for norms: Σ (W + scale A B)² is found without A B."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.factored import Factored, Squared, flattened, require_no_columns
from flora._algebra.low_rank import Labelled, contract, low_rank_product, widened
from flora._algebra.views import RANK, Views, views
from flora._trace.compat import eval_eqn
from flora._tree.errors import Unfactorable


def square(ctx: Any, eqn: Any, w: Factored) -> list[Squared]:
    """W², remembered as such until it is summed."""
    if w.base is None or jnp.issubdtype(w.base.dtype, jnp.complexfloating):
        raise Unfactorable("the square of a change, or of a complex weight")
    require_no_columns(w, "the square")
    if w.site.between is not None:
        raise Unfactorable("the square of a weight whose variant acts between A and B")
    return [Squared(eval_eqn(eqn, [w.base] * len(eqn.invars))[0], w)]


def integer_pow(ctx: Any, eqn: Any, w: Factored) -> list[Squared]:
    if eqn.params["y"] != 2:
        raise Unfactorable("a power of the weight's elements other than the square")
    return square(ctx, eqn, w)


def cast_squares(ctx: Any, eqn: Any, squared: Squared) -> list[Squared]:
    """Squares keep their weight through a cast."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"a cast to {eqn.params['new_dtype']}")
    return [dataclasses.replace(squared, value=eval_eqn(eqn, [squared.value])[0])]


def sum_squares(ctx: Any, eqn: Any, squared: Squared) -> list[Any]:
    """Σ (W + s A B)² = Σ W² + 2 s Σ W ⊙ A B + s² Σ (A B)², over in axes, out axes or all.

    References: Liu et al. 2024 (DoRA, which needs this norm).
      https://arxiv.org/abs/2402.09353
    """
    (total,) = eval_eqn(eqn, [squared.value])
    ctx.note(squared.root, eqn)
    if squared.root.a is None:
        return [total]
    w = flattened(squared.root)
    v = views(w, "w")
    # Flat axes have one segment each, those of size 1 none.
    kept = [
        axis[0][0]
        for i, axis in enumerate(v.segments)
        if axis and i not in eqn.params["axes"]
    ]
    labels = [label for axis in v.segments for label, _ in axis]
    base = widened(w.base).reshape([n for axis in v.segments for _, n in axis])
    highest = lax.Precision.HIGHEST
    cross = low_rank_product(
        Labelled(base, labels), w, v, kept, precision=highest, dtype=base.dtype
    )
    change = 2 * cross + w.site.scale**2 * _square_of_product(v, kept, base.dtype)
    return [total + change.reshape(total.shape).astype(total.dtype)]


def _square_of_product(v: Views, kept: Sequence[Hashable], dtype: Any) -> Any:
    """Σ (A B)² by the Gram matrix of the factor whose own axes are all summed."""
    a = Labelled(v.a.astype(dtype), v.a_labels)
    b = Labelled(v.b.astype(dtype), v.b_labels)
    for gone, other in ((a, b), (b, a)):
        own = [x for x in gone.labels if x != RANK and x not in other.labels]
        if not any(x in kept for x in own):
            break
    else:
        raise Unfactorable("squares summed over parts of in and out axes")
    twin = "rank of the twin"
    batch = [x for x in gone.labels if x in other.labels and x != RANK]
    high = {"precision": lax.Precision.HIGHEST}
    gram = contract(gone, _renamed(gone, RANK, twin), [*batch, RANK, twin], **high)
    rest = [x for x in other.labels if x != RANK]
    half = contract(gram, other, [*rest, twin], **high)
    return contract(half, _renamed(other, RANK, twin), kept, **high).array


def _renamed(x: Labelled, old: Hashable, new: Hashable) -> Labelled:
    return Labelled(x.array, [new if label == old else label for label in x.labels])
