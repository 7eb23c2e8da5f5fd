"""Writing: what the files hold, what servers get; files are complete or absent."""

import dataclasses
import json
import os
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import flora
import flora._peft.file
import flora.peft
from tests.support import peft_files as files
from tests.support import under_fire
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


def adapted(**settings):
    config = flora.LoraConfig(
        **{"rank": 2, "alpha": 6.0, "target": "up/kernel"} | settings
    )
    tree = flora.init(jax.random.key(0), config, files.fn, params(), X)
    return randomized(tree)


def randomized(tree):
    def draw(path, x):
        if not isinstance(x, flora.LoraWeight):
            return x
        seed = len(jax.tree_util.keystr(path))
        b = jnp.asarray(values(*x.b.shape, seed=seed)).astype(x.b.dtype)
        return dataclasses.replace(x, b=b)

    is_node = lambda x: isinstance(x, flora.LoraWeight)  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, tree, is_leaf=is_node)


def close(got, want, tolerance=2e-6):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max(), rtol=0
    )


def test_files(tmp_path):
    tree = adapted()
    flora.peft.save(
        tmp_path / "a", tree, base_model_name_or_path="org/m", task_type="CAUSAL_LM"
    )
    config, tensors = files.read(tmp_path / "a")
    assert {*tensors} == {*up_adapters()}
    for i in "01":
        node, module = tree["layers"][i]["up"]["kernel"], f"layers.{i}.up"
        np.testing.assert_array_equal(
            tensors[f"{PREFIX}{module}.lora_A.weight"], node.a.T
        )
        np.testing.assert_array_equal(
            tensors[f"{PREFIX}{module}.lora_B.weight"], node.b.T
        )
    expected = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none",
        "target_modules": ["layers.0.up", "layers.1.up"], "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "lora_dropout": 0.0,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True, "inference_mode": True,
        "base_model_name_or_path": "org/m", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    assert config | expected == config
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert b'"format":"pt"' in (tmp_path / "a/adapter_model.safetensors").read_bytes()


def test_exact_names_with_their_ranks_and_alphas(tmp_path):
    tree = adapted(
        target=["up/kernel", "down/kernel"],
        rank_pattern={"0/up/kernel": 3},
        alpha_pattern={"1/down/kernel": 1.5},
        rank_stabilized=True,
        dropout=0.1,
    )
    flora.peft.save(tmp_path / "a", tree)
    config, _ = files.read(tmp_path / "a")
    assert config["rank_pattern"] == {"layers.0.up": 3}
    assert config["alpha_pattern"] == {"layers.1.down": 1.5}
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.1)
    loaded = flora.peft.load(tmp_path / "a", params())
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)


def test_names_that_end_alike(tmp_path):
    """PEFT's 'up' is also 'gate.up': what is not adapted must be excluded by name."""
    tree = {
        "up": {"kernel": jnp.ones((4, 4))},
        "gate": {"up": {"kernel": jnp.ones((4, 4))}},
    }

    def fn(p, x):
        return x @ p["up"]["kernel"] @ p["gate"]["up"]["kernel"]

    x, config = (
        jnp.ones((2, 4)),
        flora.LoraConfig(rank=2, target=lambda p, _: p == "up/kernel"),
    )
    made = flora.init(jax.random.key(0), config, fn, tree, x)
    flora.peft.save(tmp_path / "a", made)
    written, _ = files.read(tmp_path / "a")
    assert (written["target_modules"], written["exclude_modules"]) == (
        ["up"],
        ["gate.up"],
    )
    flora.peft.load(tmp_path / "a", tree)
    both = flora.LoraConfig(
        rank=2,
        target="up/kernel",
        rank_pattern={"gate/up/kernel": 1},
        alpha_pattern={"gate/*": 3.0},
    )
    made = flora.init(jax.random.key(0), both, fn, tree, x)
    flora.peft.save(tmp_path / "b", made)
    loaded = flora.peft.load(tmp_path / "b", tree)
    assert loaded["gate"]["up"]["kernel"].rank == 1
    assert (loaded["up"]["kernel"].rank, loaded["up"]["kernel"].alpha) == (2, 16.0)


