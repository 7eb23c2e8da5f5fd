"""JSON of any kind is parsed or refused, and its form is told."""

import json

import pytest

from flora._files.parsed import install, misfit, of_later, parsed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("9" * 5_000, "Exceeds the limit"),
        (b'"\xff"', "codec can't decode"),
        ("", "Expecting value"),
    ],
)
def test_text_that_is_no_json_is_a_value_error(text, why):
    with pytest.raises(ValueError, match=why):
        parsed(text)


def test_many_repeated_names_take_no_time():
    text = json.dumps({f"k{i}": 0 for i in range(100_000)})[:-1] + ', "k7": 1, "k8": 2}'
    with pytest.raises(ValueError, match="the key 'k7' is there twice"):
        parsed(text)
    assert parsed(b'{"a": [1, 2.5, null, true, "x"]}') == {
        "a": [1, 2.5, None, True, "x"]
    }


FORM = {
    "n": int,
    "x": (int, float),
    "list": [str],
    "any": {str: {"k": bool}},
    "o": object,
}
GOOD = {"n": 1, "x": 1, "list": [], "any": {"p": {"k": True}}, "o": False, "more": 0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, ""),
        ({"x": 0.5, "list": ["a", "b"], "any": {}}, ""),
        ({"n": True}, "n is True, not an int"),
        ({"n": 1.0}, "n is 1.0, not an int"),
        ({"x": "1"}, "x is '1', not a float"),
        ({"list": "ab"}, "list is 'ab', not a list"),
        ({"list": ["a", 1]}, "list[1] is 1, not text"),
        ({"any": []}, "any is [], not an object"),
        ({"any": {"p": {}}}, "any.p lacks 'k'"),
        ({"any": {"p": {"k": 1}}}, "any.p.k is 1, not true or false"),
    ],
)
def test_the_first_thing_that_does_not_fit_is_told(change, text):
    assert misfit(GOOD | change, FORM) == text


def test_what_a_form_lacks_and_what_is_none():
    assert misfit([], {"a": int}) == "it is [], not an object"
    assert misfit({}, {"a": int, "b": int}) == "it lacks 'a', 'b'"


@pytest.mark.parametrize("number", [1, 0, -5, True, 1.5, "2", None])
def test_formats_that_are_no_later_ones(number):
    assert of_later({"format": number, "flora": "9"}, 1) == ""


def test_a_later_format_says_what_to_install():
    said = of_later({"format": 3, "flora": "0.9.1"}, 2)
    assert "was written by flora 0.9.1 in format 3; flora 0" in said
    assert said.endswith("reads formats 1 to 2. " + install("0.9.1"))
    assert "pip install 'flora-jax>=0.9.1'" in said
    for version in (None, 3, "", "1; rm", "9" * 99, "\x1b"):
        assert install(version) == "Install the latest: pip install -U flora-jax."
