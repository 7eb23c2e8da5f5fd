"""The nodes that replace weights in an adapted tree: `LoraWeight` and `Trained`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flora._tree.arrays import shown
from flora._tree.blocks import Block, covered, gates
from flora._tree.errors import LoraError, LoraTypeError
from flora._tree.layout import Layout
from flora._tree.origin import Origin
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
      start: what took a part of W into A and B as they started, such as
        'flora.starts.pissa'; '' where the base is the model's own.
      variant: how A, B and `extra` become a product, see `flora.variants`; `None` is
        LoRA.
      blocks: the adapters that A and B hold where they are not one: with ranks and
        scales of their own, in place of `rank` and `alpha`, for each index of the stack
        or for some out features.
      origin: the file that it was loaded from, for saving it as it was; nothing that is
        computed depends on it.
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
    start: str = ""
    variant: Variant | None = None
    blocks: tuple[Block, ...] = ()
    origin: Origin = dataclasses.field(default_factory=Origin)

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/√rank.

        Raises:
          LoraError: `blocks` have scales of their own.
        """
        if self.blocks:
            raise LoraError(
                f"{self!r} holds adapters of several ranks or scales, and one scale is "
                "needed here. Read leaf.blocks, or adapt each index alike."
            )
        return self.alpha / (
            math.sqrt(self.rank) if self.rank_stabilized else self.rank
        )

    def __repr__(self) -> str:
        base = "adapter" if self.base is None else shown(self.base)
        known = isinstance(self.rank, int) and isinstance(self.alpha, int | float)
        if self.blocks:
            scales = sorted({block.scale for block in self.blocks})
            ends = dict.fromkeys(f"{x:g}" for x in (scales[0], scales[-1]))
            scale = f"{len(self.blocks)} blocks, scale={'…'.join(ends)}"
        else:
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
        "start",
        "variant",
        "blocks",
        "origin",
    ],
)


@dataclasses.dataclass(frozen=True)
class Trained(_Listed):
    """Marks a leaf that trains whole (`LoraConfig.train`).

    Attributes:
      value: the array.
      origin: as of `LoraWeight`.
    """

    value: Any
    origin: Origin = dataclasses.field(default_factory=Origin)

    def __repr__(self) -> str:
        return f"Trained({shown(self.value)})"


jax.tree_util.register_dataclass(Trained, data_fields=["value"], meta_fields=["origin"])


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
    """The factors that the weight's variant makes; A and B themselves for LoRA.

    W + `scale_of(weight)` a b is what they mean.
    """
    plain = uniform(weight)
    if plain.variant is None:
        return Product(plain.a, plain.b)
    product = plain.variant.product(plain)
    if not weight.blocks or product.columns is None:
        return product
    stack, _, out = factor_sizes(weight)
    adapted = covered(weight.blocks, stack, out)
    return product._replace(columns=jnp.where(adapted, product.columns, 1))


def scale_of(weight: LoraWeight) -> float:
    """The scale of the product of `product_of`; those of blocks are in its b."""
    return 1.0 if weight.blocks else weight.scale


def uniform(weight: LoraWeight) -> LoraWeight:
    """The same ΔW as one adapter of scale 1, the scales of blocks in B.

    Differentiable: B gets the gradient that it has in its blocks.  B comes in float32
    or wider.
    """
    if not weight.blocks:
        return weight
    stack, _, out = factor_sizes(weight)
    wide = jnp.promote_types(weight.b.dtype, jnp.float32)
    gate = gates(weight.blocks, stack, weight.rank, out).astype(wide)
    return dataclasses.replace(
        weight,
        b=weight.b.astype(wide) * gate,
        alpha=float(weight.rank),
        rank_stabilized=False,
        blocks=(),
    )


def within_blocks(weight: LoraWeight) -> LoraWeight:
    """The weight with zeros in all that lies outside of its blocks."""
    if not weight.blocks:
        return weight
    stack, in_, out = factor_sizes(weight)
    gate = gates(weight.blocks, stack, weight.rank, out) != 0
    ranks = gate.any(tuple(range(len(stack) + 1, gate.ndim)))  # [*stack, rank]
    adapted = ranks.any(-1)

    def inside(name: str, x: Any) -> Any:
        if name == "a":
            own = jnp.expand_dims(ranks, range(len(stack), len(stack) + len(in_)))
        else:
            own = (
                gate
                if name == "b"
                else jnp.expand_dims(adapted, range(len(stack), x.ndim))
            )
        kept = jnp.where(own, x, jnp.zeros_like(x))
        return kept if isinstance(x, Tracer) else jax.device_put(kept, x.sharding)

    parts = jax.tree.leaves((weight.a, weight.b, weight.extra))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in parts):
        return weight
    return on_parts(inside, weight)


def factor_sizes(weight: LoraWeight) -> tuple[tuple[int, ...], ...]:
    """The sizes of the stack, in and out axes, read off A and B."""
    n = len(weight.layout.stack)
    a, b = tuple(weight.a.shape), tuple(weight.b.shape)
    return a[:n], a[n:-1], b[n + 1 :]


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
