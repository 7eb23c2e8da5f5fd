"""Ways to train an adapter, as optax transformations.

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    tx = flora.optimizer(optax.chain(tx, flora.recipes.lora_plus(16.0)), adapted)
    tx = flora.optimizer(flora.recipes.lora_fa(tx), adapted)

All take the split-off adapter, or the whole tree inside `flora.optimizer`.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flora._algebra.dense import materialize
from flora._algebra.gram import columns
from flora._train.groups import (
    decay_mask,
    factor_problem,
    partition,
    scale_rates,
    times,
)
from flora._train.optimizer import FROZEN, freeze, map_parts
from flora._train.wrappers import widened
from flora._tree.arrays import compute_dtype, is_array
from flora._tree.checks import blocks_problem, require_adapted, weight_problems
from flora._tree.config import LoraConfig
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.initializers import ByKind, Initializer, gaussian
from flora._tree.keys import consumed, require_key
from flora._tree.paths import Matcher, first, named_leaves
from flora._tree.quantized import is_quantized
from flora._tree.selection import idle_keys
from flora._tree.weight import LoraWeight, is_node, within_blocks
from flora._verbs.draw import redrawn

__all__ = [
    "decay_mask",
    "jagged",
    "lora_fa",
    "lora_plus",
    "partition",
    "restart",
    "scale_rates",
]

_GAUSSIAN = gaussian()


def lora_plus(ratio: chex.Numeric = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of B: a learning rate `ratio` times that of A.

    η_B = ratio · η_A.  Chain it behind the optimizer, whose learning rate is then η_A.
    With B = 0 at the start, B's entries must grow by more than A's change for both to
    matter in a wide layer.  `scale_rates` does the same for some leaves, embeddings
    apart.

    Args:
      ratio: a number or an array `[]`; `optax.inject_hyperparams(lora_plus)(ratio)`
        puts it into the state and takes a schedule, and `jax.vmap` sweeps it.

    Raises:
      LoraError: the ratio is not a finite number of at least 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> a, b = jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> adapter = {"kernel": flora.LoraWeight(None, a, b)}
      >>> tx = optax.chain(optax.sgd(0.01), flora.recipes.lora_plus(16.0))
      >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
      >>> float(updates["kernel"].a[0, 0]), float(updates["kernel"].b[0, 0])
      (-0.009999999776482582, -0.1599999964237213)

    References: Hayou et al. 2024, section 4. https://arxiv.org/abs/2402.12354
    """
    if wrong := factor_problem(ratio):
        raise LoraError(f"lora_plus: ratio is {wrong}")

    def scaled(path: str, part: str, update: Any) -> Any:
        return times(ratio if part == "b" else None, update)

    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (map_parts(scaled, updates), state),
    )


