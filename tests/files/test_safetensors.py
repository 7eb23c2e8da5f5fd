"""The safetensors format, byte by byte, and writers that are killed."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

import flora
from flora._files import safetensors
from flora._files.safetensors import read, write
from tests.support.promptly import promptly

KILLS = """
import os, random, signal, sys, time, warnings
import numpy as np
from flora._files.safetensors import read, write

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
        [sys.executable, "-c", KILLS, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(flora.__file__).parents[1])},
    )
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
        for name, dtype in safetensors.DTYPES.items()
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
def test_the_reference_library_reads_what_flora_writes(tmp_path):
    from safetensors import deserialize
    from safetensors.numpy import load_file, save_file

    arrays = {k: np.arange(6).reshape(3, 2).astype(k) for k in ("f4", "i8", "u1", "?")}
    write(tmp_path / "x", arrays, {"format": "pt"})
    got = load_file(tmp_path / "x")
    assert all((got[k] == arrays[k]).all() and got[k].dtype == k for k in arrays)
    narrow = np.arange(6).astype(safetensors.DTYPES["BF16"])
    write(tmp_path / "y", {"x": narrow}, {})
    ((name, found),) = deserialize((tmp_path / "y").read_bytes())
    assert (name, found["dtype"], found["shape"]) == ("x", "BF16", [6])
    assert bytes(found["data"]) == narrow.tobytes()
    save_file(arrays, tmp_path / "z", {"format": "pt"})
    file = read(tmp_path / "z")
    assert all((file.array(k) == arrays[k]).all() for k in arrays)
    for name in ("BF16", "C64"):
        x = np.arange(6).astype(safetensors.DTYPES[name])
        write(tmp_path / name, {"x": x}, {})
        assert load_file(tmp_path / name)["x"].tobytes() == x.tobytes()


@pytest.mark.third_party
def test_what_the_reference_library_cannot_do(tmp_path):
    """One of the reasons for a reader of flora's own: the docstring names them all."""
    from safetensors.numpy import load_file

    for name in ("F8_E4M3", "F8_E5M2"):
        write(tmp_path / name, {"x": np.ones(3, safetensors.DTYPES[name])}, {})
        with pytest.raises(AttributeError, match="float8"):
            load_file(tmp_path / name)


def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path, monkeypatch):
    """Header and arrays of one file, whatever comes under its name."""
    path, parsed = tmp_path / "x", safetensors._parsed
    write(path, {"x": np.arange(5)}, {})

    def late(path, text):
        write(path, {"other": np.zeros(2, np.int8), "x": -np.arange(5)}, {})
        return parsed(path, text)

    monkeypatch.setattr(safetensors, "_parsed", late)
    assert read(path).array("x").tolist() == [0, 1, 2, 3, 4]


# --- Headers of any kind --------------------------------------------------------------


def entry(shape, start, stop, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"x": entry([4], 0, 4), "y": entry([4], 0, 4)}, "'y' starts at byte 0 ins"),
        ({"x": entry([5], 0, 5), "y": entry([4], 4, 8)}, "'y' starts at byte 4 ins"),
        ({"x": entry([3], 0, 3), "y": entry([4], 4, 8)}, "'y' starts at byte 4 ins"),
        ({"x": entry([4], 4, 8)}, "'x' starts at byte 4 instead of 0"),
        ({"x": entry([4], 0, 4)}, "its arrays take 4 bytes, and 8 are there"),
        ({"x": entry([9], 0, 9)}, "its arrays take 9 bytes, and 8 are there"),
        ({"x": entry([8], 8, 0)}, "was given -8 bytes"),
        ({"x": entry([8], -8, 0)}, "its header has {"),
        ({"x": entry([True, 8], 0, 8)}, "its header has {"),
        ({"x": entry([8.0], 0, 8)}, "its header has {"),
        ({"x": entry(["8"], 0, 8)}, "its header has {"),
        ({"x": entry([0, 10**4000], 0, 0)}, "its header has {"),
        ({"x": entry([0] + [2**40] * 9, 0, 0)}, "its header has {"),
        ({"x": entry([1] * 33 + [8], 0, 8)}, "its header has {"),
        ({"x": [1, 2]}, "its header has [1, 2] for 'x'"),
        ({"x\x1b[2J": entry([8], 0, 8)}, r"'x\x1b[2J' is no name of an array"),
        ({"\ud800": entry([8], 0, 8)}, r"'\ud800' is no name of an array"),
        (b'{"x": 1, "x": 2}', "the key 'x' is there twice"),
        (b'{"x": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"x":' * 20_000 + b"1" + b"}" * 20_000, "no JSON of tensors"),
        (b'{"x": ' + b"[" * 40 + b"]" * 40 + b"}", "for 'x'"),
        (b'{"__metadata__": {"a": 1}}', "no dict of text"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "is a list, no dict"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, why):
    path = written(tmp_path / "x", header, bytes(8))
    with pytest.raises(flora.LoraError) as caught:
        read(path)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 2_100


@pytest.mark.parametrize("claimed", [10**8, 30_000_000, 2**63, 9])
def test_headers_of_any_length_are_refused_at_once(tmp_path, claimed):
    """No memory is taken for what the file claims or, unread, holds."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(claimed.to_bytes(8, "little") + b"{")
        file.truncate(16 if claimed in (9, 2**63) else 8 + claimed)
    before = resource.getrusage(resource.RUSAGE_SELF)
    refused = pytest.raises(flora.LoraError, match=r"its header (would end|has \d)")
    with promptly(), refused:
        read(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 10_000  # KiB


@pytest.mark.parametrize("piece", [b"[],", b'"a":{},', b"[[1]],"])
def test_headers_full_of_brackets_are_not_parsed(tmp_path, piece):
    path = written(tmp_path / "x", b'{"x":[' + piece * (20_000_000 // len(piece)))
    with promptly(), pytest.raises(flora.LoraError, match="no JSON of tensors"):
        read(path)


def test_a_header_of_many_tensors_is_read(tmp_path):
    header = {f"layers.{i}.up.weight": entry([1], i, i + 1) for i in range(50_000)}
    file = read(written(tmp_path / "x", header, bytes(50_000)))
    assert len(file.infos) == 50_000
