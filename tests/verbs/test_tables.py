"""Tables that print alike on every terminal."""

import sys

from flora._verbs.tables import plain_text, table


def test_columns_are_as_wide_as_what_they_hold_and_aligned():
    text = plain_text(
        table("2 leaves", ("leaf", ">bytes"), [("a/kernel", "12"), ("b", "3,400")])
    )
    assert text.split("\n") == [
        "2 leaves",
        "",
        "  leaf       bytes",
        " ──────────────────",
        "  a/kernel      12",
        "  b          3,400",
    ]


def test_cells_are_text_and_no_markup():
    text = plain_text(table("t", ("leaf",), [("[bold]w[0]/:smile:",)]))
    assert "[bold]w[0]/:smile:" in text


def test_long_cells_fold_and_numbers_never():
    long = "layers/" * 60 + "kernel"
    text = plain_text(table("t", ("leaf", ">parameters"), [(long, "1,234,567")]))
    lines = text.split("\n")
    assert max(map(len, lines)) <= 240
    assert sum("1,234,567" in line for line in lines) == 1
    assert "".join(line[2:].split("  ")[0].strip() for line in lines[4:]) == long


def test_the_text_column_yields_before_numbers_as_wide():
    number = "1" * 20
    columns = ("leaf", *(f">n{i}" for i in range(10)))
    text = plain_text(table("t", columns, [("w" * 20, *[number] * 10)]))
    assert text.count(number) == 10
    assert text.count("w") == 20


def test_cells_of_several_lines_and_no_rows():
    text = plain_text(table("t", ("leaf", "read by"), [("w", "dot\ngather")]))
    assert [line.split() for line in text.split("\n")[-2:]] == [
        ["w", "dot"],
        ["gather"],
    ]
    assert plain_text(table("nothing", ("leaf",), [])).startswith("nothing\n")


def test_the_width_of_the_terminal_does_not_matter(monkeypatch):
    made = table("t", ("leaf",), [("w" * 100,)])
    monkeypatch.setenv("COLUMNS", "20")
    assert "w" * 100 in plain_text(made)


def test_rich_is_imported_where_a_table_is_made():
    """`import flora` alone must not take the time that rich takes."""
    source = sys.modules["flora._verbs.tables"]
    assert not any(
        getattr(v, "__module__", "").startswith("rich") for v in vars(source).values()
    )
