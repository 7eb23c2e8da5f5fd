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
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import core, traverse_util
from flax.core.scope import intersect_filters
from flax.linen import module as linen_module
from jax.sharding import PartitionSpec as Spec

from flora._tree.checks import require_adapted
from flora._tree.config import LoraConfig, require_config
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.keys import require_key
from flora._tree.paths import named_leaves, path_of
from flora._tree.placement import spec_of_extra, specs
from flora._tree.weight import (
    LoraWeight,
    Trained,
    base_of,
    is_node,
    parts_of,
    trained_parts,
)
from flora._verbs.dropout import with_dropout
from flora._verbs.init import init
from flora._verbs.lora import lora

__all__ = ["LoRA", "adapt", "labels", "optimizer", "tree", "variables"]

LORA = "lora"  # below it, in params, is what trains; in its collection what does not
FROZEN = "frozen"
DELTA = "delta"

Path = tuple[Any, ...]  # attributes and indices, from the inner model
Settings = dict[str, Any]  # by path: a LoraWeight or Trained without arrays


class Plans:
    """What was found out about a model: by the shapes of its parameters, once."""

    def __init__(self) -> None:
        self.known: dict[Any, Settings] = {}


class LoRA(nn.Module):
    """A Linen module that runs another one with low-rank factors beside its weights.

    Its parameters are those of `model`, and `lora` beside them.  Its other methods are
    those of `model`, on base and factors as well; so are its attributes.

    With `config.dropout`, the inputs of A are dropped wherever there is an rng named
    'dropout'.  Where nn.Dropout's flag says that a call is deterministic, give none.

    `model.init` makes base and factors.  What is made of the base's values then, DoRA's
    magnitude, has to be made anew if a checkpoint replaces these: `flora.linen.adapt`.

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
    plans: Plans = dataclasses.field(default_factory=Plans, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise LoraTypeError(
                f"flora.linen.LoRA: model is a {type(self.model).__name__}; expected a "
                "Linen module. For NNX see flora.nnx, for a function flora.init."
            )
        if isinstance(self.model, LoRA):
            raise LoraError(
                "flora.linen.LoRA: the model is a flora.linen.LoRA already. Adapt the "
                "module within it: model.model."
            )
        require_config(self.config)
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on base and factors."""
        return self._run(("__call__",), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model; a method runs on base and factors."""
        if name.startswith("_") or name in LoRA.__dataclass_fields__:
            raise AttributeError(name)
        return _seen(self, (name,), getattr(self.model, name))

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` may be one of the model's class, too."""
        name = getattr(method, "__name__", "")
        if method is not None and getattr(type(self.model), name, None) is method:
            method = name
        return super().apply(variables, *args, method=method, **kwargs)

    def __kontext_keys__(self) -> dict[str, str]:
        """The keys that the model asks of Kauldron."""
        from kauldron import kontext  # type: ignore[import-not-found]

        return kontext.get_keypaths(self.model)

    @nn.compact
    def _run(self, method: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        initializing, out = self.is_initializing(), None
        if initializing:
            out = _at(self.model, method)(*args, **kwargs)
            if self.has_variable("params", LORA):
                raise LoraError(
                    f"{type(self.model).__name__} has parameters named {LORA!r} of its "
                    "own, where the factors belong. Rename them."
                )
        base, other = _parted(self.variables)
        call = _Call(self, method, other, args, kwargs)
        if initializing:
            trained, frozen = _parts(_init(self, self.make_rng("params"), call, base))
            # Some packages' patch of `param` wants a shape.
            self.param(LORA, lambda *_, **__: trained, ())
            if frozen:
                self.variable(LORA, FROZEN, lambda: frozen)
            return out
        if not self.has_variable("params", LORA):
            raise LoraError(
                "flora.linen.LoRA: the variables have no 'params/lora', so nothing is "
                "adapted. Write variables = flora.linen.adapt(key, model, variables, "
                "*args), or take those of model.init."
            )
        trained = self.get_variable("params", LORA)
        frozen = self.get_variable(LORA, FROZEN, {})
        weights = _filled(base, _settings(self, call, base), trained, frozen)
        out, updates = call.on(lora(call.fn), self._with_keys(weights))
        for collection, values in updates.items():
            for name, value in values.items():
                self.put_variable(collection, name, value)
        return out

    def _with_keys(self, weights: Any) -> Any:
        named, _ = named_leaves(weights)
        rated = any(isinstance(x, LoraWeight) and x.dropout for _, x in named)
        if not rated or not self.has_rng("dropout"):
            return weights
        return with_dropout(weights, self.make_rng("dropout"))


def _at(model: Any, path: Path) -> Any:
    for key in path:
        model = getattr(model, key) if isinstance(key, str) else model[key]
    return model


def _seen(module: LoRA, path: Path, value: Any) -> Any:
    """What an attribute of the inner model is from outside: on base and factors."""
    if isinstance(value, nn.Module):
        return value if module.scope is None else _Submodule(module, path, value)
    if isinstance(value, list | tuple):
        return type(value)(_seen(module, (*path, i), x) for i, x in enumerate(value))
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(path, args, kwargs)

        return types.MethodType(run, module)
    return value


class _Submodule:
    """A submodule of the inner model, called from outside of it."""

    def __init__(self, module: LoRA, path: Path, inner: nn.Module) -> None:
        self._lora, self._path, self._inner = module, path, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._lora._run((*self._path, "__call__"), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _seen(self._lora, (*self._path, name), getattr(self._inner, name))


class _Call:
    """One call of the inner model, as a function of its parameters."""

    def __init__(
        self,
        module: LoRA,
        method: Path,
        other: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        scope: Any = module.scope
        model = module.model.clone(parent=None, name=None)
        mutable = intersect_filters(scope.mutable, core.DenyList(("params", LORA)))
        capture = _capture_filter()

        def fn(params: Any, other: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
            made = model.apply(
                {"params": params, **other},
                *args,
                rngs=rngs,
                method=lambda model, *args, **kwargs: _at(model, method)(*args, **kwargs),
                mutable=mutable or False,
                capture_intermediates=capture,
                **kwargs,
            )
            return made if mutable else (made, {})

        fn.__qualname__ = fn.__name__ = f"{type(model).__name__}.{method[-1]}"
        self.fn: Callable[..., Any] = fn
        self.rest = (other, _rngs(module), args, kwargs)

    def on(self, fn: Callable[..., Any], params: Any) -> Any:
        return fn(params, *self.rest)


def _rngs(module: LoRA) -> dict[str, Any]:
    """The rngs that the model would have on its own, others at a second call."""
    scope: Any = module.scope
    rngs = {}
    for name in scope.rngs:
        if name == "params":
            continue
        first = not scope.rng_counters.get(name)
        made = module.make_rng(name)
        rngs[name] = scope.rngs[name].as_jax_rng() if first else made
    return rngs


def _capture_filter() -> Any:
    """What `capture_intermediates` asks for, but of the outermost module.

    Its output is this module's own, which is captured already.
    """
    stack = linen_module._context.capture_stack  # Flax has no public name for it
    outer = stack[-1] if stack else False
    if not outer:
        return False
    wanted = outer if callable(outer) else lambda module, name: name == "__call__"

    def capture(module: nn.Module, name: str) -> bool:
        return bool(module.path) and wanted(module, name)

    return capture


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
    base, other = _parted(_variables(variables, "adapt"))
    if LORA in dict(variables["params"]):
        raise LoraError(
            "flora.linen.adapt: the variables have 'params/lora' already. Take it out "
            "to start anew."
        )
    adapted = _init(model, key, _Outside(model, other, args, kwargs), base)
    trained, frozen = _parts(adapted)
    return _joined(base, other, trained, frozen)


class _Outside:
    """A call as `model.apply` is given it."""

    def __init__(self, model: LoRA, other: Any, args: Any, kwargs: Any) -> None:
        inner = model.model.clone(parent=None, name=None)
        self.rest = (other, args, kwargs)

        def fn(params: Any, other: Any, args: Any, kwargs: Any) -> Any:
            return inner.apply({"params": params, **other}, *args, **kwargs)

        fn.__qualname__ = fn.__name__ = type(inner).__name__
        self.fn: Callable[..., Any] = fn


def tree(model: LoRA, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """The adapted tree of an adapted model's variables, with `LoraWeight` nodes.

    What `flora.save`, `flora.merge`, `flora.summary`, `flora.peft.save`,
    `flora.monitor` and the others take; arrays are shared.  Its paths are those of
    `model.model`'s variables.

    Args:
      model: a `LoRA` module.
      variables: those of `model.init` or `adapt`, trained or not.
      *args: of one call, as for `adapt`; needed only if this `model` has not run yet,
        since its layouts are not known then.
      **kwargs: likewise.

    Raises:
      LoraError: the variables have no factors, others than the config asks for, or the
        layouts are not known.
    """
    _require_lora(model, "tree")
    base, other = _parted(_variables(variables, "tree"))
    if LORA not in variables["params"]:
        raise LoraError(
            "flora.linen.tree: the variables have no 'params/lora'. Pass those that "
            "flora.linen.adapt or model.init returned."
        )
    settings = _known(model, "tree", base, other, args, kwargs)
    frozen = variables.get(LORA, {}).get(FROZEN, {})
    params = _filled(base, settings, variables["params"][LORA], frozen)
    return {**other, "params": params}


def variables(model: LoRA, tree: Any, *args: Any, **kwargs: Any) -> Any:
    """The variables of an adapted tree, for `model.apply`: the inverse of `tree`.

    For adapters that come from elsewhere: `flora.load`, `flora.peft.load`,
    `flora.starts`.  A leaf that trains whole becomes the base's, with a delta of zero.

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
    named, _ = named_leaves(given["params"])
    has = {path: _bare(x) for path, x in named if is_node(x)}
    wants = _known(model, "variables", base, other, args, kwargs)
    fail(_differences(has, wants))
    trained, frozen = _parts(given["params"])
    return _joined(base, other, trained, frozen)


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


def _init(model: LoRA, key: Any, call: Any, base: Any) -> Any:
    """The adapted parameters; the plan is kept."""
    adapted = init(key, model.config, call.fn, base, *call.rest)
    named, _ = named_leaves(adapted)
    found = {path: _bare(x) for path, x in named if is_node(x)}
    model.plans.known[_shapes(base)] = found
    return adapted


def _settings(model: LoRA, call: Any, base: Any) -> Settings:
    """The plan for parameters of these shapes, found out if it is not known."""
    shapes = _shapes(base)
    if shapes not in model.plans.known:
        jax.eval_shape(lambda base: _init(model, jax.random.key(0), call, base), base)
    return model.plans.known[shapes]


def _known(
    model: LoRA, verb: str, base: Any, other: Any, args: Any, kwargs: Any
) -> Settings:
    if not args and not kwargs and _shapes(base) not in model.plans.known:
        raise LoraError(
            f"flora.linen.{verb}: this module has not run, and its layouts are not "
            f"known. Pass the arguments of a call: flora.linen.{verb}(model, ..., x)."
        )
    return _settings(model, _Outside(model, other, args, kwargs), base)


def _shapes(base: Any) -> Any:
    named, _ = named_leaves(base)
    return tuple((path, tuple(x.shape), str(x.dtype)) for path, x in named)


def _bare(node: Any) -> Any:
    if isinstance(node, Trained):
        return Trained(None)
    return dataclasses.replace(node, base=None, a=None, b=None, key=None, extra=None)


def _differences(has: Settings, wants: Settings) -> Iterator[str]:
    for path in sorted(has.keys() | wants.keys()):
        if has.get(path) != wants.get(path):
            yield (
                f"flora.linen.variables: '{path}' is {has.get(path, 'not adapted')!r} in "
                f"the tree and {wants.get(path, 'not adapted')!r} by the module's "
                "config. Write a config with the tree's settings."
            )


def _parts(adapted: Any) -> tuple[Any, Any]:
    """What trains and what of variants does not, by path, in the boxes that W has."""
    trained: dict[tuple[str, ...], Any] = {}
    frozen: dict[tuple[str, ...], Any] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(adapted, is_leaf=_is_one)
    for keys, x in flat:
        path, node = tuple(path_of(keys).split("/")), getattr(x, "value", x)
        if isinstance(x, Trained | LoraWeight):
            node = x
        if isinstance(node, Trained):
            zeros = jax.tree.map(jnp.zeros_like, node.value)
            trained[*path, DELTA] = zeros if x is node else x.replace(value=zeros)
        elif isinstance(node, LoraWeight):
            moving = trained_parts(node)
            for name, part in parts_of(node).items():
                boxed = _boxed(x, node, name, part)
                (trained if name in moving else frozen)[*path, name] = boxed
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def _is_one(x: Any) -> bool:
    return is_node(x) or isinstance(x, nn.meta.AxisMetadata)


def _boxed(box: Any, node: LoraWeight, name: str, part: Any) -> Any:
    """The array in a box with the names of the axes that it shares with W."""
    if not isinstance(box, nn.Partitioned):
        return part
    found = specs(node.layout, Spec(*box.names), len(node.base.shape))
    by_part = {"a": found.a, "b": found.b}
    spec = by_part.get(name) or spec_of_extra(found, node, part.shape)
    names = (*spec, *(None for _ in range(len(part.shape) - len(spec))))
    return box.replace(value=part, names=names)


def _filled(base: Any, settings: Settings, trained: Any, frozen: Any) -> Any:
    """The adapted parameters."""
    have = {
        "/".join(path): x
        for tree in (trained, frozen)
        for path, x in traverse_util.flatten_dict(nn.meta.unbox(tree)).items()
    }
    named, treedef = named_leaves(base)
    fail(_missing(settings, have))

    def fill(path: str, value: Any) -> Any:
        bare = settings.get(path)
        if bare is None:
            return value
        if isinstance(bare, Trained):
            return Trained(value + have[f"{path}/{DELTA}"])
        own = {
            k[len(path) + 1 :]: x
            for k, x in have.items()
            if k.rpartition("/")[0] == path
        }
        a, b = own.pop("a"), own.pop("b")
        return dataclasses.replace(bare, base=value, a=a, b=b, extra=own or None)

    return treedef.unflatten([fill(path, x) for path, x in named])


def _missing(settings: Settings, have: Mapping[str, Any]) -> Iterator[str]:
    for path, bare in settings.items():
        parts = (DELTA,) if isinstance(bare, Trained) else ("a", "b")
        for part in parts:
            if f"{path}/{part}" not in have:
                yield (
                    f"flora.linen.LoRA: 'params/lora/{path}/{part}' is not there, and "
                    "the config adapts that leaf. Pass variables of this config."
                )
    paths = {p.rpartition("/")[0] for p in have} - settings.keys()
    for path in sorted(paths):
        yield (
            f"flora.linen.LoRA: there is 'params/lora/{path}', and the config does not "
            "adapt that leaf. Pass variables of this config."
        )


def _parted(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base's parameters and other collections, without the adapter's."""
    plain = {k: x for k, x in core.unfreeze(variables).items() if k != LORA}
    params = plain.pop("params", {})
    return {k: x for k, x in params.items() if k != LORA}, plain


def _joined(base: Any, other: Any, trained: Any, frozen: Any) -> dict[str, Any]:
    made = {**other, "params": {**base, LORA: trained}}
    return {**made, LORA: {FROZEN: frozen}} if frozen else made


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
            f"flora.linen.{verb}: the model is a {type(model).__name__}. Pass the module "
            "that flora.linen.LoRA(model=..., config=...) returned."
        )
