"""What `flora.variants` exports: DoRA, VeRA, AdaLoRA, Columns."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flora._algebra.norms import column_norms, compiled_norms
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


def _scaled(weight: LoraWeight, by_rank: Any) -> Any:
    """A diag(by_rank), `[*stack, *in, rank]`."""
    stack, in_ = len(weight.layout.stack), len(weight.layout.in_)
    return weight.a * jnp.expand_dims(by_rank, range(stack, stack + in_))
