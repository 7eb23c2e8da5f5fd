"""One gated MLP and the ways to train it in JAX, for the comparisons.

    y = x + (silu(x W_gate) * (x W_up)) W_down,   loss = mean(y²) in float32,

each W with LoRA of rank r.  Every arm has the same weights, factors and activations,
all of one dtype, and every arm's step returns the loss and the gradients of what it
trains and of x, since a layer below would need dx.  quax and `nnx.LoRALinear` have no
alpha: the scale is in their B before the step starts, which saves them a
multiplication.  Arms named for a qtype have their W in that, with a scale for each
`block` of inputs; the libraries round alike.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any

import _timing
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flora
import flora.quantize

FORMS = ("auto", "direct", "thin_first", "thin_last", "concat", "merged", "dithered")
KERNELS = ("gate", "up", "down")
QTYPES = ("int8", "nf4")  # of quantized arms

Weights = dict[str, Any]
Factors = dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of its input; scale = 2."""

    tokens: int
    d: int
    ff: int
    rank: int = 16
    dtype: Any = jnp.bfloat16
    block: int = 64

    scale = 2.0

    def kernel(self, name: str) -> tuple[int, int]:
        """The shape of a kernel."""
        return (self.ff, self.d) if name == "down" else (self.d, self.ff)

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.tokens, self.d), self.dtype)

    def __str__(self) -> str:
        shape = f"{self.tokens} tokens, d {self.d}, ff {self.ff}, rank {self.rank}"
        return f"{shape}, {jnp.dtype(self.dtype).name}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train the model.

    Attributes:
      pack: `(weights, factors)` to `(trained, frozen)`, two trees.
      loss: `(trained, frozen, x)` to the loss.
      factored: whether the weights that it applies are W + scale A B.
      qtype: what its W are stored as; empty for the dtype of all.
    """

    pack: Callable[[Weights, Factors], tuple[Any, Any]]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    factored: bool = True
    qtype: str = ""

    def step(self, trained: Any, frozen: Any, x: jax.Array) -> Any:
        """`(loss, (gradients of trained, dx))`."""
        return jax.value_and_grad(self.loss, (0, 2))(trained, frozen, x)

    def inputs(self, sizes: Sizes, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        """`(trained, frozen, x)`; every arm gets the same numbers from the same key."""
        weights, factors, x = draw(sizes, key)
        return (*self.pack(weights, factors), x)

    def shapes(self, sizes: Sizes) -> Any:
        """`inputs`, of `ShapeDtypeStruct`s."""
        return jax.eval_shape(functools.partial(self.inputs, sizes), jax.random.key(0))


def draw(sizes: Sizes, key: jax.Array) -> tuple[Weights, Factors, jax.Array]:
    """Weights, factors (B is not zero) and activations, all Gaussian."""
    keys = iter(jax.random.split(key, 10))

    def gaussian(*shape: int) -> jax.Array:
        values = jax.random.normal(next(keys), shape) * shape[0] ** -0.5
        return values.astype(sizes.dtype)

    weights, factors = {}, {}
    for name in KERNELS:
        in_, out = sizes.kernel(name)
        weights[name] = gaussian(in_, out)
        factors[name] = gaussian(in_, sizes.rank), gaussian(sizes.rank, out)
    x = jax.random.normal(next(keys), sizes.x.shape).astype(sizes.dtype)
    return weights, factors, x


def gated_mlp(params: Any, x: jax.Array) -> jax.Array:
    """The model, of `{name: {"kernel": W}}`."""
    gate, up = x @ params["gate"]["kernel"], x @ params["up"]["kernel"]
    return x + (jax.nn.silu(gate) * up) @ params["down"]["kernel"]


def mean_square(y: jax.Array) -> jax.Array:
    """The loss of all arms."""
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def plain_loss(params: Any, x: jax.Array) -> jax.Array:
    """The model and its loss."""
    return mean_square(gated_mlp(params, x))


def as_params(weights: Weights) -> Any:
    """The model's parameters."""
    return {name: {"kernel": w} for name, w in weights.items()}


def quantized(params: Any, sizes: Sizes, qtype: str) -> Any:
    """flora's way to store the weights of a tree; as they are if there is no qtype."""
    if not qtype:
        return params
    return flora.quantize.quantize(params, qtype, target="*", block=sizes.block)


