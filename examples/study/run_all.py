"""Runs the study: experiments on CPU, their tables, pictures and the page.

    python examples/study/run_all.py            # all of it, and README.md
    python examples/study/run_all.py e04 e05    # some of it
    python examples/study/run_all.py --smoke --out /tmp/study
    python examples/study/run_all.py --page     # README.md from the CSV files alone

Seeds are fixed.  Results go to `results/` beside this file unless `--out` says
otherwise.
"""

import argparse
import dataclasses
import importlib
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import _page
import jax

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))  # minilm, finetune_minilm and fetch lie there
NAMES = (
    "e01_initialization",
    "e02_rank_exponents",
    "e03_alpha",
    "e04_invariance",
    "e05_floors",
    "e06_full",
    "e07_spectral",
    "e08_lora_plus",
    "e09_dora",
    "e10_merging",
    "e11_real_full",
    "e12_real_starts",
    "e13_real_scale",
    "e14_real_quantized",
    "e15_real_variants",
    "e16_real_language",
    "e17_real_language_scale",
)
HEAD = """
# Claims about LoRA, tested

What is said of LoRA, tried on a CPU at small sizes. Every experiment has fixed seeds,
five repetitions or more with 95 % intervals (Student's t over seeds; of logarithms for
losses and rates), and one grid of learning rates for all of its arms; an arm is judged
at its own best rate. Tables are the CSV files in `results/`, and so are the numbers in
the verdicts. What holds here need not hold for a language model; where a claim is about
such a model, the verdict says what this can and cannot show.

Experiments 1 to 10 are toys, or models trained within minutes. Those from 11 on ask the
same of pretrained weights: MiniLM (22.6 million parameters; fetched once, see
[encoders](../howto/encoders.md)) learns whether a film review's sentence is praise,
from 384 sentences in 24 steps of Adam, three seeds, each with sentences of its own. The
head starts as a probe of the frozen features. Rates are a factor of about 3 apart and
chosen on validation loss; a grid grows until the best has a worse one on both sides, or
is marked "edge". "Similarity" is what is not forgotten: the correlation of the cosine
similarities of all pairs of 400 sentences of newspaper editorials, which nothing is
trained on, with those of the pretrained encoder (1 before training); "same editorial"
is how often the nearest sentence is of the same one. Experiments 16 and 17 are about a
language model, SmolLM2-135M-Instruct (fetched once, see
[language models](../howto/language_models.md)).

    python examples/study/run_all.py            # everything: results/ and this page
    python examples/study/run_all.py e05        # one experiment
    python examples/study/run_all.py e0 e10     # the toys, which fetch nothing
    python examples/study/run_all.py --smoke --out /tmp/study

Everywhere y = x (W + s A B), s = alpha/rank, A `[in, rank]`, B `[rank, out]`.
"standard" is A random and B = 0, "reversed" A = 0 and B random. The best rate is chosen
on the same seeds that are reported, which flatters every arm alike. "edge" marks a best
rate at the end of its grid.
"""


def chosen(names: Sequence[str]) -> list[str]:
    """The experiments whose names start with one of these; all of them for none.

    Raises:
      SystemExit: one of them is the start of no name.
    """
    if wrong := [x for x in names if not any(n.startswith(x) for n in NAMES)]:
        raise SystemExit(
            f"No experiment is named {wrong}. There are {', '.join(NAMES)}."
        )
    return [n for n in NAMES if not names or any(n.startswith(x) for x in names)]


def measured(seconds: float, of_cpu: float) -> dict[str, Any]:
    """What an experiment took, compilation included, and where."""
    versions = {x: metadata.version(x) for x in ("jax", "jaxlib", "flax", "optax")}
    return {
        "minutes": seconds / 60,
        "cpu_minutes": of_cpu / 60,  # of all cores together
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def run(name: str, folder: pathlib.Path, *, smoke: bool) -> dict[str, Any]:
    """Runs one experiment and writes what it found; the row of `meta.csv`."""
    module = importlib.import_module(name)
    began, of_cpu = time.perf_counter(), time.process_time()
    result = module.run(module.SMOKE if smoke else module.FULL)
    _page.save(folder, name, result)
    return {"experiment": name} | measured(
        time.perf_counter() - began, time.process_time() - of_cpu
    )


def write_page(folder: pathlib.Path, *, smoke: bool = False) -> pathlib.Path:
    """README.md: beside this file for the committed results, else in the folder."""
    texts = {name: importlib.import_module(name).TEXT for name in NAMES}
    if smoke:
        nothing = "Tiny sizes show that it runs, and nothing else."
        texts = {k: dataclasses.replace(v, verdict=nothing) for k, v in texts.items()}
    own = folder.resolve() == HERE / "results"
    target = (HERE if own else folder) / "README.md"
    target.write_text(_page.page(texts, folder, "results/" if own else "", HEAD))
    return target


def note(folder: pathlib.Path, row: dict[str, Any]) -> None:
    """Puts a row into `meta.csv` in the place of the same experiment's older one."""
    path = folder / "meta.csv"
    old = _page.read_csv(path) if path.exists() else []
    rows = {r["experiment"]: {k: r.get(k, "") for k in row} for r in (*old, row)}
    _page.write_csv(path, [rows[name] for name in NAMES if name in rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description="Tests claims about LoRA on CPU.")
    parser.add_argument("names", nargs="*", help="such as e01; all by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no evidence")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--page", action="store_true", help="README.md alone")
    options = parser.parse_args(argv)
    if options.smoke and options.out == HERE / "results":
        parser.error("--smoke needs --out: it must not replace the results")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [] if options.page else chosen(options.names):
        row = run(name, options.out, smoke=options.smoke)
        note(options.out, row)
        print(f"{name}: {row['minutes']:.2f} min (load {row['load']:.1f})", flush=True)
        jax.clear_caches()
    print(write_page(options.out, smoke=options.smoke))


if __name__ == "__main__":
    main()
