"""The two files of a PEFT adapter: read whole, written whole or not at all."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora._files.atomic import Staged, alone, replace, staged
from flora._files.parsed import parsed
from flora._files.safetensors import NAMES, Damaged, checked_path, chunks, read
from flora._peft.ignored import Ignored
from flora._tree.errors import LoraError, fail

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_MOST = 10_000_000  # bytes of a config, which may name each module three times
_LONGEST = 1_000  # characters of a key
# What torch.compile, FSDP and checkpointing put around modules, in keys and regexes.
WRAPPERS = re.compile(
    r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\\?\."
)
COUNTER = ".num_batches_tracked"  # of batches; Flax counts none
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
        found = parsed(_config(folder))
    except ValueError as error:
        if _is_pointer(path):
            raise LoraError(f"{path}: {_POINTER}") from error
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


def _config(folder: Path) -> bytes:
    """The text of the config, even where a save was stopped."""
    path = folder / CONFIG
    text = path.read_bytes()
    if not text.startswith(_NOTE):
        return text
    weights = folder / WEIGHTS
    found = _chosen(text, _digest(weights)) if weights.is_file() else None
    if found is None:
        raise LoraError(
            f"{path}: flora.peft.save was stopped as it replaced this adapter, and "
            f"{WEIGHTS} has changed since. Save the adapter anew."
        )
    return found


def _no_config(folder: Path) -> str:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        return (
            f"{folder} {what}; expected the directory of a PEFT adapter, with {CONFIG} "
            f"and {WEIGHTS}. flora downloads nothing: fetch it first."
        )
    if odd := _no_file(folder / CONFIG):
        return odd
    held = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    hint = f" Adapters lie in its folders {', '.join(held)}: name one." if held else ""
    return f"{folder} has no {CONFIG}; expected the directory of a PEFT adapter.{hint}"


def read_tensors(folder: Path, ignored: Ignored) -> dict[str, np.ndarray]:
    """`{key: array}` of adapter_model.safetensors, but for what is ignored."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise LoraError(_no_weights(folder))
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
    infos = {
        key: info
        for key, info in sorted(file.infos.items())
        if not key.endswith(COUNTER) and not ignored(key)
    }
    fail(
        _other_dtype(path, key, NAMES[info.dtype])
        for key, info in infos.items()
        if NAMES[info.dtype] not in _DTYPES
    )
    if not infos:
        raise LoraError(
            f"{path}: has no tensors{' but those ignored' if file.infos else ''}; "
            "expected '….lora_A.weight' and '….lora_B.weight'. Save the adapter anew."
        )
    return {key: np.array(file.array(key)) for key in infos}


def _no_file(path: Path) -> str:
    """What lies there in the place of a file, if anything does."""
    what = "a directory" if path.is_dir() else "no regular file"
    if path.is_symlink() and not path.exists():
        what = f"a link to '{os.readlink(path)}', which is not there"
    elif not path.exists():
        return ""
    return f"{path} is {what}; expected a file. Copy it anew."


def _no_weights(folder: Path) -> str:
    if odd := _no_file(folder / WEIGHTS):
        return odd
    text = f"{folder} has no {WEIGHTS}"
    if (folder / _PICKLE).is_file():
        return (
            f"{text}, only {_PICKLE}. That is a pickle, which can run code as it is "
            "read, and flora never opens one. Load it in PEFT and save it with "
            "safe_serialization=True."
        )
    others = sorted(x.name for x in folder.glob("*.safetensors") if x.is_file())
    if others:
        more = ", …" if len(others) > 3 else ""
        return (
            f"{text}, but {', '.join(others[:3])}{more}; expected the one file that "
            "PEFT's save_pretrained writes. Put the adapter's tensors into it: "
            "safetensors.torch.save_file."
        )
    return f"{text}; expected the weights of the adapter. Copy the file too."


def _not_read(path: Path, error: Damaged) -> str:
    if error.dtype is not None:
        return _other_dtype(path, *error.dtype)
    if _is_pointer(path):
        return f"{path}: {_POINTER}"
    return (
        f"{path}: no valid safetensors file of {path.stat().st_size} bytes: "
        f"{error.why}. It is cut off or damaged. Copy it anew."
    )


_POINTER = (
    "is a pointer of Git LFS; expected the file itself. Fetch it: git lfs pull, or "
    "hf download."
)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(30).startswith(b"version https://git-lfs")


def _other_dtype(path: Path, key: str, dtype: str) -> str:
    return (
        f"{path}: '{key}' has dtype {dtype}; expected one of {', '.join(_DTYPES)}. "
        "Save the adapter in a floating dtype."
    )


# While both files change, the config is this sentence and both configs, by weights.
_NOTE = (
    b"Not a config: flora.peft.save was stopped as it replaced this adapter. Save it "
    b"anew. flora.peft.load finds the config of the weights here.\n"
)


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files inside `folder`, so that the two in place belong together.

    Between old config and new weights stands a note in the place of the config.  No
    reader takes it for one, and flora's finds in it the config of whichever weights are
    there; so whatever stops the process leaves the old adapter or the new one.
    """
    text = (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()
    with (
        alone(folder) as folder,
        staged(folder / WEIGHTS, chunks(tensors, {"format": "pt"})) as weights,
        staged(folder / CONFIG, lambda: [text]) as new,
    ):
        old = new.path.read_bytes() if new.path.exists() else None
        if old is not None and old != text:
            note = _note(old, text, weights)
            replace(new.path, lambda: [note])
        try:
            weights.put()
        finally:
            if not weights.new.exists():  # it is in its place
                new.put()
            elif old is not None:
                replace(new.path, lambda: [old])


def _note(old: bytes, text: bytes, weights: Staged) -> bytes:
    """What stands for the config while the weights are replaced."""
    known = {_digest(weights.new): text.decode()}
    if weights.path.exists():
        digest = _digest(weights.path)
        was = _chosen(old, digest)
        if was is not None:
            known[digest] = was.decode(errors="surrogateescape")
    return _NOTE + json.dumps(known).encode()


def _chosen(text: bytes, digest: str) -> bytes | None:
    """The config in what lies there, for the weights of that digest."""
    if not text.startswith(_NOTE):
        return text
    try:
        return json.loads(text[len(_NOTE) :])[digest].encode(errors="surrogateescape")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
