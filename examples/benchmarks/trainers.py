"""One model and the same tokens, full fine-tuning beside four ways to have LoRA.

    python examples/benchmarks/trainers.py

For each way: the lines that set it up, the weights that have factors, of all that have
two axes or more, and the FLOPs of loss and gradients as XLA counts them, compiled for
CPU.  "The same weights" is flora on those that the other library reaches.  Loops are
unrolled, since XLA counts the body of one once.  Needs the extra `third-party`.
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console

import flora
import flora.linen
import flora.nnx

RANK, WORDS, D, FF, HEADS, LAYERS = 8, 1024, 256, 704, 8, 2
IDS = jax.random.randint(jax.random.key(0), (2, 128), 0, WORDS)
KEY = jax.random.key(1)
Step = tuple[set[str], float]  # the names of what trains, and the FLOPs
Ways = dict[str, tuple[int, Callable[[], Step]]]  # lines, and what gives a step
EVERYTHING = flora.LoraConfig(rank=RANK, target=lambda path, _: is_weight(path))


def is_weight(path: str) -> bool:
    """Whether a parameter has two axes or more but for those of its layers."""
    return re.search(r"(norm\w*/\w+|scale|bias)$", path) is None


class NnxBlock(nnx.Module):
    """Attention by two einsums, and two linear layers."""

    def __init__(self, linear: Any, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        shape = (D, 3, HEADS, D // HEADS)
        self.qkv = nnx.Einsum("btd,dcnh->cbtnh", shape, rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (HEADS, D // HEADS, D), rngs=rngs)
        self.up = linear(D, FF, use_bias=False, rngs=rngs)
        self.down = linear(FF, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[rows, tokens, D]` to the same shape."""
        q, k, v = self.qkv(self.norm(x))
        x = x + self.out(nnx.dot_product_attention(q, k, v))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxScan(nnx.Module):
    """Tokens to logits, layers stacked and scanned over."""

    def __init__(self, linear: Any = nnx.Linear):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(WORDS, D, rngs=rngs)
        block = nnx.vmap(lambda rngs: NnxBlock(linear, rngs))
        self.layers = nnx.split_rngs(splits=LAYERS)(block)(rngs)
        self.head = linear(D, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits."""
        axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry, "unroll": LAYERS}
        x = nnx.scan(lambda layer, x: layer(x), **axes)(self.layers, self.embed(ids))
        return self.head(x)


class LinenBlock(nn.Module):
    """As `NnxBlock`."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """As a scan's body: the carry first."""
        shape = (D, 3, HEADS, D // HEADS)
        qkv = nn.Einsum(shape, "btd,dcnh->cbtnh", use_bias=False, name="qkv")
        q, k, v = qkv(nn.RMSNorm(name="norm")(x))
        out = nn.DenseGeneral(D, (-2, -1), use_bias=False, name="out")
        x = x + out(nn.dot_product_attention(q, k, v))
        h = nn.gelu(nn.Dense(FF, use_bias=False, name="up")(x))
        return x + nn.Dense(D, use_bias=False, name="down")(h), None


class LinenScan(nn.Module):
    """As `NnxScan`."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits."""
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        block = nn.scan(LinenBlock, length=LAYERS, unroll=LAYERS, **options)
        x, _ = block(name="layers")(nn.Embed(WORDS, D, name="embed")(ids), None)
        return nn.Dense(WORDS, use_bias=False, name="head")(x)


def llama() -> tuple[nnx.Module, dict[str, Any]]:
    """Llama 3 of Tunix and the arguments of a call."""
    module = importlib.import_module("tunix.models.llama3.model")
    config = module.ModelConfig(
        num_layers=LAYERS, vocab_size=WORDS, embed_dim=D, hidden_dim=FF,
        num_heads=HEADS, head_dim=D // HEADS, num_kv_heads=4, rope_theta=10_000,
        norm_eps=1e-6,
    )  # fmt: skip
    rows, length = IDS.shape
    return module.Llama3(config, rngs=nnx.Rngs(0)), {
        "input_tokens": IDS,
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "cache": None,
        "attention_mask": jnp.tril(jnp.ones((rows, length, length), bool)),
    }


def gemma() -> nn.Module:
    """Gemma 3 of the package gemma, a local layer and a global one."""
    gm = importlib.import_module("gemma.gm")
    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=WORDS, embed_dim=D, hidden_dim=FF, num_heads=HEADS, num_kv_heads=4,
        head_dim=D // HEADS, final_logit_softcap=None, sliding_window_size=64,
        use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
    )  # fmt: skip
    return gm.nn.Transformer(config=config, dtype=jnp.float32)


# Each way, as a user writes it: the lines of these functions are counted.


def nnx_flora(model: Any, call: dict[str, Any], config: flora.LoraConfig) -> Any:
    """An adapted module of the model's class."""
    return flora.nnx.adapt(KEY, config, model, **call)


def nnx_qwix(model: Any, call: dict[str, Any], path: str) -> Any:
    """A module whose operations are intercepted."""
    qwix = importlib.import_module("qwix")
    provider = qwix.LoraProvider(module_path=path, rank=RANK, alpha=RANK)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **call)


