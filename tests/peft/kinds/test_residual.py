"""Bases that a start changed: what is taken off them, told by the adapter's first save.

What PiSSA and OLoRA take is held against PEFT in `tests/peft/test_peft_torch.py`, and
training on against it in `tests/peft/test_peft_starts.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import D, F, X, fn, linear, params, up_adapters

KINDS = ("pissa_niter_4", "corda", "lora_ga", "pissa", True)


def first():
    """The factors at the start."""
    return {
        **linear("layers.0.up", D, F, seed=70),
        **linear("layers.1.up", D, F, seed=80),
    }


def wanted():
    tree = params()
    for i in range(2):
        up = tree["layers"][str(i)]["up"]
        change = files.delta(up_adapters(), f"layers.{i}.up", 3.0)
        change -= files.delta(first(), f"layers.{i}.up", 3.0)
        up["kernel"] = up["kernel"] + change
    return tree


@pytest.mark.parametrize("how", KINDS)
def test_what_the_first_save_holds_is_taken_off(tmp_path, how):
    start = files.write(tmp_path / "start", first())
    folder = files.write(tmp_path / "a", up_adapters(), init_lora_weights=how)
    loaded = flora.peft.load(folder, params(), start=start)
    np.testing.assert_allclose(flora.lora(fn)(loaded, X), fn(wanted(), X), rtol=2e-4)
    node = loaded["layers"]["0"]["up"]["kernel"]
    np.testing.assert_array_equal(
        node.a.T, up_adapters()["base_model.model.layers.0.up.lora_A.weight"]
    )
    flora.peft.save(tmp_path / "plain", loaded, base=params())
    again = flora.peft.load(tmp_path / "plain", params())
    np.testing.assert_allclose(flora.lora(fn)(again, X), fn(wanted(), X), rtol=2e-3)


def test_it_counts_by_its_own_scale(tmp_path):
    start = files.write(tmp_path / "start", first(), lora_alpha=3)
    folder = files.write(tmp_path / "a", up_adapters(), init_lora_weights="corda")
    loaded = flora.peft.load(folder, params(), start=start)
    want = params()["layers"]["1"]["up"]["kernel"]
    want = want - files.delta(first(), "layers.1.up", 1.5)
    np.testing.assert_allclose(loaded["layers"]["1"]["up"]["kernel"].base, want, 1e-5)


def test_starts_that_do_not_fit(tmp_path):
    folder = files.write(tmp_path / "a", up_adapters(), init_lora_weights="corda")
    with pytest.raises(flora.LoraError, match="Pass start="):
        flora.peft.load(folder, params())
    few = files.write(tmp_path / "few", linear("layers.0.up", D, F))
    with pytest.raises(flora.LoraError, match=r"'layers\.1\.up'.*lacks it"):
        flora.peft.load(folder, params(), start=few)
    wide = files.write(tmp_path / "wide", first() | linear("layers.1.up", D, F + 1))
    with pytest.raises(flora.LoraError, match=r"has one of \(7, 4\)"):
        flora.peft.load(folder, params(), start=wide)
    with pytest.raises(flora.LoraError, match="does not exist"):
        flora.peft.load(folder, params(), start=tmp_path / "none")
    with pytest.raises(flora.LoraError, match="Pass arrays"):
        flora.peft.load(folder, jax.eval_shape(params), start=few)
    loftq = files.write(tmp_path / "l", up_adapters(), init_lora_weights="loftq")
    with pytest.raises(flora.LoraError, match="was quantized"):
        flora.peft.load(loftq, params(), start=few)
    assert jnp.ndim(X) == 2
