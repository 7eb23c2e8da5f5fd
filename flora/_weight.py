"""The node that stands where a weight stood: `LoraWeight`, its `Layout`, `Trained`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from flora._errors import LoraTypeError, Unfactorable


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a weight are stacked, contracted and produced.

    Attributes:
      stack: axes that index independent matrices (nn.scan, nn.vmap, experts).
      in_: axes contracted with activations (indexed, for an embedding).
      out: axes that the product keeps.
    """

    stack: tuple[int, ...] = ()
    in_: tuple[int, ...] = (0,)
    out: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("stack", "in_", "out"):  # lists too: a layout must be hashable
            axes = getattr(self, name)
            if not isinstance(axes, tuple | list) or not all(
                isinstance(i, int) and not isinstance(i, bool) for i in axes
            ):
                raise LoraTypeError(
                    f"Layout: {name}={axes!r}. Write a tuple of axes, such as (0, 1)."
                )
            object.__setattr__(self, name, tuple(axes))

    def role(self, axis: int) -> str:
        """'stack', 'in' or 'out'."""
        if axis in self.stack:
            return "stack"
        return "in" if axis in self.in_ else "out"

    def fits(self, ndim: int) -> bool:
        """Whether it names each of `ndim` axes once, in and out axes among them."""
        axes = sorted((*self.stack, *self.in_, *self.out))
        return axes == list(range(ndim)) and bool(self.in_ and self.out)

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The sizes of the stack, in and out axes of a weight of that shape."""
        return tuple(
            tuple(shape[i] for i in axes) for axes in (self.stack, self.in_, self.out)
        )

    def factor_shapes(
        self, shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `a` `[*stack, *in, rank]` and `b` `[*stack, rank, *out]`."""
        stack, in_, out = self.sizes(shape)
        return (*stack, *in_, rank), (*stack, rank, *out)

    def __str__(self) -> str:
        named = (("stack", self.stack), ("in", self.in_), ("out", self.out))
        return " ".join(f"{n}={','.join(map(str, a))}" for n, a in named if a)


class Product(NamedTuple):
    """What a variant makes of a weight: (W + scale a b) ⊙ columns.

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
    """How factors start and what product they make: two functions and a tuple.

    Any frozen dataclass with these three will do; see `flora.variants`.
    """

    @property
    def frozen(self) -> tuple[str, ...]:
        """What does not train: 'a', 'b', names in `extra`."""
        ...

    def start(self, key: Any, weight: "LoraWeight") -> "LoraWeight":
        """The weight with what it needs in `extra`; `a` and `b` are drawn already."""
        ...

    def product(self, weight: "LoraWeight") -> Product:
        """The factors at hand, differentiable by what trains.  It sees no base gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A frozen weight and its low-rank factors: W + scale A B.

    A pytree node.  It checks nothing, so that it can hold `None`, labels, gradients,
    `ShapeDtypeStruct`s and tracers; `flora.init` and `flora.lora` check.

    Attributes:
      base: the frozen weight W, `[...]`; `None` in an adapter.
      a: A, `[*stack, *in, rank]`.
      b: B, `[*stack, rank, *out]`.
      key: dropout keys `[*stack]` of one step, or `None`.
      extra: `{name: array}` of what a variant has besides A and B, or `None`.
      layout: the roles of W's axes.
      rank: the rank of A B.
      alpha: the numerator of the scale.
      rank_stabilized: whether scale is alpha/√rank instead of alpha/rank.
      dropout: dropout rate on the input of the low-rank path.
      fallback: 'error' or 'materialize', for uses that have no factored rule.
      form: how its products are computed, see `LoraConfig.form`.
      variant: what is made of A, B and `extra`, see `flora.variants`; `None` for LoRA.

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
        base = "adapter" if self.base is None else _shown(self.base)
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


