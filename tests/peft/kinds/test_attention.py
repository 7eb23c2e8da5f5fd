"""`nn.MultiheadAttention`: two weights that PEFT adapts together, one of them twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from flora.peft import Module
from tests.support import peft_files as files
from tests.support import torch_models as models
from tests.support.peft_files import linear, values

D = 6
NAMES = {
    **{
        f"attn/{n}": Module(
            "attn", parameter="in_proj_weight", rows=range(i * D, (i + 1) * D)
        )
        for i, n in enumerate(("query", "key", "value"))
    },
    "attn/out": "attn.out_proj",
    "mix": "mix",
}
TENSORS = {
    **linear("attn", D, 3 * D),
    **linear("attn.base_layer.out_proj", D, D, seed=4),
}


def flax_tree(torch_tree):
    """As Flax's attention has them: three kernels, `[in, heads, features]`."""
    attn = torch_tree["attn"]
    kernels, biases = attn["in_proj_weight"].T, attn["in_proj_bias"]
    parts = {
        n: {
            "kernel": kernels[:, i * D : (i + 1) * D].reshape(D, 2, 3),
            "bias": biases[i * D : (i + 1) * D].reshape(2, 3),
        }
        for i, n in enumerate(("query", "key", "value"))
    }
    out = attn["out_proj"]
    parts["out"] = {"kernel": out["kernel"].reshape(2, 3, D), "bias": out["bias"]}
    return {"attn": parts, "mix": torch_tree["mix"]}


def fn(p, x):
    q, h = p["attn"], models.dense(p["mix"], x)
    split = [
        jnp.einsum("bld,dhk->blhk", h, q[n]["kernel"]) + q[n]["bias"]
        for n in ("query", "key", "value")
    ]
    y = models.mixed(*(x.reshape(*x.shape[:2], -1) for x in split))
    y = y.reshape(*y.shape[:2], 2, 3)
    return jnp.einsum("blhk,hkd->bld", y, q["out"]["kernel"]) + q["out"]["bias"]


def base():
    """As PyTorch has them."""
    attn = {
        "in_proj_weight": jnp.asarray(values(3 * D, D)),
        "in_proj_bias": jnp.asarray(values(3 * D)),
        "out_proj": {"kernel": jnp.asarray(values(D, D)), "bias": jnp.zeros(D)},
    }
    return {"attn": attn, "mix": {"kernel": jnp.asarray(values(D, D, seed=7))}}


def test_out_proj_changes_twice_and_has_the_gradients_of_once(tmp_path):
    folder = files.write(tmp_path / "a", TENSORS, target_modules=["attn"])
    tree = flax_tree(base())
    loaded = flora.peft.load(folder, tree, names=NAMES)
    out = loaded["attn"]["out"]["kernel"]
    change = files.delta(TENSORS, "attn.base_layer.out_proj", 3.0)
    merged = flora.merge(loaded)["attn"]["out"]["kernel"].reshape(D, D)
    np.testing.assert_allclose(merged, values(D, D) + 2 * change, rtol=2e-5, atol=1e-5)

    x, dy = values(5, D, seed=2), values(5, D, seed=3)

    def loss(w):
        y = flora.lora(lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(5, 2, 3), w))
        return (y(w, x) * dy).sum()

    grads = jax.grad(loss, allow_int=True)(out)
    a, b = np.asarray(out.a).reshape(D, 2), np.asarray(out.b).reshape(2, D)
    np.testing.assert_allclose(
        grads.a.reshape(D, 2), 3 * x.T @ dy @ b.T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        grads.b.reshape(2, D), 3 * a.T @ x.T @ dy, rtol=1e-4, atol=1e-4
    )

    flora.peft.save(tmp_path / "b", loaded)
    config, tensors = files.read(tmp_path / "b")
    assert config["target_modules"] == ["attn"]
    assert {*tensors} == {*TENSORS}
    for key, x in TENSORS.items():
        np.testing.assert_array_equal(tensors[key], x)
    with pytest.raises(
        flora.LoraError, match=r"of an nn.MultiheadAttention, which vLLM"
    ):
        flora.peft.save(tmp_path / "c", loaded, serving=True)
    odd = NAMES | {"attn/out": "attn.out"}
    with pytest.raises(flora.LoraError, match=r"where PEFT adds ΔW twice, but named"):
        flora.peft.save(tmp_path / "c", loaded, names=odd)


def test_a_file_with_a_part_of_it_is_refused(tmp_path):
    tree, known = base(), {"target_modules": ["attn", "mix"]}
    for tensors, message in (
        (linear("attn.base_layer.out_proj", D, D), r"'.*attn\.lora_A.weight' is miss"),
        (linear("attn", D, 3 * D) | linear("attn.base_layer.k", D, D), "is no"),
        (linear("attn", D, 3 * D), "'attn.weight', which none of the base's"),
    ):  # fmt: skip
        folder = files.write(tmp_path / "a", tensors, **known)
        with pytest.raises(flora.LoraError, match=message):
            flora.peft.load(folder, tree)


@pytest.mark.peft
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "target", ["attn/*/kernel", "attn/out/kernel", "attn/[qv]*/kernel"]
)
def test_adapters_of_flora_run_in_peft(tmp_path, target):
    """Both weights or one of them: PEFT, which doubles the change, gets half of it."""
    model, _, x = models.build("attention")
    params = flax_tree(models.params_of("attention", model))
    np.testing.assert_allclose(fn(params, x), models.run(model, x), atol=1e-12)
    config = flora.LoraConfig(
        rank=2, alpha=3, target=[target, "mix/kernel"],
        dtype=jnp.float64,
    )  # fmt: skip
    tree = flora.init(jax.random.key(0), config, fn, params, x)
    tree = jax.tree.map(
        lambda w: (
            dataclasses.replace(w, b=w.b + 0.3 * values(*w.b.shape))
            if isinstance(w, flora.LoraWeight)
            else w
        ),
        tree,
        is_leaf=lambda w: isinstance(w, flora.LoraWeight),
    )
    want = flora.lora(fn)(tree, x)
    assert np.abs(want - models.run(model, x)).max() > 1e-2
    flora.peft.save(tmp_path / "a", tree, names=NAMES)
    back = models.reloaded(model, tmp_path / "a")
    np.testing.assert_allclose(models.run(back, x), want, atol=1e-12)
    again = flora.peft.load(tmp_path / "a", params, names=NAMES)
    np.testing.assert_allclose(flora.lora(fn)(again, x), want, atol=1e-12)
