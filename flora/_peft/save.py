"""From an adapted tree to the two files of a PEFT adapter."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._algebra.variants import DoRA, MiCA, Rows
from flora._files.items import statistics
from flora._peft.config import WORDLESS, parse
from flora._peft.file import CONFIG, COUNTER
from flora._peft.keys import PREFIX, TOKENS
from flora._peft.kinds import tokens
from flora._peft.kinds.activated import Activated
from flora._peft.kinds.attention import attentions
from flora._peft.kinds.bias import Added, Biased
from flora._peft.kinds.diagonal import BlockDiagonal, compact, config_of
from flora._peft.kinds.groups import AcrossGroups
from flora._peft.kinds.kasa import KaSA
from flora._peft.kinds.replicated import problems as repeated
from flora._peft.kinds.start import common_start, with_start
from flora._peft.kinds.twice import AddedTwice
from flora._peft.layouts import is_conv1d
from flora._peft.naming.convention import default_slots, doubts
from flora._peft.naming.memory import (
    agreed,
    base_weights,
    conflicts,
    fullest,
    memories,
    remembered_slots,
    widest,
)
from flora._peft.naming.names import Slot, given_slots, split_name
from flora._peft.parts import Part, is_idle, joined, parts, slots_beside, with_biases
from flora._peft.serving import for_serving, with_neighbors
from flora._peft.targets import ends, selects
from flora._peft.ties import Readers, save_problems, tied_slots
from flora._peft.whole import taken
from flora._tree.checks import require_adapted
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.paths import Pattern, check_pattern, exactly, matches, named_leaves
from flora._tree.selection import idle_entries
from flora._tree.weight import LoraWeight, Trained, base_of, is_node, parts_of

Slots = Mapping[str, Sequence[Slot]]
Named = Sequence[tuple[str, Any]]


def written(
    adapted: Any,
    *,
    names: Any,
    tied: Mapping[str, Any] | None,
    readers: Readers | None,
    base: Any,
    serving: bool,
    layer_replication: Any,
    dtype: Any,
    ignore: Pattern,
    about: Mapping[str, str | None],
    allow_nonfinite: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of adapter_config.json and of adapter_model.safetensors."""
    fail(
        f"save: {key}={value!r}. Write a string."
        for key, value in about.items()
        if value is not None and not isinstance(value, str)
    )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise LoraTypeError(f"save: dtype={dtype!r}. Write a floating dtype.")
    named = require_adapted(adapted, "save")
    fail(p for path, leaf in named for p in _problems(path, leaf))
    require_finite("save", dict(_trained(named)), allow_nonfinite)
    paths = [path for path, _ in named]
    bare = any(isinstance(x, LoraWeight) and x.base is None for _, x in named)
    found = {p: some for p, x in named if (some := memories(p, x))}
    fail(conflicts(found) if names is None else ())
    known = {p: fullest(x) for p, x in found.items()} if names is None else {}
    if names is not None:
        slots = given_slots(names, paths, partial=bare)
    elif known:
        slots = remembered_slots(paths, known)
        if tied is not None:
            slots = [s for s in slots if not s.module.tied]
    else:
        slots = default_slots(paths, partial=bare)
    slots = [*slots, *tied_slots(tied or {}, paths)]
    by_path: dict[str, list[Slot]] = collections.defaultdict(list)
    for slot in slots:
        by_path[slot.path].append(slot)
    fail(_unnamed(named, by_path))
    about = agreed(found) | {k: v for k, v in about.items() if v is not None}
    spans = about.pop("layer_replication", None)
    spans = spans if layer_replication is None else layer_replication
    fail(_repeats(spans, by_path, dict(named), serving))
    unsure = doubts(paths, partial=bare) if names is None else {}
    fail(unsure[p] for p, x in named if p in unsure and p not in known and is_node(x))
    one_use = tied is not None or about.get("task_type") in WORDLESS
    fail(save_problems(named, by_path, readers, one_use, known))
    nodes = {p: x for p, x in named if isinstance(x, LoraWeight)}
    rows = {p: x for p, x in nodes.items() if isinstance(x.variant, Rows)}
    added = {p: x for p, x in nodes.items() if isinstance(x.variant, Added)}
    nodes = {p: x for p, x in nodes.items() if p not in rows and p not in added}
    started = {p: x for p, x in nodes.items() if not isinstance(x.variant, KaSA)}
    nodes |= {} if base is None else with_start(started, base)
    in_parts: dict[str, list[Part]] = {}
    of_leaf: dict[str, list[Part]] = {}
    for path, node in nodes.items():
        kind = min((readers or {}).get(path, ()), default="")
        of_leaf[path] = [*parts(path, node, by_path[path], kind)]
        for part in of_leaf[path]:
            in_parts.setdefault(part.lora.name, []).append(part)
    start = common_start(nodes, of_leaf, serving=serving) or _start(nodes)
    with_rows = [s for s in slots if s.module.order is not None]
    made = [
        joined(some, [s for s in with_rows if s.index(name) is not None])
        for name, some in in_parts.items()
    ]
    made = with_biases(made, added, by_path)
    made = [part for part in made if not is_idle(part)]
    made = attentions(made, nodes, slots)
    if serving:
        made = with_neighbors(made, named, by_path)
    made = _nested(made, None if names is None and not known else slots)
    whole = _whole(named, by_path, made)
    fail(_lost_statistics(adapted, named, by_path, whole, base, ignore))
    if serving:
        fail(_unserved(nodes))
        made = for_serving(made, whole)
        nodes = {p: dataclasses.replace(x, variant=None) for p, x in nodes.items()}
        start = True
    else:
        variants = {p: x.variant for p, x in nodes.items()}
        made = [compact(p, variants.get(p.slot.path)) for p in made]
    everything = _modules(named, by_path)
    indices, held = tokens.written(rows, by_path, everything, serving=serving)
    if made or whole.values or not rows:
        config = _config(made, whole, nodes, by_path, named) | about
        config |= {
            "init_lora_weights": start,
            "trainable_token_indices": indices or None,
            "layer_replication": [[*span] for span in spans or ()] or None,
        }
        if config["alora_invocation_tokens"] and not config["task_type"]:
            config["task_type"] = "CAUSAL_LM"  # PEFT activates no other
    else:
        config = tokens.alone(indices, about)
    wrapper = "" if config["peft_type"] == "TRAINABLE_TOKENS" else ".token_adapter"
    dtypes = {p: widest(some) for p, some in found.items()}
    tensors, own_dtype = {}, {}
    for module, (path, x) in held.items():
        key = f"{PREFIX}{module}{wrapper}.{TOKENS}"
        tensors[key], own_dtype[key] = x, dtypes.get(path)
    for part in made:
        for field in ("a", "b", "magnitude", "bias", "diag"):
            x = getattr(part.lora, field)
            if x is not None:
                key = part.lora.key(field)
                tensors[key], own_dtype[key] = x, dtypes.get(part.slot.path)
    adapted_modules = {p.lora.module: p.lora for p in made}
    for name, x in whole.values.items():
        owner, last = split_name(name)
        inside = owner in adapted_modules and name not in whole.modules
        key = f"{PREFIX}{name}"
        if inside:
            key = adapted_modules[owner].key_of_base(last)
        tensors[key] = x
        own_dtype[key] = dtypes.get(whole.paths[name])
    if not serving:  # a server has the base
        for module, x, had in base_weights(found, named, by_path):
            around = wrapper if module in held else ""
            key = f"{PREFIX}{module}{around}.base_layer.weight"
            tensors[key], own_dtype[key] = x, had
    with np.errstate(over="ignore"):
        cast = {
            k: x.astype(dtype or own_dtype[k] or x.dtype) for k, x in tensors.items()
        }
    require_finite("save", cast, allow_nonfinite, before=tensors)
    for key in [k for k in cast if k.endswith(".running_mean")]:
        # PyTorch counts batches beside them, and PEFT asks for the number.
        count = key.removesuffix(".running_mean") + COUNTER
        cast[count] = np.zeros((), np.int64)
    return config, cast


