"""What a training step of a Llama-style decoder costs on TPUs, compiled without one.

RMSNorm, rotary positions, grouped-query attention under a causal mask, a gated MLP and a
cross-entropy loss, in plain Linen and bfloat16.  Three arms: frozen (loss and the gradient
of the embedded tokens: what no way to train can undercut), flora on every linear kernel
(loss, dA, dB and that gradient) and full (loss, all dW and that gradient).

The layers are unrolled, or one `nn.scan`, each with `nn.remat` around a layer or without.
XLA counts a loop's body once.  For the scanned model "Mcycles" has each body's cycles
times its trips, read off the loop's condition; the columns with "once" are as XLA counts,
so there only the ratios of FLOPs mean anything, and not across variants.  "left out" counts
the kernels that the compiler has no estimate for: they are in neither sum.

    pip install libtpu
    python examples/benchmarks/llama.py --chips v5e,v5p,v6e --form auto

References: Touvron et al. 2023. https://arxiv.org/abs/2302.13971
  Ainslie et al. 2023 (grouped queries). https://arxiv.org/abs/2305.13245
"""

import argparse
import dataclasses
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import _report
import _tpu
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import flora

DTYPES: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
VARIANTS = ("unrolled", "unrolled, remat", "scan", "scan, remat")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the decoder and its input."""

    layers: int = 8
    sequences: int = 2
    tokens: int = 4096
    d: int = 2048
    heads: int = 16
    kv_heads: int = 8
    ff: int = 5632
    vocab: int = 32000
    rank: int = 16
    tied: bool = False

    @property
    def ids(self) -> jax.ShapeDtypeStruct:
        """The tokens, `[sequences, tokens of each]`."""
        shape = self.sequences, self.tokens // self.sequences
        return jax.ShapeDtypeStruct(shape, jnp.int32)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on `[batch, tokens, heads, dim]`."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 1e4 ** (-jnp.arange(half) / half))
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of `[batch, tokens, heads, dim]`; query heads share key heads."""
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return y.reshape(*y.shape[:2], -1)


