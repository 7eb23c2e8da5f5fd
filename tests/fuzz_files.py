"""Mutants of every file that flora reads: what it makes of files that anything befell.

    PYTHONPATH=. python tests/fuzz_files.py --mutants 7000 --seed 0

Each mutant is a saved file, or folder, with one to three changes: bits, bytes and
lengths, or keys and values of the JSON in it.  It must load as it was, or be refused by
a LoraError with a message of bounded length, in bounded time.  Where flora keeps a
checksum, a mutant that loads must be the original; files that others wrote have none.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flora
import flora.hf
import flora.peft
import flora.variants
from flora._files.adapter import _digest
from flora._files.compare import checksum
from flora.checkpoint import Checkpointer
from tests.support import peft_files

_ANY = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError)
SLOW, LONG = 2.0, 4_500  # seconds of the processor, characters of a message


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of saved folder.

    Attributes:
      save: writes it.
      load: what it gives back.
      checked: whether flora has a checksum of all that is loaded.
      sign: makes the checksums right again after a change, so that the checks behind
        them are met.
    """

    save: Callable[[pathlib.Path], Any]
    load: Callable[[pathlib.Path], Any]
    checked: bool = False
    sign: Callable[[pathlib.Path], None] | None = None


# --- What is saved --------------------------------------------------------------------


def model(p, x):
    h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
    return h @ p["second"]["kernel"] + p["second"]["bias"]


def base():
    sizes = {"first": (6, 8), "second": (8, 4)}
    draw = np.random.default_rng(0)
    return {
        k: {
            "kernel": jnp.asarray(draw.normal(size=s), jnp.float32),
            "bias": jnp.zeros(s[1]),
        }
        for k, s in sizes.items()
    }


def adapted(variant=None):
    config = flora.LoraConfig(rank=2, train="second/bias", variant=variant)
    tree = flora.init(jax.random.key(0), config, model, base(), jnp.ones((2, 6)))
    return jax.tree.map(lambda x: x + 0.5 if x.ndim == 2 and 2 in x.shape else x, tree)


def _save_adapter(folder):
    flora.save(folder / "a.safetensors", adapted(flora.variants.DoRA()))


def _load_adapter(folder):
    return flora.load(folder / "a.safetensors", base())


def _sign_adapter(folder):
    """The checksum of the record, whatever it says."""
    path = folder / "a.safetensors"
    with contextlib.suppress(*_ANY):
        header, data = _split(path.read_bytes())
        meta = header["__metadata__"]
        meta["flora_sha256"] = _digest(meta["flora"])
        path.write_bytes(_joined(json.dumps(header), data))


def _save_peft(folder):
    tensors = peft_files.up_adapters() | {
        f"{peft_files.PREFIX}head.weight": peft_files.values(3, peft_files.D),
        f"{peft_files.PREFIX}head.bias": peft_files.values(3),
    }
    peft_files.write(
        folder,
        tensors,
        modules_to_save=["head"],
        rank_pattern={r".*\.1\.up": 2, "layers.0.up": 2},
        alpha_pattern={"layers.1.up": 4.0},
        target_modules=r".*\.(0|1)\.up",
        layers_pattern=None,
    )


def _save_peft_dora(folder):
    tensors = peft_files.up_adapters()
    for i in range(2):
        name = f"{peft_files.PREFIX}layers.{i}.up"
        tensors[f"{name}.lora_magnitude_vector"] = abs(peft_files.values(peft_files.F))
    peft_files.write(
        folder,
        tensors,
        use_dora=True,
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        use_rslora=True,
        target_modules=["up"],
        exclude_modules=["down"],
    )


def _save_peft_kinds(folder):
    """Biases, new rows and layers that are there once, in one file."""
    tensors = peft_files.up_adapters()
    for i in range(2):
        name = f"{peft_files.PREFIX}layers.{i}.up"
        tensors[f"{name}.lora_B.bias"] = peft_files.values(peft_files.F)
    rows = f"{peft_files.PREFIX}layers.1.down.token_adapter.trainable_tokens_delta"
    tensors[rows] = peft_files.values(2, peft_files.F)
    peft_files.write(
        folder,
        tensors,
        lora_bias=True,
        trainable_token_indices={"layers.1.down": [3, 0]},
        layer_replication=[[0, 1], [1, 2]],
    )


