"""The version is written in one place."""

import pathlib
import re
import tomllib

import flora
from flora._tree.version import __version__


def test_the_version_has_one_source():
    assert flora.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([abrc.]+\w+)?", __version__)
    root = pathlib.Path(flora.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    source = root / settings["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{__version__}"' in source.read_text()
