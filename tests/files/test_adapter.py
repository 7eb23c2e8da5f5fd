"""`flora.save` and `flora.load`: what comes back, is refused, survives a crash."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as Spec

import flora
import flora.variants
from flora._files.adapter import _digest, load, save
from flora._files.items import statistics
from flora._files.safetensors import read, write
from flora._tree.paths import named_leaves
from tests.support.checkpoints import mesh, params, place, same, same_shardings, trained
from tests.support.registry import normal


@pytest.fixture(scope="module")
def adapted():
    return trained()[0]


@pytest.fixture
def path(tmp_path, adapted):
    save(tmp_path / "adapter.safetensors", adapted)
    return tmp_path / "adapter.safetensors"


def refused(path, base, *parts, **options):
    with pytest.raises(flora.LoraError) as caught:
        load(path, base, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


# --- What comes back ------------------------------------------------------------------


def test_the_same_tree_comes_back(path, adapted):
    got = load(path, params())
    same(got, adapted)
    kernel = got["first"]["kernel"]
    for field in dataclasses.fields(kernel):
        if field.name not in ("base", "a", "b"):
            was = getattr(adapted["first"]["kernel"], field.name)
            assert getattr(kernel, field.name) == was
    assert kernel.a.dtype == jnp.bfloat16
    base, _ = flora.split(adapted)  # holds None where a leaf trains whole
    same(load(path, base), adapted)
    given = params()
    assert load(path, given)["first"]["kernel"].base is given["first"]["kernel"]


def test_every_setting_comes_back(tmp_path):
    def fn(p, x):
        return jnp.einsum("lbi,lihd->lbhd", x, p["w"]) + p["free"]

    config = flora.LoraConfig(
        rank=3, alpha=5.5, target="w", rank_stabilized=True, dropout=0.25,
        fallback="materialize", form="concat", dtype=jnp.float32,
    )  # fmt: skip
    tree = {"w": normal(2, 6, 4, 5), "free": jnp.zeros(())}
    adapted = flora.init(jax.random.key(0), config, fn, tree, normal(2, 3, 6))
    save(tmp_path / "x", flora.with_dropout(adapted, jax.random.key(1)))
    got = load(tmp_path / "x", tree)["w"]
    expected = dataclasses.replace(adapted["w"], base=None)
    same(dataclasses.replace(got, base=None), expected)
    assert str(got.layout) == "stack=0 in=1 out=2,3"
    assert (got.alpha, got.scale) == (5.5, 5.5 / 3**0.5)
    assert (got.dropout, got.fallback, got.form) == (0.25, "materialize", "concat")


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.float32]
)
def test_every_bit_of_every_dtype_comes_back(tmp_path, adapted, dtype):
    kernel = adapted["first"]["kernel"]
    factors = {k: jnp.asarray(normal(*getattr(kernel, k).shape), dtype) for k in "ab"}
    other = {**adapted, "first": {**adapted["first"]}}
    other["first"]["kernel"] = dataclasses.replace(kernel, **factors)
    save(tmp_path / "x", other)
    same(load(tmp_path / "x", params()), other)


def test_what_also_changes_is_saved_whole(tmp_path, adapted):
    def fn(p, x):
        return x @ p["kernel"] + p["batch_stats"]["mean"]

    tree = {"kernel": normal(4, 3), "batch_stats": {"mean": jnp.zeros(3)}}
    config = flora.LoraConfig(rank=2)
    adapted = flora.init(jax.random.key(0), config, fn, tree, normal(2, 4))
    adapted["batch_stats"]["mean"] = jnp.arange(3.0)
    save(tmp_path / "x", adapted, also="batch_stats/*")
    same(load(tmp_path / "x", tree), adapted)
    save(tmp_path / "x", adapted)  # batch statistics go along in any case
    same(load(tmp_path / "x", tree), adapted)


def test_other_leaves_that_changed_are_named_with_a_remedy_that_works(tmp_path):
    def fn(p, x):
        return x @ p["kernel"] + p["shift"]

    tree = {"kernel": normal(4, 3), "shift": jnp.zeros(3)}
    config = flora.LoraConfig(rank=2)
    adapted = flora.init(jax.random.key(0), config, fn, tree, normal(2, 4))
    adapted["shift"] = jnp.arange(3.0)
    save(tmp_path / "x", adapted)
    message = "If training changed it, save with also='/shift'."
    refused(tmp_path / "x", tree, message)
    save(tmp_path / "x", adapted, also="/shift")
    same(load(tmp_path / "x", tree), adapted)
    with pytest.raises(flora.LoraError, match="also has 'shfit', which selects none"):
        save(tmp_path / "x", adapted, also=["shift", "shfit"])
    with pytest.raises(flora.LoraError, match="also='kernel' selects none"):
        save(tmp_path / "x", adapted, also="kernel")


def test_a_leaf_that_is_not_there_is_not_passed_over(tmp_path, path):
    tree = params()
    tree["first"]["bias"] = None  # it trains whole: whatever is there is replaced
    assert isinstance(load(path, tree)["first"]["bias"], flora.Trained)
    del tree["first"]["bias"]
    refused(path, tree, "'first/bias'", "the given base has no such leaf")


def test_batch_statistics_of_an_nnx_state_are_saved(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.linear(x))

    graph, state = nnx.split(Net())
    config = flora.LoraConfig(rank=2, target="kernel")

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    adapted = flora.init(jax.random.key(0), config, fn, state, normal(2, 4))
    paths = {"norm/mean", "norm/var"}
    assert statistics(adapted) == paths
    named, treedef = named_leaves(adapted)
    later = treedef.unflatten([x + 1 if p in paths else x for p, x in named])
    save(tmp_path / "x", later)
    same(load(tmp_path / "x", state), later)


def test_without_the_check_leaves_without_factors_may_have_other_shapes(tmp_path):
    def fn(p, ids):
        return p["embed"][ids] @ p["kernel"]

    tree = {"embed": normal(9, 4), "kernel": normal(4, 3)}
    ids = jnp.arange(5)
    adapted = flora.init(jax.random.key(0), flora.LoraConfig(rank=2), fn, tree, ids)
    adapted["kernel"] = dataclasses.replace(adapted["kernel"], b=normal(2, 3))
    save(tmp_path / "x", adapted)
    padded = tree | {"embed": jnp.pad(tree["embed"], ((0, 7), (0, 0)))}
    refused(tmp_path / "x", padded, "'embed'", ", or write check_base=False.")
    got = load(tmp_path / "x", padded, check_base=False)
    wanted = flora.lora(fn)(adapted, ids)
    assert jnp.array_equal(flora.lora(fn)(got, ids), wanted)
    for wrong in (padded | {"kernel": normal(5, 3)}, {"kernel": tree["kernel"]}):
        with pytest.raises(flora.LoraError, match=r"Pass the tree of the model"):
            load(tmp_path / "x", wrong, check_base=False)


def test_factors_lie_as_their_weights_do(tmp_path, path, adapted):
    spread = place(adapted, mesh(2, 2))
    save(tmp_path / "spread", spread)
    first, second = read(path), read(tmp_path / "spread")
    assert first.metadata == second.metadata
    assert all((first.array(k) == second.array(k)).all() for k in first.infos)
    base, _ = flora.split(spread)
    for name in ("first", "second"):
        base[name]["bias"] = spread[name]["bias"].value
    got = load(path, base)
    same(got, adapted)
    same_shardings(got, spread)
    assert got["first"]["kernel"].a.sharding.spec == Spec("data", None)


def variant(tree=None, value=None):
    """A model whose one weight has a variant; its magnitudes have moved."""

    def fn(p, x):
        return x @ p["kernel"]

    tree = {"kernel": normal(8, 6)} if tree is None else tree
    config = flora.LoraConfig(rank=2, variant=value or flora.variants.DoRA())
    adapted = flora.init(jax.random.key(0), config, fn, tree, normal(2, 8))
    return jax.tree.map(lambda x: x * 1.5, adapted)


def test_variants_come_back_with_what_they_train(tmp_path):
    for value in (None, flora.variants.VeRA(seed=3), flora.variants.AdaLoRA(std=0.5)):
        adapted = variant(value=value)
        save(tmp_path / "x", adapted)
        got = load(tmp_path / "x", {"kernel": adapted["kernel"].base})
        same(got, adapted)
        assert got["kernel"].variant == adapted["kernel"].variant
    with_dora = variant()
    save(tmp_path / "x", with_dora)
    assert "extra/magnitude/kernel" in read(tmp_path / "x").infos
    base = with_dora["kernel"].base
    place = jax.sharding.NamedSharding(mesh(2, 2), Spec("data", "model"))
    got = load(tmp_path / "x", {"kernel": jax.device_put(base, place)})
    same(got, with_dora)
    assert got["kernel"].extra["magnitude"].sharding.spec == Spec("model")


@dataclasses.dataclass(frozen=True)
class Own(flora.variants.DoRA):
    """A variant that is not flora's."""