def nnx_loralinear(model: Any, call: dict[str, Any]) -> Any:
    """Flax's own: linear layers of a model that is built already are replaced."""
    for path, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear):
                sizes = layer.in_features, RANK, layer.out_features
                options = {"base_module": layer, "rngs": nnx.Rngs(len(path))}
                setattr(module, name, nnx.LoRA(*sizes, **options))
    return model


def linen_flora(model: nn.Module, config: flora.LoraConfig) -> nn.Module:
    """A module around the model."""
    return flora.linen.LoRA(model=model, config=config)


def linen_qwix(model: nn.Module, path: str) -> nn.Module:
    """A module whose operations are intercepted."""
    qwix = importlib.import_module("qwix")
    provider = qwix.LoraProvider(module_path=path, rank=RANK, alpha=RANK)
    return qwix.apply_lora_to_model(model, provider)


def linen_gm(model: nn.Module) -> nn.Module:
    """A module around the model, made for gemma's."""
    gm = importlib.import_module("gemma.gm")
    return gm.nn.LoRA(rank=RANK, model=model, dtype=jnp.float32)


def lines(function: Callable) -> int:
    """The lines of a function's body, without its imports and docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    kept = [x for x in tree.body[1:] if "import_module" not in ast.unparse(x)]
    return sum((x.end_lineno or x.lineno) - x.lineno + 1 for x in kept)


def cross_entropy(logits: Any) -> jax.Array:
    """That of each next token."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], IDS[:, 1:]
    )
    return losses.mean()


def flops(step: Callable, *args: Any) -> float:
    """XLA's count of a step."""
    compiled = jax.jit(step).lower(*args).compile()
    return (compiled.cost_analysis() or {})["flops"]


def nnx_step(model: Any, call: dict[str, Any], kind: type) -> Step:
    """The names of what trains, and the FLOPs of a step."""

    def loss(model: Any) -> jax.Array:
        out = model(**call)
        return cross_entropy(out[0] if isinstance(out, tuple) else out)

    def step(state: Any) -> Any:
        grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))
        return grad(nnx.merge(graphdef, state))

    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)) for path, _ in flat}, flops(step, state)


def linen_step(model: nn.Module, *, full: bool) -> Step:
    """The names of what trains, and the FLOPs of a step."""
    params = jax.eval_shape(model.init, KEY, IDS)["params"]
    flat, treedef = jax.tree.flatten_with_path(params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat]
    trains = {
        n: x for n, (_, x) in zip(names, flat, strict=True) if full or "lora" in n
    }
    rest = {n: x for n, (_, x) in zip(names, flat, strict=True) if n not in trains}

    def loss(trained: Any, rest: Any) -> jax.Array:
        both = trained | rest
        out: Any = model.apply(
            {"params": treedef.unflatten(both[n] for n in names)}, IDS
        )
        return cross_entropy(getattr(out, "logits", out))

    return set(trains), flops(jax.value_and_grad(loss), trains, rest)


def weight_of(name: str) -> str:
    """The weight that an array belongs to, or the module that holds it."""
    name = re.sub(r"_LoRAEinsum_(\d+/)?|lora/", "", name)
    return name.split("_lora_")[0] if "_lora_" in name else name.rsplit("/", 1)[0]


def reached(weights: set[str], trained: set[str]) -> set[str]:
    """The weights that have factors, by what trains."""
    found = {weight_of(name) for name in trained}
    return {w for w in weights if w in found or w.rsplit("/", 1)[0] in found}


