"""Tunix's Gemma 4, tiny: from Hugging Face's weights to PEFT and a merged checkpoint.

What `plan_gemma4.py` plans at 31B runs here, with the same layers at small sizes, on
eight devices of a CPU: five local layers (k and v fused in one kernel) and a global one
(k is v), heads as axes of the kernels, rows and features sharded by the model's own
metadata.  The weights come by HF's names, train, are saved in the middle, go on over
another mesh, and leave as an adapter of PEFT and as a merged checkpoint.

    pip install -e ".[examples,third-party]"
    python examples/finetune_gemma4.py --out gemma4
    python examples/finetune_gemma4.py --check gemma4  # torch, peft, transformers 5

`tensors` and `modules` are all that names anything; they hold for the 31B as well.
"""

import argparse
import importlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import flora
import flora.hf
import flora.peft
import flora.sharding
from flora.checkpoint import Checkpointer

PREFIX = (
    "model.language_model."  # of the files on the hub; `Gemma4ForCausalLM`: "model."
)
TARGET = ("attn/*_einsum/w", "mlp/*_proj/kernel")
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}
DENSE = ("gate_proj", "up_proj", "down_proj")


# Everything that the 31B has; it has ten times these layers.
TINY = {
    "num_layers": 6, "num_embed": 64, "embed_dim": 32, "hidden_dim": 48, "num_heads": 8,
    "head_dim": 8, "num_kv_heads": 4, "num_global_kv_heads": 2, "global_key_size": 16,
    "sliding_window_size": 4, "k_eq_v_global": True, "attention_pattern": None,
    "final_logit_softcap": 30.0, "per_layer_input_dim": 0,
}  # fmt: skip


def tunix() -> Any:
    """Its module of Gemma 4; what reads a run's files needs none."""
    return importlib.import_module("tunix.models.gemma4.model")


def is_global(config: Any, i: int) -> bool:
    """Whether layer i sees all tokens before it: every sixth, where nothing is said."""
    pattern = config.attention_pattern
    return pattern[i % len(pattern)].name == "GLOBAL" if pattern else i % 6 == 5


def tensors(config: Any, prefix: str = PREFIX) -> dict[str, flora.hf.Tensor]:
    """Where each leaf lies in a checkpoint of Hugging Face."""
    d, n = config.embed_dim, config.num_heads
    found = {
        "embedder/input_embedding": flora.hf.Tensor(f"{prefix}embed_tokens.weight"),
        "final_norm/scale": flora.hf.Tensor(f"{prefix}norm.weight"),
    }

    def heads(count: int, dim: int, *names: str) -> flora.hf.Tensor:
        """Kernels `[heads, in, dim]`, of one tensor or a stack of several."""
        keys = names[0] if len(names) == 1 else names
        return flora.hf.Tensor(keys, (0, 2, 1), (count * dim, d), (count, dim, d))

    for i in range(config.num_layers):
        leaf, name = f"layers/{i}/", f"{prefix}layers.{i}."
        attn = f"{name}self_attn."
        h, k = config.head_dim, config.num_kv_heads
        if is_global(config, i):
            h, k = config.global_key_size, config.num_global_kv_heads or k
        found[f"{leaf}attn/q_einsum/w"] = heads(n, h, f"{attn}q_proj.weight")
        key, value = f"{attn}k_proj.weight", f"{attn}v_proj.weight"
        if is_global(config, i) and config.k_eq_v_global:
            found[f"{leaf}attn/k_einsum/w"] = heads(k, h, key)
        else:
            found[f"{leaf}attn/kv_einsum/w"] = heads(k, h, key, value)
        found[f"{leaf}attn/attn_vec_einsum/w"] = flora.hf.Tensor(
            f"{attn}o_proj.weight", (1, 0), (d, n * h)
        )
        for x in DENSE:
            found[f"{leaf}mlp/{x}/kernel"] = flora.hf.Tensor(
                f"{name}mlp.{x}.weight", (1, 0)
            )
        for ours, theirs in NORMS.items():
            found[f"{leaf}{ours}/scale"] = flora.hf.Tensor(f"{name}{theirs}.weight")
        found[f"{leaf}skip_scale"] = flora.hf.Tensor(f"{name}layer_scalar")
    return found


def modules(prefix: str = PREFIX) -> dict[str, Any]:
    """Which modules of PyTorch each adapted leaf holds, for `flora.peft`."""
    attn = f"{prefix}layers.{{i}}.self_attn."
    return {
        "layers/{i}/attn/q_einsum/w": f"{attn}q_proj",
        "layers/{i}/attn/k_einsum/w": f"{attn}k_proj",
        "layers/{i}/attn/kv_einsum/w": [f"{attn}k_proj", f"{attn}v_proj"],
        "layers/{i}/attn/attn_vec_einsum/w": f"{attn}o_proj",
        **{f"layers/{{i}}/mlp/{x}": f"{prefix}layers.{{i}}.mlp.{x}" for x in DENSE},
    }


def hf_config(config: Any) -> dict[str, Any]:
    """The same sizes as `Gemma4ForCausalLM` has them."""
    kinds = [
        "full_attention" if is_global(config, i) else "sliding_attention"
        for i in range(config.num_layers)
    ]
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": config.num_embed,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_global_key_value_heads": config.num_global_kv_heads,
        "head_dim": config.head_dim,
        "global_head_dim": config.global_key_size,
        "attention_k_eq_v": config.k_eq_v_global,
        "sliding_window": config.sliding_window_size,
        "layer_types": kinds,
        "final_logit_softcapping": config.final_logit_softcap,
        "hidden_size_per_layer_input": config.per_layer_input_dim,
        "tie_word_embeddings": True,
    }


