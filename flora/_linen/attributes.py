"""What the module within a `LoRA` has, as it is seen from outside."""

import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from flora._linen.calls import Path, run
from flora._linen.parts import LORA, arrays, without
from flora._tree.errors import LoraError
from flora._tree.paths import named_leaves

OWN = ("_id", "_state")  # what Flax keeps in each module


def attribute(module: Any, name: str) -> Any:
    """An attribute of `module.model`."""
    if (
        name.startswith("__")
        or name in OWN
        or name in type(module).__dataclass_fields__
    ):
        raise AttributeError(name)
    return _seen(module, (name,), getattr(module.model, name))


def _seen(module: Any, path: Path, value: Any) -> Any:
    """An attribute, bound to run on base and factors."""
    if module.scope is None:
        return value
    if isinstance(value, nn.Module):
        return _Submodule(module, path, value)
    if isinstance(value, Mapping):
        return {k: _seen(module, (*path, (k,)), x) for k, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_seen(module, (*path, (i,)), x) for i, x in enumerate(value))
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return _Method(module, path)
    _require_plain(module, path, value)
    return value


class _Method:
    """A method of the model or of one within it, on base and factors."""

    def __init__(self, module: Any, path: Path) -> None:
        self._lora, self._path = module, path
        self.__name__ = str(path[-1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._lora, self._path, args, kwargs)


class _Submodule:
    """A submodule of the model, called from outside of it."""

    def __init__(self, module: Any, path: Path, inner: nn.Module) -> None:
        self._lora, self._path, self._inner = module, path, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(self._lora, (*self._path, "__call__"), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _seen(self._lora, (*self._path, name), getattr(self._inner, name))


def _require_plain(module: Any, path: Path, value: Any) -> None:
    """Refuses an adapted weight that is read outside of the model's methods."""
    if not isinstance(value, jax.Array):
        return
    params = module.variables.get("params", {})
    named, _ = named_leaves(without(params))
    adapted = arrays(params.get(LORA, {}), {})
    for where, x in named:
        if x is value and where in adapted:
            raise LoraError(
                f"'{where}' was read as an attribute, {'.'.join(map(str, path))}, and "
                "would be the base alone. Read it in a method of the model: "
                "model.apply(variables, method='...')."
            )
