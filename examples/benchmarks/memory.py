"""How much memory a step without remat takes, compiled for TPUs without one.

Residual gated MLPs with RMSNorm in plain Linen and bfloat16, unrolled; LoRA on gate, up
and down; the step returns the loss and the gradients of A, B and x, and is set beside
the frozen model's, which returns the loss and dx.  An adapted layer needs its input for
dA, a frozen one does not.  Where such an input is made, element by element, of what the
frozen model keeps as well, flora has the backward pass make it again.

    pip install libtpu
    python examples/benchmarks/memory.py --layers 2,3
"""

import argparse
import dataclasses
from importlib import metadata
from typing import Any

import _report
import _tpu
import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import flora


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and of its input, `[2, tokens / 2, d]`."""

    layers: int = 2
    tokens: int = 8192
    d: int = 4096
    ff: int = 14336
    rank: int = 16


class MLPs(nn.Module):
    """X + (silu(h W_gate) * (h W_up)) W_down with h = RMSNorm(x), several times."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        for i in range(self.sizes.layers):

            def dense(name: str, size: int, i: int = i) -> nn.Dense:
                return nn.Dense(size, use_bias=False, name=f"{name}_{i}", **dtypes)

            h = nn.RMSNorm(name=f"norm_{i}", **dtypes)(x)
            gate, up = (dense(name, self.sizes.ff)(h) for name in ("gate", "up"))
            x = x + dense("down", self.sizes.d)(nn.silu(gate) * up)
        return x


def measure(chip: str, sizes: Sizes) -> dict[str, _tpu.Costs]:
    """`{arm: costs}` of the frozen model and of flora, as `_tpu.cost` has them."""
    model = MLPs(sizes)
    x = jax.ShapeDtypeStruct((2, sizes.tokens // 2, sizes.d), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y: Any = model.apply(params, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    config = flora.LoraConfig(
        rank=sizes.rank, alpha=2 * sizes.rank, target="*/kernel", dtype=jnp.bfloat16
    )
    adapted = flora.init(jax.random.key(0), config, loss, params, x)
    base, adapter = flora.split(adapted)
    run = flora.lora(loss)

    def frozen(x: jax.Array, params: Any) -> Any:
        return jax.value_and_grad(lambda x: loss(params, x))(x)

    def step(adapter: Any, x: jax.Array, base: Any) -> Any:
        return jax.value_and_grad(lambda a, x: run(flora.join(base, a), x), (0, 1))(
            adapter, x
        )

    return {
        "frozen": _tpu.cost(chip, frozen, x, params),
        "flora": _tpu.cost(chip, step, adapter, x, base),
    }


def main() -> None:
    """Parses the options, measures, prints a table a chip."""
    parser = argparse.ArgumentParser(description="Memory of a step without remat.")
    for field in dataclasses.fields(Sizes):
        if field.name != "layers":
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--layers", default="2,3", help="how many, several with commas")
    parser.add_argument("--chips", default=",".join(_tpu.CHIPS))
    args, console = parser.parse_args(), Console()
    console.print(f"{_report.versions('libtpu')}; {vars(args)}", highlight=False)
    for chip in args.chips.split(","):
        rows = []
        for layers in map(int, args.layers.split(",")):
            own = {k: getattr(args, k) for k in ("tokens", "d", "ff", "rank")}
            found = measure(chip, Sizes(layers, **own))
            frozen, ours = found["frozen"], found["flora"]
            memory = [x["temp_bytes"] / 2**20 for x in (frozen, ours)]
            cells = [f"{x:.0f}" for x in memory]
            cells += [f"{memory[1] / memory[0]:.3f}"]
            cells += [f"{ours['cycles'] / frozen['cycles']:.3f}"]
            rows.append((str(layers), cells))
        title = f"{chip}; libtpu {metadata.version('libtpu')}'s estimates"
        columns = ("layers", "frozen, MiB", "flora, MiB", "to frozen", "cycles")
        console.print(_report.table(title, columns, rows))


if __name__ == "__main__":
    main()
