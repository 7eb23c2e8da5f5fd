"""Factors for what the start of an adapter took out of its base."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora._peft.config import RESIDUAL_STARTS
from flora._peft.kinds.residual import start_of
from flora._peft.parts import Part
from flora._tree.errors import LoraError, fail
from flora._tree.matrices import matrices
from flora._tree.paths import named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.weight import LoraWeight, base_of, uniform


def with_start(nodes: Mapping[str, LoraWeight], base: Any) -> dict[str, LoraWeight]:
    """The nodes over the plain base: W' + s A B = W + s [A A₀] [B; B₀].

    A₀ and B₀ are found by an SVD of W' − W, whose rank is what the start took.

    References: https://huggingface.co/docs/peft/developer_guides/lora#pissa
    """
    plain = {p: base_of(x) for p, x in named_leaves(base)[0]}
    fail(
        f"save: base has no leaf '{path}'. Pass the tree that the adapted one was made "
        f"of."
        for path in nodes
        if path not in plain
    )
    return {path: _with_start(path, x, plain[path]) for path, x in nodes.items()}


def common_start(
    nodes: Mapping[str, LoraWeight],
    of_leaf: Mapping[str, Sequence[Part]],
    *,
    serving: bool,
) -> str:
    """How PEFT shall change the plain base before it adds A B: '', 'pissa' or 'olora'.

    Args:
      nodes: the adapted leaves, by path.
      of_leaf: the adapters of the modules in each.
      serving: whether for servers, which change no base.
    """
    started = {path: x.start for path, x in nodes.items() if x.start}
    if not started:
        return ""

    def again(how: str) -> bool:
        """Whether PEFT would change every base as it was changed here."""
        return all(
            nodes[path].start == start_of(how, ((p.rank, p.scale) for p in some))
            for path, some in of_leaf.items()
            # PEFT starts embeddings as plain LoRA then, and refuses convolutions.
            if path in started
            or any(p.lora.kind != "embedding" and not p.lora.raw for p in some)
        )

    known = [how for how in RESIDUAL_STARTS if again(how)]
    if known and not serving:
        return known[0]
    server = "servers do" if serving else "the file's users do"
    fail(
        f"save: '{path}' was started by {start}, which took a part of the weight out "
        f"of its base, and {server} not. Pass base=, the plain tree from before that "
        "start, or save flora.starts.to_plain(adapted, started, plain)."
        for path, start in started.items()
    )
    return ""


def _with_start(path: str, node: LoraWeight, plain: Any) -> LoraWeight:
    most = node.rank if node.start else 0  # what that start may have taken
    node = dataclasses.replace(node, start="")
    if node.base is plain:
        return node  # what the file's user will have, as the caller says
    for x in (node.base, plain):
        if x is None or is_quantized(x) or isinstance(x, jax.ShapeDtypeStruct):
            raise LoraError(
                f"save: '{path}' is {x!r} and base= needs its values. Pass the adapted "
                "tree and the plain base, both of arrays."
            )
    if node.base.shape != plain.shape:
        raise LoraError(
            f"save: '{path}' has shape {node.base.shape}, and {plain.shape} in base. "
            "Pass the tree that the adapted one was made of."
        )
    changed, before = np.asarray(node.base), np.asarray(plain)
    if np.array_equal(changed, before):
        return node
    eps = float(jnp.finfo(changed.dtype).eps)
    before64, changed64 = before.astype(np.float64), changed.astype(np.float64)
    w, d = (matrices(x, node.layout) for x in (before64, changed64 - before64))
    u, s, v = np.linalg.svd(d, full_matrices=False)
    floor = 4 * eps * np.linalg.norm(w, axis=(-2, -1)).max()
    rank = int((s > floor).sum(-1).max())
    if rank > max(most, s.shape[-1] // 2):
        raise LoraError(
            f"save: '{path}' differs from base by a change of rank {rank} of "
            f"{s.shape[-1]}. Pass the base that the adapter was started from."
        )
    if not rank:
        return node
    node = uniform(node)  # A₀ and B₀ have one scale, for all of its blocks
    root = np.sqrt(s[..., :rank])
    dtype = np.asarray(node.b).dtype
    a0, b0 = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    stack, in_, out = node.layout.sizes(changed.shape)
    a0 = a0.reshape(*stack, *in_, rank).astype(dtype)
    b0 = (b0 / node.scale).reshape(*stack, rank, *out).astype(dtype)
    total = node.rank + rank
    return dataclasses.replace(
        node,
        base=plain,
        a=np.concatenate([np.asarray(node.a), a0], -1),
        b=np.concatenate([np.asarray(node.b), b0], len(stack)),
        rank=total,
        alpha=node.scale * total,
        rank_stabilized=False,
    )
