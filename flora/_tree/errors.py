"""The errors that flora raises: what was passed, what was expected, what to write."""

from collections.abc import Iterable


class LoraError(ValueError):
    """A call that flora cannot serve.  The message names leaf, reason and remedy."""


class LoraTypeError(LoraError, TypeError):
    """A `LoraError` for an argument of the wrong type."""


class Unfactorable(Exception):
    """Raised by a rule that has no factored form; never leaves the interpreter."""


def fail(problems: Iterable[str], error: type[LoraError] = LoraError) -> None:
    """Raises one error that lists every problem; returns if there is none."""
    problems = list(problems)
    if not problems:
        return
    if len(problems) == 1:
        raise error(problems[0])
    shown = "\n".join(f"  - {p}" for p in problems[:20])
    more = "" if len(problems) <= 20 else f"\n  - and {len(problems) - 20} more"
    raise error(f"{len(problems)} problems:\n{shown}{more}")


def human_bytes(count: float) -> str:
    """A byte count as text, such as '64.0 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
