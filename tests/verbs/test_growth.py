"""What the verbs do for each leaf does not grow with the number of leaves."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import flora

FLORA = str(Path(flora.__file__).parent)


def chain(params, x):
    for w in params.values():
        x = x + x @ w
    return x


def leaves(n):
    return {f"w{i:04}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for i in range(n)}


X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
CONFIG = flora.LoraConfig(rank=2, target="*")


def adapted(n):
    return flora.init(jax.random.key(0), CONFIG, chain, leaves(n), X)


def instructions(fn):
    """How many bytecode instructions of flora's own a call executes."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(FLORA):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fn()
    finally:
        sys.settrace(before)
    return count


def init_of(n):
    return lambda: adapted(n)


def call_of(n):
    tree = adapted(n)
    return lambda: jax.eval_shape(flora.lora(chain), tree, X)


def split_and_join_of(n):
    tree = adapted(n)
    return lambda: flora.join(*flora.split(tree))


@pytest.mark.parametrize(
    "verb", [init_of, call_of, split_and_join_of], ids=lambda f: f.__name__
)
def test_twice_the_leaves_take_twice_the_instructions(verb):
    verb(5)()  # what happens once a process
    few, some, many = (instructions(verb(n)) for n in (10, 30, 90))
    first, second = (some - few) / 20, (many - some) / 60
    assert first > 0
    assert second < 1.02 * first, f"{first:.0f} instructions a leaf, then {second:.0f}"


def test_equal_leaves_are_drawn_by_one_abstract_call(monkeypatch):
    calls, eval_shape = [], jax.eval_shape
    monkeypatch.setattr(
        jax, "eval_shape", lambda *args: calls.append(1) or eval_shape(*args)
    )
    counts = []
    for n in (5, 50):
        calls.clear()
        adapted(n)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_equal_leaves_are_drawn_by_one_compiled_function():
    made = []

    def initializer(key, a, b, dtype):
        made.append(a)
        return jnp.ones(a, dtype), jnp.zeros(b, dtype)

    config = flora.LoraConfig(rank=2, target="*", init=initializer)
    params = {name: jnp.zeros((8, 8)) for name in leaves(30)}
    flora.init(jax.random.key(0), config, chain, params, X)
    assert made == [(8, 2)]
