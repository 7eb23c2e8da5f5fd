"""The MLP of `_arms` in PyTorch: frozen, trained whole, and with PEFT's LoRA.

Weights, factors and activations are those of the JAX arms, and so is the dtype:
`autocast_adapter_dtype=False` stops PEFT from keeping the factors of a bfloat16 model
in float32.  Quantized weights are bitsandbytes': int8 with a scale a column, which
rounds activations too, and nf4 in blocks of 64.  PyTorch is imported when it is first
needed.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import _arms
import _report
import _timing
import jax
import jax.numpy as jnp
import numpy as np

import flora.quantize

TORCH_ARMS = ("torch frozen", "torch full", "PEFT")
QUANTIZED = {f"PEFT on {x}": x for x in _arms.QTYPES}


def baselines(names: Iterable[str]) -> dict[str, str]:
    """The arm that each ratio is to: the frozen one, compiled for the compiled ones."""
    suffix = ", compiled"
    return {
        x: f"torch frozen{suffix}" if x.endswith(suffix) else "torch frozen"
        for x in names
    }


def _tensor(x: Any, sizes: _arms.Sizes, device: str) -> Any:
    torch = importlib.import_module("torch")
    dtype = getattr(torch, jnp.dtype(sizes.dtype).name)
    return torch.from_numpy(np.array(x, np.float32)).to(device, dtype)


def _linear(w: Any, qtype: str) -> Any:
    """A layer of this weight `[in, out]`, which is quantized when it is moved."""
    torch = importlib.import_module("torch")
    if not qtype:
        layer = torch.nn.Linear(*w.shape, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w.T.contiguous())
        return layer
    bnb = importlib.import_module("bitsandbytes").nn
    if qtype == "int8":
        layer = bnb.Linear8bitLt(*w.shape, bias=False, has_fp16_weights=False)
        parts = {"has_fp16_weights": False, "requires_grad": False}
        layer.weight = bnb.Int8Params(w.T.contiguous().cpu(), **parts)
        return layer
    layer = bnb.Linear4bit(
        *w.shape, bias=False, quant_type=qtype, compute_dtype=w.dtype
    )
    parts = {"quant_type": qtype, "requires_grad": False}
    layer.weight = bnb.Params4bit(w.T.contiguous().cpu(), **parts)
    return layer


def _mlp(weights: dict[str, Any], qtype: str = "") -> Any:
    """x + down(silu(gate(x)) * up(x)), made of `nn.Linear`s with these weights."""
    torch = importlib.import_module("torch")

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, w in weights.items():
                setattr(self, name, _linear(w, qtype))
            self.is_loaded_in_8bit = qtype == "int8"  # what PEFT asks
            self.is_loaded_in_4bit = qtype == "nf4"

        def forward(self, x: Any) -> Any:
            y = torch.nn.functional.silu(self.gate(x)) * self.up(x)
            return x + self.down(y)

    return Mlp()


def _with_lora(model: Any, factors: dict[str, Any], sizes: _arms.Sizes) -> Any:
    """`get_peft_model`, with these factors; PEFT's A and B are transposed."""
    peft, torch = (importlib.import_module(x) for x in ("peft", "torch"))
    config = peft.LoraConfig(
        r=sizes.rank,
        lora_alpha=sizes.scale * sizes.rank,
        target_modules=list(factors),
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = getattr(model.base_model.model, name)
            layer.lora_A["default"].weight.copy_(a.T)
            layer.lora_B["default"].weight.copy_(b.T)
    return model


def build(name: str, sizes: _arms.Sizes, device: str, seed: int = 0) -> tuple[Any, Any]:
    """`(model, x)` of an arm; x asks for its gradient too."""

    def tensor(x: Any) -> Any:
        return _tensor(x, sizes, device)

    drawn = jax.jit(_arms.draw, static_argnums=0)(sizes, jax.random.key(seed))
    weights, factors, x = jax.tree.map(tensor, drawn)
    model = _mlp(weights, QUANTIZED.get(name, ""))
    if name in ("PEFT", *QUANTIZED):
        model = _with_lora(model.to(device), factors, sizes)
    elif name == "torch frozen":
        model.requires_grad_(False)
    return model.to(device), x.requires_grad_()


def loss_of(model: Any) -> Callable[[Any], Any]:
    """The mean of y² in float32, as a function of x."""
    return lambda x: model(x).float().square().mean()


def trained(model: Any) -> list[Any]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def step(loss: Callable[[Any], Any], model: Any, x: Any) -> _timing.Call:
    """A call that waits for the loss and the gradients of what trains and of x."""
    torch = importlib.import_module("torch")
    wanted = [x, *trained(model)]

    def call() -> Any:
        value = loss(x)
        grads = torch.autograd.grad(value, wanted)
        if x.is_cuda:
            torch.cuda.synchronize()
        return value, grads

    return call


def calls(
    sizes: _arms.Sizes, device: str
) -> tuple[dict[str, _timing.Call], dict[str, str]]:
    """Checked calls to time, eager and compiled, and why arms are left out.

    Raises:
      RuntimeError: an arm fails its check.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.compiler.reset()  # past some models it would silently stop compiling
    found, refused, names = {}, {}, TORCH_ARMS
    if _report.installed("bitsandbytes"):
        names = *names, *QUANTIZED
    else:
        refused["PEFT on int8, nf4"] = "bitsandbytes is not installed."
    for name in names:
        check(name)
        model, x = build(name, sizes, device)
        found[name] = step(loss_of(model), model, x)
        try:
            start = time.perf_counter()
            compiled = step(torch.compile(loss_of(model)), model, x)
            compiled()
            print(f"{name}: torch.compile took {time.perf_counter() - start:.0f} s")
            found[f"{name}, compiled"] = compiled
        except Exception as error:  # what stops torch.compile is a result
            refused[f"{name}, compiled"] = f"{type(error).__name__}: {error}"[:200]
    return found, refused


def check(name: str) -> None:
    """What `_arms.check` checks, on the CPU: the loss, a gradient, a falling loss.

    Raises:
      RuntimeError: one of these does not hold.
    """
    torch = importlib.import_module("torch")
    sizes = _arms.Sizes(tokens=32, d=64, ff=128, rank=4, dtype=jnp.float32)
    model, x = build(name, sizes, "cpu")
    value, (dx, *grads) = step(loss_of(model), model, x)()
    first = value.item()
    factored, qtype = name.startswith("PEFT"), QUANTIZED.get(name, "")
    oracle = _arms.merge_arm(sizes) if factored else _arms.frozen_arm(sizes)
    factors, weights, x_ = oracle.inputs(sizes, jax.random.key(0))
    if qtype:
        weights = flora.quantize.dequantize(_arms.quantized(weights, sizes, qtype))
    with jax.default_matmul_precision("highest"):  # as PyTorch's, also on a GPU
        wanted = oracle.step(factors, weights, x_)
    off = np.max(np.abs(np.array(wanted[1][1]) - dx.numpy()))
    off = max(off / float(jnp.max(jnp.abs(wanted[1][1]))), abs(first / wanted[0] - 1))
    if not off <= {"": 1e-4, "nf4": 1e-2, "int8": 0.1}[qtype]:
        raise RuntimeError(f"{name}: loss or dx is off by {off} from JAX's.")
    if not grads:
        return
    norm = float(sum(g.square().sum() for g in grads)) ** 0.5
    if not norm > 0:
        raise RuntimeError(f"{name}: the norm of its gradient is {norm}.")
    tx, loss = (
        torch.optim.SGD(trained(model), lr=0.05 * first / norm**2),
        loss_of(model),
    )
    for _ in range(10):
        tx.zero_grad()
        loss(x).backward()
        tx.step()
    if not loss(x).item() < first:
        raise RuntimeError(f"{name}: ten steps do not lower the loss of {first}.")