class Layer(nn.Module):
    """Attention and a gated MLP, each after an RMSNorm."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """`[batch, tokens, d]` to the same shape, and nothing to stack."""
        sizes, dim = self.sizes, self.sizes.d // self.sizes.heads

        def dense(x: jax.Array, out: int, name: str) -> jax.Array:
            return nn.Dense(out, use_bias=False, name=name, **DTYPES)(x)

        def heads(x: jax.Array, count: int, name: str) -> jax.Array:
            return dense(x, count * dim, name).reshape(*x.shape[:2], count, dim)

        h = nn.RMSNorm(name="attention_norm", **DTYPES)(x)
        q = rotate(heads(h, sizes.heads, "q_proj"))
        k = rotate(heads(h, sizes.kv_heads, "k_proj"))
        v = heads(h, sizes.kv_heads, "v_proj")
        x = x + dense(attend(q, k, v), sizes.d, "o_proj")
        h = nn.RMSNorm(name="mlp_norm", **DTYPES)(x)
        gate, up = dense(h, sizes.ff, "gate_proj"), dense(h, sizes.ff, "up_proj")
        return x + dense(nn.silu(gate) * up, sizes.d, "down_proj"), None


class Llama(nn.Module):
    """The decoder."""

    sizes: Sizes
    variant: str = "unrolled"

    def setup(self) -> None:
        sizes, layer = self.sizes, Layer
        if "remat" in self.variant:
            layer = nn.remat(Layer, prevent_cse="scan" not in self.variant)
        if "scan" in self.variant:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            self.layers = [nn.scan(layer, length=sizes.layers, **axes)(sizes)]
        else:
            self.layers = [layer(sizes) for _ in range(sizes.layers)]
        self.embed = nn.Embed(sizes.vocab, sizes.d, **DTYPES)
        self.norm = nn.RMSNorm(**DTYPES)
        if not sizes.tied:
            self.lm_head = nn.Dense(sizes.vocab, use_bias=False, **DTYPES)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[batch, tokens]` to the loss."""
        return self.loss(self.embed(ids), ids)

    def loss(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """Embedded tokens `[batch, tokens, d]` to the cross-entropy of the next tokens."""
        for layer in self.layers:
            x, _ = layer(x, None)
        x = self.norm(x)
        logits = self.embed.attend(x) if self.sizes.tied else self.lm_head(x)
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return entropy(logits[:, :-1].astype(jnp.float32), ids[:, 1:]).mean()


def steps(sizes: Sizes, variant: str, form: str) -> Iterator[tuple[str, Any, Any]]:
    """`(arm, step, inputs)` of the arms; x is the embedded tokens."""
    model = Llama(sizes, variant)
    params = jax.eval_shape(model.init, jax.random.key(0), sizes.ids)
    if not sizes.tied:  # the steps start at the embedded tokens
        params = {"params": {k: v for k, v in params["params"].items() if k != "embed"}}
    x = jax.ShapeDtypeStruct((*sizes.ids.shape, sizes.d), jnp.bfloat16)

    def loss(params: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        value: Any = model.apply(params, x, ids, method=Llama.loss)
        return value

    config = flora.LoraConfig(
        rank=sizes.rank, alpha=2 * sizes.rank, dtype=jnp.bfloat16, form=form
    )
    adapted = flora.init(jax.random.key(0), config, loss, params, x, sizes.ids)
    base, adapter = flora.split(adapted)
    run = flora.lora(loss)

    def lora(adapter: Any, x: jax.Array, base: Any, ids: jax.Array) -> jax.Array:
        return run(flora.join(base, adapter), x, ids)

    yield "frozen", jax.value_and_grad(loss, 1), (params, x, sizes.ids)
    both = jax.value_and_grad(lora, (0, 1))
    yield f"flora {form}", both, (adapter, x, base, sizes.ids)
    yield "full", jax.value_and_grad(loss, (0, 1)), (params, x, sizes.ids)


def measure(chip: str, sizes: Sizes, variant: str, form: str) -> dict[str, _tpu.Costs]:
    """`{arm: costs}` as `_tpu.cost` has them, with "to_frozen", a ratio of cycles."""
    costs: dict[str, _tpu.Costs] = {}
    for name, step, inputs in steps(sizes, variant, form):
        costs[name] = _tpu.cost(chip, step, *inputs)
        costs[name]["to_frozen"] = costs[name]["cycles"] / costs["frozen"]["cycles"]
    return costs


def table(title: str, costs: dict[str, _tpu.Costs]) -> Table:
    """The arms as rows."""

    def row(x: _tpu.Costs) -> list[str]:
        return [
            f"{x['cycles'] / 1e6:.2f}",
            f"{x['cycles_once'] / 1e6:.2f}",
            f"{x['without_estimate']:.0f}",
            f"{x['to_frozen']:.3f}",
            f"{x['flops'] / 1e12:.3f}",
            f"{x['temp_bytes'] / 2**20:.0f}",
            f"{x['out_bytes'] / 2**20:.0f}",
        ]

    columns = (
        "arm",
        "Mcycles",
        "once",
        "left out",
        "to frozen",
        "TFLOPs once",
        "temp MiB",
        "out MiB",
    )
    return _report.table(title, columns, [(k, row(v)) for k, v in costs.items()])


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="A decoder's training step on TPUs.")
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "tied":
            parser.add_argument(flag, action="store_true", help="head is the embedding")
        else:
            parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--form", default="auto", help="of flora")
    parser.add_argument("--chips", default=",".join(_tpu.CHIPS))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS
    )
    return parser.parse_args()


def main() -> None:
    """Parses the options, measures, prints each table as soon as it is there."""
    args, console = parse(), Console()
    sizes = Sizes(**{x.name: getattr(args, x.name) for x in dataclasses.fields(Sizes)})
    console.print(f"{_report.versions('libtpu')}; {sizes}", highlight=False)
    for chip in args.chips.split(","):
        for variant in args.variants:
            title = (
                f"{chip}, {variant}; libtpu {metadata.version('libtpu')}'s estimates"
            )
            console.print(table(title, measure(chip, sizes, variant, args.form)))


if __name__ == "__main__":
    main()
