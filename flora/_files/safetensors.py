"""Files of named arrays in the safetensors format: written whole or not at all.

    8 bytes: n, little-endian | n bytes: JSON | the arrays, one after the other

The JSON is `{name: {"dtype", "shape", "data_offsets"}}` and text under `__metadata__`.
Reading maps the file into memory: only what is used of an array is read.  Nothing in it
is ever executed.

Why there is a reader here beside the package `safetensors` (measured with 0.8.0): with
NumPy, which is what goes onto a mesh, the package
- loads no float8 (`numpy has no attribute 'float8_e4m3fn'`);
- writes a transposed array as if it were not, in another order, without a word;
- takes slices of a tensor as it lies in the file, while a device needs a part of a leaf
  that is the tensor transposed and split: of 256 MiB it read 256 to give 4, where a
  view of the mapped file reads the 4;
- renames what it has written into place without flushing it to disk;
- keeps the last of two tensors of one name, and names no tensor whose entry is wrong.
What it writes is read here, and what is written here it reads.

References: https://huggingface.co/docs/safetensors
"""

import dataclasses
import json
import math
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flora._files.atomic import replace
from flora._files.parsed import parsed
from flora._tree.errors import LoraError, LoraTypeError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    **{f"I{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"U{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
    **{f"F{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
    "C64": np.dtype("complex64"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of JSON: names, shapes and places of some 150,000 tensors.  The reference
# implementation takes four times that, of which Python makes gigabytes.
_MOST = 25_000_000
_BIGGEST = 2**48  # of one axis, and of the bytes of one array


class Damaged(LoraError):
    """A file that is cut off, or of another kind.

    Attributes:
      why: what is wrong with it.
      dtype: `(name of an array, its dtype)`, where flora has no such dtype.
    """

    def __init__(
        self, path: pathlib.Path, why: str, dtype: tuple[str, str] | None = None
    ) -> None:
        super().__init__(
            f"{path} is no whole safetensors file: {why}. Copy or download it again, "
            "or pass another file."
        )
        self.why, self.dtype = why, dtype


@dataclasses.dataclass(frozen=True)
class Info:
    """What the header says of an array: `data[start:stop]` holds it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class File:
    """An open file.

    Attributes:
      path: where it lies.
      metadata: the text in its header.
      infos: what the header says of each array.
      data: the bytes behind the header, mapped.
    """

    path: pathlib.Path
    metadata: Mapping[str, str]
    infos: Mapping[str, Info]
    data: np.ndarray

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the array in the file."""
        info = self.infos[name]
        return self.data[info.start : info.stop].view(info.dtype).reshape(info.shape)


def read(path: str | os.PathLike[str]) -> File:
    """Opens a file, and checks its header against its size.

    Raises:
      LoraError: there is no such file, or (`Damaged`) it is of another kind or cut off.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise LoraError(f"{path} {what}; expected a .safetensors file.")
    with path.open("rb") as file:  # once: another file may come under that name
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(_MOST, size - 8):
            why = f"its header would end at byte {8 + length:,} of {size:,}"
            if length <= size - 8:
                why = f"its header has {length:,} bytes; expected at most {_MOST:,}"
            raise Damaged(path, why)
        header = _parsed(path, file.read(length))
        offset = 8 + length
        data = np.zeros(0, np.uint8)
        if offset < size:
            data = np.asarray(np.memmap(file, np.uint8, mode="r"))[offset:]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not _all_text(metadata.values()):
        raise Damaged(path, "__metadata__ is no dict of text")
    infos = {name: _info(path, name, entry) for name, entry in header.items()}
    _require_packed(path, infos, data.size)
    return File(path, metadata, infos, data)


def _parsed(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    # An entry has three brackets in 50 bytes: `[[[[…` is not parsed at all.
    if text.count(b"[") + text.count(b"{") > 64 + len(text) // 12:
        raise Damaged(path, "its header is no JSON of tensors")
    try:
        header = parsed(text)
    except ValueError as error:
        raise Damaged(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise Damaged(path, f"its header is a {type(header).__name__}, no dict")
    return header


def _info(path: pathlib.Path, name: str, entry: Any) -> Info:
    if unwritable_name(name):
        raise Damaged(path, f"{name!r} is no name of an array")
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise Damaged(path, f"its header has {entry!r} for '{name}'") from error
    if not isinstance(kind, str):
        raise Damaged(path, f"its header has {entry!r} for '{name}'")
    if kind not in DTYPES:
        why = f"'{name}' has dtype {kind!r}, not one of {', '.join(DTYPES)}"
        raise Damaged(path, why, (name, kind))
    numbers = (*shape, start, stop)
    if not all(type(n) is int and 0 <= n <= _BIGGEST for n in numbers) or (
        len(shape) > 32 or math.prod(n for n in shape if n) > _BIGGEST
    ):
        raise Damaged(path, f"its header has {entry!r} for '{name}'")
    if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        why = f"'{name}', {kind}{list(shape)}, was given {stop - start:,} bytes"
        raise Damaged(path, why)
    return Info(DTYPES[kind], shape, start, stop)


def _require_packed(path: pathlib.Path, infos: Mapping[str, Info], size: int) -> None:
    """Every byte belongs to one array."""
    end = 0
    for name, info in sorted(infos.items(), key=lambda x: (x[1].start, x[1].stop)):
        if info.start != end:
            raise Damaged(
                path, f"'{name}' starts at byte {info.start:,} instead of {end:,}"
            )
        end = info.stop
    if end != size:
        raise Damaged(path, f"its arrays take {end:,} bytes, and {size:,} are there")


def _all_text(values: Any) -> bool:
    return all(isinstance(x, str) for x in values)


def unwritable_name(name: str) -> bool:
    """Whether it holds control characters, ends of lines or halves of characters."""
    return not name.isprintable() and any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name
    )


def no_dtype(name: str, dtype: Any) -> list[str]:
    """What keeps an array of that dtype from being written."""
    if dtype in NAMES:
        return []
    return [
        f"'{name}' has dtype {dtype}, which safetensors does not have; expected one of "
        f"{', '.join(map(str, NAMES))}. Cast it with x.astype."
    ]


def checked_path(given: Any, message: str) -> pathlib.Path:
    """The path that a caller gave; a LoraTypeError with the message if it is none."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise LoraTypeError(message)
    return pathlib.Path(os.fsdecode(given))


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file under its name once all of it is on disk.

    Whatever stops it leaves the file that was there before.
    """
    replace(pathlib.Path(path), chunks(arrays, metadata))


def chunks(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Callable[[], Iterator[Any]]:
    """The bytes of a file with these arrays, piece by piece."""
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        x = arrays[name]
        span = [end, end := end + x.nbytes]
        kind = {"dtype": NAMES[x.dtype], "shape": list(x.shape)}
        header[name] = kind | {"data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned

    def pieces() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)

    return pieces
