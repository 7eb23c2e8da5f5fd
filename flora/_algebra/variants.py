"""What `flora.variants` exports: DoRA, VeRA, AdaLoRA, Columns, MiCA, Rows."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.norms import column_norms, compiled_norms
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.matrices import matrices, svd
from flora._tree.quantized import dequantized
from flora._tree.weight import LoraWeight, Product, factor_sizes, uniform


@dataclasses.dataclass(frozen=True)
class DoRA:
    """W_eff = (W + scale A B) ⊙ m / ‖W + scale A B‖: magnitude and direction apart.

    m, `extra["magnitude"]` `[*stack, *out]`, starts as the norm over W's in axes and
    trains; the norm it is divided by gets no gradient and is found without A B.
    `flora.init` and `flora.peft.load` refuse columns of zeros.
    Dropout acts on what adapting changes, x W keeps the whole x.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> config = flora.LoraConfig(rank=2, variant=DoRA())
      >>> params, x = {"kernel": 2 * jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> adapted = flora.init(jax.random.key(0), config, lambda p, x: x @ p["kernel"],
      ...                      params, x)
      >>> adapted["kernel"].extra["magnitude"]
      Array([4., 4., 4.], dtype=float32)

    References: Liu et al. 2024, eq. 5 and section 4.3. https://arxiv.org/abs/2402.09353
    """

    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        norms = compiled_norms(uniform(weight))
        return dataclasses.replace(weight, extra={"magnitude": norms})

    def product(self, weight: LoraWeight) -> Product:
        norms = lax.stop_gradient(column_norms(weight))
        columns = weight.extra["magnitude"] / jnp.where(norms == 0, 1, norms)
        return Product(weight.a, weight.b, columns)


@dataclasses.dataclass(frozen=True)
class VeRA:
    """ΔW = scale A diag(d) B diag(v): random A and B that never train, and two vectors.

    A and B depend on the seed and on their shapes alone, so that weights of one shape,
    and all layers of a stack, share them.  d, `[*stack, rank]`, starts at `d_initial`,
    v, `[*stack, *out]`, at zero.  For the paper's scale of 1 write alpha = rank.

    Attributes:
      d_initial: where d starts.
      seed: of A ~ U with variance 2/in and B ~ U with variance 2/rank.

    References: Kopiczko et al. 2023, eq. 2. https://arxiv.org/abs/2310.11454
    """

    d_initial: float = 0.1
    seed: int = 0
    frozen = ("a", "b")

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        stack, in_, out = weight.layout.sizes(weight.base.shape)
        keys = jax.random.split(jax.random.key(self.seed))

        def shared(key: Any, shape: tuple[int, ...], fan: int, like: Any) -> jax.Array:
            bound = math.sqrt(6 / fan)
            drawn = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            return jnp.broadcast_to(drawn, like.shape).astype(like.dtype)

        rank, dtype = weight.rank, weight.a.dtype
        return dataclasses.replace(
            weight,
            a=shared(keys[0], (*in_, rank), math.prod(in_), weight.a),
            b=shared(keys[1], (rank, *out), rank, weight.b),
            extra={
                "d": jnp.full((*stack, rank), self.d_initial, dtype),
                "v": jnp.zeros((*stack, *out), dtype),
            },
        )

    def product(self, weight: LoraWeight) -> Product:
        v = jnp.expand_dims(weight.extra["v"], len(weight.layout.stack))
        return Product(_scaled(weight, weight.extra["d"]), weight.b * v)


@dataclasses.dataclass(frozen=True)
class AdaLoRA:
    """ΔW = scale A diag(e) B: e, `[*stack, rank]`, starts at zero and can be pruned.

    A and B start as N(0, `std`²).  Where e is set to zero a component is gone.

    Attributes:
      std: of A and B at the start.

    References: Zhang et al. 2023, eq. 3. https://arxiv.org/abs/2303.10512
    """

    std: float = 0.02
    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        draws = [
            (self.std * jax.random.normal(k, x.shape, jnp.float32)).astype(x.dtype)
            for k, x in zip(jax.random.split(key), (weight.a, weight.b), strict=True)
        ]
        stack = weight.layout.sizes(weight.base.shape)[0]
        e = jnp.zeros((*stack, weight.rank), weight.a.dtype)
        return dataclasses.replace(weight, a=draws[0], b=draws[1], extra={"e": e})

    def product(self, weight: LoraWeight) -> Product:
        return Product(_scaled(weight, weight.extra["e"]), weight.b)


@dataclasses.dataclass(frozen=True)
class Columns:
    """W_eff = (W + scale A B) ⊙ c, with a fixed factor c for each output.

    c, `extra["columns"]` `[*stack, *out]`, starts at one and never trains.  DoRA is of
    this kind once its norm is divided out, which `flora.multi` does to serve it.
    """

    frozen = ("columns",)

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        stack, _, out = factor_sizes(weight)
        return dataclasses.replace(weight, extra={"columns": jnp.ones((*stack, *out))})

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b, weight.extra["columns"])


@dataclasses.dataclass(frozen=True)
class MiCA:
    """ΔW = scale A B with A = 0 at first and a B that never trains.

    B is the `rank` last right singular vectors of W `[in, out]`, those of its smallest
    singular values.

    References: https://arxiv.org/abs/2604.01694
    """

    frozen = ("b",)

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        _, *sizes = weight.layout.matrix(weight.base.shape)
        if weight.rank > min(sizes):
            raise LoraError(
                f"{self!r}: a weight of shape {weight.base.shape} ({weight.layout}) "
                f"has {min(sizes)} singular vectors and the rank is {weight.rank}. "
                f"Write a rank of at most {min(sizes)}."
            )
        wide = jnp.promote_types(weight.b.dtype, jnp.float32)
        w = matrices(dequantized(weight.base).astype(wide), weight.layout)
        last = svd(w, min(sizes))[2][..., -weight.rank :, :]
        b = last.reshape(weight.b.shape).astype(weight.b.dtype)
        return dataclasses.replace(weight, a=jnp.zeros_like(weight.a), b=b)

    def product(self, weight: LoraWeight) -> Product:
        return Product(weight.a, weight.b)


@dataclasses.dataclass(frozen=True)
class Rows:
    """W with other values in some of its rows, which alone train: new tokens.

    W_eff = W + A (B − Aᵀ W): A picks the rows and never trains, B holds what stands in
    their place, `[rank, *out]`, and starts as they are.  Along an out axis, the words
    of a head, B picks and A holds.  The rank is the number of rows; the scale is 1 and
    nothing is dropped, whatever the config says.

    Attributes:
      rows: which, each once.
      along: 'in' for rows of an embedding `[words, features]`, 'out' for the columns of
        a head's kernel `[features, words]`.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> config = flora.LoraConfig(rank=2, target="table", variant=Rows((0, 7)))
      >>> params, ids = {"table": jnp.ones((9, 4))}, jnp.arange(3)
      >>> adapted = flora.init(jax.random.key(0), config, lambda p, i: p["table"][i],
      ...                      params, ids)
      >>> adapted["table"].b.shape
      (2, 4)

    References: https://huggingface.co/docs/peft/package_reference/trainable_tokens
    """

    rows: tuple[int, ...]
    along: str = "in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(i) for i in self.rows))

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a",) if self.along == "in" else ("b",)

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        if problem := self.problem(weight.layout, weight.base.shape):
            raise LoraError(f"{self!r}: {problem}")
        if weight.rank != len(self.rows):
            raise LoraError(
                f"{self!r} has {len(self.rows)} rows and the rank is {weight.rank}. "
                f"Write rank={len(self.rows)}."
            )
        held = self.held(weight).astype(weight.a.dtype)
        return self.node(weight, held)

    def node(self, weight: LoraWeight, held: Any) -> LoraWeight:
        """The weight with `held`, `[rank, *out]` or `[*in, rank]`, in its rows."""
        size = weight.base.shape[self._axis(weight.layout)]
        picks = jax.nn.one_hot(jnp.asarray(self.rows), size, dtype=held.dtype)
        a, b = (picks.T, held) if self.along == "in" else (held, picks)
        return dataclasses.replace(
            weight,
            a=a,
            b=b,
            rank=len(self.rows),
            alpha=float(len(self.rows)),
            rank_stabilized=False,
            dropout=0.0,
            variant=self,
        )

    def held(self, weight: LoraWeight) -> Any:
        """The rows of W itself, in the shape of the factor that stands for them."""
        axis, first = self._axis(weight.layout), self.along == "in"
        rows = jnp.take(
            dequantized(weight.base), jnp.asarray(self.rows), axis=axis, mode="clip"
        )
        return jnp.moveaxis(rows, axis, 0 if first else -1)

    def product(self, weight: LoraWeight) -> Product:
        old = lax.stop_gradient(self.held(weight))
        if self.along == "in":
            return Product(weight.a, weight.b - old.astype(weight.b.dtype))
        return Product(weight.a - old.astype(weight.a.dtype), weight.b)

    def problem(self, layout: Layout, shape: tuple[int, ...]) -> str:
        """Why a weight has no such rows; or ''."""
        if self.along not in ("in", "out"):
            return f"along is {self.along!r}. Write 'in' or 'out'."
        axes = layout.in_ if self.along == "in" else layout.out
        rest = layout.out if self.along == "in" else layout.in_
        if layout.stack or len(axes) != 1 or list(rest) != sorted(rest):
            return (
                f"a weight of shape {shape} ({layout}) has no rows along '{self.along}'"
                ": expected one axis of them and no stack. Train the leaf whole."
            )
        if bad := [i for i in self.rows if not 0 <= i < shape[axes[0]]]:
            return (
                f"row {bad[0]} is none of the {shape[axes[0]]} that a weight of shape "
                f"{shape} has along axis {axes[0]}. Resize the base, or correct it."
            )
        if not self.rows or len({*self.rows}) < len(self.rows):
            return f"rows is {self.rows}. Name at least one, each once."
        return ""

    def _axis(self, layout: Layout) -> int:
        return (layout.in_ if self.along == "in" else layout.out)[0]


def _scaled(weight: LoraWeight, by_rank: Any) -> Any:
    """A diag(by_rank), `[*stack, *in, rank]`."""
    stack, in_ = len(weight.layout.stack), len(weight.layout.in_)
    return weight.a * jnp.expand_dims(by_rank, range(stack, stack + in_))
