"""What `llama.py`, `table.py` and `quality.py` measure is what they say."""

import dataclasses
import math

import _decoder
import jax
import jax.numpy as jnp
import llama
import pytest
import quality
import table
from _decoder import Llama, Sizes
from language_models.llama import Llama as Published
from language_models.llama_config import LlamaConfig
from llama import How

import flora.quantize
from tests.support.contract import close

SMALL = Sizes(
    layers=2, sequences=4, tokens=64, d=64, heads=4, kv_heads=2, ff=128, vocab=128,
    rank=4,
)  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        How(),
        How(attention="none", head="none"),
        How(head="frozen", head_block=8),
        How(target=("q_proj/kernel",), head="frozen", variant="dora"),
        pytest.param(
            How(layers="unrolled", target="all", head="none", base="nf4", block=32),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_arms_have_one_loss_at_init(how):
    if how.target == "all":  # there is no head to adapt
        how = dataclasses.replace(how, head="frozen")
    value = None
    for name, step, inputs in llama.steps(SMALL, how):
        trained, x, base, ids = drawn_as_before(name, inputs)
        loss, (grads, dx) = step(trained, x, base, ids)
        assert dx.shape == x.shape
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves((loss, grads, dx)))
        if how.base not in name:
            value = loss if value is None else value
            assert float(loss) == pytest.approx(float(value), rel=2e-2), name


def drawn_as_before(name, inputs):
    """Inputs of an arm, each weight drawn by its path in the model alone."""

    def one(path, x):
        words = [str(getattr(k, "key", "")) for k in path]
        name = "/".join(w for w in words if w)
        if any(getattr(k, "name", "") == "b" for k in path):
            return jnp.zeros(x.shape, x.dtype)
        key = jax.random.key(sum(map(ord, name)))
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.random.randint(key, x.shape, 0, 7).astype(x.dtype)
        values = jax.random.normal(key, x.shape) / math.sqrt(x.shape[-1])
        return values.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(one, inputs)


def test_the_target_says_what_trains():
    def adapted(**how):
        arms = {name: x for name, _, x in llama.steps(SMALL, How(**how))}
        trained = jax.tree_util.tree_leaves_with_path(arms["flora auto"][0])
        return {jax.tree_util.keystr(path) for path, _ in trained}

    linear, all_ = adapted(head="frozen"), adapted(target="all", head="frozen")
    assert len(linear) == 2 * 7
    assert len(all_) == 2 * 8
    assert adapted() == all_  # the head is adapted unless told
    only = adapted(target=("up_proj/kernel",), head="none")
    assert len(only) == 2
    assert only < linear


@pytest.mark.parametrize("like", _decoder.LIKE)
def test_widths_are_those_of_the_published_models(like):
    sizes = dataclasses.replace(table.sizes_like(like), layers=1)
    arms = llama.steps(sizes, table.LINEAR)
    (_, _, (_, _, params, _)) = next(arms)
    found = {
        jax.tree_util.keystr(path).split("_proj")[0].rpartition("'")[2]: x.shape[
            1:
        ]  # of the one layer
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if "_proj" in jax.tree_util.keystr(path)
    }
    d, q, kv, ff = {
        "8b": (4096, 4096, 1024, 14336),
        "70b": (8192, 8192, 1024, 28672),
        "gemma4-31b": (5376, 8192, 4096, 21504),
    }[like]
    assert found == {
        "q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d),
        "gate": (d, ff), "up": (d, ff), "down": (ff, d),
    }  # fmt: skip


def test_a_packed_sequence_sees_its_own_example_alone():
    sizes = dataclasses.replace(SMALL, sequences=1, tokens=16)
    model = Llama(sizes, "scan", head=False, packed=True)
    x = jax.random.normal(jax.random.key(0), (1, 16, 64), jnp.bfloat16)
    ids = jnp.ones((1, 16), jnp.int32).at[0, 8].set(0)
    params = model.init(jax.random.key(1), x, ids, method=Llama.loss)

    def loss(x, packed):
        run = model.clone(packed=packed)
        return run.apply(params, x[:, -8:], ids[:, -8:], method=Llama.loss)

    def last(x, packed):
        """Of the second example, as the whole sequence has it."""
        seen = dataclasses.replace(sizes, tokens=16)
        layers = Llama(seen, "scan", head=False, packed=packed)
        return layers.apply(params, x, ids, method=second)

    def second(module, x, ids):
        segments = jnp.cumsum(ids == 0, axis=1) if module.packed else None
        for layer in module.layers:
            x, _ = layer(x, segments)
        return jnp.mean(jnp.square(x[:, 8:].astype(jnp.float32)))

    # Rotary positions are relative, so a shift changes rounding and nothing else.
    assert float(last(x, True)) == pytest.approx(float(loss(x, True)), rel=1e-2)
    assert float(last(x, False)) != pytest.approx(float(loss(x, True)), rel=1e-3)


def test_gradients_of_batches_are_summed():
    def loss(w, x, base, ids):
        return jnp.sum(jnp.tanh(x @ w) * base) + 0 * jnp.sum(ids)

    w, x = jnp.ones((3, 2)) / 5, jnp.arange(24.0).reshape(4, 2, 3) / 9
    ids, base = jnp.ones((4, 2)), jnp.float32(2)
    (value, grads), dx = llama.accumulated(loss, 2)(w, x, base, ids)
    wanted, (grads_, dx_) = llama.accumulated(loss, 1)(w, x, base, ids)
    close(value, wanted)
    close(grads, grads_)
    close(dx.reshape(dx_.shape), dx_)


def test_a_row_is_read_as_it_was_written():
    cells = {("8B, DoRA", "v5e"): (1.25, 0.5), ("8B, DoRA", "v6e"): (1.0, 1.01)}
    line = table.line("8B, DoRA", cells)
    assert line == "| 8B, DoRA | 1.250 (0.50) |  | 1.000 (1.01) |"
    assert table.published(f"text\n{line}\n| other | 1 (2) |") == cells


def test_every_row_has_a_line_on_the_page():
    lines = table.PAGE.read_text().splitlines()
    for name in table.ROWS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, name


@pytest.mark.slow
def test_quality_finds_what_rounding_does():
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Published(config, dtype=jnp.float32, param_dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (2, 16), 0, 97)
    params = model.init(jax.random.key(0), ids)
    kinds = [
        ("int8", 32, False),
        ("int4", 32, False),
        ("int4", 64, False),
        ("int4", 32, True),
    ]
    found = dict(quality.measure(model, params, ids, kinds, rank=8))
    dense, int8, int4, wide, loftq = found.values()
    assert dense == pytest.approx(
        {"bits": 32, "error": 0, "kl": 0, "perplexity": dense["perplexity"]}, abs=1e-5
    )
    assert [x["bits"] for x in (int8, int4, wide)] == [9, 5, 4.5]
    assert 0 < int8["error"] < loftq["error"] < int4["error"] < wide["error"]
    assert 0 < int8["kl"] < loftq["kl"] < int4["kl"]
    tree = flora.quantize.quantize(params, "int4", target=quality.LINEAR, block=32)
    logits, rounded = (
        model.apply(x, ids) for x in (params, flora.quantize.dequantize(tree))
    )
    one, other = (x - x.mean(-1, keepdims=True) for x in (logits, rounded))
    error = jnp.sqrt(jnp.mean((one - other) ** 2) / jnp.mean(one**2))
    assert int4["error"] == pytest.approx(float(error), rel=1e-3)
