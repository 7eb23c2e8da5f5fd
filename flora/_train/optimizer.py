"""Training only the adapter: mask, optimizer, eval_params, value_and_grad."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora._train.apply import paired
from flora._train.wrappers import (
    BRANCHES,
    COPIES,
    refuse_functions,
    refuse_lookahead,
    require_outermost,
    widened,
)
from flora._tree.arrays import is_array, shown
from flora._tree.checks import require_adapted
from flora._tree.errors import LoraTypeError, fail
from flora._tree.notes import note_call
from flora._tree.paths import named_leaves
from flora._tree.weight import (
    LoraWeight,
    Trained,
    is_node,
    parts_of,
    trained_parts,
)
from flora._verbs.split import join, split

FROZEN = "frozen"


def mask(adapted: Any) -> Any:
    """True at the leaves that train (A, B, `extra` and `Trained`), False at all others.

    Args:
      adapted: an adapted tree, or gradients of one.

    Returns:
      A tree of bools of the same structure, for `optax.masked` and the like.
      `optax.masked` hands the gradients of other leaves on unchanged; `flora.lora`
      makes them zero, and `flora.optimizer` freezes them whatever they are.

    Raises:
      LoraError: the tree is not adapted.
    """
    require_adapted(adapted, "mask")
    return _labels(adapted, True, False)


def map_parts(fn: Callable[[str, str, Any], Any], tree: Any) -> Any:
    """The tree with `fn(path, part, x)` in the place of each array x.

    The one place that says which arrays train and as what.  `part` is 'a', 'b' or the
    name of an array in `extra`, 'train' for a leaf that trains whole, and 'frozen' for
    all else; `path` is the leaf's.

    Args:
      fn: what to put there.
      tree: an adapted tree, an adapter, gradients or updates of one, whole or masked.
    """
    named, treedef = named_leaves(tree)
    return treedef.unflatten([_mapped(fn, path, leaf) for path, leaf in named])


def _mapped(fn: Callable[[str, str, Any], Any], path: str, leaf: Any) -> Any:
    if not isinstance(leaf, LoraWeight):
        part = "train" if isinstance(leaf, Trained) else FROZEN
        return jax.tree.map(lambda x: fn(path, part, x), leaf)
    trained = trained_parts(leaf)

    def one(keys: Any, x: Any) -> Any:
        field = keys[0].name
        part = keys[1].key if field == "extra" else field
        here = field in ("a", "b", "extra") and part in trained
        return fn(path, part if here else FROZEN, x)

    return jax.tree_util.tree_map_with_path(one, leaf)


def _labels(tree: Any, train: Any, freeze: Any) -> Any:
    return map_parts(lambda _, part, x: freeze if part == FROZEN else train, tree)


def optimizer(
    tx: optax.GradientTransformation, adapted: Any
) -> optax.GradientTransformationExtraArgs:
    """`tx` on A, B and `Trained` leaves; all other leaves stay bit for bit.

    It stands outermost: wrappers (`optax.MultiSteps`, `schedule_free`, `partition`) and
    the links of a chain go into `tx`.  Around it, and after it in a chain, they would
    keep copies of the base, and are refused, unless all is given the adapter alone.

    Leaves whose dtype has a narrower range than float32 (float16, float8) are float32
    inside `tx`, and so are their moments: in float16 Adam's eps of 1e-8 is zero, and
    its first step NaN.  Their updates have their own dtype again.

    Args:
      tx: any optax transformation, weight decay and all.
      adapted: the adapted tree, or the adapter alone.

    Returns:
      A transformation for the whole tree.  `update` takes gradients of the tree, or of
      the adapter alone as `value_and_grad` returns them, together with the tree; `tx`
      sees what trains, and no more.  There is no state for frozen leaves.  Apply the
      updates with `apply_updates`, which leaves out all that is frozen.  (Those of
      frozen leaves are -0.0, which `optax.apply_updates` adds without changing a bit:
      an array where there was a gradient, a scalar where there was none, so that no
      memory of the base's size is taken.  It fails on PRNG keys, and outside of jit
      XLA's additions flush subnormal numbers to zero.)

    Raises:
      LoraError: the tree is not adapted; at `init` or `update`, a transformation of
        optax's around it keeps copies of the whole tree, or `tx` is `optax.lookahead`;
        at `update`, gradients and parameters have other structures, a leaf that trains
        has no gradient, or an extra argument is a function of parameters.
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise LoraTypeError(
            f"optimizer: tx is a {type(tx).__name__}; expected an optax "
            "transformation, such as optax.adamw(1e-4)."
        )
    require_adapted(adapted, "optimizer")
    inner = optax.multi_transform(
        {"train": widened(tx), "freeze": freeze()},
        lambda tree: _labels(tree, "train", "freeze"),
    )

    def init(params: Any) -> Any:
        if jax.tree.leaves(params):  # optax.tree_map_params passes none
            require_adapted(params, "optimizer")
        if _has_base(params):
            require_outermost(COPIES)
        state = inner.init(params)
        refuse_lookahead(state)
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        refuse_functions(extra)
        grads = updates if params is None else _aligned(updates, params)
        alone = params is not None and not _has_base(updates) and _has_base(params)
        require_outermost(BRANCHES if alone else ())
        shown = None if params is None else _trained_alone(params)
        new, state = inner.update(_trained_alone(grads), state, shown, **extra)
        like = grads if params is None else params
        return jax.tree.map(_update_of, like, grads, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _has_base(tree: Any) -> bool:
    """Whether a tree holds frozen arrays, or gradients of them."""
    leaves = (
        x.base if isinstance(x, LoraWeight) else x for _, x in named_leaves(tree)[0]
    )
    return any(not isinstance(x, Trained) and jax.tree.leaves(x) for x in leaves)


def _aligned(grads: Any, params: Any) -> Any:
    """The gradients in the structure of `params`, holes where a leaf has none."""
    pairs, treedef = paired(params, grads, "optimizer: gradients and parameters")
    fail(
        f"optimizer: '{path}' trains, and {shown(g)} is given as its gradient. "
        "Pass the gradients of the adapted tree, or of its adapter."
        for path, p, g in pairs
        if is_node(p) and type(g) is not type(p)
    )
    return treedef.unflatten([_aligned_leaf(p, g) for _, p, g in pairs])


def _aligned_leaf(p: Any, g: Any) -> Any:
    if not isinstance(p, LoraWeight):
        return _or_holes(g, p)
    base, key = _or_holes(g.base, p.base), _or_holes(g.key, p.key)
    return dataclasses.replace(p, base=base, a=g.a, b=g.b, key=key, extra=g.extra)


def _or_holes(g: Any, p: Any) -> Any:
    """The gradient, or a hole for each array of p."""
    return jax.tree.map(lambda _: optax.MaskedNode(), p) if g is None else g


def _trained_alone(tree: Any) -> Any:
    """The tree with holes, which optax passes over, in the place of what is frozen."""
    return map_parts(
        lambda _, part, x: optax.MaskedNode() if part == FROZEN else x, tree
    )


def _update_of(p: Any, g: Any, new: Any) -> Any:
    """What moves p: nothing where it was hidden from the transformation."""
    if not isinstance(new, optax.MaskedNode):
        return new
    if not isinstance(g, optax.MaskedNode):
        return _no_change(g.shape, g.dtype)
    numbers = is_array(p) or isinstance(p, int | float | complex)
    return _no_change((), jnp.result_type(p)) if numbers else None


def freeze() -> optax.GradientTransformation:
    """Updates of -0.0: p + -0.0 is p bit for bit, -0.0 included; p + 0.0 is not."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: _no_change(g.shape, g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _no_change(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.full(shape, -0.0, dtype)
    # Gradients of integers have no dtype of numbers, and PRNG keys no zero.
    number = jnp.issubdtype(dtype, jnp.number) or dtype == jnp.bool_
    return jnp.zeros(shape, dtype if number else jnp.int8)


def eval_params(fn: Callable[[Any, Any], Any], state: Any, adapted: Any) -> Any:
    """The tree with `fn(state, params)` in the place of what trains.

    For what averages parameters inside `optimizer`, such as `schedule_free`, whose
    `schedule_free_eval_params` is a function of its own state and parameters.

    Args:
      fn: takes the state of the `tx` that `optimizer` was given, and parameters of
        which it sees what trains alone; returns others.
      state: what `init` or `update` of `optimizer(tx, ...)` returned.
      adapted: the tree that was trained.

    Returns:
      The tree to evaluate, merge or save; frozen leaves are the very same objects.

    Raises:
      LoraError: the tree is not adapted, or the state is not one of `optimizer`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.optim
      >>> fn = lambda p, x: jnp.sum(x @ p["kernel"])
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> tx = flora.optimizer(optax.contrib.schedule_free_sgd(0.1), adapted)
      >>> loss, grads = flora.value_and_grad(flora.lora(fn))(adapted, x)
      >>> updates, state = tx.update(grads, tx.init(adapted), adapted)
      >>> adapted = flora.apply_updates(adapted, updates)
      >>> averaged = flora.optim.eval_params(
      ...     optax.contrib.schedule_free_eval_params, state, adapted)
    """
    require_adapted(adapted, "eval_params")
    if not isinstance(state, optax.PartitionState) or "train" not in state.inner_states:
        raise LoraTypeError(
            f"eval_params: state is a {type(state).__name__}; expected what update of "
            "flora.optimizer(tx, adapted) returned. On the adapter alone, call fn "
            "itself and write flora.join(base, fn(state, adapter))."
        )
    masked: Any = state.inner_states["train"]
    new = fn(masked.inner_state, _trained_alone(adapted))
    return jax.tree.map(
        lambda p, x: p if isinstance(x, optax.MaskedNode) else x, adapted, new
    )


def value_and_grad(fn: Callable, *, has_aux: bool = False) -> Callable:
    """Differentiates a function of an adapted tree by the adapter alone.

    The base is no input of the differentiation, so it can be of integers and the tree
    can hold dropout keys.

    Args:
      fn: `fn(adapted, *args, **kwargs)`, a scalar loss, or `(loss, aux)`.
      has_aux: whether `fn` returns `(loss, aux)`.

    Returns:
      A function of the same arguments that returns `(value, gradients)`; the gradients
      have the structure of `flora.split(adapted)[1]`.

    Raises:
      LoraError: the tree is not adapted.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> fn = flora.lora(lambda p, x: jnp.sum(x @ p["kernel"]))
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> loss, grads = flora.value_and_grad(fn)(adapted, x)
      >>> grads["kernel"].base is None, bool((grads["kernel"].a == 0).all())
      (True, True)
    """
    if not callable(fn):
        raise LoraTypeError(
            f"value_and_grad: fn is a {type(fn).__name__}; expected a function of an "
            "adapted tree that returns a loss."
        )

    def differentiated(adapted: Any, *args: Any, **kwargs: Any) -> Any:
        base, adapter = split(adapted)
        fail(
            p
            for path, leaf in named_leaves(adapter)[0]
            for p in _untrainable(path, leaf)
        )

        def loss(adapter: Any) -> Any:
            tree = _same_keys(join(base, adapter), adapted)
            try:
                out = fn(tree, *args, **kwargs)
            except Exception as error:
                note_call(error, "flora.value_and_grad", fn, args, kwargs)
                raise
            _require_scalar(out, has_aux)
            return out

        return jax.value_and_grad(loss, has_aux=has_aux)(adapter)

    return differentiated


def _untrainable(path: str, leaf: Any) -> list[str]:
    """What keeps a leaf of an adapter from being differentiated."""
    values = [leaf.value] if isinstance(leaf, Trained) else [*parts_of(leaf).values()]
    floating = [is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact) for x in values]
    if all(floating):
        return []
    return [
        f"'{path}' is to train and holds {values[floating.index(False)]!r}; expected "
        "floating arrays. Pass the tree that flora.init or flora.join returned."
    ]


def _require_scalar(out: Any, has_aux: bool) -> None:
    """Raises unless a loss function gave what can be differentiated."""
    pair = isinstance(out, tuple | list) and len(out) == 2
    value = out[0] if has_aux and pair else out
    number = is_array(value) or isinstance(value, float)
    if (has_aux and not pair) or not number or np.shape(value) != ():
        kind = jax.typeof(value) if number else f"a {type(out).__name__}"
        wanted = "(loss, aux) with a scalar loss" if has_aux else "a scalar loss"
        raise LoraTypeError(
            f"value_and_grad: fn returned {kind}; expected {wanted}. Write .mean() or "
            ".sum(), or has_aux=True for (loss, aux)."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise LoraTypeError(
            f"value_and_grad: fn returned a loss of {jnp.result_type(value)}; "
            "expected a real floating one."
        )


def _same_keys(joined: Any, adapted: Any) -> Any:
    def attach(x: Any, old: Any) -> Any:
        return dataclasses.replace(x, key=old.key) if isinstance(x, LoraWeight) else x

    return jax.tree.map(attach, joined, adapted, is_leaf=is_node)