def test_what_trains_whole(tmp_path):
    tree = adapted(train=["head/*", "norm/scale", "up/bias"])
    flora.peft.save(tmp_path / "a", tree)
    config, tensors = files.read(tmp_path / "a")
    assert config["modules_to_save"] == ["head", "norm"]
    assert config["bias"] == "lora_only"
    assert {*tensors} - {*up_adapters()} == {
        f"{PREFIX}{n}"
        for n in ("head.weight", "head.bias", "norm.weight", "norm.bias",
                  "layers.0.up.base_layer.bias", "layers.1.up.base_layer.bias")
    }  # fmt: skip
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}head.weight"], params()["head"]["kernel"].T
    )
    loaded = flora.peft.load(tmp_path / "a", params())
    close(flora.lora(files.fn)(loaded, X), flora.lora(files.fn)(tree, X))
    all_biases = adapted(train=["bias"])
    flora.peft.save(tmp_path / "b", all_biases)
    assert files.read(tmp_path / "b")[0]["bias"] == "all"
    jax.tree.map(
        np.testing.assert_array_equal,
        flora.peft.load(tmp_path / "b", params()),
        all_biases,
    )


def test_an_adapter_without_its_base(tmp_path):
    tree = adapted()
    flora.peft.save(tmp_path / "a", flora.split(tree)[1], dtype=jnp.bfloat16)
    _, tensors = files.read(tmp_path / "a")
    assert all(x.dtype == jnp.bfloat16 for x in tensors.values())
    loaded = flora.peft.load(tmp_path / "a", params())
    close(
        loaded["layers"]["0"]["up"]["kernel"].b,
        tree["layers"]["0"]["up"]["kernel"].b,
        1e-2,
    )


def test_dora(tmp_path):
    tree = adapted(variant=flora.variants.DoRA())
    flora.peft.save(tmp_path / "a", tree)
    config, tensors = files.read(tmp_path / "a")
    assert config["use_dora"] is True
    m = tensors[f"{PREFIX}layers.0.up.lora_magnitude_vector"]
    np.testing.assert_array_equal(
        m, tree["layers"]["0"]["up"]["kernel"].extra["magnitude"]
    )
    loaded = flora.peft.load(tmp_path / "a", params())
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    with pytest.raises(flora.LoraError, match="vLLM and SGLang refuse"):
        flora.peft.save(tmp_path / "b", tree, serving=True)
    mixed = adapted()
    mixed["layers"]["0"] = tree["layers"]["0"]
    with pytest.raises(
        flora.LoraError, match=r"modules are DoRA, such as 'layers\.0\.up' \('lay"
    ):
        flora.peft.save(tmp_path / "b", mixed)
    vera = adapted(variant=flora.variants.VeRA())
    with pytest.raises(flora.LoraError, match=r"VeRA.*cannot hold"):
        flora.peft.save(tmp_path / "b", vera)
    assert not (tmp_path / "b").exists()