def _shown(x: Any) -> str:
    shape = ",".join(map(str, getattr(x, "shape", ())))
    return f"{x.dtype}[{shape}]" if hasattr(x, "dtype") else repr(x)


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
class Quantized:
    """A frozen weight that is stored in fewer bits, and opened where it is used.

    Attributes:
      stored: what is stored, a pytree with the weight's `shape` and `dtype`; each of its
        arrays has the weight's axes, whole or in blocks.
      opener: makes the dense weight of it.
    """

    stored: Any
    opener: Callable[[Any], Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> Any:
        return self.stored.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        """The weight as an array, `[...]`."""
        return self.opener(self.stored)

    def __repr__(self) -> str:
        parts = jax.tree.leaves(self.stored)
        if not parts or not all(hasattr(x, "dtype") for x in parts):
            return f"Quantized({self.stored!r})"
        return f"Quantized({_shown(self)} as {'+'.join(str(x.dtype) for x in parts)})"

    def __jax_array__(self) -> Any:
        raise LoraTypeError(
            f"{self!r} was used as an array. Run the function through flora.lora(fn)."
        )


jax.tree_util.register_dataclass(
    Quantized, data_fields=["stored"], meta_fields=["opener"]
)


def opened(base: Any) -> Any:
    """A weight as an array."""
    return base.dense() if is_stored(base) else base


def abstract(base: Any) -> Any:
    """A stored weight as the array that it stands for, without its values."""
    if not is_stored(base):
        return base
    return jax.ShapeDtypeStruct(base.shape, base.dtype)


def is_stored(x: Any) -> bool:
    """Whether x is a weight stored in fewer bits."""
    return isinstance(x, Quantized)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Marks a leaf that trains whole (`LoraConfig.train`)."""

    value: Any


jax.tree_util.register_dataclass(Trained, data_fields=["value"], meta_fields=[])


def base_of(leaf: Any) -> Any:
    """The weight of a leaf of a parameter tree, adapted or not."""
    if isinstance(leaf, LoraWeight):
        return leaf.base
    return leaf.value if isinstance(leaf, Trained) else leaf


def is_fallback(x: Any) -> bool:
    """Whether x names what to do where an operation has no factored rule."""
    return isinstance(x, str) and x in ("error", "materialize")


def is_node(x: Any) -> bool:
    """Whether x is a node of flora's in an adapted tree."""
    return isinstance(x, LoraWeight | Trained)


def is_leaf(x: Any) -> bool:
    """Whether x counts as one leaf of a parameter tree, adapted or not."""
    return is_node(x) or is_stored(x)


def compute_dtype(*dtypes: Any) -> Any:
    """The widest of the dtypes, float32 at least (or its complex twin)."""
    return jnp.result_type(
        jnp.float32, *(d for d in dtypes if jnp.dtype(d).itemsize > 1)
    )


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


def delta(weight: LoraWeight) -> jax.Array:
    """W_eff - W in W's shape, in float32 or wider: scale A B for plain LoRA."""
    product = product_of(weight)
    change = _low_rank(weight, product)
    if product.columns is None:
        return change
    base = opened(weight.base).astype(change.dtype)
    return (base + change) * _spread(weight, product, change.dtype) - base


def materialize(weight: LoraWeight) -> jax.Array:
    """(W + scale A B) ⊙ columns, in float32 or wider, rounded once to W's dtype."""
    product = product_of(weight)
    change, base = _low_rank(weight, product), opened(weight.base)
    whole = base.astype(change.dtype) + change
    if product.columns is not None:
        whole = whole * _spread(weight, product, change.dtype)
    return whole.astype(base.dtype)


def _low_rank(weight: LoraWeight, product: Product) -> jax.Array:
    """Scale A B in W's shape, in float32 or wider."""
    if product.between is not None:
        raise Unfactorable(
            f"{weight.variant!r} puts a function between A and B: no sum with W is that"
        )
    layout, shape = weight.layout, weight.base.shape
    stack, in_, out = (math.prod(s) for s in layout.sizes(shape))
    a, b = product.a, product.b
    dtype = compute_dtype(a.dtype, b.dtype, weight.base.dtype)
    a = a.astype(dtype).reshape(stack, in_, -1)
    b = b.astype(dtype).reshape(stack, -1, out)
    dims = (((2,), (1,)), ((0,), (0,)))
    ab = lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)
    return weight.scale * in_place(ab, layout, shape)


def _spread(weight: LoraWeight, product: Product, dtype: Any) -> jax.Array:
    """A factor for each output, as an array that W's shape broadcasts with."""
    layout, shape = weight.layout, weight.base.shape
    ones = tuple(1 if i in layout.in_ else n for i, n in enumerate(shape))
    return in_place(product.columns.astype(dtype), layout, ones)


def in_place(x: jax.Array, layout: Layout, shape: tuple[int, ...]) -> jax.Array:
    """An array in the order `[*stack, *in, *out]` with its axes where W has them."""
    order = (*layout.stack, *layout.in_, *layout.out)
    x = x.reshape([shape[i] for i in order])
    return x.transpose([order.index(i) for i in range(len(shape))])
