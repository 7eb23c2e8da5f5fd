"""Each way of reading a weight runs on the factors, or is refused: none on W alone."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flora
import flora.nnx
from flora._nnx.readers import readers
from tests.support.nnx_models import X, adapted, close

EACH = flora.LoraConfig(rank=2, target=re.compile(r"(.*/)?(kernel|w|ws/0)"))


def weight():
    return nnx.Param(jax.random.normal(jax.random.key(3), (8, 8)))


def of_w(module, x):
    return x @ module.w


def of_kernel(module, x):
    return x @ module.kernel


def unwrapped(function):
    def call(self, x):
        return function(self, x)

    return call


class Parent(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.w, self.ws = weight(), nnx.List([weight()])

    def __call__(self, x):
        return self.linear(x) @ self.w + x @ self.ws[0]

    def by_name(self, x):
        return x @ self.w

    def by_list(self, x):
        for w in self.ws:
            x = x @ w
        return x

    def by_child(self, x):
        return self.linear(x)

    def of_child(self, x):
        return x @ self.linear.kernel

    def by_private(self, x):
        return self._private(x)

    def _private(self, x):
        return x @ self.w

    def by_getattr(self, x):
        return x @ getattr(self, "w")  # noqa: B009

    def by_vars(self, x):
        return x @ vars(self)["w"]

    def by_state(self, x):
        return x @ nnx.state(self)["w"][...]

    def by_lambda(self, x):
        return (lambda: x @ self.w)()

    def by_scan(self, x):
        return jax.lax.scan(lambda c, _: (c @ self.w, None), x, None, length=2)[0]

    def by_split(self, x):
        graphdef, state = nnx.split(self)
        return jax.jit(lambda s: nnx.merge(graphdef, s).by_name(x))(state)

    by_partial = functools.partialmethod(lambda self, _, x: x @ self.w, 1)

    @property
    def transposed(self):
        return self.w.T

    def by_property(self, x):
        return x @ self.transposed

    @staticmethod
    def static(module, x):
        return x @ module.w

    def by_static(self, x):
        return self.static(self, x)

    @classmethod
    def of_class(cls, module, x):
        return x @ module.w

    def by_class(self, x):
        return self.of_class(self, x)

    @nnx.jit
    def by_jit(self, x):
        return x @ self.w

    @nnx.remat
    def by_remat(self, x):
        return x @ self.w

    @unwrapped
    def by_decorator(self, x):
        return x @ self.w

    # Refused: no name of theirs says what they read.
    def hidden_getattr(self, x):
        return x @ getattr(self, "xw"[1:])

    def hidden_helper(self, x):
        return of_w(self, x)

    def hidden_helper_of_child(self, x):
        return of_kernel(self.linear, x)

    def hidden_unbound(self, x):
        return nnx.Linear.__call__(self.linear, x)


class Child(Parent):
    def __call__(self, x):
        return super().__call__(x)

    def by_name(self, x):
        return 2 * super().by_name(x)

    def of_child(self, x):
        return 2 * super().of_child(x)


class Around(nnx.Module):
    def __init__(self, rngs):
        self.parent, self.child = Parent(rngs), Child(rngs)

    def __call__(self, x):
        return self.parent(x) + self.child(x)

    def by_methods(self, x):
        return self.parent.by_name(x) + self.child.of_child(x)

    def of_grandchild(self, x):
        return x @ self.parent.linear.kernel

    def by_property(self, x):
        return x @ self.parent.transposed + self.child(x)


def methods(prefix):
    return [
        (cls, name)
        for cls in (Parent, Child, Around)
        for name in dir(cls)
        if re.match(prefix, name)
    ]


@functools.cache
def both(cls):
    module = adapted(cls(nnx.Rngs(0)), config=EACH)
    return module, flora.nnx.merge(module)


@pytest.mark.parametrize(("cls", "name"), methods("by_|of_child|of_grand|__call__"))
def test_each_way_of_reading_runs_on_the_factors(cls, name):
    module, merged = both(cls)
    close(getattr(module, name)(X), getattr(merged, name)(X))
    if cls is Around:
        close(module.child.by_name(X), merged.child.by_name(X))


@pytest.mark.parametrize(("cls", "name"), methods("hidden_"))
def test_hidden_reads_are_refused_until_the_method_is_named(cls, name):
    module, _ = both(cls)
    with pytest.raises(flora.LoraError, match=r"would run on the base alone.*methods="):
        getattr(module, name)(X)
    listed = adapted(cls(nnx.Rngs(0)), config=EACH, methods=("__call__", name))
    close(getattr(listed, name)(X), getattr(flora.nnx.merge(listed), name)(X))


UNBOUND = {
    "method": lambda m: Parent.by_name(m.parent, X),
    "super": lambda m: Child.__call__(m.child, X),
    "remat": lambda m: nnx.remat(Child.__call__)(m.child, X),
    "static": lambda m: Parent.static(m.parent, X),
    "property": lambda m: X @ m.parent.transposed,
}


@pytest.mark.parametrize("call", UNBOUND.values(), ids=UNBOUND)
def test_calls_that_pass_by_the_module_are_refused(call):
    module, merged = both(Around)
    call(merged)
    with pytest.raises(
        flora.LoraError, match=r"run on the base alone|no factored form"
    ):
        call(module)


def test_the_weight_itself_can_be_read_from_outside():
    module, _ = both(Around)
    assert isinstance(module.parent.w, nnx.Param)
    assert module.parent.ws[0].shape == (8, 8)
    module.parent.w = kept = module.parent.w
    assert module.parent.w is kept


def test_what_reads_is_found_through_properties():
    names, read = readers(Parent, frozenset({"w"}))
    assert {"by_name", "by_property", "by_static", "transposed"} <= names
    assert "static" not in names
    assert {"w", "transposed", "static", "of_class"} == read
    assert "by_child" not in names
    assert readers(nnx.BatchNorm, frozenset({"w"}))[0] == frozenset()


def test_a_returned_weight_is_refused():
    class Table(nnx.Module):
        def __init__(self):
            self.w = weight()

        def __call__(self, x):
            return x @ self.w

        def table(self):
            return self.w

        def array(self):
            return self.w[...]

    module = adapted(Table(), config=EACH)
    for name in ("table", "array"):
        with pytest.raises(flora.LoraError, match="returns a weight that is adapted"):
            getattr(module, name)()
    assert jnp.shape(module(X)) == (4, 8)