def test_variants_of_others_are_refused(tmp_path):
    with pytest.raises(flora.LoraError, match=r"'kernel' has variant=Own.*, which no"):
        save(tmp_path / "x", variant(value=Own()))


def test_a_plan_takes_an_adapter(path, adapted):
    plan = jax.eval_shape(lambda: params(dtype=jnp.bfloat16))
    refused(path, plan, "'first/kernel' is a ShapeDtypeStruct", "check_base=False")
    got = load(path, plan, check_base=False)
    same(flora.split(got)[1], flora.split(adapted)[1])
    assert got["first"]["kernel"].base is plan["first"]["kernel"]


def test_names_and_settings_in_the_file_are_plain(path):
    assert sorted(read(path).infos) == [
        "a/first/kernel", "a/second/kernel", "b/first/kernel", "b/second/kernel",
        "whole/first/bias", "whole/second/bias",
    ]  # fmt: skip
    leaves = json.loads(read(path).metadata["flora"])["leaves"]
    assert leaves["first/kernel"]["layout"] == {"stack": [], "in": [0], "out": [1]}
    assert leaves["first/kernel"]["settings"]["alpha"] == 4.0
    assert leaves["second/bias"] == {"kind": "trained", "shape": [8]}


# --- Bases that do not fit ------------------------------------------------------------


