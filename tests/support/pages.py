"""What a page of Markdown defines, for tests that use it."""

import pathlib
import re
from typing import Any

HOWTO = pathlib.Path(__file__).parents[2] / "examples/howto"


def defined(page: str, name: str, names: dict[str, Any]) -> Any:
    """The class or function that one Python block of a how-to defines."""
    text = (HOWTO / page).read_text()
    found = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (block,) = [x for x in found if re.match(rf"(?:class|def) {name}\b", x)]
    exec(compile(block, page, "exec", dont_inherit=True), names)
    return names[name]