def _repeats(
    spans: Any, by_path: Slots, leaves: Mapping[str, Any], serving: bool
) -> Iterator[str]:
    """What is wrong with the layers that PEFT shall repeat."""
    if not spans:
        return
    pairs = isinstance(spans, list | tuple) and all(map(_is_span, spans))
    if not pairs:
        yield (
            f"save: layer_replication={spans!r}. Write ranges of the base's layers, "
            "such as [[0, 2], [1, 3]]."
        )
        return
    if serving:
        yield "save: layer_replication is on, which vLLM and SGLang do not serve."
    slots = [slot for some in by_path.values() for slot in some]
    yield from (f"save: {p}" for p in repeated(spans, slots, leaves))


def _is_span(x: Any) -> bool:
    ints = isinstance(x, list | tuple) and all(type(i) is int for i in x)
    return ints and len(x) == 2 and 0 <= x[0] < x[1]


def _unserved(nodes: Mapping[str, LoraWeight]) -> Iterator[str]:
    """Kinds of adapters that no server has."""
    for path, x in nodes.items():
        if isinstance(x.variant, Activated):
            yield (
                f"save: '{path}' is activated by tokens (aLoRA), which vLLM and SGLang "
                "do not serve. Train without alora_invocation_tokens."
            )
        elif isinstance(x.variant, KaSA):
            yield (
                f"save: '{path}' is KaSA, whose base is another one (truncated). Ship "
                "flora.merge(adapted)."
            )


