"""Mutants of the files that flora reads: some hundred; `fuzz_files.py` has more."""

import pytest

from tests import fuzz_files


def troubles(names, mutants, seed):
    found, seen = [], set()

    def report(n, name, result, said, text):
        seen.add((name, result))
        if result in ("raw", "hang", "silent"):
            found.append(f"{n} {name}: {result} ({said})\n{text}")

    fuzz_files.run(names, mutants, seed, report)
    assert {(name, "refused") for name in names} <= seen
    return found


@pytest.mark.parametrize("name", [k for k in fuzz_files.KINDS if "checkp" not in k])
def test_mutants_load_as_they_were_or_are_refused(name):
    assert troubles([name], 60, 1) == []


# Orbax closes its event loop at the first error; the reads still under way say so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mutants_of_checkpoints_load_as_they_were_or_are_refused():
    assert troubles(["checkpoint", "checkpoint, signed"], 24, 2) == []


@pytest.mark.parametrize("name", fuzz_files.KINDS)
def test_what_the_checks_behind_a_checksum_let_through_is_told(name, tmp_path):
    """A change of one value of the payload is another tree, so a mutant can be told."""
    kind = fuzz_files.KINDS[name]
    kind.save(tmp_path)
    original = fuzz_files.told(kind.load(tmp_path))
    assert fuzz_files.outcome(kind, tmp_path, original) == ("same", "")
    other = original[0], [(kind, x[:-1]) for kind, x in original[1]]
    wanted = "silent" if kind.checked else "other"
    assert fuzz_files.outcome(kind, tmp_path, other) == (wanted, "")
