"""Plans LoRA on a 70B Llama on a laptop: `flora.init` on shapes alone.

80 unrolled layers of grouped-query attention and a gated MLP, in bfloat16; every linear
kernel is a target.  No array of the model is ever made: the tree, the factors and the
call are `ShapeDtypeStruct`s.

    python examples/benchmarks/plan_70b.py --rank 16

References: Grattafiori et al. 2024 (sizes). https://arxiv.org/abs/2407.21783
"""

import time
from typing import Any

import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.table import Table

import flora

DTYPES: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on `[tokens, ..., dim]`."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[0]), 5e5 ** (-jnp.arange(half) / half))
    angles = jnp.expand_dims(angles, tuple(range(1, x.ndim - 1)))
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class Attention(nn.Module):
    """Causal grouped-query attention: g query heads share a key head."""

    heads: int
    kv_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[tokens, d]` to the same shape."""
        (tokens, d), groups = x.shape, self.heads // self.kv_heads

        def project(name: str, *heads: int) -> jax.Array:
            shape = (*heads, d // self.heads)
            return nn.DenseGeneral(shape, use_bias=False, name=name, **DTYPES)(x)

        q = rotate(project("q_proj", self.kv_heads, groups))
        k = rotate(project("k_proj", self.kv_heads))
        v = project("v_proj", self.kv_heads)
        scores = jnp.einsum("qhgd,khd->hgqk", q, k) * (d // self.heads) ** -0.5
        seen = jnp.tril(jnp.ones((tokens, tokens), bool))
        weights = nn.softmax(jnp.where(seen, scores, -jnp.inf))
        y = jnp.einsum("hgqk,khd->qhgd", weights, v)
        return nn.DenseGeneral(
            d, axis=(-3, -2, -1), use_bias=False, name="o_proj", **DTYPES
        )(y)


class Llama(nn.Module):
    """A decoder; the defaults are Llama 3 70B."""

    layers: int = 80
    d: int = 8192
    ff: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocab: int = 128256

    def dense(self, features: int, name: str) -> nn.Dense:
        """A linear layer without bias."""
        return nn.Dense(features, use_bias=False, name=name, **DTYPES)

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[tokens]` to logits `[tokens, vocab]`."""
        x = nn.Embed(self.vocab, self.d, name="embed", **DTYPES)(ids)
        for i in range(self.layers):
            name = f"layers_{i}"
            h = nn.RMSNorm(name=f"{name}_attention_norm", **DTYPES)(x)
            x = x + Attention(self.heads, self.kv_heads, name=f"{name}_attention")(h)
            h = nn.RMSNorm(name=f"{name}_mlp_norm", **DTYPES)(x)
            gate = self.dense(self.ff, f"{name}_gate_proj")(h)
            h = nn.silu(gate) * self.dense(self.ff, f"{name}_up_proj")(h)
            x = x + self.dense(self.d, f"{name}_down_proj")(h)
        return self.dense(self.vocab, "lm_head")(nn.RMSNorm(name="norm", **DTYPES)(x))


def measure(*, rank: int = 16, tokens: int = 4096, **sizes: Any) -> dict[str, float]:
    """Time and memory of planning, and what the plan says.

    Args:
      rank: of every kernel's factors.
      tokens: length of the abstract input.
      **sizes: of `Llama`, where they are not its defaults.

    Returns:
      "shapes_seconds" (Flax's own `jax.eval_shape` of the model), "init_seconds" (of
      `flora.init`), "peak_bytes" (resident, of the whole process since it started, so
      measure in a fresh one), and from `flora.summary` "leaves", "targets",
      "parameters", "base_bytes", "adapter_parameters" and "adapter_bytes".
    """
    model, ids = Llama(**sizes), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    config = flora.LoraConfig(rank=rank, alpha=2 * rank)
    start = time.perf_counter()
    tree = jax.eval_shape(model.init, jax.random.key(0), ids)
    shaped = time.perf_counter()
    adapted = flora.init(jax.random.key(0), config, model.apply, tree, ids)
    planned = time.perf_counter()
    plan = flora.summary(adapted)
    return {
        "shapes_seconds": shaped - start,
        "init_seconds": planned - shaped,
        "peak_bytes": _report.peak_bytes(),
        "leaves": len(plan.rows),
        "targets": sum(row.role == "lora" for row in plan.rows),
        "parameters": plan.parameters,
        "base_bytes": plan.bytes - plan.trained_bytes,
        "adapter_parameters": plan.trained,
        "adapter_bytes": plan.trained_bytes,
    }


def table(plan: dict[str, float]) -> Table:
    """The numbers as rows."""
    result = Table("what", title="flora.init of a 70B Llama", title_justify="left")
    result.add_column("", justify="right")
    for name, value in plan.items():
        what, unit = name.replace("_", " "), ""
        if name.endswith("bytes"):
            what, unit, value = what.removesuffix(" bytes"), " GiB", value / 2**30
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        result.add_row(what, shown + unit)
    return result


def main() -> None:
    """Parses the sizes, measures, prints."""
    sizes = {
        "layers": 80,
        "d": 8192,
        "ff": 28672,
        "heads": 64,
        "kv-heads": 8,
        "vocab": 128256,
        "tokens": 4096,
        "rank": 16,
    }
    _report.run("Plans LoRA on a 70B Llama.", sizes, measure, table)


if __name__ == "__main__":
    main()
