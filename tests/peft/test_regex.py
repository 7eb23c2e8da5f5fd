"""Expressions out of files match what Python's `re` matches, in bounded time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora
from flora._peft.regex import Invalid, Patterns, Regex, Steps
from tests.support.promptly import promptly

ATOMS = (
    "a", "b", "é", "1", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[a-c]",
    "[]a]", r"[\w.]", r"[^\]a]", "{", "]", "-", r"\x61", r"\-", "(?i:A)", "(?#a)b", "",
)  # fmt: skip
COUNTS = ("*", "+", "?", "{2}", "{1,2}", "{,2}", "{0,}", "*?", "+?", "??", "{2,3}?")
GROUPS = ("(", "(?:", "(?=", "(?!", "(?s:")
POSITIONS = ("^", "$", r"\b", r"\B", r"\A", r"\Z", "(?<=a)", r"(?<!\.)")


def grown(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(GROUPS), inner).map(lambda x: f"{x[0]}{x[1]})"),
        st.tuples(inner, st.sampled_from(COUNTS)).map(lambda x: f"({x[0]}){x[1]}"),
        st.tuples(st.sampled_from(ATOMS[:8]), st.sampled_from(COUNTS)).map("".join),
    )


expressions = st.recursive(
    st.sampled_from(ATOMS) | st.sampled_from(POSITIONS), grown, max_leaves=8
)


@settings(max_examples=300, deadline=None)
@given(
    expressions, st.booleans(), st.lists(st.text("abcA1._-é", max_size=7), max_size=9)
)
def test_it_matches_what_re_matches(text, folded, names):
    text = "(?i)" + text if folded else text
    python, regex = re.compile(text), Regex(text)
    for name in names:
        assert regex.fullmatch(name) == bool(python.fullmatch(name)), (text, name)
        assert regex.match(name) == bool(python.match(name)), (text, name)


OF_PEFT = [
    r".*\.layers\.(0|1)\.(self_attn|mlp)\.(q|k|v|o)_proj",
    r"^(?!.*vision).*q_proj$",
    r"(?:.*?(?:vision|patch).*?(?:attn|mlp).*?(?:q_proj|k_proj))|(?:\bmodel\.layers\.[\d]"
    r"{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"model\.layers\.(?:[0-9]|1[0-5])\..*(?<!k)_proj",
]


@pytest.mark.parametrize("text", OF_PEFT)
def test_expressions_as_people_write_them(text):
    names = [
        f"{model}.layers.{i}.{part}_proj"
        for model in ("model", "vision.model")
        for i in (0, 1, 7, 15, 16)
        for part in ("self_attn.q", "self_attn.k", "mlp.up")
    ]
    found = [n for n in names if Regex(text).fullmatch(n)]
    assert found == [n for n in names if re.fullmatch(text, n)]
    assert 0 < len(found) < len(names)


BOMBS = [
    r"(([a-z0-9_.]+)+)+!",
    r"(a|a)*b",
    r"(.*.*.*)*x",
    r"(?:.?){500}!",
    "(" * 5 + ".?" + "){50}" * 5 + "!",
    r"^(?!((.+)+)+!).*q_proj",
    r"((?:(?=(.*)*y).)*)*!",
    "(?=.*.)" * 1000 + ".*",
    ".*a" * 1000 + "!",
    "|".join(f"model.layers.{i}.q" for i in range(4000)),
]


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_no_expression_takes_long(text):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)] + ["a" * 999]
    with promptly():
        try:
            regex = Regex(text, "target_modules 'x'")
            assert sum(map(regex.fullmatch, names)) in (0, 1000)
        except flora.LoraError as error:
            assert str(error).startswith("target_modules 'x' takes too long")  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a(", "without its end"),
        ("a)", "unbalanced"),
        ("*a", "nothing to repeat"),
        ("a**", "nothing to repeat"),
        ("^*", "nothing to repeat"),
        ("[a", "a set without an end"),
        ("[z-a]", "bad character range"),
        (r"\y", "bad escape"),
        ("a{3,2}", "above the most"),
        ("a{9999999999}", "nine digits"),
        (r"(a)\1", "backreference"),
        ("(?P<x>a)(?P=x)", "does not match"),
        ("(a)?(?(1)b|c)", "does not match"),
        ("(?>a)", "does not match"),
        ("a*+", "possessive"),
        ("a(?i)b", "does not match"),
        ("(?x)a", "does not match"),
        ("a\n", "printable"),
        ("(" * 99 + ")" * 99, "parentheses"),
        ("(?i)[\\x00-\\U0010ffff]", "together"),
        ("(?a-u:b)", "does not match"),
    ],
)
def test_what_is_no_expression_is_refused(text, why):
    with pytest.raises(Invalid, match=re.escape(why)):
        Regex(text)


def test_names_are_bounded():
    with pytest.raises(flora.LoraError, match="1,001 characters; expected"):
        Regex(".*").match("a" * 1001)
    with pytest.raises(flora.LoraError, match=r"'a\\x1b' is a name"):
        Regex(".*").match("a\x1b")


KEYS = ["up", "^0.up", r"1\.up", "0.up", "(0|1).down", "d.wn", "n", "1.down", r"own$"]
NAMES = ["up", "0.up", "x.0.up", "1.up", "x.1xup", "0.down", "x.2.down", "a.n", "an"]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_key_that_covers_the_end_of_a_name_counts(name):
    def covers(key):
        return re.match(rf"(.*\.)?({key})$", name) is not None

    for order in (KEYS, KEYS[::-1]):
        patterns = Patterns("rank_pattern", order, Steps())
        wanted = [k for k in order if covers(k)]
        assert patterns.first(name) == (wanted[0] if wanted else None)
        assert patterns.all(name) == {i for i, k in enumerate(order) if covers(k)}
