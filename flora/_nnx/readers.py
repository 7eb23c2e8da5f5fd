"""Methods that read adapted weights: which ones do, and reads outside of a run.

A method of an adapted module runs on base and factors if its code names an attribute
that has factors.  One that comes to such an attribute otherwise (by a helper, by
`super()`, unbound) would run on the base alone: `Guarded` refuses to be read by it.
"""

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from flax import nnx

from flora._tree.errors import LoraError

RECIPE = "_lora_recipe"  # of an adapted class: what `adapted_class` was given
_SKIPPED = {n for n in dir(nnx.Module) if n.startswith("__")} - {"__call__"}
_NO_SELF = (staticmethod, classmethod)
_PROPERTIES = (property, functools.cached_property)


class Guarded:
    """An attribute that methods of an adapted module may not read outside of a run."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, cls: type | None = None) -> Any:
        if module is None:
            return self
        if self.name not in vars(module):
            raise AttributeError(self.name)
        _refuse_methods(sys._getframe(1), self.name)
        return vars(module)[self.name]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: Any) -> None:
        del vars(module)[self.name]


def _refuse_methods(frame: Any, name: str) -> None:
    """Raises if a method of an adapted module is among the callers."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = type(frame.f_locals.get(code.co_varnames[0]))
            if RECIPE in vars(first) and code in _codes(vars(first)[RECIPE][0]):
                raise LoraError(
                    f"{first.__name__}.{code.co_name} reads {name!r}, which is "
                    "adapted, and would run on the base alone. Write "
                    f"module.{code.co_name}(...), and name it, or the method of the "
                    "model that calls it, in methods=(...,)."
                )
        frame = frame.f_back


def readers(cls: type, names: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The methods and properties of a class that read one of these attributes.

    Returns:
      Their names, and `names` with the properties and static methods among them: who
      reads those reads the weight.
    """
    read, grown = names, None
    while read != grown:
        grown, read = read, read | {n for n in _reading(cls, read) if _opaque(cls, n)}
    static = {n for n in read if isinstance(_attribute(cls, n), _NO_SELF)}
    return frozenset(_reading(cls, read)) - static, read


def is_property(cls: type, name: str) -> bool:
    """Whether a class has a property of this name."""
    return isinstance(_attribute(cls, name), _PROPERTIES)


def _attribute(cls: type, name: str) -> Any:
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _opaque(cls: type, name: str) -> bool:
    return isinstance(_attribute(cls, name), _PROPERTIES + _NO_SELF)


def _reading(cls: type, names: frozenset[str]) -> Iterator[str]:
    for name, functions in _functions(cls).items():
        if name not in _SKIPPED and any(
            names & {*_names_in(f.__code__)} for f in functions
        ):
            yield name


@functools.cache
def _codes(cls: type) -> frozenset[types.CodeType]:
    functions = [f for fs in _functions(cls).values() for f in fs]
    return frozenset(code for f in functions for code in _nested(f.__code__))


@functools.cache
def _functions(cls: type) -> dict[str, list[types.FunctionType]]:
    """A class's functions by name, with those that subclasses have overridden."""
    found: dict[str, list[types.FunctionType]] = {}
    for owner in cls.__mro__:
        if owner not in nnx.Module.__mro__:
            for name, x in vars(owner).items():
                found.setdefault(name, []).extend(_functions_in(x, set()))
    return found


def _functions_in(x: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The functions that an attribute of a class is made of."""
    if id(x) in seen or isinstance(x, type):
        return
    seen.add(id(x))
    inner = [getattr(x, n, None) for n in ("fget", "func", "__func__", "__wrapped__")]
    if isinstance(x, types.FunctionType):
        yield x
        inner += [cell.cell_contents for cell in x.__closure__ or () if _full(cell)]
    for y in inner:
        if callable(y):
            yield from _functions_in(y, seen)


def _full(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:  # not assigned yet
        return False


def _names_in(code: types.CodeType) -> Iterator[str]:
    for inner in _nested(code):
        yield from inner.co_names
        yield from (x for x in inner.co_consts if isinstance(x, str))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _nested(inner)