@dataclasses.dataclass(frozen=True)
class Whole:
    """Parameters that are saved whole.

    Attributes:
      values: by name.
      modules: which of them belong to `modules_to_save`, and to which module of it.
      bias: 'none', 'all' or 'lora_only', for the others, which are biases.
      paths: the leaf of each.
    """

    values: Mapping[str, np.ndarray]
    modules: Mapping[str, str]
    bias: str
    paths: Mapping[str, str]


_KINDS = (
    DoRA, MiCA, KaSA, Rows, Activated, AcrossGroups, Added, AddedTwice, Biased,
    BlockDiagonal,
    type(None),
)  # fmt: skip


def _problems(path: str, leaf: Any) -> Iterator[str]:
    if isinstance(leaf, LoraWeight):
        if not isinstance(leaf.variant, _KINDS):
            yield (
                f"save: '{path}' is {leaf.variant!r}, which PEFT's LoRA files cannot "
                "hold. Ship flora.merge(adapted)."
            )
        values = [leaf.a, leaf.b, *jax.tree.leaves(leaf.extra)]
    else:
        values = [leaf.value] if isinstance(leaf, Trained) else []
    for x in values:
        if isinstance(x, jax.ShapeDtypeStruct | Tracer) or not hasattr(x, "size"):
            yield f"save: '{path}' holds {x!r}, no array. Save outside of jax.jit."


def _trained(named: Named) -> Iterator[tuple[str, Any]]:
    """What an adapter holds, each array by a name of its own."""
    for path, leaf in named:
        if isinstance(leaf, LoraWeight):
            yield from ((f"{k} of {path}", x) for k, x in parts_of(leaf).items())
        elif isinstance(leaf, Trained):
            yield path, leaf.value


