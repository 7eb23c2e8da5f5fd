"""`lora(fn)`: the unmodified function, run on an adapted tree."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.axes import Factored, Squared, from_weight, undiscovered
from flora._algebra.dense import materialize
from flora._algebra.low_rank import densified
from flora._trace.interpret import interpret
from flora._trace.rules import context
from flora._trace.stage import stage
from flora._tree.arrays import is_array
from flora._tree.checks import weight_problems
from flora._tree.config import form_problems, is_fallback
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.notes import note_call
from flora._tree.paths import named_leaves
from flora._tree.quantized import abstract, is_quantized
from flora._tree.weight import (
    LoraWeight,
    Trained,
    is_leaf,
    is_node,
    on_parts,
    trained_parts,
)


def lora(
    fn: Callable, *, fallback: str | None = None, form: str | None = None
) -> Callable:
    """The function that runs `fn` on adapted trees, with `fn`'s own signature.

    y = x W + scale (x A) B wherever `fn` multiplies by an adapted weight W.  `fn` is
    traced to a jaxpr, and only the equations that read an adapted weight change.  On a
    tree with nothing adapted, `fn` itself is called.

    Leaves that are neither factors nor named in `LoraConfig.train` are frozen: their
    gradients are zero.  Call the result inside `jax.jit`; outside, each call traces
    anew.

    Without dropout keys (`flora.with_dropout`) a call is evaluation, and to
    differentiate one by the factors of a leaf that has a dropout rate is an error.

    Args:
      fn: any function of a parameter tree first: `model.apply`, an NNX state's merge
        and call, a loss.  Its other arguments can be anything.
      fallback: 'materialize' forms W + scale A B where an operation has no factored
        rule, 'error' refuses; by default what `LoraConfig.fallback` said.
      form: how products are computed, see `LoraConfig.form`; by default what that said.

    Returns:
      A function of `(tree, *args, **kwargs)` with the outputs of `fn`.  Where `fn`
      returns an adapted leaf as it came in (an NNX state, say), its node comes back.

    Raises:
      LoraError: an operation reads an adapted weight and has no factored rule, or the
        tree's factors do not fit its weights, or `fn` returns a changed weight; or,
        once it is differentiated, dropout is configured and no keys are attached.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> def fn(params, x):
      ...     return x @ params["kernel"]
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> bool((flora.lora(fn)(adapted, x) == fn(params, x)).all())
      True

    References: Hu et al. 2021, eq. 3. https://arxiv.org/abs/2106.09685
    """
    if not callable(fn):
        raise LoraTypeError(
            f"lora() got a {type(fn).__name__}; expected the function to run, such as "
            "model.apply."
        )
    if fallback is not None and not is_fallback(fallback):
        raise LoraError(f"fallback={fallback!r}. Write 'error' or 'materialize'.")
    if form is not None:
        fail(form_problems("form", form))

    @functools.wraps(fn)
    def run_on_adapted(tree: Any, *args: Any, **kwargs: Any) -> Any:
        named, treedef = named_leaves(tree)
        if not any(is_leaf(leaf) for _, leaf in named):
            try:
                return fn(tree, *args, **kwargs)
            except Exception as error:
                note_call(error, "flora.lora, on a plain tree,", fn, args, kwargs)
                raise
        fail(p for path, leaf in named for p in weight_problems(path, leaf))
        keyless = _keyless(named)
        values = [_value(path, leaf, fallback, form, keyless) for path, leaf in named]
        plain = [abstract(x.base) if isinstance(x, Factored) else x for x in values]
        staged = stage(fn, plain, treedef, args, kwargs, verb="flora.lora")
        inputs = [
            x for x, k in zip(values, staged.tree_inputs, strict=True) if k is not None
        ]
        outs = interpret(context(), staged.jaxpr, [*inputs, *staged.args])
        unchanged = {
            id(x): leaf
            for x, (_, leaf) in zip(values, named, strict=True)
            if is_node(leaf)
        }
        return staged.finish(
            [
                unchanged[id(x)] if id(x) in unchanged else _output(x, path)
                for x, path in zip(outs, staged.outputs, strict=True)
            ]
        )

    return run_on_adapted


def _keyless(named: list[tuple[str, Any]]) -> str:
    """What is wrong with training leaves that have a rate and no keys; '' if none."""
    rates = {
        path: leaf.dropout
        for path, leaf in named
        if isinstance(leaf, LoraWeight) and leaf.dropout and leaf.key is None
    }
    if not rates:
        return ""
    path, more = next(iter(rates)), len(rates) - 1
    return (
        f"'{path}'{f' and {more} more' if more else ''} trains without its dropout of "
        f"{rates[path]:g}: no keys are attached, and a call without is evaluation. "
        "Write flora.with_dropout(adapted, key) inside the loss, with another key each "
        "step, or flora.with_dropout(adapted, None) there to train without."
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiated(why: str, x: Any) -> Any:
    """The identity, which is not to be differentiated."""
    return x


@undifferentiated.defjvp
def _differentiated(why: str, primals: Any, tangents: Any) -> Any:
    raise LoraError(why)


def _value(
    path: str, leaf: Any, fallback: str | None, form: str | None, keyless: str = ""
) -> Any:
    """What enters the interpreter for a leaf.  All but factors and `Trained` freeze."""
    if isinstance(leaf, Trained):
        return leaf.value
    if isinstance(leaf, LoraWeight):
        trained = trained_parts(leaf)
        if keyless and leaf.dropout and leaf.key is None:
            trained = {
                name: undifferentiated(keyless, x) for name, x in trained.items()
            }
        leaf = on_parts(lambda name, x: trained.get(name, lax.stop_gradient(x)), leaf)
        leaf = dataclasses.replace(
            leaf,
            base=lax.stop_gradient(leaf.base),
            fallback=fallback or leaf.fallback,
            form=form or leaf.form,
        )
        return from_weight(leaf, path) if leaf.layout.in_ else materialize(leaf)
    if is_quantized(leaf):  # not adapted, but dequantized where it is used
        return undiscovered(lax.stop_gradient(leaf), path, fallback="materialize")
    if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact):
        return lax.stop_gradient(leaf)
    return leaf


def _output(x: Any, path: str) -> Any:
    if isinstance(x, Squared):
        return jnp.square(_output(x.root, path)).astype(x.value.dtype)
    if not isinstance(x, Factored):
        return x
    if x.indexed or x.reduced or x.settings.fallback == "materialize":
        return densified(x)
    raise LoraError(returned_raw(x.settings.path, path))


def returned_raw(path: str, output: str = "") -> str:
    """The message for a function that hands out what it made of an adapted weight."""
    where = f" as output {output}" if output else ""
    return (
        f"The function returns '{path}' changed{where}, and a changed weight has no "
        "factored form there. Return only what the call computes, call it on "
        'flora.merge(tree), or pass fallback="materialize".'
    )
