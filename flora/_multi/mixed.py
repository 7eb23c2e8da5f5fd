"""Mixed batches: another adapter for each row, and one product with W for all."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flora._algebra.axes import RANK, Factored, Named, Settings, axes_of_leaf
from flora._algebra.low_rank import densified
from flora._multi.kinds import values_of
from flora._multi.ragged import ragged_dot
from flora._multi.stacked import (
    BASE,
    chosen,
    of_one,
    only_if,
    picked,
    require_stacked,
    worked_out,
)
from flora._trace.interpret import Use, interpret
from flora._trace.rules import context
from flora._trace.stage import Staged, filled, stage
from flora._tree.arrays import is_array
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.weight import LoraWeight, Trained, is_leaf
from flora._verbs.lora import lora as run_adapted
from flora._verbs.split import join

METHODS = ("auto", "gather", "masked")

# Of method="auto": adapters times tokens a row, above which a row copies its factors.
# On 2 CPU cores (d 512 and 1024, k = 8) masks win up to 128 with 36 rows; with 8 rows,
# whose copies stay in the cache, copies win from 64 on.  By the TPU compiler's
# estimates for v5e (an MLP of d 4096 and ff 14336 in bfloat16, k = 8, rank 16) a step
# of 32 rows costs 1.33 (masked) and 1.95 (gather) of the base's at one token each, 1.32
# and 1.31 at 16 tokens.
MASK_UP_TO = 64


def lora(fn: Callable, *, method: str = "auto") -> Callable:
    """The function that runs `fn` with another adapter for each row of a batch.

    y_n = x_n W + scale (x_n A_i) B_i with i = ids[n].  W meets the whole batch in one
    product, as in `fn`; no array of W's size is made for a row.  `fn` sees one row at a
    time (`jax.vmap`, with a batch of one), so what it computes across rows, such as the
    statistics of a batch norm, is of one row alone.

    How a row meets its factors:

    - "gather" copies A_i and B_i for each row, as `jax.vmap` over `select` does.  Each
      copy is `[in, rank]`, whatever is read of it: of an embedding
      `[vocabulary, rank]`.
    - "masked" multiplies by the factors of all adapters, side by side:
      z = x [A_1 ... A_k], of which all but adapter i's part is set to zero, then
      z [B_1; ...; B_k].  Nothing is copied, but the thin products are k times as wide.
      An embedding looks rows up.  All adapters meet all rows, and 0 · NaN is NaN:
      `stack` refuses what is not finite, but an adapter whose z overflows reaches other
      rows.
    - "auto" chooses for each leaf: "masked" where there are at least k rows and
      k · tokens of a row ≤ 64, as in decoding, and for lookups; else "gather".

    Args:
      fn: a function of a parameter tree first.  Every array among its other arguments
        that has axes has the batch as axis 0, as has every output; scalars and
        whatever is no array are the same for all rows.
      method: "auto", "gather" or "masked".

    Returns:
      A function of `(base, stacked, ids, *args, **kwargs)` with the outputs of `fn`.
      `base` is the plain tree, or what `flora.split` returned; `stacked` is what
      `flora.multi.stack` returned; `ids` `[batch]` are integers 0 to k-1, and -1 (in a
      list also `None`) is the base alone.  Traced ids out of range give NaN.  Where a
      leaf trains whole (`LoraConfig.train`) each row gets a copy, and `base` needs its
      old value.  Norms that DoRA divides by are found in every call, for each adapter:
      `flora.multi.prepare` does it once.  Differentiable in `stacked`; the base gets no
      gradient.

    Raises:
      LoraError: base and adapters do not fit, ids are out of range, an argument or an
        output has another axis 0, or as of `flora.lora`.

    Example:
      >>> import jax, jax.numpy as jnp, flora, flora.multi
      >>> def fn(params, x):
      ...     return x @ params["kernel"]
      >>> base, x = {"kernel": jnp.eye(2)}, jnp.ones((3, 2))
      >>> one, two = ({"kernel": flora.LoraWeight(None, jnp.ones((2, 1)), b)}
      ...             for b in (jnp.ones((1, 2)), 2 * jnp.ones((1, 2))))
      >>> run = flora.multi.lora(fn)
      >>> run(base, flora.multi.stack([one, two]), [0, 1, None], x).tolist()
      [[3.0, 3.0], [5.0, 5.0], [1.0, 1.0]]

    References: Chen et al. 2023, Punica. https://arxiv.org/abs/2310.18547
    """
    if not callable(fn):
        raise LoraTypeError(
            f"multi.lora() got a {type(fn).__name__}; "
            "expected the function to run, such as model.apply."
        )
    if method not in METHODS:
        raise LoraError(f"method={method!r}. Write one of {', '.join(METHODS)}.")

    @functools.wraps(fn)
    def run(base: Any, stacked: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = _paired(base, stacked)
        rest, rest_def = jax.tree.flatten((args, kwargs))
        mapped = [i for i, x in enumerate(rest) if is_array(x) and np.ndim(x)]
        ids = _indices(ids, pairs.count)
        _check_rows(len(ids), (args, kwargs))

        def row(i: Any, *arrays: Any) -> Any:
            given = filled(rest, mapped, [x[None] for x in arrays])
            args, kwargs = rest_def.unflatten(given)
            outs = _one_row(fn, method, pairs, len(ids), i, args, kwargs)
            return jax.tree_util.tree_map_with_path(_without_batch, outs)

        return jax.vmap(row)(ids, *(rest[i] for i in mapped))

    return run


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """A base and k adapters.

    Attributes:
      base: the frozen weights; `None` where a leaf trains whole.
      nodes: `(path, node or None)` of the stacked adapter.
      treedef: of the adapter.
      old: for each node the base's value if the leaf trains whole.
      count: k.
    """

    base: Any
    nodes: Sequence[tuple[str, Any]]
    treedef: Any
    old: Sequence[Any]
    count: int


def _paired(base: Any, stacked: Any) -> _Pairs:
    nodes, treedef, count = require_stacked(stacked, "multi.lora")
    nodes = worked_out("multi.lora", nodes, values_of(base))
    leaves, base_def = jax.tree.flatten(base, is_leaf=lambda x: x is None or is_leaf(x))
    abstract = treedef.unflatten([of_one(x) for _, x in nodes])
    try:
        held = base_def.flatten_up_to(treedef.unflatten([x for _, x in nodes]))
    except ValueError:
        join(base, abstract)  # says what differs
        raise
    whole = [isinstance(x, Trained) for x in held]
    old = [x if w else None for x, w in zip(leaves, whole, strict=True)]
    fail(
        f"multi.lora: '{path}' trains whole, and the base has no value of it for rows "
        "without an adapter. Pass the plain tree that flora.init was given as base."
        for (path, x), value in zip(nodes, old, strict=True)
        if isinstance(x, Trained) and value is None
    )
    frozen = [None if w else x for x, w in zip(leaves, whole, strict=True)]
    base = base_def.unflatten(frozen)
    join(base, abstract)
    return _Pairs(base, nodes, treedef, old, count)


def _indices(ids: Any, count: int) -> jax.Array:
    """Integers `[batch]`, checked where their values are there."""
    if isinstance(ids, list | tuple):
        ids = [BASE if i is None else i for i in ids]
    made = jnp.asarray(ids)
    if made.ndim != 1 or not jnp.issubdtype(made.dtype, jnp.integer):
        raise LoraTypeError(
            f"multi.lora: ids is {made.dtype}{list(made.shape)}; expected integers "
            "[batch], one for each row, -1 for the base alone."
        )
    if not isinstance(made, Tracer):
        wrong = [int(i) for i in made if not BASE <= i < count]
        if wrong:
            raise LoraError(
                f"multi.lora: ids holds {wrong[:5]}; there are {count} adapters, 0 to "
                f"{count - 1}, and -1 is the base alone."
            )
    return made


def _check_rows(rows: int, args: Any) -> None:
    named = jax.tree_util.tree_flatten_with_path(args)[0]
    fail(
        f"multi.lora: argument {jax.tree_util.keystr(path[1:])} has shape {x.shape} "
        f"and ids {rows} rows. Axis 0 of every array is the batch; bind others with "
        "functools.partial."
        for path, x in named
        if is_array(x) and np.ndim(x) and x.shape[0] != rows
    )


def _without_batch(path: Any, y: Any) -> Any:
    if np.shape(y)[:1] != (1,):
        raise LoraError(
            f"multi.lora: output {jax.tree_util.keystr(path) or 'of fn'} has shape "
            f"{np.shape(y)} for one row; expected (1, ...). Axis 0 of every output is "
            "the batch: give it model.apply and compute losses of what it returns."
        )
    return y[0]


# --- One row -------------------------------------------------------------------------


def _one_row(
    fn: Callable,
    method: str,
    pairs: _Pairs,
    rows: int,
    i: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    """`fn` on one row: traced with one adapter, then run with what stands for it.

    The factors of one adapter are themselves low-rank, A_i = [A_1 ... A_k] E with E of
    zeros and ones, `[k·rank, rank]`, and B_i = Eᵀ [B_1; ...; B_k].  So the rules that
    never form A B do not form A_i either: x A_i = (x [A_1 ... A_k]) E.
    """
    whole = [_whole(x, i, pairs, n) for n, (_, x) in enumerate(pairs.nodes)]
    lora = {n: x for n, x in enumerate(pairs.nodes) if isinstance(x[1], LoraWeight)}

    @functools.wraps(fn)
    def run(tree: Any, *args: Any, **kwargs: Any) -> Any:
        base, nodes, factors = tree
        nodes = list(nodes)
        for (n, (_, node)), (a, b, extra) in zip(lora.items(), factors, strict=True):
            nodes[n] = dataclasses.replace(node, a=a, b=b, extra=extra)
        adapted = join(base, pairs.treedef.unflatten(nodes))
        return run_adapted(fn, form="direct")(adapted, *args, **kwargs)

    factors = [of_one((x.a, x.b, x.extra)) for _, x in lora.values()]
    leaves, treedef = jax.tree.flatten((pairs.base, whole, factors))
    staged = stage(run, leaves, treedef, args, kwargs, verb="flora.multi")
    columns = [_columns(x, i, pairs.count) for _, x in lora.values()]
    lazy = [
        f
        for (path, x), own in zip(lora.values(), columns, strict=True)
        for f in (*_lazy_pair(path, x, i, pairs.count), *own)
    ]
    at = range(len(leaves) - len(lazy), len(leaves))
    limit = MASK_UP_TO // pairs.count if rows >= pairs.count else 0
    gathered = _to_gather(staged, filled(leaves, at, lazy), method, limit)
    values = [
        f
        for (path, x), own in zip(lora.values(), columns, strict=True)
        for f in (*(_gathered(x, i, pairs.count) if path in gathered
                    else _lazy_pair(path, x, i, pairs.count)), *own)
    ]  # fmt: skip
    outs = interpret(
        context(together=False, ragged_dot=ragged_dot),
        staged.jaxpr,
        _inputs(staged, filled(leaves, at, values)),
    )
    return staged.finish([densified(y) if isinstance(y, Factored) else y for y in outs])


def _inputs(staged: Staged, values: Sequence[Any]) -> list[Any]:
    held = [x for x, k in zip(values, staged.tree_inputs, strict=True) if k is not None]
    return [*held, *staged.args]


def _whole(node: Any, i: Any, pairs: _Pairs, n: int) -> Any:
    """A leaf that trains whole, as one row has it; `None` for others."""
    if not isinstance(node, Trained):
        return None
    value = chosen(node, i, pairs.count).value
    return Trained(jnp.where(i == BASE, pairs.old[n], value).astype(value.dtype))


def _gathered(x: LoraWeight, i: Any, count: int) -> tuple[Any, Any]:
    return picked(x.a, i, count), only_if(picked(x.b, i, count), i, count)


def _columns(x: LoraWeight, i: Any, count: int) -> list[Any]:
    """The factors for each output that one row has, where the adapters have such."""
    leaves = jax.tree.leaves(x.extra)
    return [only_if(picked(c, i, count), i, count, of_base=1) for c in leaves]


def _lazy_pair(
    path: str, x: LoraWeight, i: Any, count: int
) -> tuple[Factored, Factored]:
    """A_i = [A_1 ... A_k] E and B_i = Eᵀ [B_1; ...; B_k], never multiplied out."""
    n, rank = len(x.layout.stack), x.rank
    chose = only_if(jax.nn.one_hot(i, count, dtype=jnp.float32), i, count)
    e = (chose[:, None, None] * jnp.eye(rank)).reshape(count * rank, rank)
    stack = x.a.shape[1 : 1 + n]

    def beside(factor: Any, at: int) -> Any:
        moved = jnp.moveaxis(factor, 0, at)
        return moved.reshape(*moved.shape[:at], count * rank, *moved.shape[at + 2 :])

    def choice(e: Any, dtype: Any) -> Any:
        return jnp.broadcast_to(e, (*stack, *e.shape)).astype(dtype)

    a, b = beside(x.a, x.a.ndim - 2), beside(x.b, n)
    shapes = x.a.shape[1:], x.b.shape[1:]
    last = len(shapes[0]) - 1
    return (
        _product(path, a, choice(e, a.dtype), shapes[0], n, range(n, last)),
        _product(path, choice(e.T, b.dtype), b, shapes[1], n, (n,)),
    )


def _product(
    path: str, a: Any, b: Any, shape: tuple[int, ...], stack: int, in_: Sequence[int]
) -> Factored:
    """A pure A B of that shape, whose first axes are a stack."""
    names = tuple(map(str, range(len(shape))))
    inner = [n for i, n in enumerate(names) if i >= stack and i in in_]
    rest = [n for i, n in enumerate(names) if i >= stack and i not in in_]
    factors = {
        "a": Named(a, (*names[:stack], *inner, RANK)),
        "b": Named(b, (*names[:stack], RANK, *rest)),
    }
    settings = Settings((path,), fallback="materialize", form="direct")
    return Factored(None, factors, axes_of_leaf(path, shape), settings)


def _to_gather(
    staged: Staged, values: Sequence[Any], method: str, limit: int
) -> set[str]:
    """The leaves of which each row gets copies."""
    paths = {p for x in values if isinstance(x, Factored) for p in x.settings.paths}
    if method != "auto":
        return paths if method == "gather" else set()
    log: dict[Use, None] = {}
    jax.eval_shape(lambda: _ran(log, staged, values))
    uses: Mapping[str, list[Use]] = {path: [] for path in paths}
    for use in log:
        uses[use.path].append(use)
    return {path for path, mine in uses.items() if _is_long(mine, limit)}


def _ran(log: dict[Use, None], staged: Staged, values: Sequence[Any]) -> None:
    ctx = context(log, ragged_dot=ragged_dot)
    interpret(ctx, staged.jaxpr, _inputs(staged, values))


def _is_long(uses: Sequence[Use], limit: int) -> bool:
    """Whether a row has more tokens than may be multiplied by all adapters."""
    kinds = {use.primitive for use in uses if use.binding}
    if kinds & {"gather", "dynamic_slice"}:
        return False
    tokens = max((use.tokens for use in uses), default=0)
    dense = any(use.dense for use in uses) or "conv_general_dilated" in kinds
    return dense or tokens > limit