def frozen_arm(sizes: Sizes, qtype: str = "") -> Arm:
    """Loss and dx alone: the lower bound for every way to train."""
    run = flora.lora(plain_loss) if qtype else plain_loss
    return Arm(
        lambda weights, factors: ((), quantized(as_params(weights), sizes, qtype)),
        lambda _, params, x: run(params, x), factored=False, qtype=qtype,
    )  # fmt: skip


@jax.custom_vjp
def fenced_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """X W, with x and dy written to memory once, as the forms of flora have it."""
    return jax.lax.optimization_barrier(x) @ w


fenced_product.defvjp(
    lambda x, w: (fenced_product(x, w), w),
    lambda w, dy: (jax.lax.optimization_barrier(dy) @ w.T, None),
)


def fenced_arm(sizes: Sizes) -> Arm:
    """Frozen, with flora's fences and without its factors: what fences alone do."""

    def loss(nothing: Any, weights: Weights, x: jax.Array) -> jax.Array:
        gate = fenced_product(x, weights["gate"])
        h = jax.nn.silu(gate) * fenced_product(x, weights["up"])
        return mean_square(x + fenced_product(h, weights["down"]))

    return Arm(lambda weights, factors: ((), weights), loss, factored=False)


def full_arm(sizes: Sizes) -> Arm:
    """Every W trains."""
    return Arm(
        lambda weights, factors: (as_params(weights), ()),
        lambda params, nothing, x: plain_loss(params, x),
        factored=False,
    )


def merge_arm(sizes: Sizes) -> Arm:
    """W + scale A B is formed, and `jax.grad` goes through it."""

    def loss(factors: Factors, weights: Weights, x: jax.Array) -> jax.Array:
        summed = {
            k: weights[k] + sizes.scale * (a @ b) for k, (a, b) in factors.items()
        }
        return plain_loss(as_params(summed), x)

    return Arm(lambda weights, factors: (factors, weights), loss)


