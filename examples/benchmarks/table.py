"""Measures the rows of the tables of decoders in README.md, and writes them there.

    pip install libtpu
    python examples/benchmarks/table.py --rows "8B*" --write

Each row is a line of Markdown that begins with its name.  Cells are cycles of flora to
those of the frozen model, and in brackets the temporary memory of the two; rows of
quantized bases are to flora's step on bfloat16.  A loop's body counts once, but as
often as it runs where there is work outside of it: a head, DoRA's norms.  One step is
compiled after the other, which takes about a minute each on an idle core (attention
written out: four), and a row is written as soon as its cells are there.  The tests hold
what the page says (`tests/models/test_tpu.py`).
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
from _decoder import Sizes, sizes_like
from llama import How

PAGE = pathlib.Path(__file__).with_name("README.md")


LINEAR = How(attention="none", head="none")
WRITTEN = How(head="frozen")
HEAD = How(head="adapted", head_block=512)
EIGHT = sizes_like("8b")


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row measures: flora on a model, or "full" fine-tuning of it."""

    sizes: Sizes
    how: How = LINEAR
    full: bool = False

    @property
    def ours(self) -> str:
        """The arm on the base in bfloat16."""
        return "full" if self.full else f"flora {self.how.form}"

    @property
    def arms(self) -> tuple[str, str]:
        """The arm, and that which it is to."""
        if self.how.base == "bfloat16":
            return self.ours, "frozen"
        return f"{self.ours}, {self.how.base}", self.ours

    def keys(self, chip: str) -> dict[str, Any]:
        """What the costs depend on: a frozen model has neither rank nor form."""
        how = dataclasses.replace(self.how, base="bfloat16", block=64)
        head = how.head if how.head == "none" else "frozen"
        plain = dataclasses.replace(
            how, form="", variant="", target="", head=head, dropout=0.0
        )
        own = () if self.full else (self.sizes, how)
        return {
            "frozen": (chip, dataclasses.replace(self.sizes, rank=0), plain),
            self.ours: (chip, self.ours, self.sizes, plain, own),
        }


def eight(**how: Any) -> Row:
    """The first row, other than it in something."""
    return Row(EIGHT, dataclasses.replace(LINEAR, **how))


ROWS = {
    "8B, linear layers": Row(EIGHT),
    "the same, full fine-tuning": Row(EIGHT, full=True),
    "the same, `direct`": eight(form="direct"),
    "8B, attention written out, frozen head": Row(EIGHT, WRITTEN),
    "with them, full fine-tuning": Row(EIGHT, WRITTEN, full=True),
    "8B, rank 64": Row(sizes_like("8b", rank=64)),
    "8B, rank 256": Row(sizes_like("8b", rank=256)),
    "8B, DoRA": eight(variant="dora"),
    "8B, dropout of 0.1": eight(dropout=0.1),
    "8B, 2048 tokens": Row(sizes_like("8b", tokens=2048)),
    "8B, 32768 tokens": Row(sizes_like("8b", tokens=32768, sequences=8)),
    "70B, linear layers": Row(sizes_like("70b")),
    "Gemma 4 31B, linear layers": Row(sizes_like("gemma4-31b")),
    "8B, head adapted too": Row(EIGHT, HEAD),
    "8B, packed sequences": Row(EIGHT, dataclasses.replace(WRITTEN, packed=True)),
    "8B, gradients of 2 batches": eight(accumulate=2),
    "8B, remat keeps products": eight(policy="dots"),
    "8B, remat offloads products": eight(policy="offload"),
    "8B, flash attention": eight(attention="flash"),
    "8B on int8, a scale a column": eight(base="int8", block=None),
    "8B on int4, a scale a column": eight(base="int4", block=None),
    "8B on fp8 (e4m3), a scale a column": eight(base="float8_e4m3fn", block=None),
    "8B on int8, blocks of 64": eight(base="int8"),
    "8B on int4, blocks of 64": eight(base="int4"),
    "8B on nf4, blocks of 64": eight(base="nf4"),
}

_known: dict[Any, _tpu.Costs] = {}


def cell(chip: str, name: str) -> tuple[float, float]:
    """The ratios of cycles and of temporary memory."""
    row = ROWS[name]
    arm, to = row.arms
    known = {x: _known[key] for x, key in row.keys(chip).items() if key in _known}
    found = llama.measure(chip, row.sizes, row.how, [row.ours, arm], known)
    _known.update({key: found[x] for x, key in row.keys(chip).items()})
    in_layers = row.how.head == "none" and row.how.variant == "lora"
    cycles = "cycles_once" if in_layers else "cycles"
    one, other = (found[arm][k] / found[to][k] for k in (cycles, "temp_bytes"))
    return one, other


Cells = dict[tuple[str, str], tuple[float, ...]]


def published(text: str) -> Cells:
    """`{(row, chip): (cycles, memory)}` of the page's cells that have numbers."""
    found = {}
    for line in text.splitlines():
        name, *cells = (x.strip() for x in line.strip("|").split("|"))
        for chip, told in zip(_tpu.CHIPS, cells, strict=False):
            numbers = re.findall(r"\d+\.\d+", told)
            if name in ROWS and numbers:
                found[name, chip] = tuple(map(float, numbers))
    return found


def line(row: str, cells: Cells) -> str:
    """A row in Markdown."""
    forms = {0: "", 1: "{:.3f}", 2: "{:.3f} ({:.2f})"}
    found = [cells.get((row, chip), ()) for chip in _tpu.CHIPS]
    told = [forms[len(x)].format(*x) for x in found]
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
