"""examples/smollm2_arms.py: its arithmetic, and what the page quotes of its results."""

import json
import math
import pathlib
import types

import pytest
import smollm2_arms as arms
from scipy import stats

ROOT = pathlib.Path(arms.__file__).parent
RUNS = ROOT / "results" / "smollm2_runs.csv"


def row(arm, rate, seed, exact, train_nats):
    scores = {"exact": exact, "choice": exact, "nats": 1.0}
    return arms._row(arm, rate, seed, scores, train_nats, 3.0)


ROWS = [
    row(arms.BASE, 0.0, 0, 0.0, 5.0),
    row("LoRA", 7e-4, 0, 0.9, 0.3),  # held-out answers choose nothing
    row("LoRA", 2e-3, 0, 0.8, 0.2),
    row("LoRA", 2e-3, 1, 0.7, 0.2),
    row("LoRA", 2e-3, 2, 0.6, 0.2),
]


def test_intervals_are_of_the_seeds_at_the_best_rate():
    base, lora = arms.summary(ROWS)
    assert (base["arm"], base["seeds"]) == (arms.BASE, 1)
    assert math.isnan(base["exact_half"])
    assert (lora["rate"], lora["seeds"], lora["exact"]) == (2e-3, 3, 0.7)
    low, _ = stats.t.interval(0.95, 2, 0.7, 0.1 / math.sqrt(3))
    assert lora["exact_half"] == pytest.approx(0.7 - low, abs=1e-4)


def test_what_is_there_is_not_run_again():
    rates = arms.ARMS["LoRA"][1]
    assert [*arms.wanted(["LoRA"], 1, [])] == [("LoRA", x, 0) for x in rates]
    assert [*arms.wanted(["LoRA"], 1, ROWS)] == [("LoRA", rates[2], 0)]
    ahead = [*ROWS, row("LoRA", rates[2], 0, 0.1, 9.0)]
    assert [*arms.wanted(["LoRA"], 4, ahead)] == [("LoRA", 2e-3, 3)]


def test_a_run_becomes_a_row(monkeypatch):
    found = {
        "held_out": {
            "0": {"exact": 0.0, "choice": 0.5, "nats": 5.0},
            "12": {"exact": 0.8, "choice": 0.8, "nats": 0.2},
        },
        "train_loss": [5.0, 0.1], "other": [0.0, math.log(2)], "parameters": 7,
        "bytes": 2**20, "memory": 2**31, "seconds": {"1": [9.0, 4.0], "2": [1.0, 2.0]},
    }  # fmt: skip
    asked = []

    def run(command, **_):
        asked.extend(command)
        out = pathlib.Path(command[command.index("--out") + 1])
        (out / "results.json").write_text(json.dumps(found))

    monkeypatch.setattr(arms, "subprocess", types.SimpleNamespace(run=run, DEVNULL=0))
    base, mine = arms.one("full", 1e-4, 2, ["--length", "64"], base=True)
    assert (base["choice"], base["other_perplexity"]) == (0.5, 1.0)
    cost = {"trained": 7, "MiB": 1.0, "cpu_seconds": 3.0, "GiB": 2.0}
    assert mine == row("full", 1e-4, 2, 0.8, 0.1) | cost | {
        "nats": 0.2,
        "other_perplexity": 2.0,
    }
    for option in ("--full", "--learning-rate 0.0001", "--seed 2", "--length 64"):
        assert option in " ".join(asked)


def test_the_page_has_the_table():
    table = arms.summary(arms.read(RUNS))
    kept = arms.read(RUNS.with_name("smollm2.csv"))
    assert [{k: str(x) for k, x in r.items()} for r in table] == kept
    page = (ROOT / "howto" / "language_models.md").read_text().splitlines()
    assert [x for x in arms.markdown(table) if x not in page] == []


def test_the_plot_has_every_arm():
    runs = arms.read(RUNS)
    figure = arms.plot(runs, arms.summary(runs))
    left, right = figure.axes
    names = {x["arm"] for x in runs} - {arms.BASE}
    for axes in (left, right):
        assert {x for x in axes.get_legend_handles_labels()[1]} >= names
