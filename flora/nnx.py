"""LoRA inside any NNX trainer: an adapted module of the model's own class.

    model = flora.nnx.adapt(key, config, model, x)         # beside each W: A and B
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
    flora.save("adapter.safetensors", flora.nnx.tree(model))
    plain = flora.nnx.merge(model)

y = x W + scale (x A) B, as the model's own methods compute it.  `kernel` keeps its
place, type and array; `kernel_lora_a` and `kernel_lora_b` are `nnx.LoRAParam`s beside
it, and so is whatever else trains.  The model that was given is not changed, and shares
its arrays with the adapted one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from flora._nnx.calls import adapt_in_place, methods_of
from flora._nnx.carry import become
from flora._nnx.parts import DROPOUT, FrozenLoRA, copied, detached, is_adapted, raw
from flora._tree.checks import weight_problems
from flora._tree.config import LoraConfig, require_config
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.keys import consumed, path_salt, require_key
from flora._tree.nearest import Nearest
from flora._tree.weight import LoraWeight, base_of, is_node
from flora._verbs.init import init
from flora._verbs.merge import merge as merged

__all__ = ["FrozenLoRA", "adapt", "merge", "module", "tree", "update"]

M = TypeVar("M")
Methods = Sequence[str] | Mapping[str, Sequence[Any]]


def adapt(
    key: Any,
    config: LoraConfig,
    model: M,
    *args: Any,
    methods: Methods = ("__call__",),
    **kwargs: Any,
) -> M:
    """The adapted module: `model`'s class and arrays, with A and B beside each weight.

    The first of `methods` is traced with the arguments, abstractly, to find out how the
    weights are used (see `flora.init`).  Other methods of the model run through these,
    or through the submodules that they call, on base and factors as well.

    With `config.dropout`, the module has an `nnx.Dropout` at `lora_dropout`: its mode
    is that of `model.train()` and `model.eval()`, its keys are the module's own.

    Args:
      key: a PRNG key, consumed.
      config: what to adapt and how; paths are those of `nnx.state(model)`.
      model: an NNX module with its parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: of one call, arrays or `jax.ShapeDtypeStruct`s; modules such as `nnx.Rngs`
        are not changed.
      methods: names of the methods that the weights are used by.  For methods that do
        not share their arguments, or do not all use each weight, a dict of the
        arguments of each: `{"encode": (x,), "decode": (z,)}`.
      **kwargs: likewise.

    Returns:
      Another module.  `nnx.LoRAParam` is what trains: A, B, arrays of the variant, and
      the weights that `config.train` names; `FrozenLoRA` what of a variant does not.

    Raises:
      LoraError: the model is adapted already, or lacks a method; or what `flora.init`
        refuses, such as a config that selects nothing.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.nnx
      >>> from flax import nnx
      >>> linear, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.nnx.adapt(jax.random.key(0), config, linear, x)
      >>> isinstance(adapted, nnx.Linear), adapted.kernel_lora_a.shape
      (True, (4, 2))
      >>> bool((adapted(x) == linear(x)).all())
      True

    References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
    """
    require_key(key, "flora.nnx.adapt")
    config = require_config(config)
    _require_plain(model, "adapt")
    calls = _calls(model, methods, args, kwargs)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise LoraError(
            f"flora.nnx.adapt: {_name(model)} holds no nnx.Param, and no other "
            "variable is adapted. Make its weights nnx.Param, or a subclass."
        )

    def fn(params: Any, rest: Any, calls: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        return [getattr(model, n)(*args, **kwargs) for n, (args, kwargs) in calls]

    fn.__qualname__ = fn.__name__ = type(model).__name__
    adapted = init(key, config, fn, params, rest, calls)
    # The same key as init's on purpose: what is folded into it is no leaf's path.
    own = _cloned(key, params) if config.dropout else None
    return _module(model, adapted, own, tuple(methods))


def module(
    model: M,
    tree: Any,
    *,
    key: Any = None,
    methods: Sequence[str] = ("__call__",),
) -> M:
    """The adapted module of a plain one and an adapted tree, as `adapt` returns it.

    For adapters that come from elsewhere: `flora.load`, `flora.peft.load`,
    `flora.starts`, `flora.quantize`.

    Args:
      model: an NNX module, not adapted.
      tree: an adapted tree of `nnx.state(model)`, or of a part such as the parameters.
      key: a PRNG key for dropout, consumed; without one, training with a dropout rate
        is an error.
      methods: names of the methods that the weights are used by.

    Raises:
      LoraError: the model is adapted already, or lacks a method; or the tree is not
        adapted, or not one of this model, in leaves that are named.
    """
    _require_plain(model, "module")
    _calls(model, methods, (), {})
    if key is not None:
        require_key(key, "flora.nnx.module")
    return _module(model, tree, key, tuple(methods))


def tree(model: Any) -> Any:
    """The adapted tree of an adapted module: its state with `LoraWeight` nodes.

    What `flora.save`, `flora.merge`, `flora.summary`, `flora.peft.save`,
    `flora.monitor` and the others take; arrays are shared.  Its paths are those of the
    plain module's state.

    Raises:
      LoraError: the module is not adapted.
    """
    _require_adapted(model, "tree")
    return nnx.state(detached(model))


def update(model: Any, tree: Any) -> None:
    """Puts an adapted tree, or an adapter alone, into an adapted module, in place.

    Ranks, scales, bases and layouts become those of the tree.  An optimizer's state
    stays as it was; where shapes change, make another one.

    Args:
      model: an adapted module.
      tree: as `flora.nnx.tree` or `flora.split` returns it, or a part of it; leaves
        that are not there, or `None`, stay.

    Raises:
      LoraError: the module is not adapted, or the tree has leaves that the module does
        not have, or of another shape; then nothing is changed.
    """
    _require_adapted(model, "update")
    plain = detached(model)
    _fill(plain, tree, "update")
    if DROPOUT in vars(model):
        setattr(plain, DROPOUT, getattr(model, DROPOUT))
    become(model, adapt_in_place(plain, methods_of(model)))


def merge(model: M, *, allow_nonfinite: bool = False) -> M:
    """A plain module of the model's own class, W + scale A B in each weight's place.

    Args:
      model: an adapted module; it is not changed.
      allow_nonfinite: True to merge what a run that diverged left, see `flora.merge`.

    Raises:
      LoraError: the module is not adapted, or NaN or infinity comes out.
    """
    _require_adapted(model, "merge")
    graphdef, state = nnx.split(detached(model))
    return nnx.merge(graphdef, merged(state, allow_nonfinite=allow_nonfinite))


def _module(model: Any, tree: Any, key: Any, methods: tuple[str, ...]) -> Any:
    plain = copied(model)
    rate = _fill(plain, tree, "module")
    if rate and key is not None:
        if hasattr(plain, DROPOUT):
            raise LoraError(
                f"{_name(model)} has an attribute {DROPOUT!r} of its own, where the "
                "adapter's dropout belongs. Rename it, or leave dropout out."
            )
        setattr(plain, DROPOUT, _dropout(rate, key))
    return adapt_in_place(plain, methods)


def _cloned(key: Any, params: Any) -> Any:
    """The key, to be consumed once more; abstract where all parameters are."""
    leaves = jax.tree.leaves(params)
    if all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.eval_shape(jax.random.clone, key)
    return jax.random.clone(key)


def _dropout(rate: float, key: Any) -> nnx.Dropout:
    def made(key: Any) -> nnx.Dropout:
        own = jax.random.fold_in(consumed(key), path_salt(DROPOUT))
        return nnx.Dropout(rate, rngs=nnx.Rngs(dropout=own))

    abstract = isinstance(key, jax.ShapeDtypeStruct)
    return nnx.eval_shape(made, key) if abstract else made(key)


def _fill(plain: Any, tree: Any, verb: str) -> float:
    """Puts a tree's leaves into a plain module; returns the highest dropout rate."""
    have = dict(nnx.to_flat_state(nnx.state(plain)))
    flat = [(p, x) for p, x in _flat(tree, verb) if raw(x) is not None]
    fail(_problems(verb, plain, have, flat))
    nodes = [x for _, x in flat if is_node(raw(x))]
    if not nodes:
        raise LoraError(
            f"flora.nnx.{verb}: none of the tree's {len(flat)} leaves is adapted. Pass "
            "an adapted tree of the model's state, such as flora.load returns."
        )
    filled = []
    for path, x in flat:
        value = _with_base(raw(x), raw(have[path]))
        variable = isinstance(have[path], nnx.Variable)  # else an array by itself
        filled.append((path, have[path].replace(value) if variable else value))
    nnx.update(plain, nnx.from_flat_state(filled))
    return max(getattr(raw(x), "dropout", 0.0) for x in nodes)


