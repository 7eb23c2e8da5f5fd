"""`flora.save` and `flora.load`: what comes back, what is refused, what a crash leaves."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import mesh, params, place, same, same_shardings, trained
from jax.sharding import PartitionSpec as Spec
from models import normal

import flora
from flora import _safetensors
from flora._files import _digest, load, save
from flora._safetensors import read, write


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
    save(tmp_path / "x", adapted)
    refused(tmp_path / "x", tree, "'batch_stats/mean': the checkpoint was trained on")


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
        path, other, str(path), "'second/kernel': the checkpoint was trained on a base of "
        "float32[16,8] ", "check_base=False",
    )  # fmt: skip
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
            path, other, "3 problems",
            "'first/kernel': the adapter was trained with shape (8, 16); the given base "
            "has shape (8, 15). Pass the tree of the model that it was trained on.",
            "'second/kernel': the adapter was trained with shape (16, 8); the given base "
            "has no such leaf.",
            "'third/kernel': the adapter was trained with no such leaf; the given base "
            "has shape (2, 2).", check_base=check_base,
        )  # fmt: skip
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
    for text in (b"[1]", b"{", b'{"x": 1}', b'{"x": {"dtype": "F32"}}', b'{"a":1,"a":1}',
                 b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
                 b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                 b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'):  # fmt: skip
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

    data = path.read_bytes()
    for change, message in (
        (version, "was written by flora 9.9 in format 2; flora 0.1.0 reads format 1"),
        (alpha, "is damaged: its header was changed"),
        (dropped, "is damaged: 'b/first/kernel' came or went"),
    ):
        path.write_bytes(data)
        rewritten(path, change)
        refused(path, params(), message)


def test_nan_is_refused_both_ways(path, adapted, monkeypatch):
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
    with monkeypatch.context() as patch:
        patch.setattr("flora._files._not_finite", lambda *_: [])
        save(path, broken)
    refused(path, params(), "'b/first/kernel' holds NaN or infinity in 1 of 32 places")


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

    if step == "open":
        monkeypatch.setattr(pathlib.Path, "open", fails)
    elif step == "write":  # after the header
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


KILLS = """
import os, random, signal, sys, time, warnings
import numpy as np
from flora._safetensors import read, write

warnings.simplefilter("ignore")  # of forks: no thread of JAX's has started
path, draw, met = sys.argv[1], random.Random(0), 0
write(path, {"x": np.zeros(1 << 19, np.int64)}, {})
for trial in range(1, 13):
    child = os.fork()
    if not child:
        for n in range(10**6):
            write(path, {"x": np.full(1 << 19, 1000 * trial + n)}, {})
    time.sleep(draw.uniform(0.02, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [n for n in os.listdir(os.path.dirname(path)) if n.endswith(".tmp")]
    met += bool(left)
    for name in left:
        os.remove(os.path.join(os.path.dirname(path), name))
    assert len(set(read(path).array("x").tolist())) == 1
print(met)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "x")], capture_output=True,
        text=True, check=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(flora.__file__).parents[1])},
    )  # fmt: skip
    assert int(done.stdout) > 3, "hardly a kill met a save under way"


# --- The format -----------------------------------------------------------------------


def test_the_format_s_own_example_reads(tmp_path):
    """The bytes are written out by hand here."""
    header = b'{"t":{"dtype":"I16","shape":[2,1],"data_offsets":[0,4]},"e":'
    header += (
        b'{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]},"__metadata__":{"a":"b"}}'
    )
    data = len(header).to_bytes(8, "little") + header + b"\x01\x00\xff\xff"
    (tmp_path / "x").write_bytes(data)
    file = read(tmp_path / "x")
    assert file.array("t").tolist() == [[1], [-1]]
    assert file.array("e").shape == (0, 3)
    assert file.metadata == {"a": "b"}


def test_arrays_are_written_as_the_format_says(tmp_path):
    arrays = {
        name: np.arange(6).reshape(3, 2).astype(dtype)
        for name, dtype in _safetensors.DTYPES.items()
    } | {"scalar": np.float32(3)[...], "transposed": np.arange(6.0).reshape(2, 3).T}
    write(tmp_path / "x", arrays, {"note": "é"})
    file, data = read(tmp_path / "x"), (tmp_path / "x").read_bytes()
    assert file.metadata == {"note": "é"}
    for name, x in arrays.items():
        assert file.infos[name].dtype == x.dtype
        assert file.array(name).shape == x.shape
        assert file.array(name).tobytes() == x.tobytes()
        assert not file.array(name).flags.writeable
    n = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + n])["transposed"]["data_offsets"]
    assert data[8 + n :][start:stop] == np.array([0.0, 3, 1, 4, 2, 5]).tobytes()


@pytest.mark.third_party
def test_the_reference_library_reads_what_flora_writes(tmp_path, path):
    from safetensors import deserialize
    from safetensors.numpy import load_file, save_file

    arrays = {k: np.arange(6).reshape(3, 2).astype(k) for k in ("f4", "i8", "u1", "?")}
    write(tmp_path / "x", arrays, {"format": "pt"})
    got = load_file(tmp_path / "x")
    assert all((got[k] == arrays[k]).all() and got[k].dtype == k for k in arrays)
    assert {name for name, _ in deserialize(path.read_bytes())} == {*read(path).infos}
    save_file(arrays, tmp_path / "y", {"format": "pt"})
    file = read(tmp_path / "y")
    assert all((file.array(k) == arrays[k]).all() for k in arrays)