def test_other_bases_are_refused_by_leaf(path):
    other = params()
    other["second"]["kernel"] = other["second"]["kernel"].at[3, 5].add(1e-6)
    message = refused(
        path,
        other,
        str(path),
        "'second/kernel': the checkpoint was trained on a base of float32[16,8] ",
        "check_base=False",
    )
    assert "first" not in message
    assert (
        load(path, other, check_base=False)["second"]["kernel"].base
        is (other["second"]["kernel"])
    )
    refused(path, params(dtype=jnp.bfloat16), "2 problems", "bfloat16[8,16]")


def test_other_structures_are_refused_by_leaf(path, adapted):
    other = params() | {"third": {"kernel": jnp.ones((2, 2))}}
    other["first"] = {"kernel": jnp.ones((8, 15)), "bias": other["first"]["bias"]}
    del other["second"]["kernel"]
    for check_base in (True, False):
        refused(
            path,
            other,
            "3 problems",
            "'first/kernel': the adapter was trained with shape (8, 16); the given "
            "base has shape (8, 15). Pass the tree of the model that it was trained "
            "on.",
            "'second/kernel': the adapter was trained with shape (16, 8); the given "
            "base has no such leaf.",
            "'third/kernel': the adapter was trained with no such leaf; the given base "
            "has shape (2, 2).",
            check_base=check_base,
        )
    refused(path, adapted, "'first/kernel' of the given base is adapted already")


# --- Files that are not whole ---------------------------------------------------------


def rewritten(path, change):
    """The file with another header, right by the format."""
    file = read(path)
    arrays = {k: np.array(file.array(k)) for k in file.infos}
    arrays, metadata = change(arrays, dict(file.metadata))
    write(path, arrays, metadata)


def test_a_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    for size in {0, 1, 7, 8, 100, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:size])
        refused(path, params(), f"{path} is no whole safetensors file: ")
    path.write_bytes(data + b"\0")
    refused(path, params(), "bytes, and")


def test_a_changed_byte_is_refused_wherever_it_is(path, adapted):
    data = path.read_bytes()
    drawn = np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [
        *range(8),
        *drawn.integers(8, header, 60),
        *drawn.integers(header, len(data), 60),
    ]
    for at in places:
        bad = bytearray(data)
        bad[at] ^= 1 << int(drawn.integers(8))
        path.write_bytes(bytes(bad))
        got = loaded_or_refused(path)
        if got is not None:  # a space between the header and the arrays
            same(got, adapted)
            assert at < header


def loaded_or_refused(path):
    try:
        return load(path, params())
    except flora.LoraError:
        return None


