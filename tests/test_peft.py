"""Loading: each kind of adapter against its formula in NumPy, from hand-made files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import flora
import flora.peft
from flora._peft.config import parse
from flora._peft.targets import selects
from tests.support import peft_files as files
from tests.support.peft_files import (
    PREFIX,
    D,
    F,
    X,
    delta,
    linear,
    params,
    up_adapters,
    values,
)


def close(got, want, tolerance=2e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0
    )


def merged_by_hand(tensors, scales, tree):
    """The tree with scale B A added to the kernels of modules `{module: scale}`."""
    plain = jax.tree.map(np.asarray, tree)
    for module, scale in scales.items():
        node = plain
        for word in module.split("."):
            node = node[word]
        node["kernel"] = node["kernel"] + delta(tensors, module, scale)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), plain)


def check(loaded, tensors, scales, fn=files.fn, x=X):
    want = merged_by_hand(tensors, scales, params())
    close(flora.lora(fn)(loaded, x), fn(want, x))
    jax.tree.map(close, flora.merge(loaded), want)


def test_linear(tmp_path):
    base, tensors = params(), up_adapters()
    loaded = flora.peft.load(files.write(tmp_path / "a", tensors), base)
    node = loaded["layers"]["1"]["up"]["kernel"]
    assert (node.rank, node.alpha, node.layout) == (2, 6.0, flora.Layout())
    assert node.base is base["layers"]["1"]["up"]["kernel"]
    assert node.a.dtype == node.b.dtype == jnp.float32
    np.testing.assert_array_equal(
        node.a.T, tensors[f"{PREFIX}layers.1.up.lora_A.weight"]
    )
    check(loaded, tensors, {"layers.0.up": 3.0, "layers.1.up": 3.0})


def test_gradients_are_those_of_the_formula(tmp_path):
    tensors, x = up_adapters(), 0.2 * X  # so that tanh does not saturate
    folder = files.write(tmp_path / "a", tensors, lora_alpha=0.2)
    loaded = flora.peft.load(folder, params())

    def loss(tree):
        return (flora.lora(files.fn)(tree, x) ** 2).sum()

    _, grads = flora.value_and_grad(loss)(loaded)
    merged = merged_by_hand(tensors, {"layers.0.up": 0.1, "layers.1.up": 0.1}, params())
    dense = jax.grad(lambda p: (files.fn(p, x) ** 2).sum())(merged)
    for i in "01":
        dw = np.asarray(dense["layers"][i]["up"]["kernel"], np.float64)  # [in, out]
        a = tensors[f"{PREFIX}layers.{i}.up.lora_A.weight"]
        b = tensors[f"{PREFIX}layers.{i}.up.lora_B.weight"]
        got = grads["layers"][i]["up"]["kernel"]
        close(got.a, 0.1 * dw @ b, 1e-5)
        close(got.b, 0.1 * a @ dw, 1e-5)


def test_patterns_in_their_order_and_rslora(tmp_path):
    tensors = {
        **linear("layers.0.up", D, F, 4),
        **linear("layers.1.up", D, F, 2),
        **linear("layers.0.down", F, D, 3),
        **linear("layers.1.down", F, D, 3),
    }
    folder = files.write(
        tmp_path / "a",
        tensors,
        r=3,
        target_modules=["up", "down"],
        # The first key that covers the end of a name wins: 0.up is 4, not 2.
        rank_pattern={r"layers\.0\.up": 4, "up": 2},
        alpha_pattern={"1.down": 5, "0.down": 7},
        use_rslora=True,
    )
    loaded = flora.peft.load(folder, params())
    scales = {
        "layers.0.up": 6 / 4**0.5,
        "layers.1.up": 6 / 2**0.5,
        "layers.0.down": 7 / 3**0.5,
        "layers.1.down": 5 / 3**0.5,
    }
    check(loaded, tensors, scales)
    node = loaded["layers"]["0"]["up"]["kernel"]
    assert (node.rank, node.alpha, node.rank_stabilized) == (4, 6.0, True)


@pytest.mark.parametrize(
    ("config", "module", "chosen"),
    [
        ({"target_modules": ("up",)}, "layers.0.up", True),
        ({"target_modules": ("up",)}, "layers.0.gate_up", False),
        ({"target_modules": ("0.up",)}, "layers.10.up", False),
        ({"target_modules": r".*up"}, "layers.0.gate_up", True),
        ({"target_modules": r"up"}, "layers.0.up", False),
        ({"target_modules": "all-linear"}, "layers.0.up", True),
        ({"target_modules": ("up",), "exclude_modules": ("0.up",)}, "a.0.up", False),
        ({"target_modules": ("up",), "exclude_modules": r"a\..*"}, "a.0.up", False),
        ({"target_modules": ("up",), "modules_to_save": ("a",)}, "a.0.up", False),
        (
            {"target_modules": ("up",), "layers_to_transform": (1,)},
            "m.layers.1.up",
            True,
        ),
        (
            {"target_modules": ("up",), "layers_to_transform": (1,)},
            "m.layers.2.up",
            False,
        ),
        # without a word before the list PEFT's pattern finds no index
        (
            {"target_modules": ("up",), "layers_to_transform": (1,)},
            "layers.1.up",
            False,
        ),
        # the first index counts, not the last
        (
            {"target_modules": ("up",), "layers_to_transform": (1,)},
            "m.layers.1.experts.0.up",
            True,
        ),
        # exact names are not limited to layers
        (
            {"target_modules": ("m.layers.2.up",), "layers_to_transform": (1,)},
            "m.layers.2.up",
            True,
        ),
        (
            {
                "target_modules": ("up",),
                "layers_to_transform": (1,),
                "layers_pattern": ("h", "layers"),
            },
            "layers.1.up",
            True,
        ),
    ],
)
def test_rules_of_targets(config, module, chosen):
    raw = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()} | {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
    }
    assert selects(parse(raw, Path("x")), module) is chosen


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["layers.0.up", "layers.1.up"]},
        {"target_modules": r".*\.up"},
        {"target_modules": ["up", "down"], "exclude_modules": ["down"]},
        {
            "target_modules": ["up"],
            "layers_to_transform": [0, 1],
            "layers_pattern": "layers",
        },
    ],
)
def test_ways_to_select(tmp_path, settings):
    tensors = up_adapters()
    loaded = flora.peft.load(files.write(tmp_path / "a", tensors, **settings), params())
    check(loaded, tensors, {"layers.0.up": 3.0, "layers.1.up": 3.0})


def test_all_linear_may_leave_out_the_head(tmp_path):
    tensors = (
        up_adapters() | linear("layers.0.down", F, D) | linear("layers.1.down", F, D)
    )
    folder = files.write(tmp_path / "a", tensors, target_modules="all-linear")
    loaded = flora.peft.load(folder, params())
    assert not isinstance(loaded["head"]["kernel"], flora.LoraWeight)
    short = {k: v for k, v in tensors.items() if "1.down" not in k}
    with pytest.raises(
        flora.LoraError, match=r"layers.1.down.lora_A.weight' is missing"
    ):
        flora.peft.load(
            files.write(folder, short, target_modules="all-linear"), params()
        )


def test_modules_and_biases_that_train_whole(tmp_path):
    head = {"head.weight": values(3, D, seed=7), "head.bias": values(3, seed=7)}
    norm = {"norm.weight": values(D, seed=7), "norm.bias": values(D, seed=8)}
    bias = {f"layers.{i}.up.base_layer.bias": values(F, seed=30 + i) for i in range(2)}
    whole = {PREFIX + k: v for k, v in (head | norm | bias).items()}
    tensors = up_adapters() | whole
    folder = files.write(
        tmp_path / "a", tensors, modules_to_save=["head", "norm"], bias="lora_only"
    )
    loaded = flora.peft.load(folder, params())
    for leaf, want in (
        (loaded["head"]["kernel"], head["head.weight"].T),
        (loaded["head"]["bias"], head["head.bias"]),
        (loaded["norm"]["scale"], norm["norm.weight"]),
        (loaded["layers"]["1"]["up"]["bias"], bias["layers.1.up.base_layer.bias"]),
    ):
        assert isinstance(leaf, flora.Trained)
        np.testing.assert_array_equal(leaf.value, want)
    assert isinstance(loaded["layers"]["0"]["down"]["bias"], jax.Array)


def test_dora(tmp_path):
    magnitudes = {f"layers.{i}.up": np.abs(values(F, seed=50 + i)) for i in range(2)}
    tensors = up_adapters() | {
        f"{PREFIX}{k}.lora_magnitude_vector": v for k, v in magnitudes.items()
    }
    loaded = flora.peft.load(
        files.write(tmp_path / "a", tensors, use_dora=True), params()
    )
    for i in range(2):
        w = np.asarray(params()["layers"][str(i)]["up"]["kernel"], np.float64)
        whole = w + delta(tensors, f"layers.{i}.up", 3.0)
        want = whole * magnitudes[f"layers.{i}.up"] / np.linalg.norm(whole, axis=0)
        close(flora.merge(loaded)["layers"][str(i)]["up"]["kernel"], want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes(tmp_path, dtype):
    tensors = {k: v.astype(dtype) for k, v in up_adapters().items()}
    folder = files.write(tmp_path / "a", tensors)
    node = flora.peft.load(folder, params())["layers"]["0"]["up"]["kernel"]
    assert node.a.dtype == jnp.float32  # as PEFT has them
    want = tensors[f"{PREFIX}layers.0.up.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(node.a, want)
    half = flora.peft.load(folder, params(), dtype=jnp.bfloat16)["layers"]["0"]["up"]
    assert half["kernel"].b.dtype == jnp.bfloat16


def test_an_abstract_base(tmp_path):
    shapes = jax.eval_shape(lambda: params())
    loaded = flora.peft.load(files.write(tmp_path / "a", up_adapters()), shapes)
    node = loaded["layers"]["0"]["up"]["kernel"]
    assert isinstance(node.base, jax.ShapeDtypeStruct)
    assert isinstance(node.a, jax.Array)


def test_a_tree_that_is_adapted_already(tmp_path):
    tensors = up_adapters()
    folder = files.write(tmp_path / "a", tensors)
    config = flora.LoraConfig(rank=3, target="up/kernel")
    adapted = flora.init(jax.random.key(0), config, files.fn, params(), X)
    loaded = flora.peft.load(folder, adapted)
    assert loaded["layers"]["0"]["up"]["kernel"].rank == 2
    check(loaded, tensors, {"layers.0.up": 3.0, "layers.1.up": 3.0})


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_bases_that_the_start_changed(tmp_path, how):
    """At the start, W - scale B₀ A₀ + scale B₀ A₀ is W."""
    tensors, base = {}, params()
    for i in "01":
        w = np.asarray(base["layers"][i]["up"]["kernel"], np.float64).T  # [out, in]
        if how == "pissa":
            u, s, v = np.linalg.svd(w, full_matrices=False)
            root = np.sqrt(s[:2] / 3.0)
            a, b = root[:, None] * v[:2], u[:, :2] * root
        else:
            q, r = np.linalg.qr(w)
            a, b = r[:2], q[:, :2]
        tensors[f"{PREFIX}layers.{i}.up.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{PREFIX}layers.{i}.up.lora_B.weight"] = b.astype(np.float32)
    folder = files.write(tmp_path / "a", tensors, init_lora_weights=how)
    loaded = flora.peft.load(folder, base)
    for i in "01":
        node, w = loaded["layers"][i]["up"]["kernel"], base["layers"][i]["up"]["kernel"]
        assert np.abs(node.base - w).max() > 0.1
        close(flora.merge(loaded)["layers"][i]["up"]["kernel"], w)
    # Written for the plain base, with what the start took as two more ranks.
    flora.peft.save(tmp_path / "b", loaded, base=base)
    config, written = files.read(tmp_path / "b")
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    for i in "01":
        change = delta(written, f"layers.{i}.up", config["lora_alpha"] / 4)
        assert np.abs(change).max() < 2e-6
    with pytest.raises(flora.LoraError, match="changed the base"):
        flora.peft.load(folder, jax.eval_shape(params))