def _lost_statistics(
    adapted: Any,
    named: Named,
    by_path: Slots,
    whole: Whole,
    base: Any,
    ignore: Pattern,
) -> Iterator[str]:
    """Batch statistics that may have changed and that the files would lack."""
    check_pattern("ignore", ignore)
    frozen = [(p, x) for p, x in named if not isinstance(x, LoraWeight | Trained)]
    yield from (f"save: {p}" for p in idle_entries("ignore", ignore, frozen))
    plain = {} if base is None else dict(named_leaves(base)[0])
    found = statistics(adapted)
    lost = [
        path
        for path, x in frozen
        if path in found
        and not matches(ignore, path, x)
        and not any(
            slot.at(i) in whole.values
            for slot in by_path[path]
            for i in np.ndindex(*_stack(x, slot))
        )
        and not (path in plain and np.array_equal(plain[path], x))
    ]
    if lost:
        short = [p for p in found if matches("batch_stats/*", p, None)] == [*found]
        left = "batch_stats/*" if short else [exactly(p) for p in lost]
        yield (
            f"save: '{lost[0]}' {f'and {len(lost) - 1} more ' if lost[1:] else ''}may "
            "have changed in training: batch statistics. PEFT saves those of modules "
            "that train whole, and no others. Name the modules in train= of "
            f"LoraConfig, ship flora.merge(adapted), or write ignore={left!r} to leave "
            "them out."
        )


def _unnamed(named: Named, by_path: Slots) -> Iterator[str]:
    for path, leaf in named:
        if isinstance(leaf, LoraWeight | Trained) and path not in by_path:
            yield (
                f"save: '{path}' is not in names. Write which module it is: "
                f"names={{..., '/{path}': 'model.layers.{{i}}.…'}}."
            )


def _nested(made: Sequence[Part], declared: Sequence[Slot] | None) -> list[Part]:
    """Adapters of several parameters of one module, the last declared outermost.

    Names that were given tell the order; else what goes down comes last, as in all
    experts of HF.
    """
    count = collections.Counter(p.lora.module for p in made)
    if declared is not None:
        at = {slot.name: i for i, slot in enumerate(declared)}
        made = sorted(made, key=lambda p: at.get(p.slot.name, len(at)))  # tied: last
    else:
        made = sorted(made, key=lambda p: p.lora.parameter.startswith("down"))
    first = {
        p.lora.module: [
            q.lora.parameter for q in made if q.lora.module == p.lora.module
        ]
        for p in made
        if p.lora.raw
    }
    fail(
        f"save: '{module}' has adapters of {', '.join(words)}; PEFT nests them in the "
        "order in which the PyTorch module declares them. Pass names= in that order: "
        "names={'…': flora.peft.Module('…', parameter='…'), ...}."
        for module, words in first.items()
        if declared is None and sum(not w.startswith("down") for w in words) > 1
    )
    left = dict(count)
    result = []
    for part in made:
        module = part.lora.module
        if count[module] > 1 and not part.lora.raw:
            raise LoraError(
                f"save: '{module}' has an adapter of its weight and of a raw "
                "parameter, which PEFT cannot nest. Leave one of them out."
            )
        left[module] -= 1
        lora = dataclasses.replace(part.lora, depth=left[module])
        result.append(dataclasses.replace(part, lora=lora))
    return result


def _whole(named: Named, by_path: Slots, made: Sequence[Part]) -> Whole:
    """Trained leaves, and what PEFT saves along with them."""
    trained = {
        slot.at(i): split_name(slot.at(i))[0]
        for path, leaf in named
        if isinstance(leaf, Trained)
        for slot in by_path[path]
        if not slot.module.tied
        for i in np.ndindex(*_stack(leaf, slot))
    }
    known = {"weight", "bias", "running_mean", "running_var"}
    fail(
        f"save: '{name}' trains whole, but it is a parameter of a module with others; "
        "PEFT saves modules whole. Keep it frozen, or ship flora.merge(adapted)."
        for name in trained
        if split_name(name)[1] not in known
    )
    adapted = {p.lora.module for p in made}
    bias_only = {n for n in trained if n.endswith(".bias")}
    saved = {m for n, m in trained.items() if n not in bias_only}
    fail(
        f"save: '{m}' is adapted and has a weight that trains whole. Do one of both."
        for m in sorted(saved & adapted)
    )
    values: dict[str, np.ndarray] = {}
    parts: dict[str, list[tuple[Slot, np.ndarray]]] = {}
    biases = {n for n in bias_only if trained[n] not in saved}
    mode = "none" if not biases else "lora_only"
    if any(trained[n] not in adapted for n in biases):
        mode = "all"
    for path, leaf in named:
        for slot in by_path[path]:
            if isinstance(leaf, LoraWeight):
                continue
            for i in np.ndindex(*_stack(leaf, slot)):
                name = slot.at(i)
                owner, last = split_name(name)
                bias = last == "bias" and (
                    mode == "all" or (mode == "lora_only" and owner in adapted)
                )
                second = slot.module.tied and isinstance(leaf, Trained)
                if owner in saved or bias or second:
                    beside = slots_beside(by_path[path])
                    value = taken(base_of(leaf), slot, i, beside)
                    parts.setdefault(name, []).append((slot, value))
    for name, some in parts.items():
        values[name] = _assembled(some)
    modules = {n: split_name(n)[0] for n in values if split_name(n)[0] in saved}
    return Whole(values, modules, mode, {n: s[0][0].path for n, s in parts.items()})


