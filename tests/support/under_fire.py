"""Saves that are killed, and loads while another process saves; by hand:

    python tests/support/under_fire.py --kills 100 --reads 500

prints for each writer of flora's how many kills left a mix of two versions, and how
many reads during saves saw one.  Every version n of a case holds n everywhere: in its
arrays, its alphas, its step.  What does not is a mix.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

if __name__ == "__main__":
    ROOT = pathlib.Path(__file__).parents[2]
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import numpy as np

import flora
import flora.hf
import flora.peft
from flora._files.safetensors import read
from flora._peft import file as peft_file
from tests.support.process_worker import forked

SHAPE, RANK = (64, 96), 8


class Mix(Exception):
    """What was loaded is of several versions."""


def one(found):
    """The one version that all of it is of."""
    versions = {float(v) for x in found for v in np.unique(np.asarray(x))}
    if not versions:
        raise ValueError("there is nothing")
    if len(versions) > 1:
        raise Mix(f"versions {sorted(versions)[:5]}")
    return int(versions.pop())


def base():
    return {"up": {"kernel": np.zeros(SHAPE, np.float32)}}


def adapted(n, alpha=None):
    a, b = np.full((SHAPE[0], RANK), n), np.full((RANK, SHAPE[1]), n)
    factors = a.astype(np.float32), b.astype(np.float32)
    leaf = flora.LoraWeight(
        base()["up"]["kernel"],
        *factors,
        layout=flora.Layout(),
        rank=RANK,
        alpha=n if alpha is None else alpha,
    )
    return {"up": {"kernel": leaf}}


def version(tree):
    leaf = tree["up"]["kernel"]
    return one((leaf.a, leaf.b, leaf.alpha))


# --- The cases ------------------------------------------------------------------------


def save_file(folder, n):
    flora.save(folder / "adapter.safetensors", adapted(n))


def load_file(folder):
    return version(flora.load(folder / "adapter.safetensors", base()))


def save_peft(folder, n):
    flora.peft.save(folder, adapted(n))


def load_peft(folder):
    return version(flora.peft.load(folder, base()))


def as_peft_reads(folder):
    """The config, then the weights; what is no JSON is refused."""
    config = json.loads((folder / "adapter_config.json").read_text())
    file = read(folder / "adapter_model.safetensors")
    return one((config["lora_alpha"], *map(file.array, file.infos)))


LEAVES = tuple("abcde")
TENSORS = {k: flora.hf.Tensor(f"{k}.weight") for k in LEAVES}


def save_hf(folder, n):
    """One file, three shards and five take turns."""
    tree = {k: np.full(SHAPE, n, np.float32) for k in LEAVES}
    size = tree["a"].nbytes
    shard_bytes = {0: 5 * size, 1: 2 * size, 2: size}[n % 3]
    flora.hf.save(folder, tree, TENSORS, shard_bytes=shard_bytes)


def load_hf(folder):
    like = {k: jax.ShapeDtypeStruct(SHAPE, np.float32) for k in LEAVES}
    return one(flora.hf.load(folder, like, TENSORS).values())


def as_transformers_reads(folder):
    """One file if it is there, else those that the index names."""
    alone, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if alone.is_file():
        file = read(alone)
        return one(map(file.array, file.infos))
    where = json.loads(index.read_text())["weight_map"]
    return one(read(folder / name).array(key) for key, name in where.items())


def as_vllm_reads(folder):
    """All files, or those of them that the index names; the last of a name counts."""
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = {*json.loads(index.read_text())["weight_map"].values()}
        names = [name for name in names if name in named]
    files = [read(folder / name) for name in names]
    return one({k: f.array(k) for f in files for k in f.infos}.values())


SAVERS = {}


def save_step(folder, n):
    from flora.checkpoint import Checkpointer  # Orbax takes long to import

    if folder not in SAVERS:
        SAVERS[folder] = Checkpointer(folder / "steps", max_to_keep=2)
    SAVERS[folder].save(n, adapted(n, 8), {"count": n, "mu": np.full(SHAPE, n)})
    SAVERS[folder].wait()


def load_step(folder):
    from flora.checkpoint import Checkpointer

    state = {"count": 0, "mu": np.zeros(SHAPE, int)}
    with Checkpointer(folder / "steps") as checkpointer:
        tree, state, step = checkpointer.restore(adapted(0, 8), state)
    leaf = tree["up"]["kernel"]
    return one((leaf.a, leaf.b, state["count"], state["mu"], step))


@dataclasses.dataclass(frozen=True)
class Case:
    """A writer, its reader, and what other readers of these files do."""

    save: Callable
    load: Callable
    others: tuple[Callable, ...] = ()
    savers: int = 2  # processes that save into one folder at the same time


CASES = {
    "flora.save": Case(save_file, load_file),
    "flora.peft.save": Case(save_peft, load_peft, (as_peft_reads,)),
    "flora.hf.save": Case(save_hf, load_hf, (as_transformers_reads, as_vllm_reads)),
    "Checkpointer.save": Case(save_step, load_step, savers=1),
}


def outcome(load, folder):
    """`(version, what went wrong)` of what lies in the folder."""
    try:
        return load(folder), ""
    except Mix as error:
        return None, f"mix: {error}"
    except (flora.LoraError, OSError, ValueError) as error:
        return None, f"refused: {error}"


# --- Processes ------------------------------------------------------------------------


def save_forever(case, folder, first, pipe):
    """Tells of each save before and after it."""
    for n in itertools.count(first):
        os.write(pipe, f"begin {n}\n".encode())
        case.save(folder, n)
        os.write(pipe, f"done {n}\n".encode())


def answer(case, asked, told):
    """Reads a folder for each line, with all readers of the case."""
    with os.fdopen(asked) as lines:
        for line in lines:
            folder = pathlib.Path(line.rstrip("\n"))
            found = [outcome(load, folder) for load in (case.load, *case.others)]
            os.write(told, f"{json.dumps(found)}\n".encode())


def kills(name, count, seed=0, least=2):
    """What the readers found after each of the kills."""
    case, draw = CASES[name], random.Random(seed)
    to, told = os.pipe(), os.pipe()
    reader = forked(answer, case, to[0], told[1])
    found, met = collections.Counter(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        os.fdopen(told[0]) as answers,
    ):
        for trial in range(count):
            reading, writing = os.pipe()
            child = forked(
                save_forever, case, pathlib.Path(folder), 1000 * trial + 1, writing
            )
            os.close(writing)
            with os.fdopen(reading) as lines:
                said, times = [], []
                while len(times) < least:
                    said.append(lines.readline().split())
                    times += [time.monotonic()] if said[-1][0] == "done" else []
                time.sleep(draw.uniform(0, 3 * (times[-1] - times[-2])))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                said += [line.split() for line in lines]
            done = max(int(n) for word, n in said if word == "done")
            begun = max(int(n) for word, n in said if word == "begin")
            met += begun > done
            os.write(to[1], f"{folder}\n".encode())
            loads = (case.load, *case.others)
            results = json.loads(answers.readline())
            for load, (version_, wrong) in zip(loads, results, strict=True):
                key = wrong.split(":")[0] or {done: "old", begun: "new"}.get(
                    version_, "mix"
                )
                found[load.__name__, key] += 1
        left = [p.name for p in pathlib.Path(folder).rglob(".flora-*.tmp")]
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    for end in (*to, told[1]):
        os.close(end)
    assert len(left) <= 4, left  # each save sweeps what was left before
    return met, found


def read_often(case, folder, count, pipe):
    found, seen = collections.Counter(), set()
    for _ in range(count):
        version_, wrong = outcome(case.load, folder)
        found[wrong.split(":")[0] or "one version"] += 1
        if wrong:
            sys.stderr.write(f"{wrong}\n")
        seen.add(version_)
    os.write(pipe, f"{json.dumps([found, len(seen)])}\n".encode())


def reads(name, count):
    """What a reader saw, and of how many versions, while others saved all the time."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        begun, told = os.pipe(), os.pipe()
        savers = [
            forked(save_forever, case, pathlib.Path(folder), 10**6 * i + 1, begun[1])
            for i in range(case.savers)
        ]
        os.close(begun[1])
        lines = os.fdopen(begun[0])
        while lines.readline().split()[0] != "done":
            pass
        drain = forked(lambda: collections.deque(lines, maxlen=0))
        reader = forked(read_often, case, pathlib.Path(folder), count, told[1])
        os.close(told[1])
        with os.fdopen(told[0]) as result:
            text = result.readline()
        for pid in savers:
            os.kill(pid, signal.SIGKILL)
        for pid in (*savers, reader, drain):
            os.waitpid(pid, 0)
        lines.close()
    found, seen = json.loads(text)
    return collections.Counter(found), seen


