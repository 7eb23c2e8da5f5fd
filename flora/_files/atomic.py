"""Files that change in one step, whatever stops the writer and whoever reads.

One file is replaced by one rename.  Where several belong together, the writer keeps
others out (`alone`), puts all new ones on disk before the first of them counts
(`staged`), and a reader looks again when one of them changed meanwhile (`steadily`).
Everything happens inside the folder of the files: it may be a mount point, a link, the
current directory, or lie in one that nobody can write to.
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from flora._tree.errors import LoraError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

T = TypeVar("T")
_TRIES, _PAUSE = 200, 0.005  # s


@dataclasses.dataclass(frozen=True)
class Staged:
    """A file that is whole on disk, and is to be `path`.

    Attributes:
      new: where it lies until then.
      path: the file that it will replace; no link.
    """

    new: pathlib.Path
    path: pathlib.Path

    def put(self) -> None:
        """Makes it `path`, in one step that a crash cannot divide."""
        os.replace(self.new, self.path)
        sync(self.path.parent)


def replace(path: pathlib.Path, chunks: Callable[[], Iterable[Any]]) -> None:
    """The file at `path` becomes these bytes in one step; see `staged`."""
    with staged(path, chunks) as file:
        file.put()


@contextlib.contextmanager
def staged(path: pathlib.Path, chunks: Callable[[], Iterable[Any]]) -> Iterator[Staged]:
    """Writes the bytes beside `path`, for `Staged.put`; removed unless that is called.

    A link stays, and what it points to is replaced.  The mode and owner of a file stay;
    a new one gets what the umask leaves of 0666.  A process that is killed leaves a
    hidden `.flora-<random>.tmp`, which nobody reads and the next save removes.
    """
    path = pathlib.Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise LoraError(f"{path} is no regular file. Write to another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    like = path.stat() if path.exists() else None
    new, file = _created(path.parent, 0o666 if like is None else 0o600)
    try:
        with file:
            for chunk in chunks():
                file.write(chunk)
            file.flush()
            if like is not None:
                _liken(file.fileno(), like)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            yield Staged(new, path)
    finally:
        new.unlink(missing_ok=True)


def _created(folder: pathlib.Path, mode: int) -> tuple[pathlib.Path, Any]:
    """A new file, locked for as long as it is open: `_sweep` spares it."""
    while True:
        new = folder / f".flora-{secrets.token_hex(8)}.tmp"
        file = open(new, "xb", opener=lambda p, flags: os.open(p, flags, mode))  # noqa: SIM115
        if fcntl is None:
            return new, file
        _lock(file.fileno(), fcntl.LOCK_EX)
        if new.exists():  # not swept before it was locked
            return new, file
        file.close()


def _liken(file: int, like: os.stat_result) -> None:
    """Gives an open file the owner, if one may, and the mode of another."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(file, like.st_uid, like.st_gid)
        os.fchmod(file, stat.S_IMODE(like.st_mode))


def _sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes left; a living one holds a lock on its files."""
    if fcntl is None:
        return
    for old in folder.glob(".flora-*.tmp"):
        with contextlib.suppress(OSError), old.open("r+b") as file:
            if _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                old.unlink()


def _lock(file: int, how: int) -> bool:
    """Whether that worked: some file systems have no locks."""
    assert fcntl is not None
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder itself, made if need be; other savers wait, where it can be locked."""
    folder = pathlib.Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise LoraError(f"{folder} is a file; expected a directory to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        _lock(descriptor, fcntl.LOCK_UN)  # even if a fork of this process has it too
        os.close(descriptor)


def sync(folder: pathlib.Path) -> None:
    """Writes a folder's names to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def steadily(paths: Sequence[pathlib.Path], read: Callable[[], T]) -> T:
    """What `read()` gives or raises while none of the paths changes.

    They are held open meanwhile, so that no other file can pass for one of them.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as held:
            before = [_held(path, held) for path in paths]
            try:
                found = read()
            except (LoraError, OSError):
                if before == [_identity(path) for path in paths]:
                    raise
            else:
                if before == [_identity(path) for path in paths]:
                    return found
        time.sleep(_PAUSE)
    raise LoraError(
        f"{paths[0]} has changed each of the {_TRIES} times that it was read. Stop "
        "what writes it, or read a copy."
    )


def _held(path: pathlib.Path, held: contextlib.ExitStack) -> Any:
    try:  # a pipe is not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    held.callback(os.close, descriptor)
    return _key(os.fstat(descriptor))


def _identity(path: pathlib.Path) -> Any:
    try:
        return _key(os.stat(path))
    except OSError:
        return None


def _key(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
