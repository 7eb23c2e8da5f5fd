"""How the cost grows with rank, with the number of adapted leaves and with depth.

By rank: XLA's count of the FLOPs of one step above the frozen model's, compiled for
this machine, beside what x A, B and their gradients need:
3 · 2 · tokens · rank · (in + out).  By leaves: seconds to `flora.init`, beside a plain
trace, and to trace and lower one step of a chain of small products, beside the frozen
model's.  By layers: the same of one `lax.scan`.  Seconds are CPU time of this process;
each ratio is of two times that were taken one after the other, and the median of
several such pairs is shown.

    python examples/benchmarks/scale.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import _report
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flora


def chain(params: Any, x: jax.Array) -> jax.Array:
    """Many small products, one after the other."""
    for w in params.values():
        x = x + x @ w
    return jnp.mean(jnp.square(x))


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """The same as one loop."""
    x, _ = jax.lax.scan(lambda x, w: (x + x @ w, None), x, params["stack"])
    return jnp.mean(jnp.square(x))


def adapted_step(
    model: Callable, params: Any, x: Any, rank: int, dtype: Any = jnp.float32
) -> tuple[Any, Any]:
    """`(step, (adapter, x, base))`: loss, gradients of A, B (in `dtype`) and x."""
    config = flora.LoraConfig(rank=rank, target="*", dtype=dtype)
    adapted = flora.init(jax.random.key(0), config, model, params, x)
    base, adapter = flora.split(adapted)
    run = flora.lora(model)

    def step(adapter: Any, x: jax.Array, base: Any) -> Any:
        def loss(adapter: Any, x: jax.Array) -> jax.Array:
            return run(flora.join(base, adapter), x)

        return jax.value_and_grad(loss, (0, 1))(adapter, x)

    return step, (adapter, x, base)


def frozen_step(model: Callable, params: Any, x: Any) -> tuple[Any, Any]:
    """`(step, inputs)`: loss and the gradient of x."""
    return jax.value_and_grad(model, 1), (params, x)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    """A float32 array without values."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flops(step: Callable, inputs: Any) -> float:
    """As XLA counts them."""
    analysis = jax.jit(step).lower(*inputs).compile().cost_analysis()
    return float((analysis or {})["flops"])


def by_rank(ranks: list[int], tokens: int = 512, width: int = 1024) -> Table:
    """FLOPs above the frozen model's, beside what the factors need."""
    params, x = {"w": shape(width, width)}, shape(tokens, width)
    frozen = flops(*frozen_step(chain, params, x))
    rows = []
    for rank in ranks:
        more = flops(*adapted_step(chain, params, x, rank)) - frozen
        need = 3 * 2 * tokens * rank * 2 * width
        rows.append((str(rank), [f"{more / 1e6:.1f}", f"{more / need:.3f}"]))
    columns = ("rank", "MFLOPs above frozen", "to 6 tokens rank (in + out)")
    return _report.table(f"{tokens} tokens, a {width}×{width} weight", columns, rows)


def seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    start = time.process_time()
    result = fn()
    return time.process_time() - start, result


def times(model: Callable, params: Any, x: Any) -> tuple[float, ...]:
    """Seconds to init, to trace alone; to trace and lower: adapted, frozen."""
    # JAX keeps traces by function, so each pair has functions of its own.
    plain, _ = seconds(lambda: jax.make_jaxpr(lambda *args: model(*args))(params, x))
    init, (step, inputs) = seconds(lambda: adapted_step(model, params, x, 4))
    lora, _ = seconds(lambda: jax.jit(step).lower(*inputs))
    step, inputs = frozen_step(lambda *args: model(*args), params, x)
    frozen, _ = seconds(lambda: jax.jit(step).lower(*inputs))
    return init, plain, lora, frozen


def by_size(title: str, cases: dict[int, tuple[Callable, Any]], pairs: int) -> Table:
    """A row for each size."""
    rows = []
    for n, (model, params) in cases.items():
        found = [times(model, params, shape(8, 32)) for _ in range(pairs)]
        init, plain, lora, frozen = map(statistics.median, zip(*found, strict=True))
        to_plain = statistics.median(x[0] / x[1] for x in found)
        to_frozen = statistics.median(x[2] / x[3] for x in found)
        shown = [f"{init:.2f}", f"{1e3 * init / n:.2f}", f"{plain:.2f}"]
        shown += [f"{to_plain:.2f}", f"{lora:.2f}", f"{frozen:.2f}", f"{to_frozen:.2f}"]
        rows.append((str(n), shown))
    columns = (title, "init s", "ms each", "plain trace s", "ratio")
    columns += ("trace + lower s", "frozen s", "ratio")
    return _report.table(f"by {title}, medians of {pairs} pairs", columns, rows)


def main() -> None:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description="How the cost grows.")
    flag: Callable = parser.add_argument
    flag("--ranks", type=int, nargs="+", default=[1, 4, 16, 64, 256, 512])
    flag("--leaves", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    flag("--layers", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--pairs", type=int, default=3)
    args, console = parser.parse_args(), Console()
    console.print(_report.versions(), highlight=False)
    console.print(by_rank(args.ranks))
    wide = {n: {f"w{i:05}": shape(32, 32) for i in range(n)} for n in args.leaves}
    leaves = {n: (chain, p) for n, p in wide.items()}
    console.print(by_size("leaves", leaves, args.pairs))
    deep = {n: {"stack": shape(n, 32, 32)} for n in args.layers}
    layers = {n: (scanned, p) for n, p in deep.items()}
    console.print(by_size("layers", layers, args.pairs))


if __name__ == "__main__":
    main()
