"""Optax transformations in `optimizer` and around it: what fits, what is refused."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, fail
from flora._tree.weight import LoraWeight, is_node

# What of optax cannot stand around `optimizer` on a whole tree: these keep copies of
# it, or hold a mask of all leaves against gradients of the adapter alone;
COPIES = ("MultiSteps", "flatten", "lookahead", "masked", "mechanize", "partition",
          "sam", "schedule_free", "split_real_and_imaginary")  # fmt: skip
# and these branch between updates of all leaves and gradients as they came in.
BRANCHES = ("apply_if_finite", "conditionally_mask", "conditionally_transform")


def require_outermost(names: tuple[str, ...]) -> None:
    """Raises where one of these functions of optax is calling, or one with a base.

    A transformation is not told what stands around it; the stack alone knows.
    """
    frame, around = inspect.currentframe(), ""
    while frame is not None:
        name = frame.f_code.co_qualname.partition(".")[0]
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "optax" and (
            name in names or _holds_base(frame.f_locals.get("state"))
        ):
            around = name
        frame = frame.f_back
    if around:
        raise LoraError(
            f"optimizer: optax's {around} is around flora.optimizer and works on the "
            "whole tree, base and all. Write flora.optimizer outermost, "
            f"flora.optimizer({around}(...), adapted), or give all of it the adapter "
            "alone: base, adapter = flora.split(adapted)."
        )


def _holds_base(state: Any) -> bool:
    """Whether an optimizer's state has arrays for a base, such as an EMA of it."""
    return any(
        isinstance(x, LoraWeight) and any(map(np.ndim, jax.tree.leaves(x.base)))
        for x in jax.tree.leaves(state, is_leaf=is_node)
    )


def refuse_lookahead(state: Any) -> None:
    """Raises where `optax.lookahead` is inside: its parameters are two trees."""

    def found(x: Any) -> bool:
        return isinstance(x, optax.LookaheadState)

    if any(map(found, jax.tree.leaves(state, is_leaf=found))):
        raise LoraError(
            "optimizer: optax.lookahead takes two copies of the parameters, and the "
            "tree is one. Take its steps on the adapter: base, adapter = "
            "flora.split(adapted), params = optax.LookaheadParams.init_synced(adapter),"
            " and at the end flora.join(base, params.slow)."
        )


def refuse_functions(extra: Mapping[str, Any]) -> None:
    """Raises for extra arguments of `update` that are functions of parameters."""
    fail(
        f"optimizer: {name}= is a function of parameters, and tx would call it on a "
        "tree without its base. Take the steps on the adapter: base, adapter = "
        f"flora.split(adapted), and {name}= of a function of flora.join(base, adapter)."
        for name, x in extra.items()
        if callable(x)
    )


def widened(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`tx` in float32 for arrays whose dtype has a narrower range than float32.

    Adam's eps of 1e-8 is zero in float16, and m/(√v + 0) is NaN where v is zero too.
    Updates have the dtype of their gradients again.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        shown = None if params is None else jax.tree.map(_wide, params)
        new, state = tx.update(jax.tree.map(_wide, updates), state, shown, **extra)
        return jax.tree.map(_like, updates, new), state

    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(jax.tree.map(_wide, params)), update
    )


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_narrow(x) else x


def _like(old: Any, new: Any) -> Any:
    return new.astype(old.dtype) if _is_narrow(old) else new


def _is_narrow(x: Any) -> bool:
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    return jnp.finfo(x.dtype).minexp > jnp.finfo(jnp.float32).minexp