def _stack(leaf: Any, slot: Slot) -> tuple[int, ...]:
    return tuple(base_of(leaf).shape[: slot.holes]) if slot.holes else ()


def _assembled(some: Sequence[tuple[Slot, np.ndarray]]) -> np.ndarray:
    """A parameter of which several leaves hold rows."""
    if len(some) == 1:
        return some[0][1]
    total = sum(len(x) for _, x in some)
    value = np.zeros((total, *some[0][1].shape[1:]), some[0][1].dtype)
    for slot, x in some:
        rows = sorted(slot.module.order or ())
        value[rows] = x
    return value


def _config(
    made: Sequence[Part],
    whole: Whole,
    nodes: Mapping[str, LoraWeight],
    by_path: Slots,
    named: Named,
) -> dict[str, Any]:
    """The config, with each module by its full name."""
    stabilized = bool(made) and all(p.rank_stabilized for p in made)
    if not stabilized:
        made = [dataclasses.replace(p, rank_stabilized=False) for p in made]
    rates = {x.dropout: path for path, x in nodes.items()}
    if len(rates) > 1:
        shown = ", ".join(f"{rate} in '{path}'" for rate, path in rates.items())
        raise LoraError(
            f"save: dropout rates differ: {shown}; PEFT has one, for training alone. "
            "Set one: jax.tree.map(lambda x: dataclasses.replace(x, dropout=0.1) if "
            "isinstance(x, flora.LoraWeight) else x, adapted, is_leaf=lambda x: "
            "isinstance(x, flora.LoraWeight))."
        )
    rank = _most([p.rank for p in made], 8)
    alpha = _most([p.alpha for p in made], 8)
    dora = any(p.lora.magnitude is not None for p in made)
    plain = [p for p in made if p.lora.magnitude is None]
    if dora and plain:
        other = next(p for p in made if p.lora.magnitude is not None)
        raise LoraError(
            f"save: {len(made) - len(plain)} modules are DoRA, such as "
            f"'{other.lora.module}' ('{other.slot.path}'), and {len(plain)} plain "
            f"LoRA, such as '{plain[0].lora.module}' ('{plain[0].slot.path}'); PEFT "
            "has one or the other. Train with one variant= of LoraConfig, or ship "
            "flora.merge(adapted)."
        )
    raw = [p.lora.name for p in made if p.lora.raw]
    modules = [p.lora.module for p in made if not p.lora.raw and not p.lora.inner]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": modules or None,
        "exclude_modules": None,
        "target_parameters": raw or None,
        "lora_dropout": next(iter(rates), 0.0),
        "bias": whole.bias,
        "fan_in_fan_out": any(is_conv1d(p, x.layout) for p, x in nodes.items()),
        "use_rslora": stabilized,
        "use_dora": dora,
        "lora_bias": any(p.lora.bias is not None for p in made),
        "init_lora_weights": True,
        "use_bdlora": config_of(made),
        "kasa_config": _kasa(nodes),
        "alora_invocation_tokens": _invocation(nodes),
        "modules_to_save": sorted({*whole.modules.values()}) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "ensure_weight_tying": any(
            slot.module.tied
            for path, leaf in named
            if isinstance(leaf, LoraWeight | Trained)
            for slot in by_path.get(path, ())
        ),
    }
    if not made:
        raise LoraError(
            "save: no leaf has factors. PEFT's LoRA needs one adapted module; ship "
            "flora.merge(adapted)."
        )
    _patterns(config, made, rank, alpha)
    _exclude_others(config, modules, _modules(named, by_path))
    return config


