"""Where the user wrote an equation."""

import os
import types

import jax
import jax.numpy as jnp
import pytest

import flora
from flora._trace.source import source_line
from tests.support.registry import MODELS

LIB = "/env/lib/python3.11/site-packages"
FLORA = os.path.dirname(flora.__file__)
USER = ("/home/me/model.py", 41, "__call__")
FLAX = (f"{LIB}/flax/linen/linear.py", 290, "__call__")
JAX = (f"{LIB}/jax/_src/lax/lax.py", 17, "dot")


def equation(*frames):
    """An equation with those frames `(file, line, function)`, the outermost first."""
    trace = None
    for file, number, name in reversed(frames):
        code = types.SimpleNamespace(co_filename=file, co_name=name)
        frame = types.SimpleNamespace(f_code=code)
        trace = types.SimpleNamespace(tb_frame=frame, tb_lineno=number, tb_next=trace)
    traceback = types.SimpleNamespace(as_python_traceback=lambda: trace)
    return types.SimpleNamespace(source_info=types.SimpleNamespace(traceback=traceback))


FRAMES = {
    "the user's": ([USER], "model.py:41 (__call__)"),
    "not what the user called": ([USER, FLAX, JAX], "model.py:41 (__call__)"),
    "the innermost": (
        [("/home/me/train.py", 7, "loss"), FLAX, USER, FLAX], "model.py:41 (__call__)"),
    "a library's, where there is nothing better": (
        [FLAX, JAX], "linear.py:290 (__call__)"),
    "nobody's": ([JAX], ""),
    "none": ([], ""),
    "not flora's own": (
        [USER, (f"{FLORA}/_trace/interpret.py", 3, "run"), JAX],
        "model.py:41 (__call__)"),
    "not what context managers or exec add": (
        [USER, ("/lib/contextlib.py", 81, "inner"), ("<string>", 1, "f")],
        "model.py:41 (__call__)"),
    "names that only begin alike": (
        [(f"{LIB}/jaxtyping/it.py", 2, "f")], "it.py:2 (f)"),
    "of haiku and equinox": (
        [USER, (f"{LIB}/haiku/a.py", 1, "a"), (f"{LIB}/equinox/b.py", 2, "b")],
        "model.py:41 (__call__)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_which_frame_counts(name):
    frames, wanted = FRAMES[name]
    assert source_line(equation(*frames)) == wanted


def test_an_equation_without_a_traceback_has_no_line():
    info = types.SimpleNamespace(traceback=None)
    assert source_line(types.SimpleNamespace(source_info=info)) == ""


def test_in_a_jitted_function_only_its_own_lines_count():
    caller, inner = ("/home/me/train.py", 7, "loss"), (f"{LIB}/jax/nn.py", 3, "relu")
    traced = equation(caller, JAX, inner, JAX)
    assert source_line(traced) == "train.py:7 (loss)"
    assert source_line(traced, "relu") == ""  # JAX's own: the caller's line is not its
    assert source_line(traced, "other") == "train.py:7 (loss)"
    own = equation(caller, ("/home/me/layer.py", 9, "layer"), USER, JAX)
    assert source_line(own, "layer") == "model.py:41 (__call__)"
    # A function that calls itself by name once more: the outermost counts.
    again = equation(("/home/me/a.py", 1, "f"), ("/home/me/a.py", 2, "f"))
    assert source_line(again, "f") == "a.py:2 (f)"


def test_lines_of_what_jax_traced():
    def inner(x):
        return jnp.sin(x)

    def outer(x):
        y = inner(x)
        return jax.jit(inner)(y) * 2

    sin, jitted, times = jax.make_jaxpr(outer)(1.0).eqns
    (again,) = jitted.params["jaxpr"].eqns
    first, second = inner.__code__.co_firstlineno, outer.__code__.co_firstlineno
    for eqn in (sin, again):
        assert source_line(eqn) == f"test_source.py:{first + 1} (inner)"
    for eqn in (jitted, times):
        assert source_line(eqn) == f"test_source.py:{second + 2} (outer)"


def test_the_source_line_is_the_user_s_not_flax_s():
    model = MODELS["mlp"]()
    report = flora.coverage(model.fn, model.params, *model.args)
    for row in report.rows:
        assert row.uses[0].source.startswith("registry.py:")
        assert row.uses[0].source.endswith("(__call__)")


def test_the_source_line_is_the_caller_s_where_jax_reuses_a_trace():
    def lookups(p, ids):
        first = jnp.take(p["first"], ids, axis=0)
        return first + jnp.take(p["second"], ids, axis=0)

    params = {"first": jnp.ones((9, 5)), "second": jnp.ones((9, 5))}
    report = flora.coverage(lookups, params, jnp.arange(3))
    start = lookups.__code__.co_firstlineno
    for i, name in enumerate(params, 1):
        sources = {use.source for use in report[name].uses}
        assert sources == {f"test_source.py:{start + i} (lookups)"}
