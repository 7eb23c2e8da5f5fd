"""Training k adapters at once on one base: sweeps of learning rates, ranks, seeds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora._multi.conform import aligned, common, flattened, on_arrays, require_alike
from flora._multi.stacked import side_by_side
from flora._train.apply import apply_updates
from flora._train.wrappers import widened
from flora._tree.arrays import is_array
from flora._tree.checks import blocks_problem
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.paths import named_leaves
from flora._tree.weight import LoraWeight
from flora._verbs.split import join

MakeTx = Callable[[Any], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The state of k runs that train at once; a pytree that can pass through `jax.jit`.

    Attributes:
      adapter: the stacked adapters as they train, B without any scale.
      scales: for each leaf its scales `[k]`, or `None` where the runs have one scale.
      state: the optimizers' states, each array `[k, ...]`.
      hyper: the hyperparameters that `tx` is called with, each array `[k, ...]`.
      own: rank, alpha, rank_stabilized and form of every leaf of every run.
    """

    adapter: Any
    scales: Any
    state: Any
    hyper: Any
    own: tuple[Any, ...]


jax.tree_util.register_dataclass(
    Runs, data_fields=["adapter", "scales", "state", "hyper"], meta_fields=["own"]
)


def start(adapters: Sequence[Any], tx: MakeTx, hyper: Any) -> Runs:
    """Starts k runs of one model that differ in their adapters and in `hyper`.

    Smaller ranks are padded with zeros, whose gradients are zero, so each run trains as
    it would alone.  Every run keeps its own scale: alphas and ranks may differ as well.

    Args:
      adapters: the adapters that k runs start from, all of one base; the same one k
        times for runs that differ in `hyper` alone.
      tx: a function that makes the optimizer of one run, such as `optax.adamw`; it is
        called with one entry of `hyper`, traced.
      hyper: learning rates `[k]`, or a pytree of arrays `[k, ...]`.

    Returns:
      The `Runs` that `train_step(...)` takes and returns and `finish` takes apart.

    Raises:
      LoraError: the adapters do not fit each other, or `hyper` does not have k entries.
    """
    fail(
        p
        for adapter in adapters
        for path, leaf in named_leaves(adapter)[0]
        for p in blocks_problem("start", path, leaf)
    )
    leaves, treedef = aligned(adapters, "start")
    require_alike(leaves, "start")
    _check_hyper(hyper, len(adapters))
    if not callable(tx):
        raise LoraTypeError(
            f"start: tx is a {type(tx).__name__}; expected what makes an optimizer of "
            "one entry of hyper, such as optax.adamw itself."
        )
    own = tuple(tuple(_own(x) for x in nodes) for _, nodes in leaves)
    fail(p for path, nodes in leaves for p in _dropouts(path, nodes))
    nodes = side_by_side([(p, _unscaled(x)) for p, x in leaves], None, "start")
    adapter = treedef.unflatten(
        [_settled(new, x) for new, (_, x) in zip(nodes, leaves, strict=True)]
    )
    scales = [_scales(x) for _, x in leaves]
    hyper = jax.tree.map(jnp.asarray, hyper)
    init = jax.vmap(lambda one, h: widened(tx(h)).init(one))
    state = on_arrays(init, adapter, hyper)
    return Runs(adapter, scales, state, hyper, own)


def _check_hyper(hyper: Any, count: int) -> None:
    found = jax.tree_util.tree_flatten_with_path(hyper)[0]
    fail(
        f"start: hyper{jax.tree_util.keystr(path)} has shape {np.shape(x)}; there are "
        f"{count} adapters. Write one entry each: shape ({count}, ...)."
        for path, x in found
        if np.shape(x)[:1] != (count,)
    )
    if not found:
        raise LoraError("start: hyper is empty. Pass a learning rate for each adapter.")


def _own(node: Any) -> Any:
    if not isinstance(node, LoraWeight):
        return None
    return node.rank, node.alpha, node.rank_stabilized, node.form


def _dropouts(path: str, nodes: Sequence[Any]) -> list[str]:
    rates = {x.dropout for x in nodes if isinstance(x, LoraWeight)}
    if len(rates) < 2:
        return []
    return [
        f"start: '{path}' has dropout rates {sorted(rates)}. One compiled step has one "
        "rate: sweep over it in separate calls."
    ]


def _unscaled(nodes: list[Any]) -> list[Any]:
    """The nodes with a scale of 1 where they differ in theirs, and B as it is."""
    if _scales(nodes) is None:
        return nodes
    return [
        dataclasses.replace(x, alpha=float(x.rank), rank_stabilized=False)
        for x in nodes
    ]


def _settled(new: Any, nodes: Sequence[Any]) -> Any:
    """The node with form 'direct': several runs would copy W for each [W ; B]."""
    if not isinstance(new, LoraWeight):
        return new
    return dataclasses.replace(new, form="direct", fallback=nodes[0].fallback)


