"""Tables and options that the scripts share; they import it as a sibling module."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata, util

import jax
from rich.console import Console
from rich.table import Table

Results = dict[str, dict[str, float] | str]


def versions(*others: str) -> str:
    """The versions and the platform of the numbers, `others` where installed."""
    found = [f"{x} {metadata.version(x)}" for x in ("jax", "jaxlib", "flax")]
    found += [f"{x} {metadata.version(x)}" for x in others if installed(x)]
    return f"{', '.join(found)} on {jax.default_backend()}"


def run(
    title: str, sizes: Mapping[str, int], measure: Callable, table: Callable
) -> None:
    """Parses sizes from the command line, measures, and prints what `table` makes."""
    parser = argparse.ArgumentParser(description=title)
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args, console = parser.parse_args(), Console()
    console.print(f"{versions()}; {vars(args)}", highlight=False)
    console.print(table(measure(**vars(args))))


def peak_bytes() -> int:
    """The most memory that this process has had resident.

    Linux tells it per program; `getrusage` would count the parent's too.  0 where
    nothing says so.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def installed(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(util.find_spec(x) is not None for x in packages)


def table(
    title: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str] | str]]
) -> Table:
    """A table of arms: the first column is text, the others are numbers.

    Args:
      title: above it.
      columns: the names of the columns, that of the arms included.
      rows: `(arm, cells)`; a string instead of cells is a reason that there are none.
    """
    result = Table(title=title, title_justify="left")
    result.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        result.add_column(name, justify="right")
    refused = {arm: cells for arm, cells in rows if isinstance(cells, str)}
    for arm, cells in rows:
        result.add_row(
            arm, *(cells if arm not in refused else ["—"] * len(columns[1:]))
        )
    if refused:
        result.caption = "\n".join(f"{arm}: {why}" for arm, why in refused.items())
        result.caption_justify = "left"
    return result


def time_table(title: str, results: Results) -> Table:
    """Wall-clock as rows."""

    def row(x: dict[str, float] | str) -> list[str] | str:
        if isinstance(x, str):
            return x
        spread = f"{x['lower']:.3f} to {x['upper']:.3f}"
        return [f"{x['ms']:.2f}", f"{x['to_frozen']:.3f}", spread]

    columns = ("arm", "median ms", "to frozen", "quartiles")
    return table(title, columns, [(k, row(v)) for k, v in results.items()])
