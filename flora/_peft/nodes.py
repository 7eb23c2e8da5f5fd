"""From what a file has for each leaf to the leaves of an adapted tree."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flora._algebra.norms import compiled_norms, zero_problems
from flora._algebra.variants import DoRA, MiCA
from flora._peft.config import PeftConfig
from flora._peft.factors import magnitude, node
from flora._peft.file import CONFIG, WEIGHTS
from flora._peft.keys import PREFIX, Content
from flora._peft.kinds.activated import Activated
from flora._peft.kinds.bias import Added, with_bias
from flora._peft.kinds.diagonal import variant_of
from flora._peft.kinds.kasa import KaSA, diagonal, truncated
from flora._peft.kinds.residual import (
    Starts,
    is_changed,
    residual,
    start_of,
    without_start,
)
from flora._peft.load import AdaptedLeaf, Assignment
from flora._peft.naming.names import Slot
from flora._peft.targets import listed
from flora._peft.whole import put
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, fail
from flora._tree.placement import mesh_of, spec_of, specs
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, Trained, base_of, uniform

Taken = tuple[Starts, Any] | None  # out of the base, and where that is from


def in_dtype(content: Content, dtype: Any) -> Content:
    """Factors in float32 at least, as PEFT has them, or as asked for."""
    parts = ("a", "b", "magnitude", "bias", "diag")
    loras = tuple(
        dataclasses.replace(x, **{n: _cast(getattr(x, n), dtype) for n in parts})
        for x in content.loras
    )
    return dataclasses.replace(content, loras=loras)


def _cast(x: Any, dtype: Any) -> Any:
    if x is None:
        return None
    wide = np.float64 if x.dtype == np.float64 else np.float32
    return x.astype(wide if dtype is None else dtype)


def placed_rows(node: LoraWeight, dtype: Any) -> LoraWeight:
    """The node of a leaf some of whose rows train, with factors as `in_dtype`."""
    a, b = (_cast(np.asarray(x), dtype) for x in (node.a, node.b))
    node = dataclasses.replace(node, a=a, b=b)
    return dataclasses.replace(node, **_placed(node))


def node_of(
    site: AdaptedLeaf, config: PeftConfig, folder: Path, taken: Taken
) -> LoraWeight:
    """The node of a leaf, sharded as its base is.

    Args:
      site: the leaf and what the file has for it.
      config: of the adapter.
      folder: where it lies, for messages.
      taken: what the adapter's start took out of the base, and where that is from.
    """
    made = node(site.path, site.base, site.layout, site.pieces, site.beside)
    if not site.layout.in_:  # a bias
        return dataclasses.replace(made, variant=Added(), **_placed(made))
    base = _changed_base(site, config, folder, taken)
    made = dataclasses.replace(made, start=_start(site, config, taken))
    made = with_bias(made, site.pieces, site.beside)
    new = dataclasses.replace(
        made, base=base, dropout=float(config.lora_dropout), **_placed(made)
    )
    if config.kasa_config is not None:
        return _kasa(new, site, config.kasa_config)
    if config.use_bdlora:
        variant = variant_of(new, site.pieces, folder / CONFIG)
        return new if variant is None else dataclasses.replace(new, variant=variant)
    if config.alora_invocation_tokens:
        return _activated(new, site, config, folder)
    if config.init_lora_weights == "mica" and new.variant is None:
        return _mica(new, site)
    return _dora(new, site) if config.use_dora else new


def _changed_base(
    site: AdaptedLeaf, config: PeftConfig, folder: Path, taken: Taken
) -> Any:
    """The base as the start of the adapter left it."""
    base, kasa = site.base, config.kasa_config is not None
    if not (config.residual or taken or kasa):
        return base
    if isinstance(base, jax.ShapeDtypeStruct) or is_quantized(base):
        raise LoraError(
            f"{folder / CONFIG}: the start of the adapter (init_lora_weights "
            f"{config.init_lora_weights!r}{' and KaSA' * kasa}) changed the base, "
            f"but '{site.path}' is {base!r}. Pass arrays."
        )
    known = base, site.layout, site.pieces, site.beside
    if taken:
        left = without_start(*known, *taken)
    elif kasa:
        left = truncated(*known, folder / CONFIG)
    else:
        left = residual(*known, config.residual)
    return jax.device_put(left, base.sharding if isinstance(base, jax.Array) else None)


def _start(site: AdaptedLeaf, config: PeftConfig, taken: Any) -> str:
    """What changed the base of a leaf, for `LoraWeight.start`."""
    changed = any(is_changed(p.lora) for p in site.pieces)
    if not changed or not (config.residual or taken):
        return ""
    if not taken:
        return start_of(config.residual, ((p.rank, p.scale) for p in site.pieces))
    how = config.init_lora_weights
    return f"PEFT's {how if isinstance(how, str) else 'start'}"


def _kasa(
    new: LoraWeight, site: AdaptedLeaf, settings: Mapping[str, Any]
) -> LoraWeight:
    e = jax.device_put(diagonal(new, site.pieces))
    if spec_of(new.base) is not None:
        e = jax.device_put(e, NamedSharding(mesh_of(new.base), PartitionSpec()))
    named = {k: v for k, v in settings.items() if k in ("beta", "gamma")}
    return dataclasses.replace(new, variant=KaSA(**named), extra={"e": e})


def _mica(new: LoraWeight, site: AdaptedLeaf) -> LoraWeight:
    layout = site.layout
    if site.pieces[0].lora.kind == "embedding" and layout.in_ > layout.out:
        raise LoraError(
            f"'{site.path}' has the layout {layout}, of a product, and the B "
            "that MiCA keeps is of a lookup. Pass the plain tree, and no fn=."
        )
    return dataclasses.replace(new, variant=MiCA())


def _dora(new: LoraWeight, site: AdaptedLeaf) -> LoraWeight:
    base, layout = new.base, site.layout
    m = jax.device_put(magnitude(layout, base.shape, site.pieces, site.beside))
    spec = spec_of(base)
    if spec is not None:
        found, stack = specs(layout, spec, len(base.shape)), len(layout.stack)
        parts = (*found.b[:stack], *found.b[stack + 1 :])
        m = jax.device_put(m, NamedSharding(mesh_of(base), PartitionSpec(*parts)))
    new = dataclasses.replace(new, extra={"magnitude": m}, variant=DoRA())
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(new)):
        fail(zero_problems(site.path, new, compiled_norms(uniform(new))))
    return new


def _activated(
    new: LoraWeight, site: AdaptedLeaf, config: PeftConfig, folder: Path
) -> LoraWeight:
    """The node as one that acts from its invocation tokens on."""
    lora = site.pieces[0].lora
    plain = lora.kind == "linear" and not lora.raw and new.variant is None
    if not plain or config.use_dora or config.init_lora_weights == "mica":
        raise LoraError(
            f"{folder / CONFIG}: alora_invocation_tokens is "
            f"{[*config.alora_invocation_tokens]}, and '{lora.name}' is no plain LoRA "
            "of a linear layer, the only one that PEFT activates. Train without it."
        )
    variant = Activated(config.alora_invocation_tokens)
    return dataclasses.replace(new, variant=variant)


def _placed(made: LoraWeight) -> dict[str, Any]:
    """The factors as JAX arrays, sharded as the weight is."""
    spec = spec_of(made.base)
    if spec is None:
        return jax.device_put({"a": made.a, "b": made.b})
    found, mesh = specs(made.layout, spec, len(made.base.shape)), mesh_of(made.base)
    return {
        "a": jax.device_put(made.a, NamedSharding(mesh, found.a)),
        "b": jax.device_put(made.b, NamedSharding(mesh, found.b)),
    }


def whole_of(
    found: Assignment, leaves: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The leaves that train whole, with the values of the file."""
    new, problems = {}, []
    for path, parts in found.whole.items():
        base = base_of(leaves[path])
        if is_quantized(base):
            problems.append(f"'{path}' is {base!r} and cannot train whole.")
            continue
        if isinstance(base, jax.ShapeDtypeStruct):
            value = np.zeros(base.shape, base.dtype)
        else:
            value = np.array(base)
        beside = tuple(slot for slot, _, _ in parts)
        for slot, index, x in parts:
            try:
                put(value, slot, index, x.astype(value.dtype), beside)
            except ValueError as error:
                problems.append(
                    f"{folder / WEIGHTS}: '{PREFIX}{slot.at(index)}' has shape "
                    f"{x.shape}, which does not fit the base's '{path}' "
                    f"{tuple(base.shape)}: {error}. Is it the adapter of another base?"
                )
        statistics = path.rpartition("/")[2] in ("mean", "var")
        array = jax.device_put(value, getattr(base, "sharding", None))
        new[path] = array if statistics else Trained(array)
    fail(problems)
    return new


