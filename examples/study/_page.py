"""Tables, pictures and the page: CSV files and README.md, which is made from them."""

import csv
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

Row = Mapping[str, Any]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment hands back: `{table: rows}` and a picture."""

    tables: Mapping[str, Sequence[Row]]
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Text:
    """What the page says of an experiment.

    `[[table | column=value; ... | column]]` in the verdict stands for that cell of the
    CSV file: numbers cannot drift from the data.

    Attributes:
      title: its heading.
      claim: what is claimed, and by whom.
      setup: how it is tested.
      captions: `{table: what its columns mean}`.
      verdict: what came out.
    """

    title: str
    claim: str
    setup: str
    captions: Mapping[str, str]
    verdict: str


def panels(count: int, *, width: float = 3.3, height: float = 3.0) -> Any:
    """A figure and its axes side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
    return figure, axes


def label(ax: Axes, title: str, x: str, y: str, scale: str = "log") -> None:
    """Names a panel; both axes logarithmic unless told."""
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.set(xscale=scale, yscale=scale)
    ax.xaxis.set_minor_formatter(NullFormatter())


def rounded(value: Any) -> str:
    """A cell: three or four digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "" if math.isnan(value) else "diverged"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """One table, in the older one's place; numbers with four significant digits."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            )
    new.replace(path)


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """Its rows, as they stand."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(folder: pathlib.Path, name: str, result: Result) -> None:
    """Writes the CSV files and the picture of an experiment."""
    for table, rows in result.tables.items():
        write_csv(folder / f"{name}_{table}.csv", rows)
    result.figure.savefig(folder / f"{name}.png", dpi=90)


def page(texts: Mapping[str, Text], folder: pathlib.Path, link: str, head: str) -> str:
    """README.md, from the CSV files in `folder`; pictures are at `link`."""
    parts = [head.strip()]
    for name, text in texts.items():
        if not (folder / f"{name}.png").exists():
            continue
        files = {t: folder / f"{name}_{t}.csv" for t in text.captions}
        tables = {t: read_csv(file) for t, file in files.items()}
        parts.append(f"## {text.title}")
        parts.append(f"**Claim.** {_flat(text.claim)}")
        parts.append(f"**Setup.** {_flat(text.setup)} (`{name}.py`)")
        for table, rows in tables.items():
            parts.append(_flat(text.captions[table]))
            parts.append(markdown(rows))
        parts.append(f"![{text.title}]({link}{name}.png)")
        parts.append(f"**Verdict.** {with_numbers(_flat(text.verdict), tables)}")
    meta = folder / "meta.csv"
    if meta.exists():
        rows = read_csv(meta)
        total = sum(float(row["cpu_minutes"]) for row in rows)
        parts += ["## Where these numbers were made", markdown(rows)]
        parts.append(
            f"In all {total:.1f} minutes of CPU time, both cores together. Wall-clock "
            "time is what it was beside other work on the machine (load)."
        )
    return "\n\n".join(parts) + "\n"


def _flat(text: str) -> str:
    return " ".join(text.split())


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in markdown; a column and its `_low`, `_high` become one."""
    names = [n for n in rows[0] if not re.search("_(low|high)$", n)]
    if all(not row.get("edge") for row in rows):
        names = [n for n in names if n != "edge"]
    lines = ["| " + " | ".join(n.replace("_", " ") for n in names) + " |"]
    lines.append("|" + "---|" * len(names))
    for row in rows:
        lines.append("| " + " | ".join(cell(row, n) for n in names) + " |")
    return "\n".join(lines)


def cell(row: Mapping[str, str], name: str) -> str:
    """The text of a cell, with its interval where there is one."""
    if f"{name}_low" not in row:
        return _number(row[name])
    if row[name] == "nan":
        return "diverged"
    low, high = _number(row[f"{name}_low"]), _number(row[f"{name}_high"])
    own = _number(row[name])
    return own if low == high else f"{own} ({low} to {high})"


def _number(text: str) -> str:
    try:
        return text if re.fullmatch(r"-?\d+", text) else rounded(float(text))
    except ValueError:
        return text


def with_numbers(text: str, tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The verdict with the cells it names.

    Raises:
      KeyError: a name is of no table or column, or of none or several rows.
    """

    def look_up(match: re.Match) -> str:
        table, where, column = (part.strip() for part in match[1].split("|"))
        wanted = dict(pair.strip().split("=", 1) for pair in where.split(";"))
        rows = [
            row for row in tables[table] if all(row[k] == v for k, v in wanted.items())
        ]
        if len(rows) != 1:
            raise KeyError(f"[[{match[1]}]] names {len(rows)} rows of {table}.")
        return _number(rows[0][column])

    return re.sub(r"\[\[(.+?)\]\]", look_up, text)