def flora_arm(sizes: Sizes, form: str = "auto", qtype: str = "") -> Arm:
    """The arm of flora in a form; 'auto' sees the device when the step is traced."""
    run = flora.lora(plain_loss, form=form)
    config = flora.LoraConfig(
        rank=sizes.rank, alpha=sizes.scale * sizes.rank, dtype=sizes.dtype
    )

    def pack(weights: Weights, factors: Factors) -> tuple[Any, Any]:
        params = quantized(as_params(weights), sizes, qtype)
        adapted = flora.init(jax.random.key(0), config, gated_mlp, params, sizes.x)
        for name, (a, b) in factors.items():
            w = adapted[name]["kernel"]
            adapted[name]["kernel"] = dataclasses.replace(w, a=a, b=b)
        base, adapter = flora.split(adapted)
        return adapter, base

    def loss(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
        return run(flora.join(base, adapter), x)

    return Arm(pack, loss, qtype=qtype)


class LinenModel(nn.Module):
    """The model in Linen, for qwix to patch."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[tokens, d]` to the same shape."""

        def dense(x: jax.Array, name: str) -> jax.Array:
            dtype, out = self.sizes.dtype, self.sizes.kernel(name)[1]
            layer = nn.Dense(out, False, dtype=dtype, param_dtype=dtype, name=name)
            return layer(x)

        return x + dense(nn.silu(dense(x, "gate")) * dense(x, "up"), "down")


def qwix_provider(sizes: Sizes, qtype: str) -> Any:
    """What adapts every layer, on weights in that type if there is one."""
    qwix = importlib.import_module("qwix")
    how = {"weight_qtype": qtype, "tile_size": sizes.block} if qtype else {}
    alpha = sizes.scale * sizes.rank
    return qwix.LoraProvider(module_path=".*", rank=sizes.rank, alpha=alpha, **how)


def qwix_factors(factors: Factors) -> Any:
    """The factors under qwix's names."""
    return {
        name: {"kernel_lora_a": a, "kernel_lora_b": b}
        for name, (a, b) in factors.items()
    }


def qwix_arm(sizes: Sizes, qtype: str = "") -> Arm:
    """qwix: `apply_lora_to_model` on Linen; the factors are split off by name."""
    qwix = importlib.import_module("qwix")
    model = qwix.apply_lora_to_model(LinenModel(sizes), qwix_provider(sizes, qtype))

    def pack(weights: Weights, factors: Factors) -> tuple[Any, Any]:
        lora, params = qwix_factors(factors), as_params(weights)
        if qtype:
            like = jax.eval_shape(model.init, jax.random.key(0), sizes.x)["params"]
            params = qwix.quantize_params(params, like)
        return lora, params

    def loss(lora: Any, params: Any, x: jax.Array) -> jax.Array:
        params = {name: params[name] | lora[name] for name in params}
        return mean_square(model.apply({"params": params}, x))

    return Arm(pack, loss, qtype=qtype)


class NnxModel(nnx.Module):
    """The model in NNX, of layers that `linear(in, out)` makes."""

    def __init__(self, sizes: Sizes, linear: Callable[..., Any]):
        for name in KERNELS:
            setattr(self, name, linear(*sizes.kernel(name)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[tokens, d]` to the same shape."""
        gate, up, down = (getattr(self, name) for name in KERNELS)
        return x + down(nnx.silu(gate(x)) * up(x))


def nnx_linear(sizes: Sizes) -> Callable[..., Any]:
    """What makes `nnx.Linear`s."""
    dtypes = {"dtype": sizes.dtype, "param_dtype": sizes.dtype}
    return functools.partial(
        nnx.Linear, use_bias=False, rngs=nnx.Rngs(0), **dtypes
    )  # fmt: skip


def nnx_loss(graphdef: Any) -> Callable[..., jax.Array]:
    """The loss of a model that was split into its factors and the rest."""

    def loss(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return mean_square(nnx.merge(graphdef, trained, frozen)(x))

    return loss


def filled(state: Any, values: Any) -> Any:
    """The values in the place of a state's."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(values))


def nnx_arm(sizes: Sizes) -> Arm:
    """`nnx.LoRALinear`, its state split by `nnx.LoRAParam`; the scale is in B."""

    def linear(*shape: int) -> Any:
        dtype = sizes.dtype
        return nnx.LoRALinear(
            *shape,
            lora_rank=sizes.rank,
            use_bias=False,
            dtype=dtype,
            param_dtype=dtype,
            lora_dtype=dtype,
            lora_param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )

    model = nnx.eval_shape(lambda: NnxModel(sizes, linear))
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def pack(weights: Weights, factors: Factors) -> tuple[Any, Any]:
        lora = {
            name: {"lora": {"lora_a": a, "lora_b": sizes.scale * b}}
            for name, (a, b) in factors.items()
        }
        return filled(trained, lora), filled(frozen, as_params(weights))

    return Arm(pack, nnx_loss(graphdef))


def tunix_arm(sizes: Sizes, qtype: str = "") -> Arm:
    """Tunix's recipe: qwix on an NNX model, `nnx.LoRAParam` trains."""
    qwix = importlib.import_module("qwix")

    def adapted() -> Any:
        model, x = NnxModel(sizes, nnx_linear(sizes)), jnp.zeros((1, sizes.d))
        provider = qwix_provider(sizes, qtype)
        return qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(adapted)
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def pack(weights: Weights, factors: Factors) -> tuple[Any, Any]:
        lora, params = qwix_factors(factors), as_params(weights)
        if qtype:
            params = qwix.quantize_params(params, model)
        return filled(trained, lora), filled(frozen, params)

    return Arm(pack, nnx_loss(graphdef), qtype=qtype)


def quax_arm(sizes: Sizes) -> Arm:
    """quax: `LoraArray`s under `quaxify`, partitioned; no alpha, the scale is in B."""
    eqx, quax = (importlib.import_module(x) for x in ("equinox", "quax"))
    lora = importlib.import_module("quax.examples.lora")

    def array(w: Any, a: Any, b: Any) -> Any:
        made = lora.LoraArray(w, rank=sizes.rank, key=jax.random.key(0))
        return eqx.tree_at(lambda x: (x.a, x.b), made, (a, sizes.scale * b))

    def pack(weights: Weights, factors: Factors) -> tuple[Any, Any]:
        arrays = {name: array(w, *factors[name]) for name, w in weights.items()}
        nothing = jax.tree.map(lambda _: False, arrays)
        trained = eqx.tree_at(
            lambda tree: [x for w in tree.values() for x in (w.a, w.b)],
            nothing,
            replace_fn=lambda _: True,
        )
        return eqx.partition(arrays, trained)

    def loss(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
        params = as_params(eqx.combine(trained, frozen))
        return quax.quaxify(plain_loss)(params, x)

    return Arm(pack, loss)


def on_quantized(name: str, make: Callable[..., Arm]) -> dict[str, Callable]:
    """The arm on weights in each of `QTYPES`."""
    return {f"{name} on {x}": functools.partial(make, qtype=x) for x in QTYPES}


OTHERS: dict[str, Callable[[Sizes], Arm]] = {
    "qwix": qwix_arm,
    "Tunix's recipe": tunix_arm,
    "quax": quax_arm,
    "nnx.LoRALinear": nnx_arm,
    **on_quantized("qwix", qwix_arm),
    **on_quantized("Tunix's recipe", tunix_arm),
}


def makers() -> dict[str, Callable[[Sizes], Arm]]:
    """All arms by name."""
    forms = {f"flora {form}": functools.partial(flora_arm, form=form) for form in FORMS}
    ends = {"full": full_arm, "dense merge": merge_arm}
    limits = {"frozen": frozen_arm, "frozen fenced": fenced_arm}
    stored = on_quantized("frozen", frozen_arm) | on_quantized("flora auto", flora_arm)
    return limits | forms | stored | ends | OTHERS


@functools.cache
def refusal(name: str) -> str:
    """Why an arm of another library is left out; empty where it is not.

    Raises:
      RuntimeError: an arm of this file's own fails its check.
    """
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            check(name, makers()[name])
    except Exception as error:  # what stops another library is a result
        if name not in OTHERS:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def arms(sizes: Sizes, only: Collection[str] = ()) -> dict[str, Arm | str]:
    """Checked arms by name; a string says why there is none.

    Args:
      sizes: of the model.
      only: the arms wanted, by default all; 'frozen' is always there.

    Raises:
      ValueError: `only` has a name that no arm has.
    """
    known = makers()
    if unknown := set(only) - set(known):
        raise ValueError(f"No arm is called {unknown}. Write of {list(known)}.")
    wanted = [name for name in known if not only or name in {*only, "frozen"}]
    return {name: refusal(name) or known[name](sizes) for name in wanted}


def calls(
    sizes: Sizes, only: Collection[str] = ()
) -> tuple[dict[str, _timing.Call], dict[str, str]]:
    """Compiled steps on this machine, to time, and why arms are left out."""
    found, refused = {}, {}
    for name, arm in arms(sizes, only).items():
        if isinstance(arm, str):
            refused[name] = arm
        else:
            inputs = jax.jit(functools.partial(arm.inputs, sizes))(jax.random.key(0))
            found[name] = _timing.blocking(jax.jit(arm.step), *inputs)
    return found, refused


def check(name: str, make: Callable[[Sizes], Arm]) -> None:
    """Proves on small arrays that an arm trains what it is said to train.

    Raises:
      RuntimeError: its loss or dx is not that of W + scale A B, its gradient is zero,
        or ten steps of gradient descent do not lower the loss.
    """
    sizes = Sizes(tokens=32, d=16, ff=24, rank=4, dtype=jnp.float32, block=8)
    arm, key = make(sizes), jax.random.key(1)
    trained, frozen, x = arm.inputs(sizes, key)
    step = jax.jit(arm.step)
    first, (grads, dx) = step(trained, frozen, x)
    if arm.factored:
        _check_values(name, arm, first, dx, sizes, key)
    if not jax.tree.leaves(trained):
        return
    norm = optax.tree.norm(grads)
    if not norm > 0:
        raise RuntimeError(f"{name}: the norm of its gradient is {norm}.")
    tx = optax.sgd(float(0.05 * first / norm**2))
    state, loss = tx.init(trained), first
    for _ in range(10):
        loss, (grads, _) = step(trained, frozen, x)
        updates, state = tx.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    if not loss < first:
        raise RuntimeError(f"{name}: ten steps take the loss from {first} to {loss}.")


def _check_values(
    name: str, arm: Arm, loss: Any, dx: Any, sizes: Sizes, key: Any
) -> None:
    """The dense merge of the same factors, W rounded as the arm's, is the oracle."""
    oracle = merge_arm(sizes)
    factors, weights, x = oracle.inputs(sizes, key)
    weights = flora.quantize.dequantize(quantized(weights, sizes, arm.qtype))
    wanted, (_, wanted_dx) = oracle.step(factors, weights, x)
    largest = jnp.max(jnp.abs(wanted_dx))
    off = jnp.maximum(abs(loss / wanted - 1), jnp.max(abs(dx - wanted_dx)) / largest)
    if not off <= 1e-4:
        raise RuntimeError(f"{name}: loss or dx is off by {off} from W + scale A B.")
