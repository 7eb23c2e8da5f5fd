"""PEFT's rules for what a config selects, and what a file must then hold."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flora._peft.config import PeftConfig
from flora._peft.file import CONFIG, WEIGHTS
from flora._peft.ignored import Ignored
from flora._peft.keys import PREFIX, Content
from flora._peft.naming.names import split_name
from flora._tree.errors import LoraError


def ends(name: str) -> list[str]:
    """The name, and every end of it that starts after a dot."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def selects(config: PeftConfig, module: str) -> bool:
    """Whether PEFT would adapt a module of that path."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if config.regex("exclude_modules", excluded).fullmatch(module):
            return False
    elif any(end in excluded for end in ends(module)):
        return False
    if config.saves(module):
        return False
    targets = config.target_modules or frozenset()
    if isinstance(targets, str):
        return is_all_linear(config) or config.regex(
            "target_modules", targets
        ).fullmatch(module)
    if module in targets:
        return True
    return any(e in targets for e in ends(module)) and _in_layers(config, module)


def is_all_linear(config: PeftConfig) -> bool:
    """Whether the target is every linear layer."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _in_layers(config: PeftConfig, module: str) -> bool:
    if not config.layers_to_transform:
        return True
    return layer_of(config, module) in config.layers_to_transform


def layer_of(config: PeftConfig, module: str) -> int | None:
    """The index of a module's layer, by the rules of `layers_pattern`."""
    if not config.layers_pattern:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        return int(found["idx"]) if found else None
    starts = [0, *(m.end() for m in re.finditer(r"\.", module))]
    for pattern in config.layers_pattern:
        regex = config.regex("layers_pattern", pattern)
        for start in starts:
            ends = regex.ends(module, start)
            found = {
                int(m[1])
                for m in re.finditer(r"(?<=\.)(\d+)\.", module)
                if ends >> m.start() & 1
            }
            if len(found) > 1:
                raise LoraError(
                    f"layers_pattern {pattern!r} finds the layers {sorted(found)} in "
                    f"'{module}'. Write the name of the list of layers alone."
                )
            if found:
                return found.pop()
    return None


def target_problems(
    config: PeftConfig,
    content: Content,
    weights: Sequence[str],
    parameters: Sequence[str],
    tied: set[str],
    folder: Path,
    ignored: Ignored,
) -> Iterator[str]:
    """What the config selects and the file lacks, and the other way round.

    Names, layers and patterns that select nothing are no problem: PEFT passes over
    them, and writes them.

    Args:
      config: the config.
      content: of the file.
      weights: the modules of the base that have a weight.
      parameters: all parameters of the base.
      tied: modules that share another one's weight; PEFT adapts them unasked.
      folder: where both lie.
      ignored: the keys that may be missing.
    """
    here, file = folder / CONFIG, folder / WEIGHTS
    held = {lora.module for lora in content.loras if not lora.raw}
    universe = sorted({*weights, *held})
    inner = {lora.module for lora in content.loras if lora.inner}
    for module in sorted(held - tied - inner):
        if not selects(config, module):
            yield (
                f"{file}: '{PREFIX}{module}' is adapted, but {here.name} does not "
                f"select it: target_modules is {listed(config.target_modules)}. PEFT "
                f"would leave it out. Name it there, or write ignore='{module}.*'."
            )
    missing = [m for m in universe if m not in held and selects(config, m)]
    if is_all_linear(config):  # which leaves out the model's head
        alone = [m for m in missing if not re.search(r"(^|\.)\d+(\.|$)", m)]
        missing = [m for m in missing if m not in alone or len(alone) > 1]
    for module in missing:
        key = f"{PREFIX}{module}.lora_A.weight"
        if ignored(key):
            continue
        yield (
            f"{file}: '{key}' is missing; the base has the module and target_modules "
            f"{listed(config.target_modules)} selects it. PEFT would leave it "
            "untrained. Is the adapter one of another base? If not, write "
            f"ignore='{module}.*'."
        )
    raw = {lora.name for lora in content.loras if lora.raw}
    for name in parameters:
        module = split_name(name)[0]
        wanted = any(end in config.target_parameters for end in ends(name))
        if wanted and name not in raw and not ignored(f"{PREFIX}{name}"):
            yield (
                f"{file}: no '{PREFIX}{module}….lora_A.weight' is of '{name}'; the "
                f"base has it and target_parameters {listed(config.target_parameters)} "
                "selects it. PEFT would leave it untrained. Save the adapter anew, or "
                f"write ignore='{name}'."
            )


