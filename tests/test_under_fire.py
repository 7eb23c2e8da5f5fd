"""Real kills, and loads while other processes save: few here, many by hand."""

import subprocess
import sys

import pytest

from tests.support import under_fire


def figures(kills, reads):
    """What the script prints; it fails if one of its readers sees a mix, or nothing."""
    command = [
        sys.executable,
        under_fire.__file__,
        f"--kills={kills}",
        f"--reads={reads}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_kills_and_reads():
    text = figures(kills=1, reads=10)
    assert text.count(": 0 wrong pairs, 0 refused") == len(under_fire.CASES) == 4
    assert text.count(" 0 mix") == 7  # by as many readers


@pytest.mark.slow
@pytest.mark.by_hand
def test_many_kills_and_reads():
    text = figures(kills=20, reads=100)
    assert text.count(" 0 mix") == 7
