"""What `flora.monitor.measure` measures: norms, ranks and overlaps of ΔW = scale A B.

All comes from products of rank × rank: ‖ΔW‖² = scale² tr(AᵀA · BBᵀ), and ΔW's singular
values are those of scale R_A R_Bᵀ, where A = Q_A R_A and Bᵀ = Q_B R_B.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._algebra.gram import columns, rows, whole
from flora._tree.arrays import compute_dtype, is_array
from flora._tree.checks import require_adapted
from flora._tree.errors import LoraError, fail
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight, on_parts, parts_of, product_of, scale_of


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures of one adapted leaf: arrays `[*stack]`, one value a matrix.

    ΔW is scale A B.  With a variant it is scale a b of the factors that the variant
    makes; its column factors (DoRA's magnitudes) are not part of it.

    Attributes:
      norm_a: ‖A‖_F; all norms here are Frobenius norms.
      norm_b: ‖B‖_F.
      norm_delta: ‖ΔW‖_F.
      grad_a: ‖g_A‖_F.
      grad_b: ‖g_B‖_F.
      grad_delta: ‖scale (A g_B + g_A B)‖_F, how far a step of plain SGD moves ΔW for
        each unit of learning rate, to first order.  (∂L/∂ΔW itself is never formed.)
      effective_rank: exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ of ΔW's singular values σ,
        between 1 and rank; 0 where ΔW = 0.
      stable_rank: ‖ΔW‖_F²/σ₁², between 1 and rank; 0 where ΔW = 0.
      relative: ‖ΔW‖_F/‖W‖_F.
      overlap_in: ‖Uᵀ ΔW‖_F²/‖ΔW‖_F², the share of ΔW's energy that lies in W's k
        leading singular directions on the side of its input; k/in by chance, 0 where
        ΔW = 0.
      overlap_out: ‖ΔW V‖_F²/‖ΔW‖_F², on the side of its output; k/out by chance.
    """

    norm_a: Any
    norm_b: Any
    norm_delta: Any
    grad_a: Any = None
    grad_b: Any = None
    grad_delta: Any = None
    effective_rank: Any = None
    stable_rank: Any = None
    relative: Any = None
    overlap_in: Any = None
    overlap_out: Any = None


NAMES = tuple(field.name for field in dataclasses.fields(Measures))


@dataclasses.dataclass(frozen=True)
class Report:
    """The measures of all adapted leaves; a pytree.

    Attributes:
      leaves: `{path: Measures}`.
    """

    leaves: dict[str, Measures]

    def floats(self) -> dict[str, float]:
        """`{'path/norm_a': value}` for a logger; 'path[2]/norm_a' in a stack."""
        host = jax.device_get(self)
        return {key: float(x) for key, x in _flat(host)}