def test_serving(tmp_path):
    tree = adapted(
        target=["up/kernel", "down/kernel"],
        rank_pattern={"0/up/kernel": 3},
        alpha_pattern={"down/kernel": 1.0},
        rank_stabilized=True,
    )
    flora.peft.save(tmp_path / "a", tree, serving=True)
    config, tensors = files.read(tmp_path / "a")
    assert (config["r"], config["use_rslora"]) == (3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    merged, scale = flora.merge(tree), config["lora_alpha"] / config["r"]
    for i in "01":
        for n in ("up", "down"):
            assert tensors[f"{PREFIX}layers.{i}.{n}.lora_A.weight"].shape[0] == 3
            base = np.asarray(params()["layers"][i][n]["kernel"], np.float64)
            close(
                base + delta(tensors, f"layers.{i}.{n}", scale),
                merged["layers"][i][n]["kernel"],
            )
    for settings in ({"train": ["head/*"]}, {"train": ["up/bias"]}):
        with pytest.raises(flora.LoraError, match="SGLang ignores and vLLM refuses"):
            flora.peft.save(tmp_path / "b", adapted(**settings), serving=True)


@pytest.mark.parametrize(
    ("kind", "one"),
    [(kind, one) for kind, sizes in files.TOGETHER.items() for one in sizes],
)
def test_serving_writes_zeros_for_what_servers_read_together(tmp_path, kind, one):
    tree, made = files.together(kind, one)
    flora.peft.save(tmp_path / "a", made, serving=True)
    written, tensors = files.read(tmp_path / "a")
    assert {*written["target_modules"]} == {
        f"layers.0.{n}" for n in files.TOGETHER[kind]
    }
    for n, (in_, out) in files.TOGETHER[kind].items():
        a, b = (tensors[f"{PREFIX}layers.0.{n}.lora_{c}.weight"] for c in "AB")
        assert (a.shape, b.shape) == ((2, in_), (out, 2))
        assert a.any() == b.any() == (n == one)
    flora.peft.load(tmp_path / "a", tree)
    flora.peft.save(tmp_path / "plain", made)
    assert files.read(tmp_path / "plain")[0]["target_modules"] == [f"layers.0.{one}"]


def test_serving_an_adapter_without_its_base(tmp_path):
    """Whether there is a gate beside up, the adapter alone does not tell."""
    sizes = {"up_proj": F, "gate_proj": F, "q_proj": 6, "k_proj": 2, "v_proj": 2}
    tree = {n: {"kernel": jnp.asarray(values(D, out))} for n, out in sizes.items()}

    def fn(p, x):
        return sum((x @ w["kernel"]).sum() for w in p.values())

    def made(*targets):
        config = flora.LoraConfig(rank=2, target=[f"{t}/kernel" for t in targets])
        return flora.init(jax.random.key(0), config, fn, tree, jnp.ones((2, D)))

    alone = flora.split(made("up_proj"))[1]
    with pytest.raises(flora.LoraError, match=r"'gate_proj.weight' is not.*flora.join"):
        flora.peft.save(tmp_path / "a", alone, serving=True)
    alone = flora.split(made("q_proj", "v_proj"))[1]  # servers fill in k themselves
    flora.peft.save(tmp_path / "a", alone, serving=True)
    assert files.read(tmp_path / "a")[0]["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("one", ["gate_up_proj", "down_proj"])
def test_serving_writes_zeros_for_the_other_stack_of_experts(tmp_path, one):
    """vLLM takes the outer adapter of a module with experts for that of down_proj."""
    tree, fn, x, made = files.stacked_experts(one)
    flora.peft.save(tmp_path / "a", made, serving=True)
    written, tensors = files.read(tmp_path / "a")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    assert sorted(written["target_parameters"]) == sorted(names)
    inner, outer = "experts.base_layer", "experts"
    for front, name, in_, out in (
        (inner, "gate_up_proj", D, 2 * F),
        (outer, "down_proj", F, D),
    ):
        a, b = (tensors[f"{PREFIX}{front}.lora_{c}.weight"] for c in "AB")
        assert (a.shape, b.shape) == ((6, in_), (out, 6))
        assert a.any() == b.any() == (name == one)
    loaded = flora.peft.load(tmp_path / "a", tree, fn=fn, args=(x,))
    close(flora.merge(loaded)["experts"][one], flora.merge(made)["experts"][one])


def test_what_cannot_be_written(tmp_path):
    target = tmp_path / "a"
    tree = adapted()
    node = tree["layers"]["1"]["up"]["kernel"]
    bad = adapted()
    bad["layers"]["1"]["up"]["kernel"] = dataclasses.replace(
        node, b=node.b.at[0, 0].set(jnp.nan)
    )
    for given, settings, message in (
        (params(), {}, "none of the tree's .* leaves is adapted"),
        (bad, {}, "'b of layers/1/up/kernel' holds NaN or infinity in 1 of 12"),
        (jax.eval_shape(lambda: tree), {}, "Save outside of jax.jit"),
        (tree, {"task_type": 3}, "task_type=3. Write a string"),
        (tree, {"names": {"layers/0/up": "x"}}, "'layers/1/up/kernel' is not in names"),
        (tree, {"dtype": jnp.int8}, "Write a floating dtype"),
        (tree, {"base": {"x": jnp.ones(3)}}, "base has no leaf 'layers/0/up/kernel'"),
        (adapted(target=(), train="head/*"), {}, "no leaf has factors"),
    ):
        with pytest.raises(flora.LoraError, match=message):
            flora.peft.save(target, given, **settings)
        assert not target.exists()
    target.write_text("mine")
    with pytest.raises(flora.LoraError, match="is a file"):
        flora.peft.save(target, tree)
    assert target.read_text() == "mine"
    one_by_one = adapted()
    for i, rate in (("0", 0.1), ("1", 0.2)):
        up = one_by_one["layers"][i]["up"]
        up["kernel"] = dataclasses.replace(up["kernel"], dropout=rate)
    with pytest.raises(flora.LoraError, match="dropout rates differ"):
        flora.peft.save(tmp_path / "b", one_by_one)


def failing(monkeypatch, step, call):
    """Makes that call of a function of `os` fail."""
    real, calls = getattr(os, step), []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError("no space left")
        return real(*args)

    monkeypatch.setattr(os, step, fail)


@pytest.mark.parametrize(
    ("step", "call"),
    [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)],
)  # weights, config, the note between them
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step, call):
    folder = files.write(tmp_path / "a", up_adapters())
    (folder / "README.md").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    failing(monkeypatch, step, call)
    with pytest.raises(OSError, match="no space"):
        flora.peft.save(folder, adapted())
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_of_the_last_step_leaves_the_new_adapter(tmp_path, monkeypatch):
    folder, tree = files.write(tmp_path / "a", up_adapters()), adapted()
    failing(monkeypatch, "replace", 3)
    with pytest.raises(OSError, match="no space"):
        flora.peft.save(folder, tree)
    monkeypatch.undo()
    chex.assert_trees_all_equal(flora.peft.load(folder, params()), tree)
    with pytest.raises(json.JSONDecodeError):  # PEFT refuses it
        files.read(folder)
    assert (
        b"flora.peft.save was stopped" in (folder / "adapter_config.json").read_bytes()
    )
    other = files.write(tmp_path / "b", up_adapters(3)) / "adapter_model.safetensors"
    other.replace(folder / other.name)
    with pytest.raises(
        flora.LoraError, match=r"has changed since. Save the adapter anew"
    ):
        flora.peft.load(folder, params())
    flora.peft.save(folder, tree)
    chex.assert_trees_all_equal(flora.peft.load(folder, params()), tree)