def _load_peft_kinds(folder):
    tree = peft_files.params()
    del tree["layers"]["1"]["down"]["bias"]
    return flora.peft.load(folder, tree)


def _save_peft_diagonal(folder):
    tensors = {
        **peft_files.linear("layers.0.up", peft_files.D, peft_files.F),
        **peft_files.linear("layers.1.up", peft_files.D // 2, peft_files.F),
    }
    kind = {"target_modules_bd_a": ["1.up"], "nblocks": 2, "match_strict": False}
    peft_files.write(folder, tensors, use_bdlora=kind)


def _save_peft_kasa(folder):
    tensors = peft_files.up_adapters()
    for i in range(2):
        name = f"{peft_files.PREFIX}layers.{i}.up"
        tensors[f"{name}.lora_diag"] = peft_files.values(2)
    peft_files.write(folder, tensors, kasa_config={"beta": 1e-4, "gamma": 1e-3})


def _save_peft_activated(folder):
    tensors = peft_files.up_adapters()
    peft_files.write(folder, tensors, alora_invocation_tokens=[3, 1])


def _load_peft(folder):
    return flora.peft.load(folder, peft_files.params())


def _stacked():
    """The same base with its layers stacked."""
    tree = peft_files.params()
    layers = jax.tree.map(lambda *x: jnp.stack(x), *tree["layers"].values())
    return tree | {"layers": layers}


def _load_peft_stacked(folder):
    return flora.peft.load(folder, _stacked())


TENSORS = {
    "first/kernel": flora.hf.Tensor("model.first.weight", (1, 0)),
    "first/bias": flora.hf.Tensor("model.first.bias"),
    "second/kernel": flora.hf.Tensor("model.second.weight", (1, 0)),
    "second/bias": flora.hf.Tensor("model.second.bias"),
}


def _save_hf(folder):
    flora.hf.save(folder, base(), TENSORS, shard_bytes=250)


def _load_hf(folder):
    return flora.hf.load(folder, jax.eval_shape(base), TENSORS)


def _state(tree):
    return optax.adam(1e-3).init(tree)


def _save_checkpoint(folder):
    tree = adapted()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(7, tree, _state(tree), metadata={"loss": 0.5, "tags": ["x"]})


def _load_checkpoint(folder):
    tree = adapted()
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore(tree, _state(tree))
        return restored, checkpointer.metadata()


def _record(folder):
    return folder / "7" / "flora" / "metadata"


def _sign_checkpoint(folder):
    path = _record(folder)
    with contextlib.suppress(*_ANY):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"sha256": checksum(record)}))


KINDS = {
    "adapter": Kind(_save_adapter, _load_adapter, checked=True),
    "adapter, signed": Kind(_save_adapter, _load_adapter, sign=_sign_adapter),
    "peft": Kind(_save_peft, _load_peft),
    "peft, stacked": Kind(_save_peft, _load_peft_stacked),
    "peft, dora": Kind(_save_peft_dora, _load_peft),
    "peft, kinds": Kind(_save_peft_kinds, _load_peft_kinds),
    "peft, diagonal": Kind(_save_peft_diagonal, _load_peft),
    "peft, kasa": Kind(_save_peft_kasa, _load_peft),
    "peft, activated": Kind(_save_peft_activated, _load_peft),
    "index": Kind(_save_hf, _load_hf),
    "checkpoint": Kind(_save_checkpoint, _load_checkpoint, checked=True),
    "checkpoint, signed": Kind(
        _save_checkpoint, _load_checkpoint, sign=_sign_checkpoint
    ),
}


# --- Mutations ------------------------------------------------------------------------

