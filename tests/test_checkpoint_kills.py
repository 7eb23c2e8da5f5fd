"""Kills and torn files leave what was saved before."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
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
@pytest.mark.by_hand
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills_leave_what_was_saved(tmp_path, seed):
    assert killed(tmp_path, seed, trials=40) > 10


# --- Savers beside a reader -----------------------------------------------------------


def meanwhile(monkeypatch, name, act):
    """Does something once, after a reader's look at a step's record."""
    real, done = getattr(Checkpointer, name), []

    def late(self, step):
        found = real(self, step)
        if not done:
            done.append(step)
            act()
        return found

    monkeypatch.setattr(Checkpointer, name, late)


def test_a_step_that_is_removed_as_it_is_read_gives_way_to_the_next(
    tmp_path, monkeypatch
):
    first, second = trained(2), trained(3)
    with Checkpointer(tmp_path, max_to_keep=1) as saver:
        saver.save(1, *first)
        saver.wait()

        def save():
            saver.save(2, *second)
            saver.wait()

        meanwhile(monkeypatch, "_record", save)
        with Checkpointer(tmp_path) as reader:
            found = reader.restore(*first)
            assert found.step == 2
            same(found[:2], second)
            with pytest.raises(flora.LoraError, match="has no step 1"):
                reader.restore(*first, step=1)


def test_a_step_that_is_saved_anew_as_it_is_read_is_not_mixed(tmp_path, monkeypatch):
    """The record of one adapter would go with the arrays of the other."""
    first, second = trained(2), trained(2, alpha=6.0)
    with Checkpointer(tmp_path) as saver:
        saver.save(1, *first)

        def save():
            saver.delete(1)
            saver.save(1, *second)
            saver.wait()

        saver.wait()
        meanwhile(monkeypatch, "_record", save)
        with (
            Checkpointer(tmp_path) as reader,
            pytest.raises(flora.LoraError, match="has alpha=6"),
        ):
            reader.restore(*first)


@pytest.mark.parametrize("error", [FileNotFoundError, NotADirectoryError])
def test_a_step_that_is_removed_as_steps_are_listed(tmp_path, monkeypatch, error):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, *trained(1))
    reload, calls = ocp.CheckpointManager.reload, []

    def late(self):
        calls.append(self)
        if len(calls) == 1:
            raise error("1")
        return reload(self)

    monkeypatch.setattr(ocp.CheckpointManager, "reload", late)
    with Checkpointer(tmp_path) as reader:
        assert reader.steps() == (1,)
    assert len(calls) == 2
