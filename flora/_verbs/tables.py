"""Human-readable tables, made with rich."""

import io
from collections.abc import Sequence
from typing import Any

_WIDTH = 240  # characters; a table takes what it needs, up to these


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A rich table; columns that begin with '>' are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(
            name.lstrip(">"),
            justify="right" if name[0] == ">" else "left",
            no_wrap=name[0] == ">",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plain_text(report: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH).print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))
