"""Each version is written in one place: pyproject.toml, or its source."""

import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement

import flora
from flora._tree.version import __version__

ROOT = pathlib.Path(flora.__file__).parents[1]


def test_the_version_has_one_source():
    assert flora.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([abrc.]+\w+)?", __version__)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    source = ROOT / settings["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{__version__}"' in source.read_text()


def test_the_first_job_installs_every_floor():
    command = [sys.executable, ".ci/floors.py"]
    printed = subprocess.check_output(command, cwd=ROOT, text=True).split()
    pinned = {r.name: next(iter(r.specifier)) for r in map(Requirement, printed)}
    assert all(pin.operator == "==" for pin in pinned.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["examples"], *extras["test"]):
        requirement = Requirement(line)
        if requirement.name != "flora-jax":
            floors = [x.version for x in requirement.specifier if x.operator == ">="]
            assert floors == [pinned[requirement.name].version], line
    run = (ROOT / ".ci/run").read_text()
    assert "python .ci/floors.py >" in run
    assert "PIP_CONSTRAINT=" in run


def test_the_readme_names_the_floors():
    readme = " ".join((ROOT / "README.md").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    floors = dict(re.findall(r"([\w-]+)>=([\w.]+)", " ".join(project["dependencies"])))
    for name, version in (
        ("Python", python),
        ("JAX", floors["jax"]),
        ("Flax", floors["flax"]),
        ("Optax", floors["optax"]),
        ("Orbax", floors["orbax-checkpoint"]),
        ("Chex", floors["chex"]),
    ):
        assert f"{name} ≥ {version}" in readme, name
