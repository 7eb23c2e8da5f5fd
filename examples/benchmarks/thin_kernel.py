"""form="kernel" on paper, beside what the TPU compiler estimates for two products.

    python examples/benchmarks/thin_kernel.py                  # products of an 8B layer
    python examples/benchmarks/thin_kernel.py --step           # four layers, minutes

The compiler has no estimate for a Pallas kernel.  So its bytes are counted by its
block specs, and its time is bounded by two things the compiler does estimate: what
moving those bytes takes at the rate of dy Qᵀ alone, and what the matrix units take for
two products whose rank is padded to their width, at the rate of x W.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import _tpu
import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flora
from flora._algebra.kernels import Blocks, Sizes, blocks_of, plan

BF16 = jnp.bfloat16
WIDTH = {"v5e": 128, "v5p": 128, "v6e": 256}
"""Rows and columns of a matrix unit.

https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm
"""

TOKENS, D = 8192, 4096
OUTPUTS = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336,
           "down": 4096}  # fmt: skip


def moved(sizes: Sizes, blocks: Blocks, itemsizes: Sequence[int]) -> list[int]:
    """Bytes of z, dy, Q, g and dQ between HBM and a core's memory.

    A block is moved when its index differs from the step's before.
    """
    found, total = plan(sizes, blocks), []
    specs = (*found.in_specs, *found.out_specs)
    for spec, itemsize in zip(specs, itemsizes, strict=True):
        steps = itertools.product(*map(range, found.grid))
        at = [spec.index_map(*step) for step in steps]
        times = 1 + sum(a != b for a, b in itertools.pairwise(at))
        total.append(times * math.prod(n for n in spec.block_shape if n) * itemsize)
    return total


def kernel_bytes(tokens: int, out: int, rank: int) -> int:
    """All of them, in bfloat16, and what adding up the parts of g takes."""
    sizes = Sizes(1, 1, tokens, out, rank)
    *inputs, g, dq = moved(sizes, blocks_of(sizes, 2), (2, 2, 2, 4, 4))
    return sum(inputs) + 2 * g + dq + 2 * tokens * rank


@functools.cache
def by_compiler(chip: str, tokens: int, out: int, rank: int) -> dict[str, float]:
    """Cycles of dy Qᵀ, of both products and of x W; bytes of both."""

    def fenced(fn: Any, *shapes: Sequence[int]) -> dict[str, float]:
        args = [jax.ShapeDtypeStruct(shape, BF16) for shape in shapes]
        return _tpu.cost(chip, lambda *a: fn(*jax.lax.optimization_barrier(a)), *args)

    def g(dy: Any, q: Any, z: Any) -> Any:
        return dy @ q.T

    def both(dy: Any, q: Any, z: Any) -> Any:
        dq = jnp.einsum("tr,to->ro", z, dy, preferred_element_type=jnp.float32)
        return dy @ q.T, dq

    thin = (tokens, out), (rank, out), (tokens, rank)
    return {
        "g": fenced(g, *thin)["cycles"],
        "both": fenced(both, *thin)["cycles"],
        "x W": fenced(jnp.matmul, (tokens, D), (D, out))["cycles"],
        "bytes": 2 * 2 * math.prod(thin[0]) + 2 * 2 * tokens * rank + 6 * rank * out,
    }


def on_paper(chip: str, tokens: int, out: int, rank: int) -> dict[str, float]:
    """Bytes and cycles of the kernel, and of the two products that it replaces."""
    found, width = by_compiler(chip, tokens, out, rank), WIDTH[chip]
    mine = kernel_bytes(tokens, out, rank)
    memory = found["g"] * mine / (2 * tokens * (out + rank) + 2 * rank * out)
    units = 2 * found["x W"] * -(-rank // width) * width / D
    return {
        "bytes": mine,
        "bytes of two": found["bytes"],
        "memory": memory,
        "matrix units": units,
        "cycles": max(memory, units),
        "cycles of two": found["both"],
    }


class Layer(nn.Module):
    """The linear layers of a Llama-3-8B, something cheap in attention's place."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """`[batch, tokens, d]` to the same shape, and nothing to stack."""
        dtypes: dict[str, Any] = {"dtype": BF16, "param_dtype": BF16}

        def dense(x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(OUTPUTS[name], use_bias=False, name=name, **dtypes)(x)

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.repeat(x.reshape(*x.shape[:2], 8, 128), 4, 2).reshape(q.shape)

        h = nn.RMSNorm(name="attention_norm", **dtypes)(x)
        q, k, v = (dense(h, name) for name in "qkv")
        x = x + dense(q * jax.nn.sigmoid(repeated(k)) + repeated(v), "o")
        h = nn.RMSNorm(name="mlp_norm", **dtypes)(x)
        h = nn.silu(dense(h, "gate")) * dense(h, "up")
        return x + dense(h, "down"), None


class Model(nn.Module):
    """Four layers, scanned and rematted."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The mean of the squares of what comes out."""
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            length=4,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        y, _ = layers(name="layers")(x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))


def step(chip: str, form: str | None, rank: int = 16) -> dict[str, float]:
    """Cycles of a step, each loop's body once, and its temporary bytes.

    Args:
      chip: of `_tpu.CHIPS`.
      form: how products are computed; `None` for the frozen model's loss and dx.
      rank: of the factors.
    """
    model, x = Model(), jax.ShapeDtypeStruct((2, TOKENS // 2, D), BF16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    if form is None:
        found = _tpu.cost(chip, jax.value_and_grad(model.apply, 1), params, x)
        return {"cycles": found["cycles_once"], "temp_bytes": found["temp_bytes"]}
    config = flora.LoraConfig(rank=rank, alpha=2 * rank, dtype=BF16)
    adapted = flora.init(jax.random.key(0), config, model.apply, params, x)
    base, adapter = flora.split(adapted)
    run = flora.lora(model.apply, form=form)

    def loss(adapter: Any, x: Any, base: Any) -> Any:
        return run(flora.join(base, adapter), x)

    gradient = jax.value_and_grad(loss, (0, 1))
    found = _tpu.cost(chip, gradient, adapter, x, base)
    cycles = found["cycles_once"]
    if form == "kernel":
        paper = (on_paper(chip, TOKENS, out, rank) for out in OUTPUTS.values())
        cycles += sum(each["cycles"] for each in paper)
    return {"cycles": cycles, "temp_bytes": found["temp_bytes"]}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(_tpu.CHIPS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    if args.step:
        table = Table("chip", "form", "to frozen", "temporary memory to frozen")
        for chip in args.chips:
            frozen = step(chip, None)
            for form in ("auto", "kernel"):
                found = step(chip, form)
                ratios = [f"{found[k] / frozen[k]:.3f}" for k in frozen]
                table.add_row(chip, form, *ratios)
        Console().print(table)
        return
    columns = (
        "MB",
        "MB, two products",
        "memory",
        "matrix units",
        "two products",
        "ratio",
    )
    table = Table("chip", "outputs", "rank", *columns)
    cases = itertools.product(args.chips, sorted({*OUTPUTS.values()}), args.ranks)
    for chip, out, rank in cases:
        x = on_paper(chip, TOKENS, out, rank)
        sizes = [f"{x[k] / 1e6:.0f}" for k in ("bytes", "bytes of two")]
        cycles = [
            f"{x[k] / 1e3:.0f}k" for k in ("memory", "matrix units", "cycles of two")
        ]
        ratio = f"{x['cycles'] / x['cycles of two']:.2f}"
        table.add_row(chip, str(out), str(rank), *sizes, *cycles, ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