def whole_problems(
    config: PeftConfig,
    content: Content,
    parameters: Sequence[str],
    folder: Path,
    ignored: Ignored,
) -> Iterator[str]:
    """What the file lacks of `modules_to_save` and `bias`."""
    file = folder / WEIGHTS
    adapted = {lora.module for lora in content.loras}
    held = {plain(name) for name in content.whole}
    holds = _Holders(config.modules_to_save)
    in_base, in_file = holds.by_entry(parameters), holds.by_entry(sorted(held))
    for entry in config.modules_to_save:
        wanted = in_base.get(entry, [])
        if not wanted and entry not in in_file:
            continue  # PEFT passes over names that match nothing
        if entry not in in_file:
            if all(ignored(f"{PREFIX}{name}") for name in wanted):
                continue
            yield (
                f"{file}: no tensor of '{entry}', which modules_to_save names; "
                f"expected '{PREFIX}…{entry}.weight'. PEFT would leave it as it is in "
                "the base. Save the adapter anew, or take the name out."
            )
        else:
            for name in wanted:
                statistics = name.endswith((".running_mean", ".running_var"))
                if name not in held and not statistics and not ignored(PREFIX + name):
                    yield (
                        f"{file}: '{PREFIX}{name}' is missing; modules_to_save names "
                        f"'{entry}' and the base has it. Save the adapter anew."
                    )
    if config.bias == "none":
        return
    for name in parameters:
        owner, parameter = split_name(name)
        if parameter != "bias" or name in held:
            continue
        wanted = config.bias == "all" or owner in adapted
        if wanted and not ignored(PREFIX + name):
            yield (
                f"{file}: '{PREFIX}{name}' is missing; bias is '{config.bias}' and the "
                "base has it. Save the adapter anew."
            )


def unnamed(config: PeftConfig, content: Content) -> list[str]:
    """The parameters kept whole that the config does not name as trained."""
    holds = _Holders(config.modules_to_save)
    adapted = {x.module for x in content.loras}

    def is_bias(name: str) -> bool:
        owner, parameter = split_name(name)
        named = config.bias == "all" or (
            config.bias == "lora_only" and owner in adapted
        )
        return parameter == "bias" and named

    return [
        n for n in content.whole if not holds.of(plain(n)) and not is_bias(plain(n))
    ]


def plain(name: str) -> str:
    """A parameter's name without what PEFT wraps around modules."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


class _Holders:
    """Entries of `modules_to_save`: PEFT saves what lies in modules that end so."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = {*entries}
        self._lengths = {len(entry) for entry in self._entries}

    def of(self, name: str) -> set[str]:
        """The entries for which PEFT saves a parameter."""
        found, module = set(), split_name(name)[0]
        while module:
            found |= {module[-n:] for n in self._lengths} & self._entries
            module = split_name(module)[0]
        return found

    def by_entry(self, names: Iterable[str]) -> dict[str, list[str]]:
        """For each entry the parameters that are saved for it."""
        found: dict[str, list[str]] = {}
        for name in names:
            for entry in self.of(name):
                found.setdefault(entry, []).append(name)
        return found


def listed(names: object, most: int = 4) -> str:
    """Names for a message, at most `most` of them."""
    if not isinstance(names, tuple | list | frozenset):
        return repr(names)
    names = sorted(names)
    some = ", ".join(map(repr, names[:most]))
    return f"[{some}{', …' if len(names) > most else ''}]"
