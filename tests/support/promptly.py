"""Work that takes a moment, or minutes and more if it is done the obvious way."""

import contextlib
import time
from collections.abc import Iterator

_SECONDS = 30


@contextlib.contextmanager
def promptly() -> Iterator[None]:
    """Fails if the block takes what no moment takes, on however busy a machine.

    What stands in such a block takes below 2 s of a free core.
    """
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < _SECONDS, f"{took:.1f} s"
