"""Measures the rows of the tables of decoders in README.md, and writes them there.

    pip install libtpu
    python examples/benchmarks/table.py --rows "8B*" --write

Each row is a line of Markdown that begins with its name.  Cells are cycles of flora to
those of the frozen model, a loop's body counted once, and in brackets the temporary
memory of the two; rows of quantized bases are to the step on bfloat16.  One step is
compiled after the other, and a row is written as soon as its cells are there.  The
tests hold what the page says (`tests/models/test_tpu.py`).
"""

import argparse
import dataclasses
import fnmatch
import pathlib
import re
import time
from typing import Any

import _tpu
import llama
from _decoder import LIKE, Sizes
from llama import How

PAGE = pathlib.Path(__file__).with_name("README.md")


def sizes_like(name: str, **more: Any) -> Sizes:
    """Four layers of that width on 2 x 4096 tokens."""
    return dataclasses.replace(LIKE[name], **{"layers": 4, "tokens": 8192, **more})


LINEAR = How(attention="none", head="none")
WRITTEN = How(head="frozen")
EIGHT = sizes_like("8b")


def stored(qtype: str, block: int | None) -> tuple[Sizes, How]:
    """The first row on a quantized base."""
    return EIGHT, dataclasses.replace(LINEAR, base=qtype, block=block)


ROWS: dict[str, tuple[Sizes, How]] = {
    "8B, linear layers": (EIGHT, LINEAR),
    "8B, attention written out, frozen head": (EIGHT, WRITTEN),
    "8B, rank 64": (sizes_like("8b", rank=64), LINEAR),
    "8B, rank 256": (sizes_like("8b", rank=256), LINEAR),
    "8B, DoRA": (EIGHT, dataclasses.replace(LINEAR, variant="dora")),
    "8B, 2048 tokens": (sizes_like("8b", tokens=2048), LINEAR),
    "8B, 32768 tokens": (sizes_like("8b", tokens=32768, sequences=8), LINEAR),
    "8B, `direct`": (EIGHT, dataclasses.replace(LINEAR, form="direct")),
    "70B, linear layers": (sizes_like("70b"), LINEAR),
    "Gemma 4 31B, linear layers": (sizes_like("gemma4-31b"), LINEAR),
    "8B, adapted head in blocks of 512 tokens": (
        EIGHT,
        How(head="adapted", head_block=512),
    ),
    "8B, packed sequences": (EIGHT, dataclasses.replace(WRITTEN, packed=True)),
    "8B, gradients of 2 batches": (
        EIGHT,
        dataclasses.replace(LINEAR, accumulate=2),
    ),
    "8B, remat keeps products": (EIGHT, dataclasses.replace(LINEAR, policy="dots")),
    "8B, remat offloads products": (
        EIGHT,
        dataclasses.replace(LINEAR, policy="offload"),
    ),
    "8B, flash attention": (EIGHT, dataclasses.replace(LINEAR, attention="flash")),
    "8B on int8, a scale a column": stored("int8", None),
    "8B on int4, a scale a column": stored("int4", None),
    "8B on float8_e4m3fn, a scale a column": stored("float8_e4m3fn", None),
    "8B on int4, blocks of 64": stored("int4", 64),
    "8B on nf4, blocks of 64": stored("nf4", 64),
}

_known: dict[tuple[Any, ...], _tpu.Costs] = {}


def cell(chip: str, row: str) -> tuple[float, float]:
    """The ratios of cycles and of temporary memory."""
    sizes, how = ROWS[row]
    ours = f"flora {how.form}"
    last = ours if how.base == "bfloat16" else f"{ours}, {how.base}"
    plain = dataclasses.replace(how, form="", variant="", base="", block=None)
    # What an arm depends on: frozen models have neither rank nor form.
    keys = {
        "frozen": (chip, dataclasses.replace(sizes, rank=0), plain),
        ours: (chip, sizes, dataclasses.replace(how, base="bfloat16", block=64)),
    }
    known = {arm: _known[key] for arm, key in keys.items() if key in _known}
    found = llama.measure(chip, sizes, how, [ours, last], known)
    _known.update({key: found[arm] for arm, key in keys.items()})
    to = found["frozen" if last == ours else ours]
    cycles, temp = (found[last][k] / to[k] for k in ("cycles_once", "temp_bytes"))
    return cycles, temp


def published(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """`{(row, chip): (cycles, memory)}` of the page's cells that have numbers."""
    found = {}
    for line in text.splitlines():
        name, *cells = (x.strip() for x in line.strip("|").split("|"))
        for chip, told in zip(_tpu.CHIPS, cells, strict=False):
            if name in ROWS and (match := re.match(r"([\d.]+) \(([\d.]+)\)", told)):
                found[name, chip] = float(match[1]), float(match[2])
    return found


def line(row: str, cells: dict[tuple[str, str], tuple[float, float]]) -> str:
    """A row in Markdown."""
    told = [
        "{:.3f} ({:.2f})".format(*cells[row, chip]) if (row, chip) in cells else ""
        for chip in _tpu.CHIPS
    ]
    return f"| {' | '.join([row, *told])} |"


def main() -> None:
    """Parses the options, measures, prints, writes."""
    parser = argparse.ArgumentParser(description="The tables of decoders.")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs")
    parser.add_argument("--chips", default=",".join(_tpu.CHIPS))
    parser.add_argument("--write", action="store_true", help="into README.md")
    args = parser.parse_args()
    wanted = [x for x in ROWS if any(fnmatch.fnmatch(x, y) for y in args.rows)]
    for row in wanted:
        for chip in args.chips.split(","):
            start, cells = time.perf_counter(), published(PAGE.read_text())
            try:
                cells[row, chip] = cell(chip, row)
            except Exception as error:  # what the compiler refuses is a result
                print(f"{row}, {chip}: {error}"[:500], flush=True)
                continue
            seconds = time.perf_counter() - start
            print(f"{line(row, cells)} {chip} took {seconds:.0f} s", flush=True)
            if args.write:
                lines = PAGE.read_text().splitlines()
                new = [
                    line(row, cells) if x.startswith(f"| {row} |") else x for x in lines
                ]
                PAGE.write_text("\n".join(new) + "\n")


if __name__ == "__main__":
    main()
