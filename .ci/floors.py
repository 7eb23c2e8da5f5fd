"""Prints the oldest version of each package that pyproject.toml allows.

pip takes it as a file of constraints:

    python .ci/floors.py > floors.txt && pip install -e ".[test]" -c floors.txt
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in sum(extras, project["dependencies"]):
    if floor := re.match(r"([\w.-]+)>=([\w.]+)", requirement):
        print("{}=={}".format(*floor.groups()))