def _flat(report: Report) -> Iterator[tuple[str, Any]]:
    for path, leaf in report.leaves.items():
        for name in NAMES:
            values = getattr(leaf, name)
            if values is not None:
                for at in np.ndindex(np.shape(values)):
                    index = f"[{','.join(map(str, at))}]" if at else ""
                    yield f"{path}{index}/{name}", values[at]


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The leading singular directions of a frozen weight.

    Attributes:
      norm: ‖W‖_F, `[*stack]`.
      in_: U, `[*stack, in, k]`, with in axes as one.
      out: V, `[*stack, out, k]`, likewise.
    """

    norm: Any
    in_: Any
    out: Any


for _cls in (Measures, Report, Subspace):
    jax.tree_util.register_dataclass(
        _cls, [field.name for field in dataclasses.fields(_cls)], []
    )


def measure(
    adapted: Any,
    grads: Any = None,
    *,
    reference: Mapping[str, Subspace] | None = None,
    spectrum: bool = True,
) -> Report:
    """Norms, ranks and overlaps of every adapted leaf, cheap enough for every step.

    Takes about 5 rank² (in + out) multiplications a leaf; the leaf's factors cost
    3 · tokens · rank (in + out) in the training step.  The QR decompositions are of
    thin matrices, the singular value decompositions of rank × rank ones, all leaves of
    one rank together; on some devices both run as loops.  Where that is too slow,
    measure every few steps only, or without `spectrum`.

    Args:
      adapted: the adapted tree, or the adapter alone.
      grads: gradients of either, as `flora.value_and_grad` returns them.  Updates
        work too: then `grad_delta` is how far the step moves ΔW.
      reference: what `flora.monitor.reference` returned, for `relative` and the
        overlaps.
      spectrum: whether to measure effective and stable rank.

    Returns:
      A `Report`; measures that were not asked for are `None`.  Norms of a ΔW that is a
      small difference of large products (a residual start) are within √ε ‖A‖ ‖B‖.

    Raises:
      LoraError: no leaf has factors; `grads` or `reference` lack a leaf; or a leaf with
        a variant has no base or no ΔW.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.monitor
      >>> a, b = jnp.ones((4, 1)), 2 * jnp.ones((1, 9))
      >>> adapter = {"q": flora.LoraWeight(None, a, b)}
      >>> report = jax.jit(flora.monitor.measure)(adapter)
      >>> {name: round(value, 3) for name, value in report.floats().items()}
      ... # doctest: +NORMALIZE_WHITESPACE
      {'q/norm_a': 2.0, 'q/norm_b': 6.0, 'q/norm_delta': 12.0, 'q/effective_rank': 1.0,
       'q/stable_rank': 1.0}

    References: Roy and Vetterli 2007 (effective rank), EUSIPCO, definition 2.
      Rudelson and Vershynin 2007 (stable rank). https://arxiv.org/abs/math/0503442
      Hu et al. 2021, section 7.3 (ΔW in W's directions).
      https://arxiv.org/abs/2106.09685
    """
    factors = factors_of(adapted, "measure")
    given = {} if grads is None else dict(named_leaves(grads)[0])
    fail(
        f"measure: {what} '{path}'. Pass {remedy} of the same tree."
        for path, x in factors.items()
        for what, remedy, missing in (
            (
                "grads has no factors for",
                "gradients",
                grads is not None and not _alike(x, given.get(path)),
            ),
            (
                "reference lacks",
                "the reference",
                reference is not None and path not in reference,
            ),
        )
        if missing
    )
    products = {path: _product(path, x) for path, x in factors.items()}
    leaves = {p: _norms(x, products[p], given.get(p)) for p, x in factors.items()}
    if reference is not None:
        leaves = {
            path: _compared(products[path], leaf, reference[path])
            for path, leaf in leaves.items()
        }
    if spectrum:
        ranks = _ranks(products)
        leaves = {p: dataclasses.replace(x, **ranks[p]) for p, x in leaves.items()}
    return Report(leaves)


def factors_of(tree: Any, verb: str) -> dict[str, LoraWeight]:
    """The nodes that have factors, in float32 or wider."""
    named = require_adapted(tree, verb)
    found = {p: x for p, x in named if isinstance(x, LoraWeight)}
    if not found:
        raise LoraError(
            f"{verb}: no leaf has factors; all that train do so whole. Name some in "
            "LoraConfig(target=...)."
        )
    fail(
        f"{verb}: '{path}' has no arrays for A and B. Pass the tree that flora.init "
        "returned, or its adapter."
        for path, x in found.items()
        if not _has_factors(x)
    )
    return {path: _wide(x) for path, x in found.items()}


def _has_factors(x: Any) -> bool:
    return isinstance(x, LoraWeight) and is_array(x.a) and is_array(x.b)


def _alike(x: LoraWeight, grad: Any) -> bool:
    return _has_factors(grad) and {*parts_of(grad)} == {*parts_of(x)}


def _wide(x: LoraWeight) -> LoraWeight:
    dtype = compute_dtype(*(part.dtype for part in parts_of(x).values()))
    return on_parts(lambda _, part: part.astype(dtype), x)


def _product(path: str, x: LoraWeight) -> LoraWeight:
    """Plain LoRA of the factors that a variant makes, its column factors aside."""
    if x.variant is None and not x.blocks:
        return x
    if x.variant is not None and x.base is None:
        raise LoraError(
            f"measure: '{path}' has the variant {x.variant!r}, which needs W to say "
            "what ΔW is. Pass the whole tree, flora.join(base, adapter)."
        )
    product = product_of(x)
    if product.between is not None:
        raise LoraError(
            f"measure: '{path}' has the variant {x.variant!r} with a function between "
            "A and B: there is no ΔW. Measure a tree without it."
        )
    return dataclasses.replace(x, a=product.a, b=product.b, variant=None, blocks=())


def _moved(x: LoraWeight, grad: LoraWeight) -> tuple[Any, Any]:
    """How the factors of ΔW change along a gradient, to first order."""
    if x.variant is None and not x.blocks:
        return grad.a, grad.b

    def factors(parts: dict[str, Any]) -> tuple[Any, Any]:
        made = product_of(on_parts(lambda name, _: parts[name], x))
        return made.a, made.b

    return jax.jvp(factors, (parts_of(x),), (parts_of(grad),))[1]


def _sum(x: Any) -> Any:
    return jnp.sum(x, (-2, -1))


def _root(square: Any) -> Any:
    return jnp.sqrt(jnp.maximum(square, 0))


def _trace(x: Any) -> Any:
    return jnp.trace(x, axis1=-2, axis2=-1)


def _norms(x: LoraWeight, product: LoraWeight, grad: Any) -> Measures:
    """The norms of a leaf's factors, of their product, and of their gradients.

    ‖A g_B + g_A B‖² = tr(AᵀA g_B g_Bᵀ) + tr(g_Aᵀ g_A B Bᵀ) + 2 tr((Aᵀ g_A)(B g_Bᵀ)).
    """
    n, a, b = len(x.layout.stack), product.a, product.b
    aa, bb = columns(a, a, n), rows(b, b, n)
    norms = Measures(
        norm_a=_root(_trace(columns(x.a, x.a, n))),
        norm_b=_root(_trace(rows(x.b, x.b, n))),
        norm_delta=scale_of(x) * _root(_sum(aa * bb)),
    )
    if grad is None:
        return norms
    grad = _wide(grad)
    da, db = _moved(x, grad)
    dada, dbdb = columns(da, da, n), rows(db, db, n)
    cross = _sum(columns(a, da, n) * rows(db, b, n))
    return dataclasses.replace(
        norms,
        grad_a=_root(_trace(columns(grad.a, grad.a, n))),
        grad_b=_root(_trace(rows(grad.b, grad.b, n))),
        grad_delta=scale_of(x) * _root(_sum(aa * dbdb) + _sum(dada * bb) + 2 * cross),
    )


def _matrices(x: LoraWeight) -> tuple[jax.Array, jax.Array]:
    """A `[*stack, in, rank]` and Bᵀ `[*stack, out, rank]`."""
    n = len(x.layout.stack)
    a, b = whole(x.a, n), whole(x.b, n)
    a = a.reshape(*a.shape[:n], -1, a.shape[-1])
    b = b.reshape(*b.shape[: n + 1], -1)
    return a, jnp.swapaxes(b, -1, -2)


def _compared(x: LoraWeight, leaf: Measures, w: Subspace) -> Measures:
    """The leaf's measures, with ΔW compared with W.

    ‖Uᵀ A B‖² = tr((Uᵀ A)ᵀ (Uᵀ A) · B Bᵀ).
    """
    n = len(x.layout.stack)
    (a, bt), high = _matrices(x), jax.lax.Precision.HIGHEST
    ua = jnp.einsum("...ik,...ir->...kr", w.in_, a, precision=high)
    vb = jnp.einsum("...ok,...or->...kr", w.out, bt, precision=high)
    aa, bb = columns(x.a, x.a, n), rows(x.b, x.b, n)
    energy = _sum(aa * bb)
    return dataclasses.replace(
        leaf,
        relative=ratio(leaf.norm_delta, w.norm),
        overlap_in=ratio(_sum(columns(ua, ua, n) * bb), energy),
        overlap_out=ratio(_sum(columns(vb, vb, n) * aa), energy),
    )


def ratio(x: Any, y: Any) -> Any:
    """x/y, and 0 where y is."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _ranks(factors: Mapping[str, LoraWeight]) -> dict[str, dict[str, Any]]:
    """Effective and stable rank of each leaf; one decomposition for all of a shape."""
    cores = {path: _core(x) for path, x in factors.items()}
    alike: dict[Any, list[str]] = {}
    for path, core in cores.items():
        alike.setdefault((core.shape[-2:], core.dtype), []).append(path)
    found = {}
    for (shape, _), paths in alike.items():
        flat = [cores[p].reshape(-1, *shape) for p in paths]
        values = jnp.linalg.svd(jnp.concatenate(flat), compute_uv=False)
        ends = np.cumsum([len(x) for x in flat])
        for p, sigma in zip(paths, jnp.split(values, ends[:-1]), strict=True):
            stack = cores[p].shape[:-2]
            ranks = effective_rank(sigma), stable_rank(sigma)
            names = ("effective_rank", "stable_rank")
            found[p] = {k: r.reshape(stack) for k, r in zip(names, ranks, strict=True)}
    return found


def _core(x: LoraWeight) -> jax.Array:
    """R_A R_Bᵀ, `[*stack, rank, rank]`: A B up to rotations and scale."""
    a, b = (jnp.linalg.qr(m, mode="r") for m in _matrices(x))
    return jnp.einsum("...ir,...or->...io", a, b, precision=jax.lax.Precision.HIGHEST)


def effective_rank(sigma: Any) -> jax.Array:
    """exp(-Σ p ln p) with p = σ/Σσ, of singular values `[..., n]`."""
    p = ratio(sigma, sigma.sum(-1, keepdims=True))
    entropy = -jnp.sum(jax.scipy.special.xlogy(p, p), -1)
    return jnp.where(sigma[..., 0] == 0, 0, jnp.exp(entropy))


def stable_rank(sigma: Any) -> jax.Array:
    """Σσ²/σ₁², of singular values `[..., n]` that fall."""
    return jnp.sum(ratio(sigma, sigma[..., :1]) ** 2, -1)
