"""What one training step costs, counted by XLA itself.  Nothing is run.

A frozen linear layer costs 2·t·in·out FLOPs forward and as many again for
dx = dy Wᵀ; full fine-tuning adds as many for dW = xᵀ dy.  LoRA adds only
6·t·r·(in + out), for x A, (x A) B and their gradients:

    LoRA/frozen ≈ 1 + 1.5 r (1/in + 1/out),   full/frozen ≈ 1.5.

Every arm computes the loss and the gradient of the input activations, so all do the
same backward.  The model is a gated MLP, layers unrolled, float32.

    python examples/benchmarks/step_cost.py --tokens 2048 --d 1024 --ff 2816
"""

from collections.abc import Callable
from typing import Any

import _report
import jax
import jax.numpy as jnp
import optax
from rich.table import Table

import flora

Costs = dict[str, float]


def gated_mlp(params: Any, x: jax.Array) -> jax.Array:
    """The model: x + (silu(x W_gate) * (x W_up)) W_down, layer after layer."""
    for layer in params:
        gate, up = x @ layer["gate"]["kernel"], x @ layer["up"]["kernel"]
        x = x + (jax.nn.silu(gate) * up) @ layer["down"]["kernel"]
    return x


def mean_square(params: Any, x: jax.Array) -> jax.Array:
    """The loss of all arms."""
    return jnp.mean(jnp.square(gated_mlp(params, x)))


def abstract_inputs(
    tokens: int, d: int, ff: int, layers: int, rank: int
) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """`(params, adapted, x)`, all of `ShapeDtypeStruct`s."""
    shapes = {"gate": (d, ff), "up": (d, ff), "down": (ff, d)}
    layer = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for name, shape in shapes.items()
    }
    params, x = [layer] * layers, jax.ShapeDtypeStruct((tokens, d), jnp.float32)
    config = flora.LoraConfig(rank=rank, alpha=2 * rank)
    return params, flora.init(jax.random.key(0), config, gated_mlp, params, x), x


def cost(step: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Costs:
    """FLOPs of the compiled step, bytes of its temporary memory and of its outputs."""
    compiled = jax.jit(step, donate_argnums=donate).lower(*args).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if not analysis or memory is None:
        raise RuntimeError(f"{jax.default_backend()} reports no cost of a program.")
    return {
        "flops": float(analysis["flops"]),
        "temp_bytes": float(memory.temp_size_in_bytes),
        "out_bytes": float(memory.output_size_in_bytes),
    }


def gradient_costs(params: Any, adapted: Any, x: Any) -> dict[str, Costs]:
    """The four gradients, each with dx."""
    apply = flora.lora(mean_square)
    base, adapter = flora.split(adapted)

    def lora(adapted: Any, x: jax.Array) -> Any:
        # x enters as a leaf that trains whole, so one backward yields dA, dB and dx.
        def loss(tree: Any) -> jax.Array:
            return apply(tree["model"], tree["x"].value)

        return flora.value_and_grad(loss)({"model": adapted, "x": flora.Trained(x)})

    def merged(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
        return mean_square(flora.merge(flora.join(base, adapter)), x)

    return {
        "frozen": cost(jax.value_and_grad(mean_square, 1), params, x),
        "lora": cost(lora, adapted, x),
        "full": cost(jax.value_and_grad(mean_square, (0, 1)), params, x),
        "merge": cost(jax.value_and_grad(merged, (0, 2)), adapter, base, x),
    }


def update_costs(adapted: Any, x: Any) -> dict[str, Costs]:
    """A donated AdamW step on the whole tree, and on the adapter alone."""
    apply, tx = flora.lora(mean_square), optax.adamw(1e-4)
    whole = flora.optimizer(tx, adapted)
    base, adapter = flora.split(adapted)

    def whole_tree(adapted: Any, state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(apply)(adapted, x)
        updates, state = whole.update(grads, state, adapted)
        return loss, optax.apply_updates(adapted, updates), state

    def split(adapter: Any, state: Any, base: Any, x: jax.Array) -> Any:
        loss = flora.value_and_grad(apply)
        value, grads = loss(flora.join(base, adapter), x)
        updates, state = tx.update(grads, state, adapter)
        return value, optax.apply_updates(adapter, updates), state

    whole_state = jax.eval_shape(whole.init, adapted)
    state = jax.eval_shape(tx.init, adapter)
    return {
        "split": cost(split, adapter, state, base, x, donate=(0, 1)),
        "whole_tree": cost(whole_tree, adapted, whole_state, x, donate=(0, 1)),
    }


def measure(
    *, tokens: int = 2048, d: int = 1024, ff: int = 2816, layers: int = 2, rank: int = 8
) -> dict[str, Costs]:
    """FLOPs, memory and their ratios, by arm.

    Outputs serve as scratch space before they are written, so compare temporary memory
    between arms that return much (full: every dW) and little only with both in view.

    Args:
      tokens: rows of x.
      d: width of the model.
      ff: width of the gated layer.
      layers: how many, unrolled.
      rank: of every kernel's factors.

    Returns:
      `{arm: {"flops", "temp_bytes", "out_bytes", ...}}`.  The gradients 'frozen',
      'lora', 'full' and 'merge' also have "to_frozen" and "to_full", ratios of FLOPs;
      the optimizer steps 'split' and 'whole_tree' have "temp_to_split", a ratio of
      temporary memory.
    """
    params, adapted, x = abstract_inputs(tokens, d, ff, layers, rank)
    gradients, updates = gradient_costs(params, adapted, x), update_costs(adapted, x)
    for arm in gradients.values():
        arm["to_frozen"] = arm["flops"] / gradients["frozen"]["flops"]
        arm["to_full"] = arm["flops"] / gradients["full"]["flops"]
    for arm in updates.values():
        arm["temp_to_split"] = arm["temp_bytes"] / updates["split"]["temp_bytes"]
    return gradients | updates


ARMS = {
    "frozen": "frozen: loss, dx",
    "lora": "flora LoRA: loss, dA, dB, dx",
    "full": "full: loss, dW, dx",
    "merge": "dense merge: loss, dA, dB, dx",
    "split": "AdamW step, adapter split off",
    "whole_tree": "AdamW step, whole adapted tree",
}


def table(costs: dict[str, Costs]) -> Table:
    """The arms as rows."""
    result = Table(title="One training step, by XLA's own count", title_justify="left")
    result.add_column("arm")
    for name in (
        "GFLOPs",
        "to frozen",
        "to full",
        "temp MiB",
        "out MiB",
        "temp to split",
    ):
        result.add_column(name, justify="right")

    def ratio(arm: Costs, name: str) -> str:
        return f"{arm[name]:.4f}" if name in arm else ""

    for name, arm in costs.items():
        result.add_row(
            ARMS[name],
            f"{arm['flops'] / 1e9:.3f}",
            ratio(arm, "to_frozen"),
            ratio(arm, "to_full"),
            f"{arm['temp_bytes'] / 2**20:.2f}",
            f"{arm['out_bytes'] / 2**20:.2f}",
            ratio(arm, "temp_to_split"),
            end_section=name == "merge",
        )
    return result


def main() -> None:
    """Parses the sizes, measures, prints."""
    sizes = {"tokens": 2048, "d": 1024, "ff": 2816, "layers": 2, "rank": 8}
    _report.run("FLOPs and memory of one step.", sizes, measure, table)


if __name__ == "__main__":
    main()
