"""The two files of a PEFT adapter: read whole, written whole or not at all."""

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora._files.parsed import parsed
from flora._files.safetensors import NAMES, Damaged, checked_path, read, replace
from flora._files.safetensors import write as write_tensors
from flora._tree.errors import LoraError, fail

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_MOST = 10_000_000  # bytes of a config, which may name each module three times
_LONGEST = 1_000  # characters of a key
_DTYPES = ("F64", "F32", "F16", "BF16")


def directory(verb: str, given: Any) -> Path:
    """The directory as a path."""
    return checked_path(
        given,
        f"flora.peft.{verb}: dir is {given!r}; expected a directory such as "
        "'adapters/run1'.",
    )


def read_json(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json."""
    path = folder / CONFIG
    if not path.is_file():
        raise LoraError(_no_config(folder))
    if (size := path.stat().st_size) > _MOST:
        raise LoraError(
            f"{path}: has {size:,} bytes; expected at most {_MOST:,}. Copy the file "
            "anew."
        )
    try:
        found = parsed(path.read_bytes())
    except ValueError as error:
        raise LoraError(
            f"{path}: not valid JSON: {error}. Expected the JSON object that PEFT's "
            "save_pretrained writes. Copy the file anew."
        ) from error
    if not isinstance(found, dict):
        raise LoraError(
            f"{path}: holds a JSON {type(found).__name__}; expected an object such as "
            '{"peft_type": "LORA", "r": 8, ...}. Copy the file anew.'
        )
    return found


def _no_config(folder: Path) -> str:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        return (
            f"{folder} {what}; expected the directory of a PEFT adapter, with {CONFIG} "
            f"and {WEIGHTS}. flora downloads nothing: fetch it first."
        )
    held = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    hint = f" Adapters lie in its folders {', '.join(held)}: name one." if held else ""
    return f"{folder} has no {CONFIG}; expected the directory of a PEFT adapter.{hint}"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """`{key: array}` of adapter_model.safetensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / _PICKLE).is_file()
        raise LoraError(
            f"{folder} has no {WEIGHTS}"
            + (
                f", only {_PICKLE}. That is a pickle, which can run code as it is "
                f"read, "
                "and flora never opens one. Load it in PEFT and save it with "
                "safe_serialization=True."
                if pickled
                else "; expected the weights of the adapter. Copy the file too."
            )
        )
    try:
        file = read(path)
    except Damaged as error:
        raise LoraError(_not_read(path, error)) from error
    fail(
        f"{path}: {key!r} is a name of {len(key):,} characters; expected printable "
        f"ones, at most {_LONGEST:,}. Save the adapter with PEFT's save_pretrained."
        for key in file.infos
        if len(key) > _LONGEST or not key.isprintable()
    )
    fail(
        _other_dtype(path, key, NAMES[info.dtype])
        for key, info in file.infos.items()
        if NAMES[info.dtype] not in _DTYPES
    )
    return {key: np.array(file.array(key)) for key in sorted(file.infos)}


def _not_read(path: Path, error: Damaged) -> str:
    if error.dtype is not None:
        return _other_dtype(path, *error.dtype)
    return (
        f"{path}: no valid safetensors file of {path.stat().st_size} bytes: "
        f"{error.why}. It is cut off or damaged. Copy it anew."
    )


def _other_dtype(path: Path, key: str, dtype: str) -> str:
    return (
        f"{path}: '{key}' has dtype {dtype}; expected one of {', '.join(_DTYPES)}. "
        "Save the adapter in a floating dtype."
    )


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files beside `folder`, then puts them in its place in one step.

    Other files of the directory stay.  Whatever stops the process leaves the directory
    as it was, or complete.
    """
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    if folder.exists() and not folder.is_dir():
        raise LoraError(f"{folder} is a file; expected a directory to save into.")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(folder) as new:
        if folder.is_dir():
            shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)
        replace(new / CONFIG, lambda: iter([text.encode()]))
        write_tensors(new / WEIGHTS, tensors, {"format": "pt"})
        _swap(new, folder)
        _sync(folder.parent)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new directory next to `folder`, removed in the end."""
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o777 & ~_umask())
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


def _link(old: str, new: str) -> None:
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _sync(folder: Path) -> None:
    """Makes names in a directory last, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` where `folder` is, or would be."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchanged(new, folder):
        # No such call here: two renames, between which the weights alone are new.
        for name in (WEIGHTS, CONFIG):
            os.replace(new / name, folder / name)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether Linux exchanged two directories, which is atomic."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
