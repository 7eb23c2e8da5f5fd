"""Where a leaf of an adapted tree was loaded from."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What the file that a leaf came from says of it, so that it can be written again.

    It is no part of a tree's structure: all origins are equal, so that leaves of
    several files, and of none, can be mapped together and run in one compiled function.
    Such a function gives back the origins that it was compiled with, whichever equal
    ones come later.  So an origin knows which others it was taken for.

    Attributes:
      text: JSON that the module that wrote it reads; '' for a leaf of no file.
    """

    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_others", set())

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Origin):
            return NotImplemented
        if self.text and other.text and self.text != other.text:
            self._others.add(other.text)  # type: ignore[attr-defined]
            other._others.add(self.text)  # type: ignore[attr-defined]
        return True

    def __hash__(self) -> int:
        return hash(Origin)

    @property
    def texts(self) -> tuple[str, ...]:
        """Its own text, and those of the origins that it was taken for."""
        others = sorted(self._others)  # type: ignore[attr-defined]
        return (self.text, *others) if self.text else ()