RAW = {  # text in the place of a value, which json.dumps would not write
    "raw-nan": "NaN", "raw-inf": "-Infinity", "raw-float": "1e999",
    "raw-deep": "[" * 100_000 + "]" * 100_000, "raw-int": "9" * 5_000,
    "raw-object": '{"a":' * 50_000 + "1" + "}" * 50_000, "raw-twice": '{"a":1,"a":2}',
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e308,
    -1e-308, "", "x", "0", "LORA", "F64", "I8", "\x1b[31mred\x1b[0m\r", "\u202etxt",
    "\ud800", "a\nb", "٣", "²", "a" * 5_000, "up.00", "layers.00.up", "layers.٣.up",
    "layers." + "9" * 4_400 + ".up", "0." * 400 + "up", "(([a-z0-9_.]+)+)+!", "(a|a)*b",
    "(", "(?i)x", r"(.)\1", [], {}, [[]], [None], ["up"], [10**400], [-1],
    ["up"] * 9_999,
    {"a": {}}, {"up": 2}, {"(([a-z.]+)+)+!": 2}, {"up": 10**400}, [0, 10**30], "../up",
    "/etc/passwd", [2, 2**40, 2**40], *RAW,
]  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """`(container, key)` of every value inside."""
    found = []
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        found.append((value, key))
        found += _places(inner)
    return found


