"""Mixtral's experts: stacked in one parameter, in parts of it, or one by one."""

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
from tests.support.peft_files import PREFIX, linear, values

E, D, F = 3, 8, 6
AT = "model.layers.{}.mlp.experts"


def tensors_of(layers=2, r=2):
    """Of `gate_up_proj`, inside of that of `down_proj`."""
    found = {}
    for i in range(layers):
        at = AT.format(i)
        found |= linear(f"{at}.base_layer", D, 2 * F, r * E, seed=10 * i)
        found |= linear(at, F, D, r * E, seed=10 * i + 5)
    return found


CONFIG = {
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def deltas(tensors, key, scale=3.0):
    """`[E, out, in]` by the formula of PEFT's layer."""
    a = tensors[f"{PREFIX}{key}.lora_A.weight"].astype(np.float64)
    b = tensors[f"{PREFIX}{key}.lora_B.weight"].astype(np.float64)
    a, b = a.reshape(E, -1, a.shape[1]), b.reshape(b.shape[0], -1, E)
    return scale * np.einsum("ore,eri->eoi", b, a)


def base(turned=False):
    """As PyTorch has them, or `[E, in, out]`."""
    shapes = {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}
    layers = {}
    for i in range(2):
        own = {n: values(*s, seed=50 + i) for n, s in shapes.items()}
        own = {n: x.swapaxes(1, 2) if turned else x for n, x in own.items()}
        layers[str(i)] = {"mlp": {"experts": jax.tree.map(jnp.asarray, own)}}
    return {"model": {"layers": layers}}


def fn(p, x, turned=False):
    """All experts in one product, of which their axis is one of those that come out."""
    for q in p["model"]["layers"].values():
        up, down = (q["mlp"]["experts"][n] for n in ("gate_up_proj", "down_proj"))
        spec = ("bd,edf->ebf", "ebf,efd->bd") if turned else (
            "bd,efd->ebf", "ebf,edf->bd")  # fmt: skip
        gate, up = jnp.split(jnp.einsum(spec[0], x, up), 2, -1)
        x = x + jnp.einsum(spec[1], jnp.tanh(gate) * up, down)
    return x


X = jnp.asarray(values(4, D, seed=3))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("followed", [False, True])
def test_stacked_experts(tmp_path, followed, turned):
    tensors = tensors_of()
    folder = files.write(tmp_path / "a", tensors, **CONFIG)
    tree = base(turned)
    more = {"fn": fn, "args": (X, turned)} if followed else {}
    loaded = flora.peft.load(folder, tree, **more)
    merged = flora.merge(loaded)["model"]["layers"]
    for i in range(2):
        for key, name in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            change = deltas(tensors, f"{AT.format(i)}{key}")
            got = np.asarray(merged[str(i)]["mlp"]["experts"][name])
            had = tree["model"]["layers"][str(i)]["mlp"]["experts"][name]
            got = (got - had).swapaxes(1, 2) if turned else got - had
            np.testing.assert_allclose(got, change, rtol=1e-4, atol=1e-4)
    got = flora.lora(fn)(loaded, X, turned)
    np.testing.assert_allclose(got, fn(flora.merge(loaded), X, turned), rtol=2e-3)
    flora.peft.save(tmp_path / "b", flora.split(loaded)[1])
    written = files.read(tmp_path / "b")[1]
    assert {*written} == {*tensors}
    for key, x in tensors.items():
        np.testing.assert_array_equal(written[key], x)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_that_share_factors(tmp_path, turned):
    """As `init` makes them where one product computes all; PEFT has each apart."""
    config = flora.LoraConfig(rank=2, alpha=3, target="*_proj")
    tree = flora.init(jax.random.key(0), config, fn, base(turned), X, turned)

    def moved(w):
        b = w.b + jnp.asarray(0.3 * values(*w.b.shape, seed=8))
        return dataclasses.replace(w, b=b)

    stop = lambda x: isinstance(x, flora.LoraWeight)  # noqa: E731
    tree = jax.tree.map(lambda x: moved(x) if stop(x) else x, tree, is_leaf=stop)
    flora.peft.save(tmp_path / "a", tree)
    tensors = files.read(tmp_path / "a")[1]
    shapes = {k.rpartition("experts")[2]: x.shape for k, x in tensors.items()}
    assert shapes[".base_layer.lora_A.weight"] == (2 * E, D)
    assert shapes[".lora_B.weight"] == (D, 2 * E)
    again = flora.peft.load(tmp_path / "a", base(turned), fn=fn, args=(X, turned))
    want = flora.merge(tree)
    for got, x in zip(jax.tree.leaves(flora.merge(again)), jax.tree.leaves(want),
                      strict=True):  # fmt: skip
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)


def apart(tree):
    """Gate, up and down in leaves of their own, `[E, in, out]`."""
    layers = {}
    for i, q in tree["model"]["layers"].items():
        own = q["mlp"]["experts"]
        gate, up = jnp.split(own["gate_up_proj"].swapaxes(1, 2), 2, -1)
        layers[i] = {"wi_0": gate, "wi_1": up, "wo": own["down_proj"].swapaxes(1, 2)}
    return {"layers": layers}