def test_foreign_files_are_refused(path, tmp_path):
    refused(tmp_path / "none", params(), "none does not exist")
    refused(tmp_path, params(), "is a directory")
    write(path, {"lora_A": np.zeros(3, np.float32)}, {"format": "pt"})
    refused(
        path, params(), "was not written by flora.save: its header has 'format', no"
    )
    for text in (
        b"[1]",
        b"{",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32"}}',
        b'{"a":1,"a":1}',
        b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
        b'{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ):
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        refused(path, params(), "is no whole safetensors file")
    path.write_bytes(b"\x80\x04\x95pickle is never read")
    refused(path, params(), "is no whole safetensors file")


def test_changed_records_and_versions_are_refused(path):
    def version(arrays, metadata):
        record = json.loads(metadata["flora"]) | {"format": 2, "flora": "9.9"}
        text = json.dumps(record)
        return arrays, {"flora": text, "flora_sha256": _digest(text)}

    def alpha(arrays, metadata):
        text = metadata["flora"].replace('"alpha": 4.0', '"alpha": 8.0')
        assert text != metadata["flora"]
        return arrays, metadata | {"flora": text}

    def dropped(arrays, metadata):
        del arrays["b/first/kernel"]
        return arrays, metadata

    def record(change):
        def changed(arrays, metadata):
            found = json.loads(metadata["flora"])
            change(found)
            text = json.dumps(found)
            return arrays, {"flora": text, "flora_sha256": _digest(text)}

        return changed

    def settings(**new):
        def change(found):
            found["leaves"]["first/kernel"]["settings"].update(new)

        return record(change)

    def unsigned(arrays, metadata):
        text = metadata["flora"].replace('"format": 1', '"format": 2')
        return arrays, metadata | {"flora": text}

    data = path.read_bytes()
    for change, message in (
        (unsigned, "Or it is damaged: its checksum is another"),
        (record(lambda x: x.pop("format")), "is damaged: it lacks 'format'"),
        (record(lambda x: x.update(format=0)), "is damaged: its format is 0"),
        (record(lambda x: x.update(leaves=[])), "leaves is [], not an object"),
        (record(lambda x: x["leaves"].clear()), "others than its leaves need"),
        (record(lambda x: x["leaves"]["first/kernel"].pop("shape")), "lacks 'shape'"),
        (settings(rank=10**400), "settings.rank is 1"),
        (settings(alpha=[]), "The file needs [], which flora"),
        (settings(alpha="x"), "settings.alpha is 'x'"),
        (settings(dropout=1), "settings.dropout is 1"),
        (settings(variant={"class": "flora:Layout", "fields": {}}), "place of a var"),
        (settings(variant={"class": "flora.nowhere:X"}), "needs flora.nowhere:X"),
        (settings(new=1), "with the settings new, which flora 0.1.0 lacks. Install"),
        (version, "was written by flora 9.9 in format 2; flora 0.1.0 reads format 1"),
        (alpha, "is damaged: its header was changed"),
        (dropped, "is damaged: 'b/first/kernel' came or went"),
    ):
        path.write_bytes(data)
        rewritten(path, change)
        refused(path, params(), message)


def test_nan_is_refused_both_ways(path, adapted):
    broken = {**adapted, "first": {**adapted["first"]}}
    kernel = broken["first"]["kernel"]
    broken["first"]["kernel"] = dataclasses.replace(
        kernel, b=kernel.b.at[0, 1].set(np.nan)
    )
    with pytest.raises(
        flora.LoraError, match=r"'b/first/kernel' holds NaN .* in 1 of 32"
    ):
        save(path, broken)
    same(load(path, params()), adapted)
    save(path, broken, allow_nonfinite=True)
    refused(path, params(), "'b/first/kernel' holds NaN or infinity in 1 of 32 places")
    same(load(path, params(), allow_nonfinite=True), broken)


def test_what_cannot_be_saved_is_refused(tmp_path, adapted):
    path = tmp_path / "x"
    used = jax.tree.map(jnp.copy, adapted)
    used["first"]["kernel"].a.delete()
    for tree, message in (
        (params(), "none of the tree's 4 leaves is adapted"),
        (flora.split(adapted)[1], "adapter without its base"),
        (jax.eval_shape(lambda: adapted), "'a/first/kernel' is a ShapeDtypeStruct"),
        (used, "'a/first/kernel', bfloat16.*, was donated"),
    ):
        with pytest.raises(flora.LoraError, match=message):
            save(path, tree)
    for wrong in (None, 3, ""):
        with pytest.raises(flora.LoraError, match=r"path=.*flora.save\(path, tree\)"):
            save(wrong, adapted)
    assert not path.exists()


# --- Crashes --------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_file_before(path, adapted, monkeypatch, step):
    before = path.read_bytes()
    full = OSError(28, "No space left on device")

    def fails(*_, **__):
        raise full

    if step == "write":  # after the header
        monkeypatch.setattr(np, "ascontiguousarray", fails)
    else:
        monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        save(path, plus_one(adapted))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def plus_one(adapted):
    return jax.tree.map(lambda x: x + 1, adapted)
