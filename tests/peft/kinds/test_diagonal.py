"""BD-LoRA: factors of blocks, which the file holds alone."""

import jax
import numpy as np
import optax
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, D, F, X, fn, params, values

KIND = {
    "target_modules_bd_a": ["down"],
    "target_modules_bd_b": ["up"],
    "nblocks": 2,
    "match_strict": True,
}


def tensors():
    found = {}
    for i in range(2):
        down, up = f"{PREFIX}layers.{i}.down", f"{PREFIX}layers.{i}.up"
        found |= {
            f"{down}.lora_A.weight": values(4, F // 2, seed=i),
            f"{down}.lora_B.weight": values(D, 4, seed=i),
            f"{up}.lora_A.weight": values(4, D, seed=5 + i),
            f"{up}.lora_B.weight": values(F, 2, seed=5 + i),
        }
    return found


def saved(folder, held=None, **config):
    config = {"r": 4, "target_modules": ["up", "down"], "use_bdlora": KIND} | config
    return files.write(folder, held or tensors(), **config)


def full(held):
    """A `[4, in]` and B `[out, 4]` by module, zeros written out."""
    for i in range(2):
        a, b = (held[f"{PREFIX}layers.{i}.down.lora_{x}.weight"] for x in "AB")
        wide = np.zeros((4, F), a.dtype)
        wide[:2, : F // 2], wide[2:, F // 2 :] = a[:2], a[2:]
        yield str(i), "down", wide, b
        a, b = (held[f"{PREFIX}layers.{i}.up.lora_{x}.weight"] for x in "AB")
        wide = np.zeros((F, 4), b.dtype)
        wide[: F // 2, :2], wide[F // 2 :, 2:] = b[: F // 2], b[F // 2 :]
        yield str(i), "up", a, wide


def test_products_and_merged_weights(tmp_path):
    tree = params()
    for i, word, a, b in full(tensors()):
        own = tree["layers"][i][word]
        own["kernel"] = own["kernel"] + 1.5 * (b @ a).T
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    np.testing.assert_allclose(flora.lora(fn)(loaded, X), fn(tree, X), rtol=2e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        flora.merge(loaded),
        tree,
    )


def test_what_lies_outside_of_the_blocks_stays_zero(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    tx = flora.optimizer(optax.adamw(0.1, weight_decay=0.1), loaded)
    _, grads = flora.value_and_grad(lambda t: (flora.lora(fn)(t, X) ** 2).sum())(loaded)
    updates, _ = tx.update(grads, tx.init(loaded), loaded)
    after = optax.apply_updates(loaded, updates)
    flora.peft.save(tmp_path / "b", after)
    _, held = files.read(tmp_path / "b")
    for i, word, a, b in full(held):
        node = after["layers"][i][word]["kernel"]
        np.testing.assert_array_equal(node.a, a.T)
        np.testing.assert_array_equal(node.b, b.T)
    assert (held[f"{PREFIX}layers.0.down.lora_A.weight"] != tensors()[
        f"{PREFIX}layers.0.down.lora_A.weight"]).all()  # fmt: skip


def test_what_was_loaded_is_written_again(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    flora.peft.save(tmp_path / "b", loaded)
    config, held = files.read(tmp_path / "b")
    for key, x in tensors().items():
        np.testing.assert_array_equal(held[key], x)
    assert config["use_bdlora"] == {
        "target_modules_bd_a": [f"layers.{i}.down" for i in range(2)],
        "target_modules_bd_b": [f"layers.{i}.up" for i in range(2)],
        "nblocks": 2,
        "match_strict": True,
    }
    flora.peft.save(tmp_path / "served", loaded, serving=True)
    config, held = files.read(tmp_path / "served")
    assert config["use_bdlora"] is None
    assert held[f"{PREFIX}layers.0.down.lora_A.weight"].shape == (4, F)


CASES = {
    "in both": ({**KIND, "target_modules_bd_a": ["u", "down"]}, "in both lists"),
    "in none": ({**KIND, "target_modules_bd_a": None}, "in no list"),
    "blocks": ({**KIND, "nblocks": 3}, "no multiples of nblocks, 3"),
    "no number": ({**KIND, "nblocks": 0}, "use_bdlora is"),
    "flag": (True, "use_bdlora is True; expected an object"),
}


@pytest.mark.parametrize("name", CASES)
def test_configs_that_do_not_fit(tmp_path, name):
    kind, text = CASES[name]
    with pytest.raises(flora.LoraError, match=text):
        flora.peft.load(saved(tmp_path / "a", use_bdlora=kind), params())


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"use_dora": True}, "use_dora and use_bdlora are on together"),
        ({"init_lora_weights": "pissa"}, "use_bdlora is on and init_lora_weights"),
    ],
)
def test_kinds_that_peft_has_one_at_a_time(tmp_path, more, text):
    with pytest.raises(flora.LoraError, match=text):
        flora.peft.load(saved(tmp_path / "a", **more), params())
