"""Fine-tunes a decoder of the Llama family from a Hugging Face checkpoint.

    python examples/finetune_lm.py --checkpoint llama/ --train chats.jsonl --out run1

Reads config.json, safetensors and tokenizer.json, puts the weights straight onto all
devices (FSDP), packs chats or texts into rows, trains A and B in bfloat16 with remat
and scan, evaluates (nats a token, and the share of answers that are exact), saves
checkpoints (`--resume` goes on), and writes the adapter for flora and, merged, for any
server.  `--full` and `--train-whole` train leaves whole, `--quantize` keeps the base in
fewer bits.  Without `--checkpoint` it first makes a tiny
checkpoint itself, so that it needs no download.

The run fails unless the loss has fallen, the base is still the checkpoint's bit for
bit, and the saved adapter gives the same logits when it is read back.
"""

import argparse
import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lm_tiny
import numpy as np
from benchmarks import _report
from jax.sharding import Mesh
from language_models import hf_llama
from language_models.generation import generator
from language_models.llama import Llama
from lm_data import Text, batch_of, pack, read_examples
from lm_export import export
from lm_report import CONSOLE, Results, progress, tell
from lm_train import (
    evaluation,
    most_trained,
    optimizer,
    put,
    started,
    step_function,
)

import flora
import flora.quantize
import flora.variants
from flora.checkpoint import Checkpointer


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="LoRA of a Llama-family decoder.")
    add = parser.add_argument
    add("--checkpoint", help="a folder of HF's; without it a tiny one is made")
    add("--train", help="JSON lines: messages, prompt and completion, or text")
    add("--eval", help="likewise, held out; without it nothing is evaluated")
    add("--choices", nargs="+", default=[], help="the answers that --eval is about")
    add("--other", help="likewise; what it loses while the model learns something else")
    add("--out", default="finetune_lm", help="the folder for all that is written")
    add("--rank", type=int, default=16)
    add("--alpha", type=float, default=32)
    add("--target", nargs="*", default=["self_attn/*/kernel", "mlp/*/kernel"])
    add("--train-whole", nargs="+", default=[], help="leaves that train whole")
    add("--full", action="store_true", help="every leaf trains whole, none has factors")
    add("--quantize", choices=flora.quantize.QTYPES, help="frozen kernels (QLoRA)")
    add("--form", default="auto", help="of the products; on CPUs 'concat' is faster")
    add("--dora", action="store_true", help="magnitudes train on their own")
    add("--dropout", type=float, default=0.0)
    add("--learning-rate", type=float, default=2e-4)
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="of the gradient's norm")
    add("--warmup", type=int, default=10, help="steps")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8, help="rows on all devices at a time")
    add("--accumulate", type=int, default=1, help="batches a step")
    add("--length", type=int, default=1024, help="tokens a row")
    add("--block", type=int, default=0, help="tokens a row with logits at a time")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--unroll", action="store_true", help="each layer has leaves: layers/3/*")
    add("--remat", default="full", choices=["none", "dots", "full"])
    add("--eval-every", type=int, default=50, help="0: after the last step alone")
    add("--save-every", type=int, default=50, help="0: no checkpoints")
    add("--seed", type=int, default=0)
    add("--prompt", action="append", help="asked before and after; may be repeated")
    add("--new-tokens", type=int, default=48, help="of each answer, at most")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--stop-after", type=int, help="stop at that step, to be resumed")
    add(
        "--merge", action="store_true", help="write the merged model too, in HF's files"
    )
    add("--devices", type=int, default=jax.device_count(), help="how many to use")
    add("--smoke", action="store_true", help="the tiny run, in seconds")
    args = parser.parse_args(argv)
    if not args.checkpoint:
        parser.set_defaults(**(TINY | SMOKE if args.smoke else TINY))
        args = _tiny(parser.parse_args(argv))
    if not args.train:
        parser.error("--checkpoint needs --train data.jsonl as well.")
    if args.batch % args.devices:
        parser.error(f"--batch {args.batch} does not divide by {args.devices} devices.")
    if args.block and args.length % args.block:
        parser.error(f"--length {args.length} does not divide by --block {args.block}.")
    if args.full and (args.quantize or args.dora or args.train_whole):
        parser.error("--full trains all weights, and none has factors or fewer bits.")
    return args


TINY = {"length": 128, "batch": 8, "accumulate": 2, "block": 64, "new_tokens": 16}
TINY |= {"learning_rate": 5e-3, "rank": 8, "alpha": 16.0, "steps": 60, "eval_every": 20}
SMOKE = {"steps": 6, "eval_every": 3, "save_every": 2, "warmup": 2}
QUESTIONS = ["What is the capital of Norway?", "Where is Cairo?"]


def _tiny(args: argparse.Namespace) -> argparse.Namespace:
    """Makes a small checkpoint and data."""
    folder = pathlib.Path(args.out) / "tiny"
    if not (folder / "config.json").is_file():
        CONSOLE.print(f"making a tiny checkpoint in {folder}")
        lm_tiny.write_checkpoint(folder, steps=50 if args.smoke else 300)
    args.checkpoint, args.prompt = str(folder), args.prompt or QUESTIONS
    if not args.train:
        args.train, args.eval = map(str, lm_tiny.write_data(folder.parent / "data"))
    return args


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that stays the same while the adapter trains."""

    args: argparse.Namespace
    mesh: Mesh
    text: Text
    model: Llama
    base: Any
    rows: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    other: dict[str, np.ndarray]

    @property
    def out(self) -> pathlib.Path:
        return pathlib.Path(self.args.out)


def start(args: argparse.Namespace) -> tuple[Job, Any]:
    """The job and the untrained adapter, from the checkpoint and the data."""
    mesh = Mesh(np.array(jax.devices()[: args.devices]), ("fsdp",))
    text = Text.read(args.checkpoint)
    rows, held_out, other = (
        pack(read_examples(path, text), args.length) if path else {}
        for path in (args.train, args.eval, args.other)
    )
    config, dtype = hf_llama.read_config(args.checkpoint), jnp.dtype(args.dtype)
    sizes = {"scan": not args.unroll, "remat": args.remat}
    model = Llama(config, dtype=dtype, param_dtype=dtype, **sizes)
    params = hf_llama.load(args.checkpoint, model, mesh)
    if args.quantize:
        settings = {"target": "*_proj/kernel", "donate": True}
        params = flora.quantize.quantize(params, args.quantize, **settings)
    settings = flora.LoraConfig(
        rank=args.rank,
        alpha=args.alpha,
        target=() if args.full else args.target,
        train="*" if args.full else args.train_whole,
        dropout=args.dropout,
        variant=flora.variants.DoRA() if args.dora else None,
        form=args.form,
    )
    ids = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    key = jax.random.key(args.seed)
    adapted = flora.init(key, settings, model.apply, params, ids)
    base, adapter = flora.split(adapted)
    full = (rows["segments"] > 0).mean()
    print(flora.summary(adapted))  # as wide as it is
    CONSOLE.print(f"{len(rows['ids'])} rows of {args.length} tokens, {full:.0%} full")
    return Job(args, mesh, text, model, base, rows, held_out, other), adapter


# --- Training -------------------------------------------------------------------------


def train(job: Job, adapter: Any, evaluate: Any, report: Any) -> tuple[Any, Any]:
    """The trained adapter; and by step: losses, held-out scores, seconds."""
    args = job.args
    tx, schedule = optimizer(
        peak=args.learning_rate,
        steps=args.steps,
        warmup=args.warmup,
        clip=args.clip,
        weight_decay=args.weight_decay,
    )
    state, places = started(tx, adapter)
    shape, root = (args.accumulate, args.batch), jax.random.key(args.seed + 1)
    settings = {"dropout": args.dropout > 0, "block": args.block}
    settings |= {"most": most_trained(job.rows)}
    step = step_function(job.model, tx, places, **settings)
    losses, held_out, seconds, began = {}, {}, {}, 0
    last = min(args.steps, args.stop_after or args.steps)
    with Checkpointer(job.out / "checkpoints") as checkpointer:
        if checkpointer.latest() is not None:
            adapter, state, began = resumed(job, checkpointer, adapter, state)
        if job.held_out and args.eval_every and not began:
            held_out[0] = evaluate(job.base, adapter, job.held_out, args.batch)
            report(0, math.nan, held_out, schedule(0))
        for n in range(began + 1, last + 1):
            batch = put(batch_of(job.rows, n - 1, shape, args.seed), job.mesh)
            key = jax.random.fold_in(root, n)
            clock = time.perf_counter(), time.process_time()
            adapter, state, loss, norm = step(job.base, adapter, state, batch, key)
            losses[n] = float(loss)
            now = time.perf_counter(), time.process_time()
            seconds[n] = now[0] - clock[0], now[1] - clock[1]
            if not np.isfinite([losses[n], float(norm)]).all():
                raise SystemExit(diverged(job, checkpointer, n, losses[n]))
            if job.held_out and _due(n, args.eval_every or last, last):
                held_out[n] = evaluate(job.base, adapter, job.held_out, args.batch)
            if args.save_every and _due(n, args.save_every, last):
                tree = flora.join(job.base, adapter)
                checkpointer.save(n, tree, state, metadata=_settings(args))
            report(n, losses[n], held_out, schedule(n - 1))
    return adapter, (losses, held_out, seconds)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def resumed(job: Job, checkpointer: Checkpointer, adapter: Any, state: Any) -> Any:
    """Adapter, state and step of the last checkpoint; the options must be the same."""
    if not job.args.resume:
        raise SystemExit(
            f"{job.out} holds a run that has come to step {checkpointer.latest()}. "
            "Write --resume to go on, or another --out."
        )
    was, now = checkpointer.metadata(), _settings(job.args)
    if other := [
        f"--{k} {was.get(k)}, not {now[k]}" for k in now if was.get(k) != now[k]
    ]:
        raise SystemExit(f"{job.out} was run with {'; '.join(other)}.")
    tree, state, began = checkpointer.restore(flora.join(job.base, adapter), state)
    CONSOLE.print(f"going on after step {began}")
    return flora.split(tree)[1], state, began


def diverged(job: Job, checkpointer: Checkpointer, step: int, loss: float) -> str:
    """What to say of a loss or a gradient that is no number.

    The last adapter that is known to give a loss is written: the one before this step,
    or the one before that if it is the loss that is none.
    """
    good = step - 1 if np.isfinite(loss) else step - 2
    path, last = job.out / "adapter.safetensors", job.out / "start.safetensors"
    saved = [n for n in checkpointer.steps() if n <= good]
    if saved:
        like = flora.load(last, job.base)
        flora.save(path, checkpointer.restore(like, step=saved[-1]).adapted)
    kept = f"of step {saved[-1]} is in {path}" if saved else f"as it began is in {last}"
    what = f"the loss is {loss}" if good < step - 1 else "the gradient is not finite"
    return (
        f"step {step}: {what}. The adapter {kept}. Write a lower --learning-rate or "
        "--clip, or --dtype float32, and another --out."
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a step does."""
    free = (
        "checkpoint",
        "out",
        "eval",
        "choices",
        "other",
        "eval_every",
        "save_every",
        "prompt",
        "resume",
        "new_tokens",
        "stop_after",
        "merge",
        "smoke",
        "remat",
        "block",
        "devices",
        "form",
    )
    return {k: v for k, v in vars(args).items() if k not in free}


# --- Before and after -----------------------------------------------------------------


def answering(job: Job) -> Any:
    """`adapted -> {prompt: answer}`."""
    prompts = job.args.prompt or []
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [job.text.chat_prompt(x) for x in messages]
    new, stop = job.args.new_tokens, job.text.stop
    generate = generator(job.model, flora.lora, new=new, stop=stop)

    def answers(adapted: Any) -> dict[str, str]:
        out = generate(adapted, ids) if ids else []
        return dict(zip(prompts, map(job.text.decode, out), strict=True))

    return answers


def prove(job: Job, adapter: Any, evaluate: Any, before: float, after: float) -> None:
    """Raises RuntimeError unless the run did what it is for.

    before, after: the loss on some training rows; `evaluate` computes it of an adapter.
    """
    if not after < before:
        raise RuntimeError(f"The loss has not fallen: {before:.4f}, then {after:.4f}.")
    # Its header holds the fingerprint of the base as it was before training.
    flora.load(job.out / "start.safetensors", job.base)
    again = flora.split(flora.load(job.out / "adapter.safetensors", job.base))[1]
    places = jax.tree.map(lambda x: x.sharding, adapter)
    if (loss := evaluate(jax.device_put(again, places))) != after:
        raise RuntimeError(
            f"The adapter that was read back has loss {loss}, not {after}."
        )


def main(argv: Sequence[str] | None = None) -> Results:
    """Reads, asks, trains, asks again, proves, writes."""
    args = options(argv)
    job, adapter = start(args)
    adapted = flora.join(job.base, adapter)
    flora.save(job.out / "start.safetensors", adapted)
    own = {"stop": job.text.stop, "choices": job.text.first_tokens(args.choices)}
    evaluate = evaluation(job.model, args.block, job.mesh, **own)
    answers = answering(job)
    some = {k: x[: 4 * args.batch] for k, x in job.rows.items()}

    def on_some(adapter: Any) -> float:
        return evaluate(job.base, adapter, some, args.batch).nats

    def on_other(adapter: Any) -> tuple[float, ...]:
        rows = job.other
        return (evaluate(job.base, adapter, rows, args.batch).nats,) if rows else ()

    before, other = (on_some(adapter), answers(adapted)), on_other(adapter)
    bar, report = progress(args.steps)
    with bar:
        adapter, (losses, held_out, seconds) = train(job, adapter, evaluate, report)
    adapted = flora.join(job.base, adapter)
    after, other = (on_some(adapter), answers(adapted)), other + on_other(adapter)
    size = export(args, job.model, adapted)
    prove(job, adapter, on_some, before[0], after[0])
    said = {k: (before[1][k], after[1][k]) for k in before[1]}
    trained = sum(x.size for x in jax.tree.leaves(adapter))
    loss, memory = (before[0], after[0]), _report.peak_bytes()
    rest = said, seconds, trained, size, memory, adapted
    results = Results(losses, loss, held_out, other, *rest)
    results.write(job.out / "results.json", args)
    tell(results)
    CONSOLE.print(f"wrote {job.out}")
    return results


if __name__ == "__main__":
    main()
