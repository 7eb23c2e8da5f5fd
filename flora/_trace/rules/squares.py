"""Rules for norms: Σ (W + scale A B)² is found without A B."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import (
    RANK,
    Factored,
    Named,
    Squared,
    by_position,
    require_linear,
    require_no_output_scale,
)
from flora._algebra.low_rank import Names, contract, low_rank, widened
from flora._trace.compat import Eqn, eval_eqn
from flora._trace.interpret import Context
from flora._tree.errors import Unfactorable


def square(ctx: Context, eqn: Eqn, w: Factored) -> list[Squared]:
    """W², remembered as such until it is summed."""
    if w.base is None or jnp.issubdtype(w.base.dtype, jnp.complexfloating):
        raise Unfactorable("the square of a change, or of a complex weight")
    require_no_output_scale(w, "the square")
    require_linear(w, "the square")
    return [Squared(eval_eqn(eqn, [w.base] * len(eqn.invars))[0], w)]


def integer_pow(ctx: Context, eqn: Eqn, w: Factored) -> list[Squared]:
    if eqn.params["y"] != 2:
        raise Unfactorable("a power of the weight's elements other than the square")
    return square(ctx, eqn, w)


def cast_squares(ctx: Context, eqn: Eqn, squared: Squared) -> list[Squared]:
    """Squares keep their weight through a cast."""
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"a cast to {eqn.params['new_dtype']}")
    return [dataclasses.replace(squared, value=eval_eqn(eqn, [squared.value])[0])]


def sum_squares(ctx: Context, eqn: Eqn, squared: Squared) -> list[Any]:
    """Σ (W + s A B)² = Σ W² + 2 s Σ W ⊙ A B + s² Σ (A B)².

    The sums are over in axes, out axes or all.

    References: Liu et al. 2024 (DoRA, which needs this norm).
      https://arxiv.org/abs/2402.09353
    """
    (total,) = eval_eqn(eqn, [squared.value])
    ctx.note(squared.root, eqn)
    if not squared.root.factors:
        return [total]
    w, gone = by_position(squared.root), eqn.params["axes"]
    kept = tuple(x.name for i, axis in enumerate(w.axes) if i not in gone for x in axis)
    wide = widened(w.base)
    base = Named(wide.reshape([x.size for x in w.pieces]), w.names)
    highest = lax.Precision.HIGHEST
    cross = low_rank(base, w, kept, precision=highest, dtype=wide.dtype).array
    a, b = w.a.astype(wide.dtype), w.b.astype(wide.dtype)
    change = 2 * cross + w.settings.scale**2 * _square_of_product(a, b, kept)
    return [total + change.reshape(total.shape).astype(total.dtype)]


def _square_of_product(a: Named, b: Named, kept: Names) -> Any:
    """Σ (A B)² by the Gram matrix of the factor whose own axes are all summed."""
    for gone, other in ((a, b), (b, a)):
        own = {*gone.names} - {*other.names}
        if not own & {*kept}:
            break
    else:
        raise Unfactorable("squares summed over parts of in and out axes")
    twin, high = {RANK: "twin"}, {"precision": lax.Precision.HIGHEST}
    batch = [n for n in gone.names if n in other.names and n != RANK]
    gram = contract(gone, gone.renamed(twin), [*batch, RANK, "twin"], **high)
    rest = [n for n in other.names if n != RANK]
    half = contract(gram, other, [*rest, "twin"], **high)
    return contract(half, other.renamed(twin), kept, **high).array
