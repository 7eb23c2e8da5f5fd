"""One error lists every problem."""

import pytest

from flora._tree.errors import (
    LoraError,
    LoraTypeError,
    Unfactorable,
    fail,
    human_bytes,
)


def message(problems, **kinds):
    with pytest.raises(LoraError) as error:
        fail(problems, **kinds)
    return str(error.value)


def test_no_problem_is_no_error():
    assert fail([]) is None
    assert fail(p for p in ()) is None


def test_one_problem_is_the_message_and_several_are_a_list():
    assert message(["a is 3"]) == "a is 3"
    assert message(iter(["a is 3", "b is 4"])) == "2 problems:\n  - a is 3\n  - b is 4"


@pytest.mark.parametrize(("count", "more"), [(20, 0), (21, 1), (148, 128)])
def test_twenty_problems_are_shown(count, more):
    lines = message(f"p{i}" for i in range(count)).split("\n")
    assert lines[0] == f"{count} problems:"
    assert lines[1:21] == [f"  - p{i}" for i in range(20)]
    assert lines[21:] == ([f"  - and {more} more"] if more else [])


def test_messages_are_bounded_and_show_no_control_characters():
    assert message(["a" * 10**6 + " end"]).startswith("a" * 100)
    assert message(["a" * 10**6 + " end"]).endswith(
        "999,850 more … " + "a" * 25 + " end"
    )
    for many in (["word " * 10**5 + "end"], [f"{i} " * 400 for i in range(99)]):
        text = message(many)
        assert 1_900 < len(text) <= 4_000
        assert text.endswith((" end", f"and {99 - text.count('  - ') + 1} more"))
    assert message(["\x1b[2J \ud800 \u202e \u2028 é\n\x00"]) == (
        r"\x1b[2J \ud800 \u202e \u2028 é" + "\n" + r"\x00"
    )
    assert str(LoraError("x\r")) == r"x\r"
    assert len(str(LoraError("x " * 9_999))) <= 4_000


def test_errors_can_be_caught_as_what_python_would_raise():
    with pytest.raises(TypeError, match="wrong kind"):
        fail(["wrong kind"], LoraTypeError)
    with pytest.raises(ValueError, match="wrong kind"):
        fail(["wrong kind"])
    assert not issubclass(LoraError, TypeError)
    # What a rule raises must never pass for an error of the user's.
    assert not issubclass(Unfactorable, ValueError)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (2**30, "1.0 GiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_byte_counts_as_text(count, text):
    assert human_bytes(count) == text
