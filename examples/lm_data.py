"""From lines of JSON to packed rows of tokens, and which tokens are trained on.

A line is one of three: {"messages": [{"role", "content"}, ...]}, rendered by the
checkpoint's own chat template and trained on what the assistant says; {"prompt",
"completion"}, trained on the completion; or {"text"}, trained on all of it.  Several
examples share a row, and a token sees only its own example.

    ids        the tokens                             7 8 9 | 4 5 6 2 | 0
    segments   which example of the row, 0: none      1 1 1 | 2 2 2 2 | 0
    positions  where in its example                   0 1 2 | 0 1 2 3 | 0
    targets    the token after it                     8 9 0 | 5 6 2 0 | 0
    weights    whether that is trained on             0 1 0 | 1 1 1 0 | 0
"""

import atexit
import bisect
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_template
import numpy as np
from tokenizers import Tokenizer

from flora import LoraError

ARRAYS = ("ids", "segments", "positions", "targets", "weights")


class ChatTemplate:
    """A template, and the process that renders it."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._process: subprocess.Popen | None = None

    def render(
        self, messages: Sequence[Any], *, prompt: bool, special: Mapping[str, str]
    ) -> str:
        """The chat as text.

        Raises:
          LoraError: the template fails, refuses the chat, or takes too much.
        """
        asked = {"messages": list(messages), "prompt": prompt, "special": dict(special)}
        said = self._answer(json.dumps(asked)) or self._stopped()
        found = json.loads(said)
        if "error" in found:
            raise LoraError(f"the chat template {found['error']}")
        return found["text"]

    def _answer(self, line: str) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", lm_template.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
            atexit.register(self._process.kill)
            line = json.dumps(self._template) + "\n" + line
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line + "\n")
            stdin.flush()
            return stdout.readline()
        except BrokenPipeError:
            return ""

    def _stopped(self) -> str:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None
        return json.dumps(
            {"error": f"takes more than {lm_template.SECONDS} s or too much memory."}
        )


@dataclasses.dataclass(frozen=True)
class Example:
    """Tokens, and which of them are trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer of a checkpoint's folder, and its chat template.

    Attributes:
      tokenizer: of tokenizer.json.
      template: Jinja, or `None`; from a folder, it runs in a sandbox.
      special: names of special tokens, such as `{"eos_token": "</s>"}`.
      stop: the tokens that end an answer.
    """

    tokenizer: Tokenizer
    template: str | None
    special: Mapping[str, str]
    stop: tuple[int, ...]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Text":
        """Reads tokenizer.json, tokenizer_config.json, config.json and the template."""
        folder = pathlib.Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise LoraError(
                f"{folder} has no tokenizer.json. Save a fast tokenizer there."
            )
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # what the package raises has no class of its own
            raise LoraError(
                f"{folder}/tokenizer.json cannot be read: {error}. Download it again."
            ) from error
        settings, template = _json(folder / "tokenizer_config.json"), None
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        found = template or settings.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = [x for x in found if isinstance(x, dict)]
            found = {x.get("name"): x.get("template") for x in named}.get("default")
        if found is not None and not isinstance(found, str):
            raise LoraError(f"{folder}: chat_template is {found!r}; expected text.")
        special = {
            k: text
            for k, x in settings.items()
            if k.endswith("_token")
            and isinstance(text := x.get("content") if isinstance(x, dict) else x, str)
        }
        ends = _json(folder / "generation_config.json").get("eos_token_id")
        ends = (
            _json(folder / "config.json").get("eos_token_id") if ends is None else ends
        )
        stop = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(i) is int and 0 <= i < 2**31 for i in stop):
            raise LoraError(f"{folder}: eos_token_id is {ends!r}; expected tokens.")
        end = tokenizer.token_to_id(special.get("eos_token", ""))
        stop += [end] if end is not None and end not in stop else []
        return cls(tokenizer, found, special, tuple(stop))

    def render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        """The chat as text; with `prompt`, up to where the assistant answers."""
        if self.template is None:
            raise LoraError(
                "the checkpoint has no chat template. Put chat_template.jinja beside "
                "its tokenizer.json, or write lines of 'prompt' and 'completion'."
            )
        template = _template(self.template)
        return template.render(messages, prompt=prompt, special=self.special)

    def chat_prompt(self, messages: Sequence[Any]) -> list[int]:
        """The tokens after which the assistant answers."""
        text = self.render(messages, prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def first_tokens(self, answers: Sequence[str]) -> list[int]:
        """The token that each answer begins with; no two begin with the same."""
        found = [
            self.tokenizer.encode(x, add_special_tokens=False).ids[:1] for x in answers
        ]
        flat = [ids[0] for ids in found if ids]
        if len({*flat}) != len(answers):
            words = [self.tokenizer.id_to_token(i) for i in flat]
            raise LoraError(
                f"choices {[*answers]} begin with the tokens {words}. Each needs "
                "one of its own: take other words."
            )
        return flat

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(list(ids))

    def example(self, line: Mapping[str, Any]) -> Example:
        """The tokens of a parsed line."""
        if "messages" in line:
            return self._chat(line["messages"])
        if isinstance(line.get("prompt"), str) and isinstance(
            line.get("completion"), str
        ):
            start = len(line["prompt"])
            text = line["prompt"] + line["completion"]
            return self._ended(text, [(start, len(text))])
        if isinstance(line.get("text"), str):
            return self._ended(line["text"], [(0, len(line["text"]))])
        raise LoraError(
            f"keys {', '.join(map(repr, line)) or 'none'}; expected 'messages', "
            "'prompt' and 'completion', or 'text'."
        )

    def _chat(self, messages: Any) -> Example:
        spans, text = [], self.render(_messages(messages))
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], prompt=True)
            after = self.render(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise LoraError(
                    f"the chat template writes turn {i} otherwise once others follow, "
                    "so that what to train on is unknown. Split the chat after it."
                )
            spans.append((len(before), len(after)))
        return self._masked(text, spans, special=False)

    def _ended(self, text: str, spans: list[tuple[int, int]]) -> Example:
        """The example with the token that ends a text, which is trained on too."""
        one = self._masked(text, spans, special=True)
        end = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        if end is None or one.ids[-1:] == (end,):
            return one
        return Example((*one.ids, end), (*one.trained, True))

    def _masked(
        self, text: str, spans: list[tuple[int, int]], *, special: bool
    ) -> Example:
        found = self.tokenizer.encode(text, add_special_tokens=special)
        trained = tuple(
            any(start <= i < stop for start, stop in spans) and j > i
            for i, j in found.offsets
        )
        return Example(tuple(found.ids), trained)


_template = functools.cache(ChatTemplate)  # one process for each


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path} is no JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise LoraError(f"{path} holds {found!r}, no object. Download it again.")
    return found


def _messages(given: Any) -> list[Mapping[str, Any]]:
    whole = isinstance(given, list) and all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and "content" in x
        for x in given
    )
    if not whole or not any(x["role"] == "assistant" for x in given):
        raise LoraError(
            "'messages' is no list of {'role', 'content'} in which an assistant speaks."
        )
    return given


def read_examples(path: str | os.PathLike[str], text: Text) -> list[Example]:
    """The examples of a file of JSON lines.

    Raises:
      ValueError: a line is none of the three kinds; the message names the line.
    """
    found = []
    # Lines end at b"\n" alone: JSON has other ends of lines, as U+2028, in its texts.
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
            json.dumps(parsed, ensure_ascii=False).encode()  # no half of a character
            if not isinstance(parsed, dict):
                raise LoraError(f"a {type(parsed).__name__}; expected an object.")
            found.append(text.example(parsed))
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{path}, line {number}: {error}") from error
    if not any(any(x.trained[1:]) for x in found):
        raise LoraError(
            f"{path}: none of {len(found)} examples has a token to train on."
        )
    return found


def pack(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """Rows of `length` tokens, `{name: [rows, length]}`, filled best fit first.

    An example longer than a row continues in another segment, whose first token repeats
    the last one of the segment before, so that every token but the first is predicted
    once.  Segments without trained tokens are left out.
    """
    parts = [part for x in examples for part in _parts(x, length)]
    parts.sort(key=lambda x: -len(x.ids))
    rows: list[list[Example]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for part in parts:
        at = bisect.bisect_left(space, (len(part.ids), -1))
        if at == len(space):
            rows.append([part])
            bisect.insort(space, (length - len(part.ids), len(rows) - 1))
            continue
        free, row = space.pop(at)
        rows[row].append(part)
        bisect.insort(space, (free - len(part.ids), row))
    filled = [_row(row, length) for row in rows]
    return {k: np.stack([row[k] for row in filled]) for k in ARRAYS}


def _parts(example: Example, length: int) -> Iterator[Example]:
    for at in range(0, max(len(example.ids) - 1, 1), length - 1):
        part = Example(example.ids[at : at + length], example.trained[at : at + length])
        if any(part.trained[1:]):
            yield part


def _row(parts: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    row: dict[str, np.ndarray] = {
        k: np.zeros(length, np.float32 if k == "weights" else np.int32) for k in ARRAYS
    }
    at = 0
    for segment, part in enumerate(parts, 1):
        stop = at + len(part.ids)
        row["ids"][at:stop] = part.ids
        row["segments"][at:stop] = segment
        row["positions"][at:stop] = range(stop - at)
        row["targets"][at : stop - 1] = part.ids[1:]
        row["weights"][at : stop - 1] = part.trained[1:]
        at = stop
    return row


def batch_of(
    rows: Mapping[str, np.ndarray], step: int, shape: tuple[int, int], seed: int
) -> dict[str, np.ndarray]:
    """The rows of a step, `{name: [accumulate, batch, length]}`.

    Each epoch has another order, which depends on the step and the seed alone, so a
    resumed run sees the rows that it would have seen.
    """
    count, size = len(rows["ids"]), shape[0] * shape[1]
    stream = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in {n // count for n in stream}
    }
    chosen = [orders[n // count][n % count] for n in stream]
    return {k: x[chosen].reshape(*shape, -1) for k, x in rows.items()}
