"""Random adapters, and their change in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

import flora
import flora.multi
import flora.quantize
from tests.support import contract
from tests.support.contract import adapt, array

METHODS = ("gather", "masked", "auto")
# It is the first to compile, and the longest.
GATHER_IS_SLOW = [
    pytest.param(x, marks=pytest.mark.slow) if x == "gather" else x for x in METHODS
]
LAYOUTS = [
    (flora.Layout(), (5, 7)),
    (flora.Layout((0,), (1,), (2,)), (3, 5, 7)),
    (flora.Layout((), (2, 0), (1,)), (4, 7, 2)),
    (flora.Layout((2, 0), (1,), (3, 4)), (2, 5, 3, 4, 2)),
]


def node(layout, shape, rank, seed=0, dtype=np.float64, **statics):
    a, b = layout.factor_shapes(shape, rank)
    a, b = array(*a, seed=seed, dtype=dtype), array(*b, seed=seed + 100, dtype=dtype)
    return flora.LoraWeight(None, a, b, layout=layout, rank=rank, **statics)


def delta(x):
    """Scale A B in NumPy, `[stack, in, out]`."""
    n = len(x.layout.stack)
    a, b = (np.asarray(f, np.float64) for f in (x.a, x.b))
    stack, rank = int(np.prod(a.shape[:n])), a.shape[-1]
    scale = x.alpha / (np.sqrt(rank) if x.rank_stabilized else rank)
    return scale * a.reshape(stack, -1, rank) @ b.reshape(stack, rank, -1)


def three(layout, shape, **options):
    """Adapters of other ranks, alphas and scalings."""
    return [
        {"w": node(layout, shape, 2, 0, alpha=3.0, **options)},
        {"w": node(layout, shape, 1, 1, alpha=5.0, **options)},
        {"w": node(layout, shape, 4, 2, alpha=2.0, rank_stabilized=True, **options)},
    ]


def adapters_of(fn, params, *args, settings=((2, 6.0), (1, 5.0), (2, 2.0)), **options):
    """Random adapters of a model, of those ranks and alphas, as if trained."""
    planned = adapt(fn, jax.eval_shape(lambda: params), *args, **options)

    def drawn(x, rank, alpha, seed):
        if isinstance(x, flora.Trained):
            value = array(*x.value.shape, seed=seed, dtype=x.value.dtype)
            return flora.Trained(value)
        if not contract.is_weight(x):
            return None
        made = node(x.layout, x.base.shape, rank, seed, x.base.dtype, alpha=alpha)
        return dataclasses.replace(made, a=0.3 * made.a, b=0.3 * made.b)

    stop = (flora.Trained, flora.LoraWeight)
    return [
        jax.tree.map(
            lambda x, r=r, alpha=alpha, k=k: drawn(x, r, alpha, k),
            planned,
            is_leaf=lambda x: isinstance(x, stop),
        )
        for k, (r, alpha) in enumerate(settings)
    ]


def of_model(model, **options):
    return adapters_of(
        model.fn, model.params, *model.args, target=model.target, **options
    )