def _scales(nodes: Sequence[Any]) -> Any:
    """`[k]`, or `None` where one static scale serves all runs."""
    if not isinstance(nodes[0], LoraWeight):
        return None
    first, rank = nodes[0].scale, max(x.rank for x in nodes)
    if all(x.scale == first for x in nodes) and common(nodes, rank).scale == first:
        return None
    return jnp.asarray([x.scale for x in nodes], float)


def train_step(
    loss: Callable, tx: MakeTx, *, batch_axis: int | None = None
) -> Callable:
    """The function that takes one step of all runs, for `jax.jit`.

    The base is shared: W meets the activations of all runs in one product, and what
    does not depend on an adapter is computed once.

    Args:
      loss: `loss(adapted, *batch)`, a scalar, as for one run: of `flora.lora(fn)`.
      tx: as for `start`.
      batch_axis: `None` if all runs see the same batch, or the axis of the batch's
        arrays along which each run has its own part.

    Returns:
      A function of `(base, runs, *batch)` that returns `(runs, losses [k])`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.multi
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> key, config = jax.random.key(0), flora.LoraConfig(rank=2)
      >>> adapted = flora.init(key, config, fn, params, x)
      >>> base, adapter = flora.split(adapted)
      >>> apply = flora.lora(fn)
      >>> runs = flora.multi.start([adapter] * 2, optax.sgd, jnp.array([0.1, 0.2]))
      >>> step = flora.multi.train_step(lambda t, x: apply(t, x).mean(), optax.sgd)
      >>> runs, losses = jax.jit(step)(base, runs, x)
      >>> losses.shape, len(flora.multi.finish(runs))
      ((2,), 2)
    """
    if not callable(loss):
        raise LoraTypeError(
            f"train_step: loss is a {type(loss).__name__}; expected a function "
            "(adapted, *batch) -> scalar."
        )

    def one(base: Any, adapter: Any, scales: Any, state: Any, hyper: Any, batch: Any):
        def of_adapter(adapter: Any) -> Any:
            return loss(join(base, _scaled(adapter, scales)), *batch)

        value, grads = jax.value_and_grad(of_adapter)(adapter)
        updates, state = widened(tx(hyper)).update(grads, state, adapter)
        return apply_updates(adapter, updates), state, value

    def step(base: Any, runs: Runs, *batch: Any) -> tuple[Runs, jax.Array]:
        if not isinstance(runs, Runs):
            raise LoraTypeError(
                f"train_step: runs is a {type(runs).__name__}; expected what "
                "flora.multi.start returned. The order is step(base, runs, *batch)."
            )
        axes = (None, 0, 0, 0, 0, [_axis(x, batch_axis) for x in batch])
        adapter, state, losses = jax.vmap(one, in_axes=axes)(
            base, runs.adapter, runs.scales, runs.state, runs.hyper, list(batch)
        )
        return dataclasses.replace(runs, adapter=adapter, state=state), losses

    return step


def _axis(x: Any, axis: int | None) -> Any:
    return jax.tree.map(lambda a: axis if is_array(a) and np.ndim(a) else None, x)


def _scaled(adapter: Any, scales: Sequence[Any]) -> Any:
    """The adapter of one run with its scales in B."""
    named, treedef = flattened(adapter, "train_step")

    def scaled(node: Any, scale: Any) -> Any:
        if scale is None:
            return node
        wide = jnp.promote_types(node.b.dtype, jnp.float32)
        return dataclasses.replace(node, b=node.b.astype(wide) * scale.astype(wide))

    pairs = zip((x for _, x in named), scales, strict=True)
    return treedef.unflatten([scaled(x, s) for x, s in pairs])


def finish(runs: Runs) -> list[Any]:
    """The adapters of the runs, each with the rank, alpha and form that it came with.

    Returns:
      k adapters for `flora.join`.

    Raises:
      LoraTypeError: `runs` is not a `Runs`.
    """
    if not isinstance(runs, Runs):
        raise LoraTypeError(
            f"finish: runs is a {type(runs).__name__}; expected what train_step "
            "returned."
        )
    named, treedef = flattened(runs.adapter, "finish")
    return [
        treedef.unflatten(
            [_of_run(x, i, own[i]) for (_, x), own in zip(named, runs.own, strict=True)]
        )
        for i in range(len(runs.own[0]))
    ]


def _of_run(node: Any, i: int, own: Any) -> Any:
    node = jax.tree.map(lambda x: on_arrays(lambda x: x[i], x), node)
    if not isinstance(node, LoraWeight):
        return node
    rank, alpha, rank_stabilized, form = own
    n = len(node.layout.stack)
    a, b = on_arrays(
        lambda a, b: (a[..., :rank], b[(slice(None),) * n + (slice(rank),)]),
        node.a,
        node.b,
    )
    return dataclasses.replace(
        node,
        a=a,
        b=b,
        rank=rank,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        form=form,
    )