def test_missing_ones_are_named_or_ignored(tmp_path):
    tensors = tensors_of(layers=1)
    folder = files.write(tmp_path / "a", tensors, **CONFIG)
    match = r"is of 'model\.layers\.1\.mlp\.experts\.down_proj'; the base has it"
    with pytest.raises(flora.LoraError, match=match):
        flora.peft.load(folder, base())
    loaded = flora.peft.load(folder, base(), ignore="layers.1.mlp.experts.*")
    left = loaded["model"]["layers"]["1"]["mlp"]["experts"]["down_proj"]
    assert not isinstance(left, flora.LoraWeight)


def test_parts_of_stacked_experts(tmp_path):
    names = {
        f"layers/{{i}}/{leaf}": Module(
            "model.layers.{i}.mlp.experts", parameter=parameter, rows=rows
        )
        for leaf, parameter, rows in (
            ("wi_0", "gate_up_proj", range(F)),
            ("wi_1", "gate_up_proj", range(F, 2 * F)),
            ("wo", "down_proj", None),
        )
    }
    tensors = tensors_of()
    folder = files.write(tmp_path / "a", tensors, **CONFIG)
    tree = apart(base())
    loaded = flora.peft.load(folder, tree, names=names)
    for i in range(2):
        change = deltas(tensors, f"{AT.format(i)}.base_layer").swapaxes(1, 2)
        got = (
            flora.merge(loaded)["layers"][str(i)]["wi_1"]
            - tree["layers"][str(i)]["wi_1"]
        )
        np.testing.assert_allclose(got, change[..., F:], rtol=1e-4, atol=1e-4)
    flora.peft.save(tmp_path / "b", loaded)
    written = files.read(tmp_path / "b")[1]
    assert {*written} == {*tensors}
    for key, x in tensors.items():
        np.testing.assert_array_equal(written[key], x)
    # Trained, gate and up have an A each.
    node = loaded["layers"]["1"]["wi_0"]
    more = jnp.asarray(values(*node.a.shape, seed=9))
    loaded["layers"]["1"]["wi_0"] = dataclasses.replace(node, a=node.a + more)
    flora.peft.save(tmp_path / "c", loaded)
    again = flora.peft.load(tmp_path / "c", tree, names=names)
    for got, x in zip(jax.tree.leaves(flora.merge(again)),
                      jax.tree.leaves(flora.merge(loaded)), strict=True):  # fmt: skip
        np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_experts_one_by_one(tmp_path):
    """As transformers 4 names them, in a leaf of gates and ups of all."""
    tensors = {}
    for i in range(2):
        for e in range(E):
            at = f"model.layers.{i}.block_sparse_moe.experts.{e}"
            for k, (n, sizes) in enumerate(
                {"w1": (D, F), "w3": (D, F), "w2": (F, D)}.items()
            ):
                tensors |= linear(f"{at}.{n}", *sizes, seed=100 * i + 10 * e + k)
    folder = files.write(tmp_path / "a", tensors, target_modules=["w1", "w2", "w3"])
    at = "model.layers.{i}.block_sparse_moe.experts.{e}"
    names = {
        "layers/{i}/mlp/experts/gate_up_proj": [Module(f"{at}.w1"), Module(f"{at}.w3")],
        "layers/{i}/mlp/experts/down_proj": Module(f"{at}.w2"),
    }
    tree = base(turned=True)
    loaded = flora.peft.load(folder, tree, names=names)
    for e in range(E):
        key = f"model.layers.1.block_sparse_moe.experts.{e}"
        got, had = (
            t["model"]["layers"]["1"]["mlp"]["experts"]["gate_up_proj"][e]
            for t in (flora.merge(loaded), tree)
        )
        change = [files.delta(tensors, f"{key}.{n}", 3.0) for n in ("w1", "w3")]
        np.testing.assert_allclose(
            got - had, np.concatenate(change, -1), rtol=1e-4, atol=1e-4
        )
    flora.peft.save(tmp_path / "b", loaded)
    written = files.read(tmp_path / "b")[1]
    assert {*written} == {*tensors}


@pytest.mark.peft
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("old", [False, True])
def test_mixtral_in_peft(tmp_path, old):
    """Followed by `fn=`: logits, and what PEFT reads back; names of both versions."""
    model, mixtral, x = models.build("mixtral")
    params = models.params_of("mixtral", model)
    target = {"target_parameters": CONFIG["target_parameters"]}
    config = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"]} | target
    adapted = models.adapt(model, config)
    want = models.run(adapted, x)
    folder = models.saved(adapted, tmp_path / "peft")
    loaded = flora.peft.load(folder, params, fn=mixtral, args=(x,))
    np.testing.assert_allclose(flora.lora(mixtral)(loaded, x), want, atol=1e-6)
    names = None
    if old:
        at = "model.layers.{i}.block_sparse_moe.experts.{e}"
        names = {
            "{i}/mlp/experts/gate_up_proj": [Module(f"{at}.w1"), Module(f"{at}.w3")],
            "{i}/mlp/experts/down_proj": f"{at}.w2",
            "{i}/self_attn/q_proj": "model.layers.{i}.self_attn.q_proj",
        }
    flora.peft.save(tmp_path / "b", loaded, names=names)
    back = models.run(models.reloaded(model, tmp_path / "b"), x)
    np.testing.assert_allclose(back, want, atol=1e-6)
