"""Initial factors computed from values: from a weight, a gradient or activations.

    adapted = flora.init(key, config, model.apply, params, x)
    start = flora.starts.pissa(adapted)                     # same model, other factors
    ...                                                     # train as usual
    plain = flora.starts.to_plain(trained, start, params)   # LoRA on the original W

EVA does not change the base: A follows the principal directions of each layer's inputs,
and B = 0.

PiSSA, OLoRA and LoRA-GA move a part of W into the factors and subtract it from the
base: W_res = W − scale A B.  That is rounded once to W's dtype, so W_res + scale A B is
W up to half a unit in the last place of W_res.  In bfloat16 the difference shows in the
outputs (2⁻⁹ of W_res); `to_plain` uses the original weights and does not have it.

To quantize the base as well, do so afterwards:
`flora.quantize.quantize(pissa(adapted), "nf4")`; or use `flora.quantize.loftq`.  Every
start accepts LoRA and DoRA leaves, and DoRA's magnitudes stay valid.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from flora._starts import residual as _residual
from flora._starts.components import alpha_at
from flora._starts.eva import eva
from flora._starts.residual import (
    gradients_of,
    made,
    nothing_adapted,
    plain_problems,
    selected,
    side_by_side,
)
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.matrices import compiled, place_of
from flora._tree.paths import Pattern, named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, Trained, base_of
from flora._verbs.lora import lora

__all__ = [
    "base_gradients",
    "each_base_gradient",
    "eva",
    "lora_ga",
    "olora",
    "pissa",
    "to_plain",
]

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")


def pissa(
    adapted: Any,
    *,
    target: Pattern = "*",
    method: str = "svd",
    niter: int = 4,
    key: chex.PRNGKey | None = None,
    donate: bool = False,
) -> Any:
    """The tree with W's principal part in the factors and the rest in the base.

    W = U S Vᵀ, A = U_r √(S_r/scale), B = √(S_r/scale) V_rᵀ, W_res = W − scale A B.

    What is decomposed is W + scale A B, so the model stays the same up to rounding,
    whatever A and B were.  The exact decomposition gathers one leaf at a time.  Where
    the rank is above min(in, out), the other columns of A and rows of B are zeros, and
    no gradient reaches them.

    Args:
      adapted: an adapted tree of arrays or tracers, with dense bases.
      target: which of its adapted leaves, as in `LoraConfig`; the others stay as they
        are.
      method: 'svd', which is exact, or 'randomized', whose time is linear in the rank.
      niter: how many power iterations the randomized method makes.
      key: a PRNG key for the randomized method; it is consumed.
      donate: whether to delete each base as soon as its leaf is done, so that no more
        than one leaf is ever held twice.

    Returns:
      A new tree.  New arrays have the shardings of those that they replace; leaves that
      did not change are shared.

    Raises:
      LoraError: nothing is selected; a base is quantized; or a leaf holds no values.
        Every such leaf is named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.starts
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> adapted = flora.init(jax.random.key(0), flora.LoraConfig(rank=2),
      ...                      lambda p, x: x @ p["kernel"], params, jnp.ones((2, 3)))
      >>> start = flora.starts.pissa(adapted)
      >>> abs(start["kernel"].base).max().round(3).item()  # the tail: 1
      1.0

    References: Meng et al. 2024 (PiSSA). https://arxiv.org/abs/2404.02948
    """
    root = _method_key("pissa", method, niter, key)
    chosen, named, treedef = selected("pissa", adapted, target)

    def one(path: str, w: LoraWeight) -> LoraWeight:
        own = None if root is None else jax.random.fold_in(root, path_salt(path))
        return made(w, _residual.pissa, (own,), donate=donate, passes=niter)

    return treedef.unflatten(
        [one(path, leaf) if path in chosen else leaf for path, leaf in named]
    )


def olora(adapted: Any, *, target: Pattern = "*", donate: bool = False) -> Any:
    """The tree with factors from a QR decomposition and the rest in the base.

    Wᵀ = Q R, A = (R_r)ᵀ from R's first rows, B = (Q_r)ᵀ from Q's first columns, so that
    B's rows are orthonormal; W_res = W − scale A B.  Ranks above
    min(in, out) are zeros.

    Args:
      adapted: as for `pissa`.
      target: likewise.
      donate: likewise.

    Returns:
      As for `pissa`.

    Raises:
      LoraError: as for `pissa`.

    References: Büyükakyüz 2024 (OLoRA). https://arxiv.org/abs/2406.01775
    """
    chosen, named, treedef = selected("olora", adapted, target)
    return treedef.unflatten(
        [
            made(x, _residual.olora, donate=donate) if path in chosen else x
            for path, x in named
        ]
    )


def lora_ga(
    adapted: Any,
    grads: Any,
    *,
    target: Pattern = "*",
    scaling: str = "stable",
    gamma: float = 16.0,
    direction: str = "ArB2r",
    method: str = "svd",
    niter: int = 4,
    key: chex.PRNGKey | None = None,
) -> Any:
    """The tree with factors along the singular directions of a gradient of W.

    G = U S Vᵀ `[in, out]`, A = c U_{1…r}, B = c (V_{r+1…2r})ᵀ, W_res = W − scale A B.

    The first step of gradient descent then changes W by −lr·scale²·c² G_{2r} up to
    terms in lr², where G_{2r} is the best approximation of G of rank 2r: no factors of
    rank r come closer to a step of full fine-tuning.  Directions that G does not have,
    beyond min(in, out), are zeros.

    Args:
      adapted: as for `pissa`.
      grads: one gradient of each chosen base: a tree with the paths of the bases, such
        as `base_gradients` or `jax.grad` of the plain model returns, or an iterator of
        such trees, each with some of the leaves (`each_base_gradient`).
      target: as for `pissa`.
      scaling: 'stable', the paper's, c = out^¼/√gamma; 'unit', c = 1; 'peft', what PEFT
        0.21 computes: A = U_{1…r} and B = out^¼/√gamma (S V)ᵀ_{r+1…2r}, whose first
        step is not a best approximation.
      gamma: the gamma of the scaling.
      direction: which singular directions the factors take: 'ArB2r', A 1…r and B
        r+1…2r; 'A2rBr', the reverse; 'ArBr', A the even ones and B the odd ones.
      method: as for `pissa`.
      niter: as for `pissa`.
      key: as for `pissa`.

    Returns:
      As for `pissa`.

    Raises:
      LoraError: as for `pissa`; or a gradient is missing or has another shape.

    References: Wang et al. 2024 (LoRA-GA), theorem 3.1. https://arxiv.org/abs/2407.05000
    """
    _require_choice("scaling", scaling, ("stable", "unit", "peft"))
    _require_choice("direction", direction, DIRECTIONS)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or gamma <= 0:
        raise LoraError(f"gamma={gamma!r}. Write a number above 0, such as 16.")
    root = _method_key("lora_ga", method, niter, key)
    chosen, named, treedef = selected("lora_ga", adapted, target)
    new: dict[str, LoraWeight] = {}
    for path, g in gradients_of(chosen, grads):
        own = None if root is None else jax.random.fold_in(root, path_salt(path))
        new[path] = made(
            chosen[path],
            _residual.lora_ga,
            (g, own),
            passes=niter,
            scaling=scaling,
            gamma=float(gamma),
            direction=direction,
        )
    fail(
        f"lora_ga: grads has no gradient of '{path}'. Pass flora.starts.base_gradients("
        "loss_fn, adapted, ...)."
        for path in chosen
        if path not in new
    )
    return treedef.unflatten([new.get(path, leaf) for path, leaf in named])


def base_gradients(
    loss_fn: Callable, adapted: Any, *args: Any, target: Pattern = "*", **kwargs: Any
) -> Any:
    """The gradient of the plain model's loss with respect to the adapted leaves' bases.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, a scalar, of the plain tree.
      adapted: an adapted tree.  The gradient is taken at its bases: A and B are not
        read.
      *args: arrays, or trees of arrays.
      target: which adapted leaves.
      **kwargs: likewise.

    Returns:
      A tree with the structure of the plain one: for each chosen leaf a dense gradient
      with the base's dtype and sharding, elsewhere `None`.

    Raises:
      LoraError: nothing is selected, or a base is quantized.
    """
    return next(
        each_base_gradient(
            loss_fn, adapted, *args, target=target, at_once=None, **kwargs
        )
    )


def each_base_gradient(
    loss_fn: Callable,
    adapted: Any,
    *args: Any,
    target: Pattern = "*",
    at_once: int | None = 1,
    **kwargs: Any,
) -> Iterator[Any]:
    """`base_gradients` for a few leaves at a time, with one backward pass a group.

    All dense gradients together are as large as the bases.  This way `lora_ga` holds
    those of `at_once` leaves only, at the cost of one pass and one compilation a group.

    Args:
      loss_fn: as for `base_gradients`.
      adapted: likewise.
      *args: likewise.
      target: likewise.
      at_once: how many leaves; `None` for all.
      **kwargs: as for `base_gradients`.

    Yields:
      Trees as for `base_gradients`, each with the gradients of its group.

    Raises:
      LoraError: as for `base_gradients`.
    """
    chosen, named, treedef = selected("base_gradients", adapted, target)
    plain = {path: base_of(leaf) for path, leaf in named}
    size = len(chosen) if at_once is None else at_once
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise LoraError(f"at_once={at_once!r}. Write a number of leaves, or None.")
    values = {p: x for p, x in plain.items() if is_array(x) or is_quantized(x)}

    def loss(group: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        marked = {p: Trained(x) for p, x in group.items()}  # all others are frozen
        tree = treedef.unflatten([{**plain, **rest, **marked}[p] for p in plain])
        value = lora(loss_fn)(tree, *args, **kwargs)
        if jnp.shape(value) != ():
            raise LoraTypeError(
                "base_gradients: loss_fn returned an array of shape "
                f"{jnp.shape(value)}; expected a scalar. Write .mean() or .sum()."
            )
        return value

    def each() -> Iterator[Any]:
        for i in range(0, len(chosen), size):
            group = {p: values[p] for p in list(chosen)[i : i + size]}
            rest = {p: x for p, x in values.items() if p not in group}
            places = {p: place_of(x) for p, x in group.items()}
            grad = jax.jit(jax.grad(loss), out_shardings=places)
            found = grad(group, rest, args, kwargs)
            yield treedef.unflatten([found.get(p) for p in plain])

    return each()


def to_plain(trained: Any, start: Any, original: Any) -> Any:
    """Plain LoRA on the original weights, from an adapter whose start changed the base.

    A' = [A A₀] and B' = [B ; −B₀] have rank 2·rank and the same scale, where A₀ and B₀
    are the factors that training started from: W + scale (A B − A₀ B₀).  This is exact
    in the factors' dtype, and undoes the rounding of W − scale A₀ B₀ to W's dtype.

    Args:
      trained: the adapted tree after training, or its adapter.
      start: what `pissa`, `olora` or `lora_ga` returned, or its adapter
        (`flora.split(start)[1]`, small enough to keep next to a checkpoint).
      original: the tree with the original weights, adapted or not.

    Returns:
      `trained` with the original bases and factors of twice the rank, for servers and
      files that know nothing of the start.  Where B₀ was zero, the added ranks have no
      effect.

    Raises:
      LoraError: the trees have other adapted leaves, ranks, scales or shapes; every
        such leaf is named.

    References: PEFT calls it `subtract_mutated_init`.
    """
    named, treedef = named_leaves(trained)
    starts, bases = (dict(named_leaves(tree)[0]) for tree in (start, original))
    nodes = {path: x for path, x in named if isinstance(x, LoraWeight)}
    if not nodes:
        raise LoraError(nothing_adapted("to_plain", named))
    fail(
        problem
        for path, w in nodes.items()
        for problem in plain_problems(path, w, starts.get(path), bases.get(path))
    )

    def one(path: str, leaf: Any) -> Any:
        if path not in nodes:
            return leaf
        first, base = starts[path], base_of(bases[path])
        twice = dataclasses.replace(
            leaf,
            base=base,
            start="",
            rank=2 * leaf.rank,
            alpha=alpha_at(leaf, 2 * leaf.rank),
        )
        axis = len(leaf.layout.stack)
        values = (leaf.a, first.a, leaf.b, first.b)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in values):
            a, b = jax.eval_shape(functools.partial(side_by_side, axis=axis), *values)
        else:
            places = place_of(leaf.a), place_of(leaf.b)
            a, b = compiled(side_by_side, places, ("axis",))(*values, axis=axis)
        return dataclasses.replace(twice, a=a, b=b)

    return treedef.unflatten([one(path, leaf) for path, leaf in named])


def _method_key(
    verb: str, method: str, niter: int, key: chex.PRNGKey | None
) -> chex.PRNGKey | None:
    """The root key of the randomized method; `None` for the exact one."""
    _require_choice("method", method, ("svd", "randomized"))
    if isinstance(niter, bool) or not isinstance(niter, int) or niter < 0:
        raise LoraError(
            f"niter={niter!r}. Write a number of power iterations, such as 4."
        )
    if method == "randomized":
        require_key(key, verb)
        return consumed(key)
    if key is not None:
        raise LoraError(
            f"{verb}: method='svd' is exact and takes no key. Write "
            "method='randomized', or leave the key out."
        )
    return None


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoraError(f"{name}={value!r}. Write one of {', '.join(choices)}.")