def plain(config: Any) -> tuple[Callable, Any]:
    """`logits(state, ids)` of Tunix's model, and its state as shapes with metadata."""
    model = nnx.eval_shape(lambda: tunix().Gemma4(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def logits(state: Any, ids: jax.Array) -> jax.Array:
        rows, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)),
                                (rows, length, length))  # fmt: skip
        return nnx.merge(graphdef, state)(ids, positions, None, mask)[0]

    return logits, state


def on_mesh(state: Any, fsdp: int, tp: int) -> Any:
    """The state's shapes, each to lie as the model's own metadata says."""
    devices = np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp)
    places = flora.sharding.shardings(state, mesh=Mesh(devices, ("fsdp", "tp")))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places
    )


def random_checkpoint(folder: pathlib.Path, config: Any) -> None:
    """A base to start from: random weights under HF's names."""
    state, rng = plain(config)[1], np.random.default_rng(0)

    def drawn(x: Any) -> np.ndarray:
        values = rng.normal(size=x.shape, scale=0.2 if len(x.shape) > 1 else 0.1)
        return (values + (len(x.shape) == 1)).astype(np.float32)

    save(folder, jax.tree.map(drawn, state), config)


def save(folder: pathlib.Path, state: Any, config: Any) -> None:
    """A checkpoint that transformers loads: weights and config.json."""
    flora.hf.save(folder, state, tensors(config, "model."))
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2))


def batches(steps: int, words: int) -> np.ndarray:
    """`[steps, rows, length]` tokens, each a function of the one before."""
    first = np.random.default_rng(1).integers(0, words, (steps, 8, 1))
    return (first * 3 ** np.arange(12) + 1).astype(np.int32) % words


def trainer(logits: Callable, adapted: Any) -> tuple[Callable, Any]:
    """A jitted step of AdamW, and the optimizer's first state."""
    apply, tx = flora.lora(logits), flora.optimizer(optax.adamw(1e-2), adapted)

    def loss_of(adapted: Any, ids: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            apply(adapted, ids)[:, :-1], ids[:, 1:]
        )
        return losses.mean()

    @jax.jit
    def step(adapted: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = flora.value_and_grad(loss_of)(adapted, ids)
        updates, state = tx.update(grads, state, adapted)
        return flora.apply_updates(adapted, updates), state, loss

    return step, tx.init(adapted)


def run(folder: pathlib.Path, sizes: dict[str, Any], steps: int) -> list[float]:
    """Trains half of the steps on one mesh and half on another; returns the losses."""
    config = tunix().ModelConfig(**sizes)
    random_checkpoint(folder / "base", config)
    logits, shapes = plain(config)
    names = tensors(config, "model.")
    ids = batches(steps, config.num_embed)
    settings = flora.LoraConfig(rank=4, alpha=8, target=TARGET)
    losses: list[float] = []

    def start(fsdp: int, tp: int) -> tuple[Any, ...]:
        base = flora.hf.load(folder / "base", on_mesh(shapes, fsdp, tp), names)
        adapted = flora.init(jax.random.key(0), settings, logits, base, ids[0])
        return base, adapted, *trainer(logits, adapted)

    with Checkpointer(folder / "steps") as checkpointer:
        base, adapted, step, state = start(4, 2)
        for batch in ids[: steps // 2]:
            adapted, state, loss = step(adapted, state, batch)
            losses.append(float(loss))
        checkpointer.save(steps // 2, adapted, state)
        checkpointer.wait()
        base, adapted, step, state = start(2, 1)
        adapted, state, done = checkpointer.restore(adapted, state)
    for batch in ids[done:]:
        adapted, state, loss = step(adapted, state, batch)
        losses.append(float(loss))

    flora.peft.save(
        folder / "adapter",
        adapted,
        names=modules("model."),
        fn=logits,  # followed, since three axes may be those of a convolution
        args=(ids[0],),
        base_model_name_or_path=str(folder / "base"),
        task_type="CAUSAL_LM",
    )
    save(folder / "merged", flora.merge(adapted), config)
    np.savez(
        folder / "logits.npz",
        ids=ids[0],
        base=jax.jit(logits)(base, ids[0]),
        adapted=jax.jit(flora.lora(logits))(adapted, ids[0]),
    )
    return losses


def check(folder: pathlib.Path) -> dict[str, float]:
    """The largest differences of transformers' and PEFT's logits, to max|logits|."""
    wanted = ("torch", "peft", "transformers")
    torch, peft, hf = (importlib.import_module(name) for name in wanted)
    ours = np.load(folder / "logits.npz")
    ids = torch.tensor(ours["ids"], dtype=torch.long)

    def loaded(name: str) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")

    def error(model: Any, name: str) -> float:
        with torch.no_grad():
            theirs = model.eval()(ids).logits.numpy()
        return float(abs(theirs - ours[name]).max() / abs(ours[name]).max())

    found = {"base": error(loaded("base"), "base")}
    model = peft.PeftModel.from_pretrained(loaded("base"), folder / "adapter")
    found["adapter"] = error(model, "adapted")
    found["adapter, merged by PEFT"] = error(model.merge_and_unload(), "adapted")
    return found | {"merged checkpoint": error(loaded("merged"), "adapted")}


def main(argv: list[str] | None = None) -> None:
    """Runs, or checks what a run wrote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="a folder to write")
    parser.add_argument("--check", type=pathlib.Path, help="a folder that was written")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)
    if args.check:
        for what, difference in check(args.check).items():
            print(f"{what}: {difference:.1e} of max|logits|")
        return
    if not args.out:
        parser.error("write --out FOLDER, or --check FOLDER")
    jax.config.update("jax_num_cpu_devices", 8)
    start = time.perf_counter()
    losses = run(args.out.resolve(), TINY, args.steps)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
