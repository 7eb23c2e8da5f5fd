"""What `load(..., ignore=)` lets pass: what it names, and nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, D, F, linear, params, up_adapters, values

DEEPER = linear("layers.2.up", D, F)
GATE = linear("layers.0.down", F, D)
NORM = {f"{PREFIX}norm.weight": values(D, seed=8)}
MAGNITUDES = {f"{PREFIX}layers.{i}.up.lora_magnitude_vector": values(F) for i in "01"}
BIASES = {f"{PREFIX}layers.{i}.up.lora_B.bias": values(F) for i in "01"}
DIAGONALS = {f"{PREFIX}layers.{i}.up.lora_diag": values(2) for i in "01"}
TOKENS = {f"{PREFIX}words.token_adapter.trainable_tokens_delta": values(2, D)}
VELORA = {f"{PREFIX}layers.{i}.up.lora_velora_embed": values(2) for i in "01"}
COUNTS = {f"{PREFIX}steps": np.ones(3, np.int64)}
# (further tensors, changes of the config, ignore=, what the message has without it)
CASES = {
    "a deeper layer": (DEEPER, {}, "layers.2.*", "none of the base's 12 leaves"),
    "its keys in full": (DEEPER, {}, [*DEEPER], "none of the base's 12 leaves"),
    "a regex": (DEEPER, {}, re.compile(r".*\.2\.up\..*"), "none of the base's 12"),
    "a callable": (DEEPER, {}, lambda key, x: ".2." in key, "none of the base's 12"),
    "what is not selected": (GATE, {}, "layers.0.down.*", "does not select it"),
    "what is missing": ({}, {"target_modules": ["up", "down"]}, "down.*", "is missing"),
    "a parameter": (NORM, {}, "norm.weight", "is not part of the adapter"),
    "magnitudes": (MAGNITUDES, {}, "lora_magnitude_vector", "use_dora false"),
    "another dtype": (COUNTS, {}, "steps", "dtype I64"),
    "a head": ({}, {"modules_to_save": ["head"]}, "head.*", "no tensor of 'head'"),
    "biases": ({}, {"bias": "lora_only"}, "up.bias", "up.bias' is missing"),
    "an unknown setting": ({}, {"use_magic": True}, "use_magic", "does not know"),
    "one that is off elsewhere": (
        {}, {"megatron_config": {"a": 1}}, "megatron_config", "no Megatron layers",
    ),
    "gradients": (
        VELORA, {"velora_config": {"num_groups": 2}},
        ("velora_config", "*lora_velora_embed*"), "ignore=('velora_config', '*lora",
    ),
    "biases of B": (BIASES, {}, "lora_B.bias", "lora_bias false"),
    "diagonals": (DIAGONALS, {}, "lora_diag", "lora_diag' is there"),
    "tokens": (
        TOKENS, {"trainable_token_indices": {"words": [0, 1]}},
        ["trainable_token_indices", "words.*"], "none of the base's 12",
    ),
    "tokens that are missing": (
        {}, {"trainable_token_indices": {"words": [0, 1]}}, "words.token_adapter.*",
        "names 2 tokens of 'words'",
    ),
    "one of training": ({}, {"lora_dropout": 1.0}, "lora_dropout", "below 1"),
    "a start on a base that has it": (
        {}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights",
        "cannot be repeated",
    ),
    "several": (
        DEEPER | NORM, {"use_magic": 3}, ["use_magic", "layers.2.*", "norm.*"],
        "use_magic is 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_named_is_passed_over(tmp_path, name):
    more, config, ignore, message = CASES[name]
    folder = files.write(tmp_path / "x", up_adapters() | more, **config)
    with pytest.raises(flora.LoraError, match=re.escape(message)):
        flora.peft.load(folder, params())
    loaded = flora.peft.load(folder, params(), ignore=ignore)
    plain = flora.peft.load(files.write(tmp_path / "y", up_adapters()), params())
    assert jax.tree.structure(loaded) == jax.tree.structure(plain)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(plain), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("layers.2.*", r"ignore has 'layers\.2\.\*', which is no key of the file"),
        (["use_magic", "up.bias"], "2 problems"),
        (3, "ignore=3 holds a int"),
        ("*.0.up.lora_B.weight", "layers.0.up' has a but no b"),
        ("r", "r is missing"),
        ("*.up.*", "has no tensors but those ignored"),
        (lambda key, x: 1 / 0, "failed on"),
    ],
)
def test_what_cannot_be_passed_over(tmp_path, ignore, message):
    folder = files.write(tmp_path / "x", up_adapters())
    with pytest.raises(flora.LoraError, match=message):
        flora.peft.load(folder, params(), ignore=ignore)


def test_a_start_may_be_in_the_base_already(tmp_path):
    """PiSSA's residual, as PEFT's users keep it beside an adapter."""
    config = {"init_lora_weights": "pissa"}
    folder = files.write(tmp_path / "x", up_adapters(), **config)
    kernel = params()["layers"]["0"]["up"]["kernel"]
    taken = flora.peft.load(folder, params())["layers"]["0"]["up"]["kernel"]
    assert jnp.abs(taken.base - kernel).max() > 0.1
    kept = flora.peft.load(folder, params(), ignore="init_lora_weights")
    assert np.array_equal(kept["layers"]["0"]["up"]["kernel"].base, kernel)
