"""Real processes: they train alike, and a job whose process is killed goes on."""

import json
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tests.support import process_worker

WORKER = pathlib.Path(process_worker.__file__)
STEPS, SECONDS = 12, 150


class Process:
    """A worker, and the JSON lines that it prints."""

    def __init__(self, job, errors):
        self.errors = errors
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(WORKER.parents[2]), str(WORKER.parent)))
        }
        with errors.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(job)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        self.queue, self.lines = queue.Queue(), []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        for line in self.popen.stdout:
            if line.startswith(b"{"):  # libraries may print too
                self.queue.put(json.loads(line))
        self.queue.put(None)

    def until(self, found, deadline):
        """Reads lines until `found(line)`; `None` is the end."""
        while True:
            line = self.queue.get(timeout=max(deadline - time.monotonic(), 0.01))
            if line is not None:
                self.lines.append(line)
            if found(line):
                return line
            assert line is not None, self.errors.read_text()[-3000:]

    def all(self, key):
        return [line[key] for line in self.lines if key in line]

    def losses(self):
        return {line["step"]: line["loss"] for line in self.lines if "step" in line}

    def stop(self):
        """Kills it, if it runs, with all that it started."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(30)
        self.thread.join(30)
        self.popen.stdout.close()
        while not self.queue.empty():
            line = self.queue.get()
            self.lines += [] if line is None else [line]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts the processes of a job, and leaves none behind."""
    started = []

    def run(count, directory=None, steps=STEPS):
        job = {
            "mode": "train", "count": count, "port": free_port(), "steps": steps,
            "devices": 4 // count, "directory": directory and str(directory),
        }  # fmt: skip
        new = [
            Process(job | {"process": i}, tmp_path / f"stderr{len(started) + i}")
            for i in range(count)
        ]
        started.extend(new)
        return new

    yield run
    for process in started:
        process.stop()


def finish(processes):
    """Waits for all, and returns the losses, which all of them saw."""
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.until(lambda line: line is not None and "done" in line, deadline)
    for process in processes:
        assert process.popen.wait(60) == 0, process.errors.read_text()[-3000:]
        assert process.losses() == processes[0].losses()
    return processes[0].losses()


def close(losses, expected):
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(
        list(losses.values()), list(expected.values()), rtol=1e-5
    )


@pytest.fixture(scope="module")
def one_process():
    """The losses of this process, by four of its devices."""
    losses = process_worker.train(jax.devices()[:4], STEPS)
    assert losses[STEPS] < 0.9 * losses[1]
    return losses


def interrupt(start, tmp_path, count, victim, then, after=7):
    """Kills a process once a step is done, restarts, and returns all losses.

    Every step that was reported saved by then is there.
    """
    directory = tmp_path / "checkpoints"
    first = start(count, directory, steps=1000)
    deadline = time.monotonic() + SECONDS
    first[victim].until(lambda line: line and line.get("step") == after, deadline)
    first[victim].stop()
    for process in first:
        process.stop()
    saved = max(n for process in first for n in process.all("saved"))
    assert saved >= 4
    second = start(then, directory)
    losses = finish(second)
    (begun,) = second[0].all("start")
    assert begun >= saved
    assert begun % 2 == 0
    done = {n: x for p in first for n, x in p.losses().items() if n <= begun}
    assert sorted(done) == list(range(1, begun + 1))
    assert sorted(losses) == list(range(begun + 1, STEPS + 1))
    return done | losses


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_a_kill(start, tmp_path, one_process):
    expected = finish(start(2, tmp_path / "uninterrupted"))
    close(expected, one_process)
    # The same processes, meshes and order of summation: the same bits.
    assert interrupt(start, tmp_path, 2, victim=1, then=2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_processes_train_as_one(start, count, one_process):
    close(finish(start(count)), one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "then"),
    [
        (4, 1, 2),
        *(
            pytest.param(*case, marks=pytest.mark.by_hand)
            for case in ((2, 0, 2), (4, 3, 4), (2, 1, 1), (1, 0, 4))
        ),
    ],
)
def test_a_killed_job_goes_on(start, tmp_path, one_process, count, victim, then):
    """The first process too, and with more or fewer processes than before."""
    close(interrupt(start, tmp_path, count, victim, then), one_process)
