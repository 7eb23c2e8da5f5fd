"""`extract`: an adapter from a full fine-tune."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._multi.combine import Combined, variant_problems
from flora._multi.lowrank import (
    compressed,
    flat_factors,
    multiplied,
    share,
    size,
)
from flora._tree.arrays import compute_dtype, is_array
from flora._tree.checks import blocks_problem, require_adapted
from flora._tree.errors import LoraError, fail
from flora._tree.finite import require_finite
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.matrices import matrices
from flora._tree.paths import (
    Pattern,
    check_pattern,
    exactly,
    matches,
    named_leaves,
)
from flora._tree.quantized import dequantized
from flora._tree.selection import idle_entries
from flora._tree.weight import LoraWeight, Trained, base_of, is_node

Named = Sequence[tuple[str, Any]]


def extract(
    adapted: Any,
    finetuned: Any,
    *,
    svd: str = "exact",
    key: Any = None,
    ignore: Pattern = (),
) -> Combined:
    """The adapter that comes nearest to a fully fine-tuned model.

    scale A B is the best of its rank for W' - W in each leaf (Eckart and Young 1936).
    Dense, one leaf at a time, in float32 or wider.

    Args:
      adapted: the pretrained tree as `flora.init` adapts it, which says which leaves
        get factors, with which layout and rank.  Leaves of `train=` take W' as it is.
      finetuned: the plain tree of the trained model.
      svd: 'exact', or 'randomized' for large leaves whose change is nearly of low rank.
      key: a typed PRNG key for 'randomized', consumed.
      ignore: a pattern (see `LoraConfig`) of frozen leaves that may have changed; their
        changes are lost.

    Returns:
      A `Combined`: the adapter, and for each leaf the share of its change that is
      missing, by norm; 1 for ignored leaves that changed.

    Raises:
      LoraError: the trees differ in leaves or shapes, a frozen leaf has changed, or one
        of the others holds NaN or infinity; all such leaves are named.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.multi
      >>> params, x = {"w": jnp.eye(3)}, jnp.ones((1, 3))
      >>> fn, config = lambda p, x: x @ p["w"], flora.LoraConfig(rank=1, target="*")
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> found = flora.multi.extract(adapted, {"w": jnp.eye(3) + jnp.ones((3, 3))})
      >>> found.errors["w"] < 1e-6
      True
    """
    named, treedef = named_leaves(adapted)
    require_adapted(adapted, "extract")
    if svd not in ("exact", "randomized"):
        raise LoraError(f"extract: svd={svd!r}. Write 'exact' or 'randomized'.")
    if svd == "randomized":
        require_key(key, "extract")
        key = consumed(key)
    elif key is not None:
        raise LoraError("extract: svd='exact' draws nothing. Leave out key=.")
    check_pattern("ignore", ignore)
    frozen = [(p, x) for p, x in named if not is_node(x)]
    fail(
        f"extract: {problem} It must match a frozen leaf."
        for problem in idle_entries("ignore", ignore, frozen)
    )
    new = [x for _, x in _fitting(named, named_leaves(finetuned)[0])]
    triples = [(path, x, y) for (path, x), y in zip(named, new, strict=True)]
    fail(p for path, x, _ in triples for p in variant_problems("extract", path, x))
    fail(p for path, x, _ in triples for p in blocks_problem("extract", path, x))
    fail(p for path, x, y in triples for p in _lost(path, x, y, ignore))
    changed = {path: y for path, x, y in triples if is_node(x)}
    bases = {path: x.value for path, x, _ in triples if isinstance(x, Trained)}
    remedy = "Pass a model that did not diverge."
    require_finite("extract", changed, before=bases, remedy=remedy)
    errors: dict[str, float] = {}
    made = []
    for path, x, y in triples:
        if isinstance(x, LoraWeight):
            salted = None if key is None else jax.random.fold_in(key, path_salt(path))
            x, errors[path] = _extracted(x, y, salted)
            made.append(x)
        elif isinstance(x, Trained):
            made.append(Trained(jnp.asarray(y, x.value.dtype)))
        else:
            if _changed(x, y):
                errors[path] = 1.0
            made.append(None)
    return Combined(treedef.unflatten(made), errors)


def _fitting(old: Named, new: Named) -> Named:
    """The leaves of the trained model, checked to be those of the other."""
    ours, theirs = [path for path, _ in old], [path for path, _ in new]
    if ours != theirs:
        odd = sorted({*ours} ^ {*theirs})
        raise LoraError(
            f"extract: the trees have other leaves: {odd[:5] or 'in another order'}. "
            "Pass the plain tree of the same model as finetuned."
        )
    fail(
        f"extract: '{path}' has shape {np.shape(base_of(x))} in adapted and "
        f"{np.shape(y)} in finetuned. Pass the same model, trained."
        for (path, x), (_, y) in zip(old, new, strict=True)
        if np.shape(base_of(x)) != np.shape(y)
    )
    return new


def _changed(x: Any, y: Any) -> bool:
    if is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return False
    return not bool(jnp.array_equal(dequantized(x), dequantized(y)))


def _lost(path: str, x: Any, y: Any, ignore: Pattern) -> list[str]:
    if isinstance(x, LoraWeight | Trained) or matches(ignore, path, x):
        return []
    if not _changed(x, y):
        return []
    return [
        f"extract: '{path}' is frozen in adapted and has changed in finetuned. Name it "
        "in target= or train= of LoraConfig, or write "
        f"ignore={exactly(path)!r} to lose the change."
    ]


def _extracted(x: LoraWeight, y: Any, key: Any) -> tuple[LoraWeight, float]:
    """The node that comes nearest to W' = y, and its error."""
    dtype = compute_dtype(x.a.dtype, x.b.dtype, x.base.dtype, y.dtype)
    change = dequantized(y).astype(dtype) - dequantized(x.base).astype(dtype)
    w = matrices(jnp.asarray(change), x.layout)
    (a, b), _ = compressed(w, x.rank, key)
    root = math.sqrt(x.scale)
    a = (a / root).reshape(x.a.shape).astype(x.a.dtype)
    b = (b / root).reshape(x.b.shape).astype(x.b.dtype)
    found = dataclasses.replace(x, base=None, key=None, a=a, b=b)
    error = share(size(w - x.scale * multiplied(*flat_factors(found))), size(w))
    return found, error