def base_problems(
    found: Assignment, leaves: Mapping[str, Any], config: PeftConfig, folder: Path
) -> Iterator[str]:
    """Weights of the base in the file that differ from this base's."""
    for path, parts in found.of_base.items():
        for slot, index, x in parts:
            if gap := _gap(base_of(leaves[path]), slot, index, x):
                yield (
                    f"{folder / WEIGHTS}: the base weight of '{slot.at(index)}' {gap}. "
                    "The adapter was trained on another base, or with a vocabulary of "
                    "another size: resize the base as the adapter's was."
                )
    for path, parts in found.unnamed.items():
        for slot, index, x in parts:
            name, base = slot.at(index), base_of(leaves[path])
            gap = _gap(base, slot, index, x)
            if not is_array(base) or isinstance(base, jax.ShapeDtypeStruct):
                gap = f"cannot be compared with '{path}', which has no values"
            if gap:
                yield (
                    f"{folder / WEIGHTS}: '{PREFIX}{name}' {gap}, and is not part of "
                    f"the adapter by {CONFIG}: modules_to_save is "
                    f"{listed(config.modules_to_save)} and bias is '{config.bias}'. "
                    f"Name its module there, or write ignore={name!r}."
                )


def _gap(base: Any, slot: Slot, index: Sequence[int], x: np.ndarray) -> str:
    """How a weight in the file differs from the base's; '' if it does not."""
    if not is_array(base) or isinstance(base, jax.ShapeDtypeStruct):
        return ""
    want = np.zeros(base.shape, np.float64)
    have = np.asarray(base).astype(np.float64)
    try:
        put(want, slot, index, x.astype(np.float64), (slot,))
    except ValueError as error:
        return f"does not fit '{slot.path}' {tuple(base.shape)}: {error}"
    at = tuple(index)
    gap = np.abs(want[at] - have[at]).max() / max(np.abs(have[at]).max(), 1e-30)
    if gap <= 2**-7:  # bfloat16 keeps 8 bits
        return ""
    return (
        f"differs from '{slot.path}' of the base by {gap:.1e} of its largest value; "
        "expected the same"
    )