def edited(draw: random.Random, text: str) -> str:
    """JSON text with a change of a key or a value."""
    try:
        value = json.loads(text)
        inner = value.get("__metadata__", {}).get("flora")  # JSON in JSON
        if inner is not None and draw.random() < 0.8:
            value["__metadata__"]["flora"] = edited(draw, inner)
            return json.dumps(value)
        places = _places(value)
        container, key = draw.choice(places)
    except (ValueError, AttributeError, IndexError, RecursionError):
        return text
    old, kind = container[key], draw.randrange(8)
    if kind == 0 and isinstance(container, dict):
        del container[key]
    elif kind == 1 and isinstance(container, dict):  # another name
        container[draw.choice([f"{key}x", str(key)[:-1], *_texts()])] = old
        container.pop(key, None)
    elif kind == 2:  # a value from elsewhere
        other, k = draw.choice(places)
        container[key] = json.loads(json.dumps(other[k])) if k in other else None
    elif kind == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        container[key] = draw.choice([old + 1, old - 1, -old, old * 2, old + 0.5, 0])
    elif kind == 4 and isinstance(old, str) and old:
        at = draw.randrange(len(old))
        container[key] = (
            old[:at] + draw.choice(["", "x", "0", ".", "\0"]) + old[at + 1 :]
        )
    elif kind == 5 and isinstance(container, dict):  # one more
        container[draw.choice(_texts())] = draw.choice(ODD)
    elif key == "shape" and isinstance(old, list):  # as many elements
        size = int(np.prod([n for n in old if isinstance(n, int)][:3] or [1]))
        new = [old[::-1], [size], [1, size], [size, 1], [size // 2, 2], [*old, 1]]
        container[key] = draw.choice(new)
    elif key == "dtype":
        container[key] = draw.choice(["I32", "U32", "F32", "F16", "BF16", "F64"])
    else:
        container[key] = draw.choice(ODD)
    done = json.dumps(value)
    for word, raw in RAW.items():
        done = done.replace(json.dumps(word), raw, 1)
    if draw.random() < 0.05:  # an object's name twice
        done = done.replace("{", '{"format": 1, "format": 2, ', 1)
    return done


def _texts() -> list[str]:
    return [x for x in ODD if isinstance(x, str) and x not in RAW]


def _split(data: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: str, data: bytes) -> bytes:
    text = header.encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _structured(draw: random.Random, data: bytes) -> bytes:
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        if data[:1] in (b"{", b"["):
            return edited(draw, data.decode()).encode(errors="surrogatepass")
        length = int.from_bytes(data[:8], "little")
        if 0 < length < len(data):
            header = edited(draw, data[8 : 8 + length].decode())
            return _joined(header, data[8 + length :])
    return _bytes(draw, data)


def _bytes(draw: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    at, kind = draw.randrange(len(data)), draw.randrange(7)
    if kind < 2:
        flipped = data[at] ^ 1 << draw.randrange(8)
        return data[:at] + bytes([flipped]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
    if kind == 4:
        return data[:at] + data[at + draw.randrange(1, 9) :]
    if kind == 5:
        length = draw.choice([0, 1, 10**8, 2**63, len(data), draw.randrange(2**20)])
        return length.to_bytes(8, "little") + data[8:]
    count = draw.randrange(1, 64)
    return data[:at] + bytes(count) + data[at + count :]


def mutate(draw: random.Random, folder: pathlib.Path) -> str:
    """One to three changes to the files of a folder; which, for the report."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    said = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        path = draw.choice(files)
        if len(files) > 1 and draw.random() < 0.01:
            path.unlink()
            files.remove(path)
            said.append(f"without {path.name}")
            continue
        old = path.read_bytes()
        how = _structured if draw.random() < 0.7 else _bytes
        path.write_bytes(how(draw, old))
        said.append(f"{how.__name__} {path.relative_to(folder)}")
    return ", ".join(said)


# --- Loading --------------------------------------------------------------------------


def told(tree: Any) -> Any:
    """Everything in what was loaded, to compare."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    arrays = [(str(np.asarray(x).dtype), np.asarray(x).tobytes()) for x in leaves]
    return str(treedef), arrays


class _Hang(BaseException):
    pass


def _stop(*_: Any) -> None:
    raise _Hang


def outcome(kind: Kind, folder: pathlib.Path, original: Any) -> tuple[str, str]:
    """What became of a mutant, and what was raised."""
    began = time.process_time()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(60)
    try:
        found, text = told(kind.load(folder)), ""
    except flora.LoraError as error:
        found, text = "refused", str(error)
    except _Hang:
        return "hang", traceback.format_exc()
    except Exception:
        return "raw", traceback.format_exc()
    finally:
        signal.alarm(0)
    if time.process_time() - began > SLOW:
        return "hang", f"{time.process_time() - began:.1f} s: {text[:200]}"
    if len(text) > LONG or "\x1b" in text or "\r" in text:
        return "raw", f"a message of {len(text)} characters: {text[:200]!r}"
    if found == "refused":
        return "refused", text
    if found == original:
        return "same", ""
    return "silent" if kind.checked else "other", ""


def run(names: Any, mutants: int, seed: int, report: Callable[..., None]) -> Any:
    """`{kind: Counter of outcomes}` of so many mutants, the kinds in turn."""
    counts = {name: collections.Counter() for name in names}
    with tempfile.TemporaryDirectory() as at:
        root, originals = pathlib.Path(at), {}
        for i, name in enumerate(names):
            folder = root / f"saved{i}"
            folder.mkdir()
            KINDS[name].save(folder)
            originals[name] = folder, told(KINDS[name].load(folder))
        for n in range(mutants):
            name = names[n % len(names)]
            folder, original = originals[name]
            draw, own = random.Random(f"{seed} {n}"), root / "mutant"
            shutil.copytree(folder, own)
            said = mutate(draw, own)
            if KINDS[name].sign:
                KINDS[name].sign(own)
            result, text = outcome(KINDS[name], own, original)
            counts[name][result] += 1
            report(n, name, result, said, text)
            shutil.rmtree(own)
    return counts


def _end(text: str) -> str:
    return "\n".join(line[:160] for line in text.split("\n")[-14:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()

    def report(n: int, name: str, result: str, said: str, text: str) -> None:
        if result in ("raw", "hang", "silent"):
            print(f"--- {n} {name}: {result} ({said})\n{_end(text)}", flush=True)

    counts = run(args.kinds, args.mutants, args.seed, report)
    total = collections.Counter()
    for name, one in counts.items():
        total += one
        print(f"{name}: {dict(one)}")
    print(f"{sum(total.values())} mutants: {dict(total)}")
    sys.exit(any(total[x] for x in ("raw", "hang", "silent")))


if __name__ == "__main__":
    main()
