"""The nodes that replace weights in an adapted tree: `LoraWeight` and `Trained`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from flora._tree.arrays import shown
from flora._tree.errors import LoraTypeError
from flora._tree.layout import Layout
from flora._tree.quantized import is_quantized


class Product(NamedTuple):
    """The product that a variant makes of a weight: (W + scale a b) ⊙ columns.

    Attributes:
      a: `[*stack, *in, rank]`.
      b: `[*stack, rank, *out]`.
      columns: a factor for each output, `[*stack, *out]`, or `None`.
      between: a function of x A, `[..., rank]`, before it meets B, or `None`.  A weight
        that has one cannot be merged.
    """

    a: Any
    b: Any
    columns: Any = None
    between: Callable[[Any], Any] | None = None


class Variant(Protocol):
    """How factors start and what product they make: two methods and a tuple.

    Any frozen dataclass that has these three is a variant; see `flora.variants`.
    """

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of what does not train: 'a', 'b' or keys of `extra`."""
        ...

    def start(self, key: Any, weight: "LoraWeight") -> "LoraWeight":
        """The weight with the arrays that it needs in `extra`; A and B are drawn."""
        ...

    def product(self, weight: "LoraWeight") -> Product:
        """The factors, differentiable in what trains; the base gets no gradient."""
        ...


class _Listed:
    """What lists of parameters ask for: W's own, as far as it has them."""

    shape = property(lambda self: base_of(self).shape)
    dtype = property(lambda self: base_of(self).dtype)
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    sharding = property(lambda self: base_of(self).sharding)

    def __float__(self) -> float:
        """Of a statistic of W, found in every array of the node."""
        return float(base_of(self))


@dataclasses.dataclass(frozen=True)
class LoraWeight(_Listed):
    """A frozen weight and its low-rank factors: W + scale A B.

    A pytree node.  It does not validate, so that it can hold `None`, labels, gradients,
    `ShapeDtypeStruct`s and tracers; `flora.init` and `flora.lora` do.

    Attributes:
      base: the frozen weight W, `[...]`; `None` in an adapter.
      a: A, `[*stack, *in, rank]`.
      b: B, `[*stack, rank, *out]`.
      key: dropout keys `[*stack]` of one step, or `None`.
      extra: `{name: array}` with what a variant has besides A and B, or `None`.
      layout: the roles of W's axes.
      rank: the rank of A B.
      alpha: the numerator of the scale.
      rank_stabilized: whether scale is alpha/√rank instead of alpha/rank.
      dropout: dropout rate on the input of the low-rank path.
      fallback: 'error' or 'materialize', for uses that have no factored rule.
      form: how its products are computed, see `LoraConfig.form`.
      variant: how A, B and `extra` become a product, see `flora.variants`; `None` is
        LoRA.
      shape, dtype, ndim, size, sharding: of W; an adapter has none of them.

    References: Hu et al. 2021, eq. 3. https://arxiv.org/abs/2106.09685
      Kalajdzievski 2023 (rank-stabilized). https://arxiv.org/abs/2312.03732
    """

    base: Any
    a: Any
    b: Any
    key: Any = None
    extra: Any = None
    layout: Layout = Layout()
    rank: int = 1
    alpha: float = 1.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    fallback: str = "error"
    form: str = "auto"
    variant: Variant | None = None

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/√rank."""
        return self.alpha / (
            math.sqrt(self.rank) if self.rank_stabilized else self.rank
        )

    def __repr__(self) -> str:
        base = "adapter" if self.base is None else shown(self.base)
        known = isinstance(self.rank, int) and isinstance(self.alpha, int | float)
        scale = f"scale={self.scale:g}" if known else f"alpha={self.alpha}"
        variant = "" if self.variant is None else f", {self.variant!r}"
        return f"LoraWeight({base}, {self.layout}, rank={self.rank}, {scale}{variant})"

    def __jax_array__(self) -> Any:
        raise LoraTypeError(
            f"{self!r} was used as an array. Run the function through "
            "flora.lora(fn), or on flora.merge(tree)."
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__jax_array__()


jax.tree_util.register_dataclass(
    LoraWeight,
    data_fields=["base", "a", "b", "key", "extra"],
    meta_fields=[
        "layout",
        "rank",
        "alpha",
        "rank_stabilized",
        "dropout",
        "fallback",
        "form",
        "variant",
    ],
)


@dataclasses.dataclass(frozen=True)
class Trained(_Listed):
    """Marks a leaf that trains whole (`LoraConfig.train`)."""

    value: Any

    def __repr__(self) -> str:
        return f"Trained({shown(self.value)})"


jax.tree_util.register_dataclass(Trained, data_fields=["value"], meta_fields=[])


def base_of(leaf: Any) -> Any:
    """The weight of a leaf of a parameter tree, adapted or not."""
    if isinstance(leaf, LoraWeight):
        return leaf.base
    return leaf.value if isinstance(leaf, Trained) else leaf


def is_node(x: Any) -> bool:
    """Whether x is a node of flora's in an adapted tree."""
    return isinstance(x, LoraWeight | Trained)


def is_leaf(x: Any) -> bool:
    """Whether x counts as one leaf of a parameter tree, adapted or not."""
    return is_node(x) or is_quantized(x)


def product_of(weight: LoraWeight) -> Product:
    """The factors that the weight's variant makes; A and B themselves for LoRA."""
    if weight.variant is None:
        return Product(weight.a, weight.b)
    return weight.variant.product(weight)


def parts_of(weight: LoraWeight) -> dict[str, Any]:
    """What an adapter holds of a weight: A, B and `extra`, by name."""
    return {"a": weight.a, "b": weight.b, **(weight.extra or {})}


def trained_parts(weight: LoraWeight) -> dict[str, Any]:
    """All parts but what the variant freezes."""
    frozen = weight.variant.frozen if weight.variant else ()
    return {name: x for name, x in parts_of(weight).items() if name not in frozen}


def on_parts(fn: Callable[[str, Any], Any], weight: LoraWeight) -> LoraWeight:
    """The weight with `fn(name, part)` in the place of A, B and each of `extra`."""
    extra = weight.extra and {name: fn(name, x) for name, x in weight.extra.items()}
    return dataclasses.replace(
        weight, a=fn("a", weight.a), b=fn("b", weight.b), extra=extra
    )
