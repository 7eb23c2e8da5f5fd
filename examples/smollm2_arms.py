"""Ways to fine-tune SmolLM2-135M on the same data and tokens: what each one brings.

    python examples/smollm2_arms.py --rounds 3

Each run is `finetune_smollm2.py` in a process of its own, so that its peak of memory is
its own; an arm is a combination of options.  Round 0 tries an arm's rates; later rounds
repeat the best of these with other seeds: another order of the data, another A.
The best rate is that of the lowest loss on training rows, most of which no run comes
to; held-out answers choose nothing.

Runs are kept in `runs.csv` as they come, and not run again: a study that was stopped
goes on.  The table and the plot are of what is there.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import finetune_smollm2
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

HERE = pathlib.Path(__file__).parent
ARMS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "LoRA": ([], (7e-4, 2e-3, 6e-3)),
    "full": (["--full"], (1e-5, 3e-5, 1e-4, 3e-4)),
    "last layer": (
        ["--unroll", "--target", "--train-whole", "layers/29/*"],
        (3e-4, 1e-3, 3e-3),
    ),
    "DoRA": (["--dora"], (2e-3,)),
    "QLoRA, int8": (["--quantize", "int8"], (2e-3,)),
    "QLoRA, nf4": (["--quantize", "nf4"], (2e-3,)),
}
BASE = "as it is"
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then writes the table and the plot."""
    parser = argparse.ArgumentParser(description="Arms of a fine-tuning of SmolLM2.")
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="seeds; 0: only the table and the plot")
    add("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    add("--out", default=str(HERE / "results"))
    args, rest = parser.parse_known_args(argv)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read(out / "smollm2_runs.csv")
    for arm, rate, seed in wanted(args.arms, args.rounds, rows):
        rows += [*one(arm, rate, seed, rest, base=not rows)]
        write(out / "smollm2_runs.csv", rows)
    table = summary(rows)
    write(out / "smollm2.csv", table)
    plot(rows, table).savefig(out / "smollm2.png", dpi=120)
    print("\n".join(markdown(table)))


def wanted(
    arms: Sequence[str], rounds: int, rows: list[Row]
) -> Iterator[tuple[str, float, int]]:
    """The runs that are not in the rows yet, round by round."""

    def there(arm: str, rate: float, seed: int) -> bool:
        key = arm, rate, seed
        return any((x["arm"], float(x["rate"]), int(x["seed"])) == key for x in rows)

    for seed in range(rounds):
        for arm in arms:
            for rate in ARMS[arm][1] if seed == 0 else [best(rows, arm)]:
                if not there(arm, rate, seed):
                    yield arm, rate, seed


def best(rows: list[Row], arm: str) -> float:
    """The rate of the lowest loss on training rows, of round 0."""
    mine = [x for x in rows if x["arm"] == arm and int(x["seed"]) == 0]
    return float(min(mine, key=lambda x: float(x["train_nats"]))["rate"])


def one(
    arm: str, rate: float, seed: int, rest: Sequence[str], *, base: bool
) -> Iterator[Row]:
    """The row of a run; before it that of the model as it is, if nothing has it yet."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--out", out, "--learning-rate", str(rate), "--seed", str(seed)]
        options += ["--eval-every", "1000" if base else "0", *ARMS[arm][0], *rest]
        script, cache = finetune_smollm2.__file__, f"{tempfile.gettempdir()}/flora-jax"
        path = {"PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}
        print(f"{arm}, rate {rate}, seed {seed}", flush=True)
        subprocess.run(
            [sys.executable, script, *options],
            check=True,
            stdout=subprocess.DEVNULL,
            env={"JAX_COMPILATION_CACHE_DIR": cache} | os.environ | path,
        )
        found = json.loads((pathlib.Path(out) / "results.json").read_text())
    scores = [*found["held_out"].values()]
    if base:
        loss, other = found["train_loss"][0], found["other"][0]
        yield _row(BASE, 0.0, 0, scores[0], loss, other)
    loss, other = found["train_loss"][1], found["other"][1]
    clock = [x for _, x in found["seconds"].values()]
    cost = {
        "trained": found["parameters"],
        "MiB": round(found["bytes"] / 2**20, 2),
        "cpu_seconds": round(float(np.median(clock)), 2),
        "GiB": round(found["memory"] / 2**30, 2),
    }
    yield _row(arm, rate, seed, scores[-1], loss, other) | cost


def _row(
    arm: str,
    rate: float,
    seed: int,
    scores: Mapping[str, float],
    loss: float,
    other: float,
) -> Row:
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "exact": scores["exact"],
        "choice": scores["choice"],
        "nats": round(scores["nats"], 5),
        "train_nats": round(loss, 5),
        "other_perplexity": round(math.exp(other), 3),
        "trained": 0,
        "MiB": 0,
        "cpu_seconds": 0,
        "GiB": 0,
    }


def summary(rows: list[Row]) -> list[Row]:
    """A row an arm, at its best rate: means over seeds, and 95 % intervals."""
    table = []
    for arm in dict.fromkeys(x["arm"] for x in rows):
        rate = best(rows, arm)
        mine = [x for x in rows if x["arm"] == arm and float(x["rate"]) == rate]
        row = {"arm": arm, "rate": rate, "seeds": len(mine)}
        for name in ("exact", "choice", "nats", "other_perplexity"):
            values = [float(x[name]) for x in mine]
            row |= {name: round(float(np.mean(values)), 4)}
            row |= {f"{name}_half": round(half_width(values), 4)}
        for name in ("trained", "MiB", "cpu_seconds", "GiB"):
            row[name] = float(np.median([float(x[name]) for x in mine]))
        table.append(row)
    return table


def markdown(table: list[Row]) -> list[str]:
    """The table as lines of Markdown; ± is half of a 95 % interval over seeds."""
    lines = [
        "| arm | rate | seeds | exact | likelier word | perplexity of other text "
        "| trained | adapter | CPU seconds a step | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        rate, cost = "", ["", "", "", ""]
        if row["arm"] != BASE:
            rate, size = f"{row['rate']:g}", row["MiB"]
            cost = [f"{row['trained'] / 1e6:.2f} M", f"{size:.1f} MiB"]
            cost += [f"{row['cpu_seconds']:.1f}", f"{row['GiB']:.1f} GiB"]
        told = [
            _told(100 * row[name], 100 * row[f"{name}_half"], " %")
            for name in ("exact", "choice")
        ]
        told.append(_told(row["other_perplexity"], row["other_perplexity_half"], ""))
        cells = [row["arm"], rate, str(row["seeds"]), *told, *cost]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _told(mean: float, half: float, unit: str) -> str:
    return f"{mean:.1f}{unit}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}{unit}"


def half_width(values: Sequence[float]) -> float:
    """Half of the mean's 95 % interval (Student's t); NaN of a single value."""
    if len(values) < 2:
        return math.nan
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def plot(rows: list[Row], table: list[Row]) -> Figure:
    """Held-out answers by rate; at the best rates, what was learned and forgotten."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip(ARMS, COLORS, strict=True))
    base = next(x for x in rows if x["arm"] == BASE)
    left.axhline(float(base["choice"]), color="0.5", ls="--", lw=1)
    left.text(1, float(base["choice"]), "as it is, likelier of the two words ",
              transform=left.get_yaxis_transform(), ha="right", va="bottom",
              fontsize=8, color="0.4")  # fmt: skip
    for row in table:
        arm, color = row["arm"], colors.get(row["arm"])
        if color is None:
            continue
        mine = [x for x in rows if x["arm"] == arm]
        rate, exact, other = (
            np.array([float(x[name]) for x in mine])
            for name in ("rate", "exact", "other_perplexity")
        )
        grid = np.unique(rate)
        left.plot(rate, exact, "o", color=color, ms=5, label=arm)
        left.plot(grid, [exact[rate == x].mean() for x in grid], color=color, lw=1)
        right.plot(exact, other, "o", color=color, ms=4, alpha=0.4)
        error = [0 if math.isnan(row[name]) else row[name] for name in HALVES]
        where = row["exact"], row["other_perplexity"]
        style = {"fmt": "D", "color": color, "capsize": 2, "label": arm}
        right.errorbar(*where, xerr=error[0], yerr=error[1], **style)
    left.set(xscale="log", xlabel="learning rate", ylabel="exact held-out answers")
    right.axhline(float(base["other_perplexity"]), color="0.5", ls="--", lw=1)
    right.text(0, float(base["other_perplexity"]), " as it is", fontsize=8,
               transform=right.get_yaxis_transform(), ha="left", va="bottom",
               color="0.4")  # fmt: skip
    right.set(xlabel="exact held-out answers (diamonds: at the best rate)",
              ylabel="perplexity of Python's reference", xlim=(None, 1),
              yscale="log")  # fmt: skip
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


HALVES = "exact_half", "other_perplexity_half"


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a CSV file; none where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """The rows as a CSV file, which is replaced in one step."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


if __name__ == "__main__":
    main()
