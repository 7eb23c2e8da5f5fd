"""Kills and torn files leave what was saved before."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import flora
from flora.checkpoint import Checkpointer
from tests.support import process_worker
from tests.support.checkpoints import files, same, trained


def torn(source, target, size):
    """A copy of a step's directory that stopped after that many bytes."""
    for path in sorted(files(source)):
        data = path.read_bytes()[:size]
        size -= len(data)
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
        if size <= 0:
            return


def test_a_save_that_stopped_at_any_byte_is_not_seen(tmp_path):
    adapted, state = trained()
    with Checkpointer(tmp_path) as saver:
        saver.save(1, adapted, state)
    whole = sum(f.stat().st_size for f in files(tmp_path / "1"))
    left = tmp_path / "2.orbax-checkpoint-tmp"
    for size in np.linspace(1, whole, 8, dtype=int):
        torn(tmp_path / "1", left, size)
        with Checkpointer(tmp_path) as saver:
            assert saver.steps() == (1,)
            same(saver.restore(adapted, state)[:2], (adapted, state))
        shutil.rmtree(left)
    torn(tmp_path / "1", left, whole // 2)
    with Checkpointer(tmp_path) as saver:
        saver.save(2, adapted, state)
        assert saver.steps() == (1, 2)
    assert not left.exists()


# Orbax leaves the reads that are under way to themselves once one has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_never_give_other_numbers(tmp_path):
    adapted, state = trained()
    with Checkpointer(tmp_path / "good") as saver:
        saver.save(1, adapted, state)
    refusals = 0
    for path in files(tmp_path / "good"):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        damaged = tmp_path / "bad" / path.relative_to(tmp_path / "good")
        damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with Checkpointer(tmp_path / "bad") as saver:
            try:
                got = saver.restore(adapted, state)
                same(got[:2], (adapted, state))
            except flora.LoraError:
                refusals += 1
        shutil.rmtree(tmp_path / "bad")
    assert refusals > 5


def killed(directory, seed, trials):
    """Savers that SIGKILL stopped at random moments; see `process_worker`."""
    job = {"mode": "kill", "devices": 2, "directory": str(directory), "seed": seed,
           "trials": trials, "longest": 0.15}  # fmt: skip
    worker = pathlib.Path(process_worker.__file__)
    paths = os.pathsep.join((str(worker.parents[2]), str(worker.parent)))
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(job)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60 + 10 * trials,
        check=True,
    )
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert len(lines) == trials
    assert all(line["ok"] for line in lines), (lines, done.stderr[-3000:])
    return sum(any("tmp" in name for name in line["left"]) for line in lines)


def test_kills_leave_what_was_saved(tmp_path):
    assert killed(tmp_path, seed=0, trials=4), "no kill met a save under way"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills_leave_what_was_saved(tmp_path, seed):
    assert killed(tmp_path, seed, trials=40) > 10
