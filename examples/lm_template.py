"""Chat templates, which are programs, run where they can do no harm.

A checkpoint's template is Jinja: a loop over a loop of a hundred thousand or a text
doubled forty times takes all the time or memory there is, in Jinja's sandbox too.  So
`lm_data.ChatTemplate` runs this file as a process that has two seconds for each chat
and a GiB of memory.
"""

import functools
import json
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 2, 2**30


@functools.cache
def compiled(template: str) -> Template:
    """The template in a sandbox, with what HF's templates use."""

    def stop(message: str) -> None:
        raise ValueError(f"refuses the chat: {message}")

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    jinja.globals["raise_exception"] = stop
    jinja.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    # Marks around what an assistant says; what is trained on is found in any template.
    plain = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", template)
    return jinja.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", plain))


def answer(template: str, asked: Mapping[str, Any]) -> dict[str, str]:
    """`{"text"}` or `{"error"}`."""
    try:
        found = compiled(template).render(
            messages=asked["messages"],
            add_generation_prompt=asked["prompt"],
            **asked["special"],
        )
        found.encode()
        return {"text": found}
    except ValueError as error:
        own = str(error).startswith("refuses the chat")
        return {"error": str(error) if own else f"fails: {error}"}
    except Exception as error:  # whatever a program may raise
        return {"error": f"fails: {error or type(error).__name__}"}


def main() -> None:
    """Answers each line of standard input; killed where one takes too long."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    template = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        if sys.platform != "win32":
            signal.alarm(SECONDS)
        said = json.dumps(answer(template, json.loads(line)))
        if sys.platform != "win32":
            signal.alarm(0)
        print(said, flush=True)


if __name__ == "__main__":
    main()