def _flat(tree: Any, verb: str) -> list[tuple[Any, Any]]:
    if not isinstance(tree, Mapping | nnx.State):
        raise LoraTypeError(
            f"flora.nnx.{verb}: tree is a {type(tree).__name__}. Pass the adapted tree "
            "of a module's state, such as flora.nnx.tree returns."
        )
    state: Any = nnx.State(tree) if isinstance(tree, dict) else tree
    return list(nnx.to_flat_state(state))


def _with_base(value: Any, current: Any) -> Any:
    """The value; an adapter without its base has the one that is there."""
    if not isinstance(value, LoraWeight):
        return value
    if value.base is None:
        value = dataclasses.replace(value, base=base_of(current))
    return dataclasses.replace(value, key=None)


def _problems(verb: str, plain: Any, have: Any, flat: Any) -> Iterator[str]:
    near = Nearest(["/".join(map(str, path)) for path in have])
    for keys, x in flat:
        path, value = "/".join(map(str, keys)), raw(x)
        if keys not in have:
            yield (
                f"flora.nnx.{verb}: the tree has '{path}', and {_name(plain)} does not"
                f"{''.join(f'; closest: {n!r}' for n in near.to(path))}. Pass a tree "
                "of this model."
            )
            continue
        if isinstance(value, LoraWeight):
            value = _with_base(value, raw(have[keys]))
            yield from (f"flora.nnx.{verb}: {p}" for p in weight_problems(path, value))
        shapes = [getattr(v, "shape", None) for v in (value, raw(have[keys]))]
        if shapes[0] != shapes[1]:
            yield (
                f"flora.nnx.{verb}: '{path}' has shape {shapes[0]} in the tree and "
                f"{shapes[1]} in {_name(plain)}. Pass a tree of this model."
            )


