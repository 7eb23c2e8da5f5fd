"""Patterns that select nothing: each is named, and what is offered instead matches."""

import ast
import re

import pytest

from flora._tree.paths import entries, matches
from flora._tree.selection import alone, idle_entries, idle_keys, nothing_selected
from tests.support.promptly import promptly

LAYER = [
    "self_attn/q_proj/kernel",
    "self_attn/q_proj/bias",
    "self_attn/v_proj/kernel",
    "mlp/up_proj/kernel",
    "norm/scale",
]
PATHS = [
    "params/embed_tokens/embedding",
    *(f"params/layers_{i}/{x}" for i in range(12) for x in LAYER),
    "params/lm_head/kernel",
    "params/lm_head/bias",
]
NAMED = [(path, None) for path in PATHS]


def offered(message):
    """The pattern that a message says to write."""
    return ast.literal_eval(re.search(r" [Ww]rite ('[^']*'|\[.*?'\])\.", message)[1])


def of(*ends, layers=range(12)):
    return [f"params/layers_{i}/{end}" for i in layers for end in ends]


Q, V, UP = LAYER[0], LAYER[2], LAYER[3]
SPELLINGS = {
    "q_proj": of(Q),
    ".*q_proj": of(Q),
    "*.q_proj": of(Q),
    "self_attn.q_proj": of(Q),
    "q_proj.weight": of(Q),
    ".*q_proj/kernel": of(Q),
    "q_proj|v_proj": of(Q, V),
    r".*\.(q_proj|v_proj)$": of(Q, V),
    r".*\.self_attn\..*_proj": of(Q, V),
    "self_attn": of(Q, V),
    "model.layers.3.mlp.up_proj": of(UP, layers=[3]),
    r"model\.layers\.[0-2]\.mlp\.up_proj": of(UP, layers=range(3)),
    "layers_11": of(Q, V, UP, layers=[11]),
    "lm_head": ["params/lm_head/kernel"],
    "base_model.model.lm_head": ["params/lm_head/kernel"],
    "model.embed_tokens": ["params/embed_tokens/embedding"],
    "layers.0.norm.scale": ["params/layers_0/norm/scale"],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_the_glob_that_is_offered_selects_what_was_meant(text):
    message = nothing_selected("target", text, PATHS)
    glob = offered(message)
    assert {p for p in PATHS if matches(glob, p, None)} == {*SPELLINGS[text]}, message
    compiled = re.compile(text) if not text.startswith("*") else text
    assert offered(nothing_selected("target", compiled, PATHS)) == glob


def test_what_is_below_goes_along_where_leaves_train_whole():
    glob = offered(nothing_selected("train", "lm_head", PATHS))
    assert [p for p in PATHS if matches(glob, p, None)] == PATHS[-2:]
    message = nothing_selected("target", "all-linear", PATHS)
    assert "write flora.coverage(fn, tree, ...).all_linear." in message


def test_nothing_is_offered_that_is_not_known():
    for text in ("kernal", "", "[", "(", "norm2", "weights"):
        message = nothing_selected("target", text, PATHS)
        assert "selects none of the 63 leaves. Closest: 'params/" in message
        assert " Write " not in message


def test_paths_are_shown_as_patterns_that_select_them():
    paths = ["a[0]/w*", "dense/kernel", "mlp/dense/kernel"]
    message = nothing_selected("target", "dense/kernl", paths)
    assert "Closest: '/dense/kernel', 'mlp/dense/kernel'" in message
    for path in paths:
        glob = ast.literal_eval(alone(path, paths))
        assert [p for p in paths if matches(glob, p, None)] == [path]


@pytest.mark.parametrize("text", ["(([a-z0-9_.]+)+)+!", "(.*.*.*)*x", "a" * 10_000])
def test_an_odd_text_costs_no_time(text):
    paths = [f"params/layers_{i}/{end}" for i in range(400) for end in LAYER]
    with promptly():  # minutes, if it were tried as a regex
        nothing_selected("target", text, paths)


def test_each_idle_entry_is_named():
    assert idle_entries("target", ["q_proj/*", "v_proj/*"], NAMED) == []
    (one,) = idle_entries("target", ["q_proj/*", "k_proj/*"], NAMED)
    assert one.startswith("target has 'k_proj/*', which selects none of the 63 leaves.")
    (one,) = idle_entries("train", re.compile("bias"), NAMED)
    assert one.startswith("train='bias' selects none of the 63 leaves.")
    (one,) = idle_entries("exclude", [lambda path, _: path == "x", "*"], NAMED)
    assert "<lambda>" in one
    assert idle_entries("exclude", (), NAMED) == []
    many = [f"x{i}" for i in range(30)]
    assert len(idle_entries("target", many, NAMED)) == 30


def test_each_idle_key_is_named():
    good = {"q_proj/kernel": 1, "self_attn/*": 2, ("norm/*", "lm_head/*"): 3, "*": 4}
    assert idle_keys("rank_pattern", good, NAMED) == []
    first, second = idle_keys("rank_pattern", {"*": 1, "x": 2, "norm/*": 3}, NAMED)
    assert first.startswith("rank_pattern='x' selects none")
    assert second == (
        "rank_pattern: all that 'norm/*' selects is taken by earlier entries, '*', and "
        "the first that selects a leaf decides. Write it before '*', or take it out."
    )
    (one,) = idle_keys("layouts", {"norm/*": 1, "scale": 2}, NAMED)
    assert one.endswith("decides. Take it out.")  # before it, 'norm/*' would be idle
    (one,) = idle_keys("layouts", {"norm/*": 1, ("lm_head/*", "scale"): 2}, NAMED)
    assert "all that 'scale' selects" in one
    pair = {"q_proj/*": 1, "v_proj/*": 2, "self_attn/*": 3}
    (one,) = idle_keys("layouts", pair, NAMED)
    assert "'q_proj/*', 'v_proj/*'" in one
    assert entries(("a", "b")) == ["a", "b"]
