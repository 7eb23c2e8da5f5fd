"""Where the user wrote an equation."""

import os
from typing import Any


def _package(name: str) -> str:
    return os.sep + os.path.join("site-packages", name) + os.sep


# Frames in these files are never the user's code.
_INTERNAL = (
    _package("jax"),
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    "<string>",
    "contextlib.py",
)
# Frames in these are reported only where there are no others.
_LIBRARIES = (
    *_INTERNAL,
    *map(_package, ("flax", "haiku", "equinox", "haliax", "jaxtyping", "keras")),
)


def source_line(eqn: Any, function: str = "") -> str:
    """Where the user wrote the equation: 'model.py:41 (__call__)'; '' if unknown.

    In a jitted `function` only its own lines count: JAX caches its trace, which may
    come from another caller.
    """
    trace = eqn.source_info.traceback
    frame = trace and trace.as_python_traceback()
    found = library = None
    while frame is not None:  # from the outermost frame inwards
        code = frame.tb_frame.f_code
        if function and code.co_name == function:
            found, library, function = None, None, ""
        if not any(name in code.co_filename for name in _LIBRARIES):
            found = frame
        elif not any(name in code.co_filename for name in _INTERNAL):
            library = frame
        frame = frame.tb_next
    frame = found or library
    if frame is None:
        return ""
    code = frame.tb_frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.tb_lineno} ({code.co_name})"
