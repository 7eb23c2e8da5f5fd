"""The initializers of `flora.initializers`: how A and B start."""

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora._tree.errors import LoraError

Shape = tuple[int, ...]
Initializer = Callable[[Any, Shape, Shape, Any], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Made:
    """An initializer that compares, prints and pickles as the call that made it."""

    build: Any
    args: tuple[Any, ...]

    def __call__(
        self, key: Any, a: Shape, b: Shape, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        return self.build.__wrapped__(*self.args)(key, a, b, dtype)

    def __repr__(self) -> str:
        return f"{self.build.__name__}({', '.join(map(repr, self.args))})"


def _as_made(build: Callable[..., Initializer]) -> Callable[..., Initializer]:
    @functools.wraps(build)
    def made(*args: Any, **kwargs: Any) -> Initializer:
        build(*args, **kwargs)  # which checks them
        bound = inspect.signature(build).bind(*args, **kwargs)
        bound.apply_defaults()
        return _Made(made, bound.args)

    return made


# What libraries choose for in · Var(A).
VARIANCES = {"peft": 1 / 3, "loralib": 1 / 3, "qwix": 2.0}


@_as_made
def gaussian(variance: float | str = 1 / 3) -> Initializer:
    """A ~ N(0, variance/in), B = 0: training starts at the pretrained model.

    1/3 is PEFT's variance for all but embeddings (see `peft`), so its learning rates
    carry over; 2 is qwix's, whose A is 2.45 times as large.

    Args:
      variance: in · Var(A), a number or a name in `VARIANCES`.

    References: Hu et al. 2021, section 4.1. https://arxiv.org/abs/2106.09685
    """
    variance = _variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return _normal(key, a, variance / a[0], dtype), jnp.zeros(b, dtype)

    return init


@_as_made
def uniform(variance: float | str = 1 / 3) -> Initializer:
    """A ~ U(−√(3·variance/in), √(3·variance/in)), B = 0: as PEFT and loralib draw.

    With 1/3 that is U(−1/√in, 1/√in), their kaiming_uniform with a = √5; with 2 it is
    U(−√(6/in), √(6/in)), qwix's he_uniform.

    Args:
      variance: in · Var(A), a number or a name in `VARIANCES`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a, b = uniform("peft")(jax.random.key(0), (100, 8), (8, 5), jnp.float32)
      >>> bool(abs(a).max() <= 0.1), bool(b.any())
      (True, False)
    """
    variance = _variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        size = math.sqrt(3 * variance / a[0])
        wide = jnp.promote_types(dtype, jnp.float32)
        draw = jax.random.uniform(key, a, _real(wide), -size, size)
        return draw.astype(dtype), jnp.zeros(b, dtype)

    return init


@_as_made
def by_rank(variance: float = 1.0) -> Initializer:
    """A ~ N(0, variance/rank²), B = 0: PEFT's `init_lora_weights="gaussian"`.

    The variance does not fall with in: at rank 8 and in = 4096 the std is 14 times that
    of `gaussian()`, and alpha/rank does the rest.

    Args:
      variance: rank² · Var(A); 1 is PEFT's, a std of 1/rank.
    """
    variance = _variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return _normal(key, a, variance / a[1] ** 2, dtype), jnp.zeros(b, dtype)

    return init


@_as_made
def orthogonal(variance: float = 1 / 200) -> Initializer:
    """A and B random and A B = 0: both train from the first step on.

    A = X Q₁ and B = Q₂ᵀ Y with X and Y Gaussian, Q₁ and Q₂ the even and the odd rows of
    one orthogonal matrix `[rank, rank]`.  A B is zero up to rounding, so the first
    outputs are the pretrained model's up to rounding.

    Args:
      variance: of an element of A or B, on average; 1/200 is PEFT's.

    Raises:
      LoraError: from the initializer, where the rank is odd.
    """
    size = math.sqrt(2 * _variance(variance))

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        rank = a[1]
        if rank % 2:
            raise LoraError(
                f"orthogonal: a matrix of {a[0]}×{b[1]} has rank {rank}; expected an "
                f"even one. Write rank={rank + 1}, or a rank_pattern for that leaf."
            )
        keys, wide = jax.random.split(key, 3), jnp.promote_types(dtype, jnp.float32)
        q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank), wide))
        x = jax.random.normal(keys[1], (a[0], rank // 2), wide)
        y = jax.random.normal(keys[2], (rank // 2, b[1]), wide)
        left = jnp.matmul(x, q[0::2], precision="highest")
        right = jnp.matmul(q[1::2].T.conj(), y, precision="highest")
        return (size * left).astype(dtype), (size * right).astype(dtype)

    return init


@_as_made
def embedding(variance: float = 1.0, vocabulary: str = "in") -> Initializer:
    """Zeros in the vocabulary's factor, N(0, variance) in the other: PEFT's embeddings.

    A = 0, B ~ N(0, variance) of a table whose rows are looked up, whatever its rank and
    sizes are.

    Args:
      variance: of an element of B.
      vocabulary: 'in', or 'out' where a tied table has the layout of its product with
        activations; then A ~ N(0, variance) and B = 0.
    """
    variance = _variance(variance)
    if vocabulary not in ("in", "out"):
        raise LoraError(f"vocabulary={vocabulary!r}. Write 'in' or 'out'.")

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        if vocabulary == "in":
            return jnp.zeros(a, dtype), _normal(key, b, variance, dtype)
        return _normal(key, a, variance, dtype), jnp.zeros(b, dtype)

    return init


@dataclasses.dataclass(frozen=True)
class ByKind:
    """Another initializer for tables that are looked up; by itself, that of all others.

    Attributes:
      others: for what is multiplied or convolved.
      tables: for tables with their vocabulary along 'in' and along 'out'.
    """

    others: Initializer
    tables: tuple[Initializer, Initializer]

    def __call__(self, key: Any, a: Shape, b: Shape, dtype: Any) -> Any:
        return self.others(key, a, b, dtype)

    def of(self, vocabulary: str) -> Initializer:
        """That of a table with its vocabulary 'in' or 'out'; '' for what is none."""
        if not vocabulary:
            return self.others
        return self.tables[0 if vocabulary == "in" else 1]


def peft(init_lora_weights: bool | str = True) -> Initializer:
    """PEFT's start for every kind of leaf, so that its learning rates carry over.

    Embeddings, by `flora.init`'s own trace: zeros in the vocabulary's factor, N(0, 1)
    in the other.  All others, convolutions and experts too, as PEFT's
    `init_lora_weights` says:

    - `True`: A ~ U(−1/√in, 1/√in), B = 0 (kaiming_uniform with a = √5);
    - `"gaussian"`: A ~ N(0, 1/rank²), B = 0;
    - `"orthogonal"`: A B = 0, see `orthogonal`;
    - `False`: A ~ U(−1/√in, 1/√in), B ~ U(−1/√rank, 1/√rank), PyTorch's own;
      embeddings N(0, 1) in both.

    Magnitudes of DoRA start as the norms of W + scale A B.  A grouped convolution has
    in for each group alone, where PEFT's A has that of all.

    Args:
      init_lora_weights: of PEFT's `LoraConfig`.

    Example:
      >>> import jax, jax.numpy as jnp, flora
      >>> params = {"table": jnp.ones((50, 8)), "kernel": jnp.ones((8, 4))}
      >>> fn = lambda p, ids: p["table"][ids] @ p["kernel"]
      >>> config = flora.LoraConfig(rank=2, target="*", init=flora.initializers.peft())
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, jnp.arange(3))
      >>> [bool(x.any()) for x in (adapted["table"].a, adapted["table"].b)]
      [False, True]
      >>> [bool(x.any()) for x in (adapted["kernel"].a, adapted["kernel"].b)]
      [True, False]
    """
    starts = {True: uniform, "gaussian": by_rank, "orthogonal": orthogonal}
    if init_lora_weights is False:
        return ByKind(_pytorch, (_normal_both, _normal_both))
    if init_lora_weights not in (True, "gaussian", "orthogonal"):
        raise LoraError(
            f"peft: init_lora_weights={init_lora_weights!r}. Write True, False, "
            "'gaussian' or 'orthogonal'; PiSSA, OLoRA, LoRA-GA and EVA are in "
            "flora.starts, LoftQ is in flora.quantize."
        )
    tables = embedding(), embedding(vocabulary="out")
    return ByKind(starts[init_lora_weights](), tables)


def _pytorch(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    keys, draw = jax.random.split(key), uniform()
    first, second = (draw(k, s, s, dtype)[0] for k, s in zip(keys, (a, b), strict=True))
    return first, second


def _normal_both(
    key: Any, a: Shape, b: Shape, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    key_a, key_b = jax.random.split(key)
    return _normal(key_a, a, 1.0, dtype), _normal(key_b, b, 1.0, dtype)


@_as_made
def a_zero(variance: float = 1 / 3) -> Initializer:
    """A = 0, B ~ N(0, variance/rank): the reversed start, for study.

    References: Hayou et al. 2024. https://arxiv.org/abs/2406.08447
    """
    variance = _variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(a, dtype), _normal(key, b, variance / b[0], dtype)

    return init


@_as_made
def both_random(variance: float = 1 / 3) -> Initializer:
    """A and B random: training does not start at the pretrained model.  For study."""
    variance = _variance(variance)

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        key_a, key_b = jax.random.split(key)
        return (
            _normal(key_a, a, variance / a[0], dtype),
            _normal(key_b, b, variance / b[0], dtype),
        )

    return init


@_as_made
def both_zero() -> Initializer:
    """A = B = 0: no gradient ever reaches either.  For study."""

    def init(key: Any, a: Shape, b: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(a, dtype), jnp.zeros(b, dtype)

    return init


def _variance(variance: Any) -> float:
    """The variance as a number, checked."""
    if isinstance(variance, str) and variance in VARIANCES:
        return VARIANCES[variance]
    real = isinstance(variance, numbers.Real) and not isinstance(variance, bool)
    if not real or not 0 < float(variance) < math.inf:
        raise LoraError(
            f"variance={variance!r}. It must be a finite number above 0, such as 1/3, "
            f"or one of {', '.join(map(repr, VARIANCES))}."
        )
    return float(variance)


def _real(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


def _normal(key: Any, shape: Shape, variance: float, dtype: Any) -> jax.Array:
    draw = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
    return (math.sqrt(variance) * draw).astype(dtype)