def _modules(named: Named, by_path: Slots) -> list[str]:
    """The modules that the leaves are parameters of."""
    return [
        split_name(slot.at(i))[0]
        for path, leaf in named
        for slot in by_path.get(path, ())
        for i in np.ndindex(*_named_stack(leaf, slot))
    ]


def _kasa(nodes: Mapping[str, LoraWeight]) -> dict[str, float] | None:
    """KaSA's config, the same for all leaves."""
    found = {x.variant if isinstance(x.variant, KaSA) else None for x in nodes.values()}
    if len(found) > 1:
        raise LoraError(
            "save: some leaves are KaSA and some are not, or of other beta and gamma; "
            "PEFT has one or the other. Ship flora.merge(adapted)."
        )
    return next((dataclasses.asdict(x) for x in found if x is not None), None)


def _invocation(nodes: Mapping[str, LoraWeight]) -> list[int] | None:
    """The tokens that activate the adapter, the same for all its leaves."""
    found: dict[Any, str] = {}
    for path, x in nodes.items():
        own = x.variant.tokens if isinstance(x.variant, Activated) else None
        found.setdefault(own, path)
    if len(found) > 1:
        paths = "' and '".join([*found.values()][:2])
        raise LoraError(
            f"save: '{paths}' are activated by other tokens, or one is not; PEFT has "
            "one list for all. Save them apart."
        )
    return next(([*own] for own in found if own), None)


def _start(nodes: Mapping[str, LoraWeight]) -> bool | str:
    """What tells PEFT which factors do not train."""
    fixed = [p for p, x in nodes.items() if isinstance(x.variant, MiCA)]
    free = [p for p in nodes if p not in fixed]
    if fixed and free:
        raise LoraError(
            f"save: '{fixed[0]}' is MiCA and '{free[0]}' is not; PEFT has one or the "
            "other. Adapt all in one way, or ship flora.merge(adapted)."
        )
    return "mica" if fixed else True


def _named_stack(leaf: Any, slot: Slot) -> tuple[int, ...]:
    if isinstance(leaf, LoraWeight):
        return tuple(leaf.a.shape[: slot.holes])
    return _stack(leaf, slot) if hasattr(base_of(leaf), "shape") else ()


def _most(values: Sequence[Any], default: Any) -> Any:
    return collections.Counter(values).most_common(1)[0][0] if values else default


def _patterns(
    config: dict[str, Any], made: Sequence[Part], rank: int, alpha: float
) -> None:
    """Exact names, anchored where one is the end of another's."""
    sites = [p.lora.site for p in made]

    tails = {end for site in sites for end in ends(site)[1:]}

    def key(site: str) -> str:
        return f"^{site}" if site in tails else site

    for part in made:
        if part.rank != rank:
            config["rank_pattern"][key(part.lora.site)] = part.rank
        if part.alpha != alpha:
            config["alpha_pattern"][key(part.lora.site)] = part.alpha


def _exclude_others(
    config: dict[str, Any], modules: Sequence[str], everything: Sequence[str]
) -> None:
    """Names modules that end like an adapted one and are not adapted."""
    mine = {*modules}
    others = sorted({m for m in everything if m not in mine})
    taken_in = [m for m in others if any(end in mine for end in ends(m))]
    saved = config["modules_to_save"] or []
    taken_in = [m for m in taken_in if m not in saved]
    if taken_in:
        config["exclude_modules"] = taken_in
    check = parse(config, _HERE)
    fail(
        f"save: '{m}' cannot be told from other modules by PEFT's rules of names. "
        "Rename one of them."
        for m in modules
        if not selects(check, m)
    )


_HERE = Path(CONFIG)