def lora_fa(
    tx: optax.GradientTransformation, *, damping: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """`tx` on B alone, with the gradient that moves ΔW most like full fine-tuning.

    g_B ← scale⁻² (Aᵀ A + damping I)⁻¹ g_B.  A stays bit for bit as it was drawn and has
    no state.  With g_B = scale Aᵀ G, where G = ∂L/∂ΔW, a step of plain SGD then moves
    ΔW by -η A (Aᵀ A)⁻¹ Aᵀ G: G itself, projected onto A's columns.  Leaves that train
    whole go to `tx` as they are.

    Args:
      tx: any optax transformation, such as `optax.adamw(1e-4, eps=1e-6)`.  Clipping
        inside it sees the new gradient of B, clipping before `lora_fa` sees the old
        ones.  `optax.MultiSteps` belongs inside too: around `lora_fa`, it would give A
        updates of +0.0.
      damping: what is added to the diagonal of Aᵀ A, as PEFT does it; A = 0 then gives
        large steps and not NaN.

    Returns:
      A transformation whose `update` needs `params`, which hold A.

    Raises:
      LoraError: `tx` is no transformation, damping is negative; a leaf has a variant;
        at `update`, there are no parameters, or B comes without its A.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> a, b = jnp.ones((4, 1)), jnp.ones((1, 3))
      >>> adapter = {"kernel": flora.LoraWeight(None, a, b)}
      >>> tx = flora.recipes.lora_fa(optax.sgd(1.0))
      >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
      >>> updates["kernel"].b.tolist(), updates["kernel"].a[0].tolist()
      ([[-0.25, -0.25, -0.25]], [-0.0])

    References: Zhang et al. 2023 (the gradient is in its second version).
      https://arxiv.org/abs/2308.03303
    """
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise LoraTypeError(
            f"lora_fa: tx is a {type(tx).__name__}; expected an optax transformation, "
            "such as optax.adamw(1e-4)."
        )
    if factor_problem(damping):
        raise LoraError(f"lora_fa: damping={damping!r}. Write a number of at least 0.")

    def label(path: str, part: str, x: Any) -> str:
        return FROZEN if part in ("a", FROZEN) else "train"

    inner = optax.multi_transform(
        {"train": widened(tx), FROZEN: freeze()}, lambda tree: map_parts(label, tree)
    )

    def init(params: Any) -> Any:
        named = named_leaves(params)[0]
        fail(p for path, leaf in named for p in blocks_problem("lora_fa", path, leaf))
        fail(
            f"lora_fa: '{path}' has the variant {leaf.variant!r}; the gradient of B is "
            "known for W + scale A B alone. Leave it to another group of "
            "flora.recipes.partition."
            for path, leaf in named
            if isinstance(leaf, LoraWeight)
            and leaf.variant is not None
            and is_array(leaf.b)
        )
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise LoraError(
                "lora_fa: the step needs A. Write tx.update(grads, state, params)."
            )
        return inner.update(
            _projected(updates, params, damping), state, params, **extra
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _projected(grads: Any, params: Any, damping: float) -> Any:
    """The gradients with scale⁻² (Aᵀ A + damping I)⁻¹ g_B in the place of each g_B."""
    factors = dict(named_leaves(params)[0])
    named, treedef = named_leaves(grads)
    fail(
        f"lora_fa: B of '{path}' is to train and its A is not in params. Group leaves "
        "by pattern and not by part, and pass the parameters that belong to the "
        "gradients."
        for path, g in named
        if isinstance(g, LoraWeight)
        and is_array(g.b)
        and not is_array(getattr(factors.get(path), "a", None))
    )

    def one(path: str, g: Any) -> Any:
        if not isinstance(g, LoraWeight) or not is_array(g.b):
            return g
        return dataclasses.replace(g, b=_solved(factors[path], g.b, damping))

    return treedef.unflatten([one(path, g) for path, g in named])


def _solved(weight: LoraWeight, g: chex.Array, damping: float) -> jax.Array:
    """Scale⁻² (Aᵀ A + damping I)⁻¹ g for each matrix, with g `[*stack, rank, *out]`."""
    dtype, n = compute_dtype(weight.a.dtype, g.dtype), len(weight.layout.stack)
    a, batch = weight.a.astype(dtype), tuple(range(n))
    gram = columns(a, a, n) + damping * jnp.eye(a.shape[-1], dtype=dtype)
    solved = lax.dot_general(
        _inverse(gram, wide=math.prod(a.shape[n:-1]) < a.shape[-1]),
        g.astype(dtype),
        (((n + 1,), (n,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
    )
    return (solved / weight.scale**2).astype(g.dtype)


def _inverse(gram: jax.Array, *, wide: bool) -> jax.Array:
    """Of Aᵀ A + damping I; where A has more columns than rows, on the span of Aᵀ A."""
    return jnp.linalg.pinv(gram, hermitian=True) if wide else jnp.linalg.inv(gram)


def restart(
    key: chex.PRNGKey,
    tx: optax.GradientTransformation,
    state: Any,
    adapted: Any,
    *,
    initializer: Initializer = _GAUSSIAN,
    init_pattern: Mapping[Matcher, Initializer] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Any, Any]:
    """ReLoRA's restart: W ← W + scale A B, then A and B as at a new start.

    So the total change of W can have a higher rank than one A B.  The optimizer's state
    of A and B starts anew; that of leaves that train whole, counts and schedules go on.
    Adam's count goes on too, so its bias correction is over, and with the usual betas
    the first step after a restart is (1-β₁)/√(1-β₂) ≈ 3.2 times as large: warm up
    again, with `jagged`.  Restart between whole steps of `optax.MultiSteps`, or half of
    the gradients of a step are lost.

    W + scale A B is summed in float32 or wider and rounded once to W's dtype.  In
    bfloat16 an element's change below half a unit in its last place, 2⁻⁹ to 2⁻⁸ of its
    size, is lost.  Of normally distributed W and ΔW that rounds away 2 % of ‖ΔW‖ where
    it is 10 % of ‖W‖, 17 % where it is 1 %, and 77 % where it is 0.1 %
    (`flora.monitor.merge_error` measures it).  Keep W in float32 to restart often.

    Args:
      key: a typed PRNG key, consumed; another one each time.
      tx: the optimizer that `state` belongs to.
      state: what `tx.init` and `tx.update` returned, of the adapted tree or of its
        adapter.
      adapted: the adapted tree.
      initializer: how A and B start, as `LoraConfig.init`.
      init_pattern: `{pattern: initializer}`, as `LoraConfig.init_pattern`.
      allow_nonfinite: True to merge NaN and infinity too, as for `flora.merge`.

    Returns:
      `(adapted, state)`.  Works under `jax.jit` (on a mesh, with the step's
      `out_shardings`); leaves without factors are shared.

    Raises:
      LoraError: the tree has no factors or no base, a base is stored in fewer bits, a
        leaf has a variant, NaN or infinity would come into a base, or the state is not
        that of `tx` or keeps moments out of the tree's structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flora, flora.recipes
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> tx = flora.optimizer(optax.adam(1e-3), adapted)
      >>> adapted, state = flora.recipes.restart(
      ...     jax.random.key(1), tx, tx.init(adapted), adapted)
      >>> bool((adapted["kernel"].b == 0).all())
      True

    References: Lialin et al. 2023, algorithm 1. https://arxiv.org/abs/2307.05695
    """
    require_key(key, "restart")
    named = require_adapted(adapted, "restart")
    fail(p for path, leaf in named for p in _unmergeable(path, leaf))
    if not any(isinstance(leaf, LoraWeight) for _, leaf in named):
        raise LoraError("restart: no leaf of the tree has factors to merge.")
    _, treedef = named_leaves(adapted)
    config = LoraConfig(init=initializer, init_pattern=init_pattern or {})
    starts = _initializers(named, config)
    root = consumed(key)

    def renew(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        a, b = redrawn(root, starts[path], path, leaf)
        leaf = dataclasses.replace(leaf, base=materialize(leaf), a=a, b=b, key=None)
        return within_blocks(leaf)

    made = {path: renew(path, leaf) for path, leaf in named}
    old = {path: x.base for path, x in named if isinstance(x, LoraWeight)}
    new = {path: made[path].base for path in old}
    require_finite("restart", new, allow_nonfinite, before=old)
    renewed = treedef.unflatten(list(made.values()))
    return renewed, _renewed_state(tx, state, renewed)


def _initializers(
    named: Sequence[tuple[str, Any]], config: LoraConfig
) -> dict[str, Initializer]:
    """How each adapted leaf starts anew."""
    if any(isinstance(x, ByKind) for x in (config.init, *config.init_pattern.values())):
        raise LoraError(
            "restart: flora.initializers.peft() tells leaves apart by what a model "
            "does, and none is traced here. Write initializer=uniform('peft') and "
            "init_pattern={'embedding': embedding()}, both of flora.initializers."
        )
    nodes = [(p, x) for p, x in named if isinstance(x, LoraWeight)]
    idle = idle_keys("init_pattern", config.init_pattern, nodes)
    fail(f"restart: {problem}" for problem in idle)
    return {p: first(config.init_pattern, config.init, p, x) for p, x in nodes}


def _unmergeable(path: str, leaf: Any) -> list[str]:
    if not isinstance(leaf, LoraWeight):
        return []
    if is_quantized(leaf.base):
        return [
            f"restart: '{path}' is {leaf.base!r}, and merging would round ΔW away. "
            "Keep its base in floating point."
        ]
    if leaf.variant is not None:
        return [
            f"restart: '{path}' has the variant {leaf.variant!r}, which starts in its "
            "own way. Write flora.init(key, config, fn, flora.merge(adapted), ...) and "
            "a new optimizer."
        ]
    return [f"restart: {p}" for p in weight_problems(path, leaf)]


def _renewed_state(tx: Any, state: Any, adapted: Any) -> Any:
    """The state with each node of a LoRA weight in it as `tx.init` makes it."""
    fresh = tx.init(adapted)
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        adapter = jax.tree.map(_without_base, adapted, is_leaf=is_node)
        fresh = tx.init(adapter)
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        raise LoraError(
            "restart: the state is not one of tx and this tree. The order is "
            "flora.recipes.restart(key, tx, state, adapted)."
        )
    leaves = jax.tree.leaves(state, is_leaf=is_node)
    nodes = any(isinstance(x, LoraWeight) for x in leaves)
    if not nodes and any(jnp.ndim(x) for x in leaves if is_array(x)):
        raise LoraError(
            "restart: the optimizer's state holds arrays, but none in the structure of "
            "the tree, so those of A and B cannot be told apart. "
            "Leave out optax.flatten."
        )
    return jax.tree.map(
        lambda old, new: new if isinstance(old, LoraWeight) else old,
        state,
        fresh,
        is_leaf=is_node,
    )


def _without_base(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return dataclasses.replace(leaf, base=None)
    return leaf if is_node(leaf) else None


def jagged(
    schedule: optax.ScalarOrSchedule, *, every: int, warmup: int
) -> optax.Schedule:
    """A learning rate that warms up again after each `restart`.

    η(t) = schedule(t) · min(1, (t mod every + 1)/warmup) once t ≥ every; before that
    `schedule` warms up by itself.

    Args:
      schedule: an optax schedule, or a number.
      every: steps between two restarts.
      warmup: steps in which the rate climbs back, at most `every`.

    Raises:
      LoraError: a number of steps is not an int of at least 1, or warmup exceeds every.

    Example:
      >>> import flora.recipes
      >>> rate = flora.recipes.jagged(1.0, every=100, warmup=10)
      >>> [round(float(rate(t)), 3) for t in (0, 99, 100, 104, 109, 110)]
      [1.0, 1.0, 0.1, 0.5, 1.0, 1.0]

    References: Lialin et al. 2023, section 3 (jagged cosine).
      https://arxiv.org/abs/2307.05695
    """
    whole = [
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 1
        for n in (every, warmup)
    ]
    if not all(whole) or warmup > every:
        raise LoraError(
            f"jagged: every={every!r}, warmup={warmup!r}. Write ints with "
            "1 ≤ warmup ≤ every."
        )

    def rate(step: Any) -> Any:
        height = schedule(step) if callable(schedule) else schedule
        climb = jnp.minimum(1.0, (step % every + 1) / warmup)
        return height * jnp.where(step < every, 1.0, climb)

    return rate