# --- A kill at each step --------------------------------------------------------------


def die_at(step, folder):
    """Kills this process before the step-th operation on a name in the folder."""
    left = [step]

    def hook(event, args):
        if any(isinstance(x, str | os.PathLike) and folder in os.fspath(x)
               for x in args):  # fmt: skip
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_and_die(save, folder, step):
    die_at(step, str(folder))
    save(folder)


def at_each_step(save, old, out):
    """Folders `out/<step>`: copies of `old`, into which a save was killed at the step.

    The last of them is that of the save which came to its end.
    """
    for step in itertools.count():
        folder = out / str(step)
        shutil.copytree(old, folder, symlinks=True)
        _, status = os.waitpid(forked(save_and_die, save, folder, step), 0)
        if status != signal.SIGKILL:
            assert status == 0
            return step
    raise AssertionError


def write_peft(folder, n):
    """The two files of `flora.peft.save`, without JAX."""
    leaf, prefix = adapted(n)["up"]["kernel"], "base_model.model.up"
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": n, "target_modules": ["up"]}
    peft_file.write(
        folder,
        config,
        {f"{prefix}.lora_A.weight": leaf.a.T, f"{prefix}.lora_B.weight": leaf.b.T},
    )


STEPS = {"peft": write_peft, "hf": save_hf}


