"""How long the adapted transformer takes to trace, against the base model.

`flora.lora(fn)` traces `fn` to a jaxpr and then walks it, so it costs one trace and one
walk.  Base and adapted model are timed in pairs, one right after the other, with
JAX's caches cleared before each, and the median of the pairs' ratios is reported:
what else the machine does then cancels.  Arrays are `ShapeDtypeStruct`s throughout.

With `--compile`, forward passes are compiled twice: as flora adapts the model, and with
y + scale (x A) B added by hand to what each Dense layer returns, which is the least
that any LoRA has to compile.

    python examples/benchmarks/tracing.py --layers 24 --pairs 7 --compile
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from rich.console import Console
from rich.table import Table

import flora


class Block(nn.Module):
    """One pre-norm block: causal attention and an MLP."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[batch, tokens, d]` to the same shape."""
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(h, mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class Decoder(nn.Module):
    """Embedding, unrolled blocks, head."""

    layers: int
    d: int = 64
    vocab: int = 256

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[batch, tokens]` to logits `[batch, tokens, vocab]`."""
        x, mask = nn.Embed(self.vocab, self.d)(ids), nn.make_causal_mask(ids)
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x, mask)
        return nn.Dense(self.vocab, name="head")(nn.LayerNorm()(x))


Work = Callable[[], Any]


def by_hand(model: nn.Module, adapted: Any) -> tuple[Callable[..., Any], Any, Any]:
    """`(apply, base, factors)`: LoRA as the plain formula, `apply(base, factors, ids)`.

    Args:
      model: all of whose adapted kernels belong to Dense layers.
      adapted: its tree, of whose weights the scale is read as well.
    """
    flat = traverse_util.flatten_dict(adapted["params"])
    weights = {k: w for k, w in flat.items() if isinstance(w, flora.LoraWeight)}
    plain = {k: weights[k].base if k in weights else w for k, w in flat.items()}
    base = {"params": traverse_util.unflatten_dict(plain)}
    factors = {k: (w.a, w.b) for k, w in weights.items()}

    def apply(base: Any, factors: Any, ids: jax.Array) -> Any:
        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y, path = call(*args, **kwargs), (*context.module.path, "kernel")
            if context.method_name != "__call__" or path not in factors:
                return y
            a, b = factors[path]
            z = jnp.tensordot(args[0], a, a.ndim - 1)
            return y + weights[path].scale * jnp.tensordot(z, b, 1)

        with nn.intercept_methods(add):
            return model.apply(base, ids)

    return apply, base, factors


def works(layers: int, form: str) -> dict[str, tuple[Work, Work]]:
    """`{what: (base, adapted)}`: the calls that are timed."""
    model = Decoder(layers)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), ids)
    config = flora.LoraConfig(rank=4, alpha=8)
    adapted = flora.init(jax.random.key(0), config, model.apply, tree, ids)
    apply = flora.lora(model.apply, form=form)

    def base_loss(tree: Any, ids: jax.Array) -> jax.Array:
        logits: Any = model.apply(tree, ids)
        return jnp.mean(jnp.square(logits))

    def lora_loss(tree: Any, ids: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(apply(tree, ids)))

    def compiled(fn: Callable[..., Any], *args: Any) -> Work:
        return lambda: jax.jit(fn).lower(*args).compile()

    formula, *split = by_hand(model, adapted)
    base = compiled(model.apply, tree, ids)
    base_step = jax.value_and_grad(base_loss)
    lora_step = flora.value_and_grad(lora_loss)
    return {
        "trace": (
            lambda: jax.make_jaxpr(model.apply)(tree, ids),
            lambda: jax.make_jaxpr(apply)(adapted, ids),
        ),
        "trace_step": (
            lambda: jax.make_jaxpr(base_step)(tree, ids),
            lambda: jax.make_jaxpr(lora_step)(adapted, ids),
        ),
        "compile": (base, compiled(apply, adapted, ids)),
        "compile_by_hand": (base, compiled(formula, *split, ids)),
        "compile_step": (
            compiled(base_step, tree, ids),
            compiled(lora_step, adapted, ids),
        ),
    }


def seconds(work: Work) -> float:
    """How long it takes with nothing cached."""
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(base: Work, adapted: Work, pairs: int) -> dict[str, float]:
    """Medians of `pairs` paired runs, after one that is thrown away."""
    runs = [(seconds(base), seconds(adapted)) for _ in range(pairs + 1)][1:]
    ratios = [slow / fast for fast, slow in runs]
    return {
        "base_seconds": statistics.median(fast for fast, _ in runs),
        "adapted_seconds": statistics.median(slow for _, slow in runs),
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
    }


def measure(
    *,
    layers: int = 24,
    pairs: int = 7,
    what: Sequence[str] = ("trace", "trace_step"),
    form: str = "auto",
) -> dict[str, dict[str, float]]:
    """Seconds and ratios of tracing the forward pass and the training step.

    Args:
      layers: depth of the decoder, unrolled.
      pairs: paired runs; one more warms up.
      what: 'trace' (forward pass), 'trace_step' (loss and gradient; the base model's by
        all its parameters, the adapted one's by the adapter), 'compile' (trace, lower
        and compile the forward pass), 'compile_by_hand' (likewise, `by_hand` in flora's
        place) and 'compile_step'.
      form: of the products; 'auto' takes the direct one on CPU.

    Returns:
      `{what: {"base_seconds", "adapted_seconds", "ratio", "min_ratio", "max_ratio"}}`,
      ratios being adapted/base of a pair.
    """
    timed = works(layers, form)
    return {name: paired(*timed[name], pairs) for name in what}


TITLES = {
    "trace": "trace, forward",
    "trace_step": "trace, forward + gradient",
    "compile": "trace + lower + compile, forward",
    "compile_by_hand": "the same, the formula by hand",
    "compile_step": "trace + lower + compile, forward + gradient",
}


def table(results: dict[str, dict[str, float]], layers: int, pairs: int) -> Table:
    """What was timed as rows."""
    result = Table(
        title=f"Decoder of {layers} layers, medians of {pairs} pairs",
        title_justify="left",
    )
    result.add_column("what")
    for name in ("base s", "adapted s", "ratio", "min", "max"):
        result.add_column(name, justify="right")
    for name, x in results.items():
        result.add_row(
            TITLES[name],
            f"{x['base_seconds']:.3f}",
            f"{x['adapted_seconds']:.3f}",
            f"{x['ratio']:.2f}",
            f"{x['min_ratio']:.2f}",
            f"{x['max_ratio']:.2f}",
        )
    return result


def main() -> None:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description="Tracing time, adapted against base.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile as well")
    parser.add_argument("--form", default="auto", help="of the products")
    args, console = parser.parse_args(), Console()
    console.print(f"{_report.versions()}; {vars(args)}", highlight=False)
    what = [name for name in TITLES if args.compile or "compile" not in name]
    results = measure(layers=args.layers, pairs=args.pairs, what=what, form=args.form)
    console.print(table(results, args.layers, args.pairs))


if __name__ == "__main__":
    main()
