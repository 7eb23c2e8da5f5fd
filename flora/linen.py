"""LoRA inside any Linen trainer: a module whose factors are ordinary parameters.

    model = flora.linen.LoRA(model=Net(), config=config)
    variables = flora.linen.adapt(key, model, variables, x)  # or model.init(key, x)
    y = model.apply(variables, x)
    tx = flora.linen.optimizer(optax.adamw(1e-4))
    flora.save("adapter.safetensors", flora.linen.tree(model, variables))

y = x W + scale (x A) B, as the model's own methods compute it.  The base's parameters
are where the model has them; whatever trains is below `params/lora`, at the weight's
path: `a`, `b` and a variant's arrays, or `delta` for a leaf that trains whole.  All
else has a gradient of zero.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax

from flora._linen import plans
from flora._linen.attributes import attribute
from flora._linen.calls import run, whole_init
from flora._linen.parts import (
    FROZEN,
    LORA,
    differences,
    filled,
    joined,
    parted,
    require_factors,
    settings_of,
)
from flora._tree.checks import require_adapted
from flora._tree.config import LoraConfig, require_config
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.keys import require_key
from flora._tree.paths import path_of
from flora._tree.weight import base_of, is_node

__all__ = ["LoRA", "adapt", "labels", "optimizer", "tree", "variables"]


class LoRA(nn.Module):
    """A Linen module that runs another one with low-rank factors beside its weights.

    Its parameters are those of `model`, and `lora` beside them.  Its other methods are
    those of `model`, on base and factors as well; so are its attributes, except for
    `model` and `config`.

    With `config.dropout`, the inputs of A are dropped wherever there is an rng named
    'dropout'.  Where nn.Dropout's flag says that a call is deterministic, give none.

    `model.init` makes base and factors; a checkpoint may bring another base later.  An
    array that a variant makes of the base's values, DoRA's magnitude, is kept as what
    training adds to that: `magnitude_delta`.

    Attributes:
      model: any Linen module.
      config: what to adapt and how; paths are those of `model`'s parameters.

    Raises:
      LoraError: at init what `flora.init` refuses, such as a config that selects
        nothing; at a call parameters without `lora`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, flora, flora.linen
      >>> config = flora.LoraConfig(rank=2)
      >>> model = flora.linen.LoRA(model=nn.Dense(3), config=config)
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> jax.tree.map(jnp.shape, variables["params"]["lora"])
      {'kernel': {'a': (4, 2), 'b': (2, 3)}}

    References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
    """

    _: dataclasses.KW_ONLY
    model: nn.Module
    config: LoraConfig

    def __post_init__(self) -> None:
        _require_linen(self.model)
        require_config(self.config)
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on base and factors."""
        return run(self, ("__call__",), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model; a method runs on base and factors."""
        return attribute(self, name)

    @nn.nowrap
    def apply(
        self, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """As `nn.Module.apply`; `method` may be one of the model's class, too."""
        method = _method(self, method)
        return super().apply(variables, *args, method=method, **kwargs)

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """As `nn.Module.init_with_output`; `method` as for `apply`."""
        method = whole_init(_method(self, method) or type(self).__call__)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def sow(self, col: str, name: str, *args: Any, **kwargs: Any) -> bool:
        """As `nn.Module.sow`; what a call returns is captured as the model's alone."""
        if col == "intermediates" and name in ("__call__", "call"):
            return False
        return super().sow(col, name, *args, **kwargs)

    @nn.nowrap
    def __kontext_keys__(self) -> dict[str, Any]:
        """The keys that the model asks of Kauldron."""
        from kauldron import kontext  # type: ignore[import-not-found]

        return kontext.get_keypaths(self.model)


def _require_linen(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise LoraTypeError(
            f"flora.linen.LoRA: model is a {type(model).__name__}; expected a Linen "
            "module. For NNX see flora.nnx, for a function flora.init."
        )
    if isinstance(model, LoRA):
        raise LoraError(
            "flora.linen.LoRA: the model is a flora.linen.LoRA already. Adapt the "
            "module within it: model.model."
        )


def _method(module: LoRA, method: Any) -> Any:
    """A method that runs on base and factors, where it is one of the model's."""
    if isinstance(method, types.MethodType) and isinstance(method.__self__, nn.Module):
        method = method.__func__
    name = method if isinstance(method, str) else getattr(method, "__name__", None)
    own = getattr(type(module.model), name, None) if isinstance(name, str) else None
    if isinstance(method, str) and not callable(own):
        raise LoraError(_unknown(module, method))
    if own is None or (method is not own and not isinstance(method, str)):
        return method
    path = (name,)

    def on_both(module: Any, *args: Any, **kwargs: Any) -> Any:
        return run(module, path, args, kwargs)

    return on_both


def _unknown(module: LoRA, method: str) -> str:
    cls = type(module.model)
    own = [
        n
        for n, x in inspect.getmembers(cls, callable)
        if n == "__call__" or not (n.startswith("_") or hasattr(nn.Module, n))
    ]
    names = ", ".join(map(repr, sorted(own))) or "none"
    return (
        f"{cls.__name__} has no method {method!r}; it has {names}. Write one of these."
    )


def adapt(key: Any, model: LoRA, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """The variables of a pretrained model with factors, for `model.apply`.

    Args:
      key: a PRNG key, consumed.
      model: a `LoRA` module.
      variables: those of `model.model`, such as `{"params": pretrained}`; arrays or
        `jax.ShapeDtypeStruct`s.
      *args: the arguments of one call, with `method=`, `rngs=` and `mutable=` as
        `model.apply` takes them.
      **kwargs: likewise.

    Returns:
      The variables with `lora` among their parameters; the others are shared.

    Raises:
      LoraError: what `flora.init` refuses; or the variables have factors already.
    """
    require_key(key, "flora.linen.adapt")
    _require_lora(model, "adapt")
    base, other = parted(_variables(variables, "adapt"))
    if LORA in variables["params"]:
        raise LoraError(
            "flora.linen.adapt: the variables have 'params/lora' already. Take it out "
            "to start anew; if it is the model's own, rename it."
        )
    fn = _call(model, other, args, kwargs)
    return joined(base, other, plans.adapted(key, model.model, model.config, fn, base))


def tree(model: LoRA, variables: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The adapted tree of an adapted model's variables, with `LoraWeight` nodes.

    What `flora.save`, `flora.merge`, `flora.summary`, `flora.peft.save`,
    `flora.monitor` and the others take; arrays are shared.  Its paths are those of
    `model.model`'s variables.

    Args:
      model: a `LoRA` module.
      variables: those of `model.init` or `adapt`, trained or not.
      *args: of one call, as for `adapt`; needed only if no such model has run in this
        process, since the layouts are not known then.
      **kwargs: likewise.

    Raises:
      LoraError: the variables have no factors, others than the config asks for, or the
        layouts are not known.
    """
    _require_lora(model, "tree")
    base, other = parted(_variables(variables, "tree"))
    trained = require_factors(variables["params"], "flora.linen.tree")
    plan = _plan(model, "tree", base, other, args, kwargs)
    frozen = variables.get(LORA, {}).get(FROZEN, {})
    return {**other, "params": filled(base, plan, trained, frozen)}


def variables(model: LoRA, tree: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The variables of an adapted tree, for `model.apply`: the inverse of `tree`.

    For adapters that come from elsewhere: `flora.load`, `flora.peft.load`,
    `flora.starts`.  A leaf that trains whole becomes the base's, with a delta of zero.
    Variables do not tell that a start such as PiSSA's changed the base: give
    `flora.peft.save` the old one as `base=`.

    Args:
      model: a `LoRA` module.
      tree: an adapted tree of `model.model`'s variables.
      *args: of one call, as for `tree`.
      **kwargs: likewise.

    Raises:
      LoraError: the tree is adapted in another way than the module's config says, in
        leaves that are named; or the layouts are not known.
    """
    _require_lora(model, "variables")
    given = _variables(tree, "variables")
    require_adapted(given["params"], "flora.linen.variables")
    other = {k: x for k, x in given.items() if k != "params"}
    base = jax.tree.map(base_of, given["params"], is_leaf=is_node)
    wants = _plan(model, "variables", base, other, args, kwargs)
    fail(differences(settings_of(given["params"]), wants))
    return joined(base, other, given["params"])


def labels(params: Any) -> Any:
    """'lora' for each parameter below `lora`, 'frozen' for the others."""

    def label(keys: Any, _: Any) -> str:
        return LORA if LORA in path_of(keys).split("/") else FROZEN

    return jax.tree_util.tree_map_with_path(label, params)


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for what is below `lora` in the parameters; all else stays, without a state.

    Args:
      tx: any optimizer of optax.
    """
    return optax.multi_transform({LORA: tx, FROZEN: optax.set_to_zero()}, labels)


def _call(model: LoRA, other: Any, args: Any, kwargs: Any) -> Callable[[Any], Any]:
    """One call of the model within, as a function of its parameters."""
    inner: Any = model.model.clone(parent=None, name=None)

    def fn(params: Any) -> Any:
        return inner.apply({"params": params, **other}, *args, **kwargs)

    fn.__qualname__ = fn.__name__ = type(inner).__name__
    return fn


def _plan(model: LoRA, verb: str, base: Any, other: Any, args: Any, kwargs: Any) -> Any:
    found = plans.known(model.model, model.config, base)
    if found is not None:
        return found
    if not args and not kwargs:
        raise LoraError(
            f"flora.linen.{verb}: this module has not run in this process, and its "
            "layouts are not known. Pass the arguments of a call: "
            f"flora.linen.{verb}(model, ..., x)."
        )
    fn = _call(model, other, args, kwargs)
    return plans.of_module(model.model, model.config, fn, base)


def _variables(variables: Any, verb: str) -> Any:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise LoraTypeError(
            f"flora.linen.{verb}: got a {type(variables).__name__} without 'params'. "
            'Pass variables, such as {"params": params}.'
        )
    return variables


def _require_lora(model: Any, verb: str) -> None:
    if not isinstance(model, LoRA):
        raise LoraTypeError(
            f"flora.linen.{verb}: the model is a {type(model).__name__}. Pass the "
            "module that flora.linen.LoRA(model=..., config=...) returned first: "
            f"flora.linen.{verb}({'key, ' * (verb == 'adapt')}model, ...)."
        )