def row(
    name: str, count: int, weights: set[str], step: Step, full: float
) -> tuple[str, list[str]]:
    """A line of the table."""
    found = reached(weights, step[0])
    missing = sorted({re.sub(r"\b\d+\b", "*", w) for w in weights - found})
    cells = [f"{count}", f"{len(found)} of {len(weights)}", f"{step[1] / full:.3f}"]
    return name, [*cells, ", ".join(missing)]


def compare(
    plain: Step,
    flora_step: Callable[[flora.LoraConfig], Step],
    mine: int,
    others: Ways,
) -> Iterator[tuple[str, list[str] | str]]:
    """The rows of one model."""
    weights, full = {n for n in plain[0] if is_weight(n)}, plain[1]
    yield "full fine-tuning", ["0", "all", "1.000", ""]
    yield row("flora", mine, weights, flora_step(EVERYTHING), full)
    for name, (count, step) in others.items():
        try:
            theirs = step()
        except Exception as error:  # what stops another library is a result
            yield name, f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found = reached(weights, theirs[0])
        yield row(name, count, weights, theirs, full)
        same = flora.LoraConfig(rank=RANK, target=lambda path, _, f=found: path in f)
        yield row("flora, the same weights", mine, weights, flora_step(same), full)


def of_nnx(
    make: Callable[[], tuple[Any, dict[str, Any]]],
    flax: tuple[int, Callable[[], Any]],
    paths: dict[str, str],
) -> Iterator:
    """The rows of an NNX model: `flax` is it with Flax's own factors, and its lines."""
    model, call = make()

    def ours(config: flora.LoraConfig) -> Step:
        return nnx_step(nnx_flora(model, call, config), call, nnx.LoRAParam)

    def qwix(path: str) -> Step:
        return nnx_step(nnx_qwix(make()[0], call, path), call, nnx.LoRAParam)

    others: Ways = {
        name: (lines(nnx_qwix), functools.partial(qwix, path))
        for name, path in paths.items()
    }
    others["nnx.LoRA"] = flax[0], lambda: nnx_step(flax[1](), call, nnx.LoRAParam)
    return compare(nnx_step(model, call, nnx.Param), ours, lines(nnx_flora), others)


def of_linen(model: nn.Module, paths: dict[str, str]) -> Iterator:
    """The rows of a Linen model."""

    def ours(config: flora.LoraConfig) -> Step:
        return linen_step(linen_flora(model, config), full=False)

    def qwix(path: str) -> Step:
        return linen_step(linen_qwix(model, path), full=False)

    others: Ways = {
        name: (lines(linen_qwix), functools.partial(qwix, path))
        for name, path in paths.items()
    }
    others["gm.nn.LoRA"] = (
        lines(linen_gm),
        lambda: linen_step(linen_gm(model), full=False),
    )
    return compare(linen_step(model, full=True), ours, lines(linen_flora), others)


def scan_loralinear() -> NnxScan:
    """The model with another layer in its source, wherever that has a linear one."""
    return NnxScan(functools.partial(nnx.LoRALinear, lora_rank=RANK))


def main() -> None:
    """Prints a table a model."""
    in_source = sum(inspect.getsource(x).count("linear(") for x in (NnxBlock, NnxScan))
    every = {"qwix": ".*"}
    tables = {
        "Llama 3 of Tunix": lambda: of_nnx(
            llama, (lines(nnx_loralinear), lambda: nnx_loralinear(*llama())), every
        ),
        "NNX, nnx.scan": lambda: of_nnx(
            lambda: (NnxScan(), {"ids": IDS}),
            (in_source, scan_loralinear),
            every | {"qwix, outside the scan": "(?!layers).*"},
        ),
        "Linen, nn.scan": lambda: of_linen(
            LinenScan(), every | {"qwix, but for the einsum": "(?!.*qkv).*"}
        ),
        "Gemma 3 of gemma": lambda: of_linen(gemma(), every),
    }
    console = Console(width=160)
    console.print(_report.versions("qwix", "google-tunix", "gemma"), highlight=False)
    columns = ["step", "lines", "weights", "FLOPs to full", "without factors"]
    for title, rows in tables.items():
        console.print(_report.table(title, columns, list(rows())))


if __name__ == "__main__":
    main()