def steps(job):
    """Kills a save of each pair `(old, new)` of versions at each of its steps."""
    out, save = pathlib.Path(job["out"]), STEPS[job["case"]]
    os.fsync = lambda _: None  # slow, and what a kill leaves does not depend on it
    for old, new in job["pairs"]:
        start = out / "old"
        start.mkdir()
        if old is not None:
            os.waitpid(forked(save, start, old), 0)
        at_each_step(lambda folder, n=new: save(folder, n), start, out / f"{old}-{new}")
        shutil.rmtree(start)


def killed_at_each_step(out, case, pairs):
    """`{(old, new): a folder for each step before which a kill came}`; the last: none.

    A process of its own does it: here JAX has started, which forks do not survive.
    """
    job = json.dumps({"out": str(out), "case": case, "pairs": pairs})
    command = [sys.executable, __file__, "--steps", job]
    subprocess.run(command, check=True, timeout=600)
    return {
        pair: sorted(
            (out / f"{pair[0]}-{pair[1]}").iterdir(), key=lambda p: int(p.name)
        )
        for pair in map(tuple, pairs)
    }


def check_turn(load, folders, old, new, *, refused=0):
    """The old version up to some step, and the new one from there on.

    refused: after how many steps between them there is neither.
    """
    found = [outcome(load, folder) for folder in folders]
    assert not [wrong for _, wrong in found if wrong.startswith("mix")]
    versions = [n for n, _ in found]
    before, after = versions.count(old), versions.count(new)
    between = len(found) - before - after
    assert before > 0 < after
    assert between <= (refused if old is not None else 0)
    assert versions == [old] * before + [None] * between + [new] * after


# --- The figures ----------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=0, help="of each writer")
    parser.add_argument("--reads", type=int, default=0, help="with each reader")
    parser.add_argument("--only", nargs="*", default=[*CASES], choices=[*CASES])
    parser.add_argument("--steps", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        steps(args.steps)
        return
    wrong = 0
    for name in args.only:
        own = CASES[name].load.__name__
        if args.kills:
            met, found = kills(name, args.kills)
            wrong += found[own, "refused"]
            wrong += sum(n for (_, word), n in found.items() if word == "mix")
            print(f"{name}: {args.kills} kills, {met} within a save", flush=True)
            for load in dict.fromkeys(load for load, _ in sorted(found)):
                words = ("old", "new", "refused", "mix")
                text = ", ".join(f"{found[load, word]} {word}" for word in words)
                print(f"    {load}: {text}", flush=True)
        if args.reads:
            found, seen = reads(name, args.reads)
            wrong += found["mix"] + found["refused"]
            print(
                f"{name}: {args.reads} reads during saves, of {seen} versions: "
                f"{found['mix']} wrong pairs, {found['refused']} refused",
                flush=True,
            )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