def _calls(
    model: Any, methods: Methods, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The calls to trace: names with their arguments."""
    several = isinstance(methods, Sequence | Mapping) and not isinstance(methods, str)
    if not several or not methods:
        raise LoraTypeError(
            f"methods={methods!r}. Write the names of one or more methods, such as "
            "methods=('__call__',) or methods={'encode': (x,), 'decode': (z,)}."
        )
    fail(_method_problem(model, n) for n in methods if not _has_method(model, n))
    if not isinstance(methods, Mapping):
        return [(methods[0], (args, kwargs))]
    if args or kwargs:
        raise LoraTypeError(
            "methods is a dict of arguments, and there are arguments beside it. Write "
            "all of them in methods."
        )
    for name, given in methods.items():
        if not isinstance(given, tuple | list):
            raise LoraTypeError(
                f"methods[{name!r}] is a {type(given).__name__}. Write the tuple of "
                f"its arguments: methods={{{name!r}: (x,)}}."
            )
    return [(name, (tuple(given), {})) for name, given in methods.items()]


def _has_method(model: Any, name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in vars(model)
        and callable(getattr(model, name, None))  # bridges to Linen look theirs up
    )


def _method_problem(model: Any, name: Any) -> str:
    public = [n for n in dir(type(model)) if not n.startswith("_")]
    own = [n for n in ("__call__", *public) if n not in dir(nnx.Module)]
    own = [n for n in own if _has_method(model, n)]
    return (
        f"{_name(model)} has no method {name!r}; it has "
        f"{', '.join(map(repr, own)) or 'none'}. Write its methods in methods=(...,)."
    )


def _require_plain(model: Any, verb: str) -> None:
    if not isinstance(model, nnx.Pytree):
        raise LoraTypeError(
            f"flora.nnx.{verb}: the model is a {type(model).__name__}; expected an NNX "
            "module. For Linen see flora.linen, for a function flora.init."
        )
    if is_adapted(model):
        raise LoraError(
            f"flora.nnx.{verb}: {_name(model)} is adapted already. Pass the model that "
            "it was made of, or flora.nnx.merge(model)."
        )
    flat = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    fail(
        f"flora.nnx.{verb}: '{'/'.join(map(str, path))}' is an nnx.LoRAParam: the "
        "model has factors of another library's. Merge them, or build it without."
        for path, _ in flat[:1]
    )


def _require_adapted(model: Any, verb: str) -> None:
    if not isinstance(model, nnx.Pytree) or not is_adapted(model):
        raise LoraError(
            f"flora.nnx.{verb}: {_name(model)} is not an adapted module. Pass what "
            "flora.nnx.adapt returned."
        )


def _name(model: Any) -> str:
    return type(model).__name__