def test_a_save_stays_inside_its_directory(tmp_path, monkeypatch):
    """It may be a mount point, a link, or where the process is."""
    folder = files.write(tmp_path / "a", up_adapters())
    (tmp_path / "link").symlink_to("a")
    (folder / "adapter_config.json").chmod(0o640)
    (tmp_path / "blob").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("../blob")
    before = folder.stat().st_ino
    monkeypatch.chdir(folder)
    for given in (".", tmp_path / "link"):
        tree = adapted(alpha=float(len(str(given))))
        flora.peft.save(given, tree)
        assert sorted(os.listdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        chex.assert_trees_all_equal(flora.peft.load(folder, params()), tree)
    assert folder.stat().st_ino == before
    assert (folder / "adapter_config.json").stat().st_mode & 0o777 == 0o640
    assert os.readlink("adapter_model.safetensors") == "../blob"
    assert os.readlink(tmp_path / "link") == "a"
    assert sorted(os.listdir(tmp_path)) == ["a", "blob", "link"]


def test_new_weights_under_the_same_config_take_one_step(tmp_path, monkeypatch):
    flora.peft.save(tmp_path, adapted())
    monkeypatch.setattr(flora._peft.file, "replace", None)  # which would write the note
    tree = jax.tree.map(lambda x: 2 * x, adapted())
    flora.peft.save(tmp_path, tree)
    loaded = flora.peft.load(tmp_path, params())["layers"]["0"]["up"]["kernel"]
    np.testing.assert_array_equal(loaded.a, tree["layers"]["0"]["up"]["kernel"].a)


def test_other_files_stay_and_old_links_do_not_change(tmp_path):
    folder = files.write(tmp_path / "a", up_adapters())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b")
    os.link(folder / "adapter_config.json", tmp_path / "copy.json")
    old = (tmp_path / "copy.json").read_bytes()
    flora.peft.save(folder, adapted(target="down/kernel"))
    assert (folder / "tokenizer" / "vocab.txt").read_text() == "a b"
    assert (tmp_path / "copy.json").read_bytes() == old
    assert files.read(folder)[0]["target_modules"] == ["layers.0.down", "layers.1.down"]


def test_kills_at_any_step_leave_the_old_adapter_or_the_new_one(tmp_path):
    """For flora; who reads the two files as they are refuses what lies between."""
    pairs = [(None, 3), (2, 3)]
    killed = under_fire.killed_at_each_step(tmp_path, "peft", pairs)
    for (old, new), folders in killed.items():
        under_fire.check_turn(under_fire.load_peft, folders, old, new)
        under_fire.check_turn(under_fire.as_peft_reads, folders, old, new, refused=9)
        for folder in folders[:: len(folders) // 3]:
            under_fire.write_peft(folder, 4)
            assert under_fire.as_peft_reads(folder) == 4
            assert len([*folder.iterdir()]) == 2


def test_a_load_sees_one_version_of_an_adapter_that_is_saved_meanwhile(
    tmp_path, monkeypatch
):
    under_fire.write_peft(tmp_path, 1)
    read, saves = flora.peft.read_tensors, []

    def late(folder, *rest):
        if len(saves) < 3:
            saves.append(len(saves) + 2)
            under_fire.write_peft(folder, saves[-1])
        return read(folder, *rest)

    monkeypatch.setattr(flora.peft, "read_tensors", late)
    assert under_fire.load_peft(tmp_path) == 4


def test_the_package_is_not_needed(tmp_path, monkeypatch):
    folder = files.write(tmp_path / "a", linear("head", D, 3), target_modules=["head"])
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    adapted = flora.peft.load(folder, params())
    flora.peft.save(tmp_path / "b", adapted)
    again = flora.peft.load(tmp_path / "b", params())
    chex.assert_trees_all_equal(again, adapted)


def test_the_file_is_byte_for_byte_what_the_package_writes(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=ml_dtypes.bfloat16),
        "c.x": np.float64(2.5)[...],
    }
    flora._peft.file.write(tmp_path / "x", {"r": 8}, tensors)
    got = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()
    assert got == safetensors.numpy.save(tensors, metadata={"format": "pt"})


def normed():
    """A linear layer, a norm with statistics, and its function."""

    def fn(p, x):
        mean = p["batch_stats"]["bn"]["mean"]
        return (x @ p["params"]["lin"]["kernel"] - mean) * p["params"]["bn"]["scale"]

    def stats(x):
        return {"bn": {"mean": jnp.full(3, x), "var": jnp.ones(3)}}

    bn = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    layers = {"lin": {"kernel": jnp.ones((4, 3))}, "bn": bn}
    return fn, {"params": layers, "batch_stats": stats(0.0)}, stats


def test_batch_statistics_are_never_lost_silently(tmp_path):
    fn, tree, stats = normed()
    x, config = jnp.ones((2, 4)), flora.LoraConfig(rank=2)
    adapted = flora.init(jax.random.key(0), config, fn, tree, x)
    later = adapted | {"batch_stats": stats(1.0)}
    for options in ({}, {"base": tree}):
        with pytest.raises(flora.LoraError) as caught:
            flora.peft.save(tmp_path / "x", later, **options)
        text = str(caught.value)
        assert "'batch_stats/bn/mean' " in text
        assert "write ignore='batch_stats/*' to leave them out" in text
    flora.peft.save(tmp_path / "x", later, ignore="batch_stats/*")
    flora.peft.save(tmp_path / "y", adapted, base=tree)  # they are as they were
    flora.peft.save(tmp_path / "z", flora.split(later)[1])  # an adapter has none
    with pytest.raises(flora.LoraError, match="ignore has 'stats', which selects none"):
        flora.peft.save(tmp_path / "x", later, ignore=["batch_stats/*", "stats"])


def test_statistics_of_a_module_that_trains_whole_are_saved(tmp_path):
    fn, tree, stats = normed()
    config = flora.LoraConfig(rank=2, train="bn/[sb]*")
    adapted = flora.init(jax.random.key(0), config, fn, tree, jnp.ones((2, 4)))
    later = adapted | {"batch_stats": stats(1.0)}
    flora.peft.save(tmp_path / "x", later)
    loaded = flora.peft.load(tmp_path / "x", tree)
    assert jnp.array_equal(loaded["batch_stats"]["bn"]["mean"], jnp.ones(3))
