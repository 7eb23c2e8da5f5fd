"""What to adapt and how: `LoraConfig`."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from flora._tree.arrays import is_array
from flora._tree.errors import LoraTypeError, fail
from flora._tree.fields import unknown_fields
from flora._tree.initializers import Initializer, gaussian
from flora._tree.layout import Layout
from flora._tree.paths import Matcher, Pattern, check_pattern
from flora._tree.weight import Variant

# Forms that multiply by a copy of W, which must not be kept for the backward pass.
COPIES = ("concat", "merged", "dithered")
FORMS = ("auto", "direct", "thin_first", "thin_last", *COPIES, "kernel")
# The fields that are `{pattern: value}`: the first that selects a leaf decides.
PATTERN_FIELDS = (
    "rank_pattern", "alpha_pattern", "layouts", "init_pattern", "form_pattern"
)  # fmt: skip

T = TypeVar("T")

_MOST = 2**20  # of a rank: no matrix has as many
_GAUSSIAN = gaussian()  # one function object, so that drawing compiles once


def _fields_checked(cls: type[T]) -> type[T]:
    """The class, whose fields by other libraries' names are an error that says so."""
    init: Any = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        fail(unknown_fields(kwargs, known), LoraTypeError)
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


@_fields_checked
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how.  ΔW = scale A B with scale = alpha/rank.

    Patterns are globs on '/'-joined paths (`*` crosses '/'; the glob must match the end
    of the path from the start of a segment, or the whole path if it starts with '/'),
    compiled regexes (of the whole path), callables `(path, leaf) -> bool`, or lists of
    these.  Of the entries of a dict, the first in the order written that selects a leaf
    decides.  An entry (of a list too) that selects nothing or decides nothing is an
    error.

    Attributes:
      rank: r, the rank of ΔW.  It may be above min(in, out) of a leaf, which wastes
        some; `flora.summary` marks it.
      alpha: numerator of the scale.
      target: leaves that get factors.  Leaves with fewer than 2 axes are skipped.
        `()` together with `train` makes a linear probe.
      exclude: leaves that stay frozen although `target` selects them.
        In these, and in the two patterns below, a glob that matches no leaf as it
        stands can name layers of a stack: 'layers/3/*' is the fourth matrix of each
        leaf whose path is that without the 3.
      rank_pattern: `{pattern: rank}`, for leaves that need another.
      alpha_pattern: `{pattern: alpha}`, likewise.
      layouts: `{pattern: Layout}` for leaves whose layout should not be discovered.
      train: leaves that train whole, without factors: heads, norms, biases.
      rank_stabilized: scale = alpha/√rank (rsLoRA).
      dropout: dropout rate on the input of the low-rank path, in [0, 1).
      dtype: dtype of A and B, whatever the base's.  In float16, train them with
        `flora.optimizer`, which computes in float32.
      init: how A and B start, one of `flora.initializers`; by default
        A ~ N(0, 1/(3·in)) and B = 0; `flora.initializers.peft()` is PEFT's start.
      init_pattern: `{pattern: initializer}`, for leaves that start in another way; the
        first that matches a leaf wins.
      fallback: 'error', or 'materialize' to form W + scale A B where an operation has
        no factored rule.
      form: how y = x W + scale (x A) B is computed: 'auto' chooses by sizes and device,
        by platform once the program is lowered where no mesh of devices is set.
        'direct', 'thin_first' and 'thin_last' differ in what is written to memory
        first; 'concat' multiplies [x | xA] by [W ; B].  All are exact up to the order
        of summation.  'merged' multiplies by W + scale A B, rounded to W's dtype;
        'dithered' rounds it at random.  'kernel' is like 'auto', and one Pallas kernel
        for TPUs reads dy once for the gradients of z = x A and B, where XLA reads it
        twice; elsewhere it is interpreted, which is slow.  On a mesh its tokens are
        divided over all axes, or 'kernel:tp' names those that outputs are sharded over.
        It is never chosen by itself.  `jax.jvp` needs 'direct', but for 'auto' away
        from TPUs.  Where another form does not apply (dropout, lookups, convolutions,
        inside shard_map) the product is direct too.
      form_pattern: `{pattern: form}`, for leaves that need another.
      variant: how A and B become a product, one of `flora.variants` or your own;
        `None` is LoRA.
      rows: `{pattern: indices}`, for embeddings and heads of which those words train
        and nothing else does (`flora.variants.Rows`), beside what `target` selects.

    Raises:
      LoraError: a value is out of its range.

    Example:
      >>> LoraConfig(rank=16, alpha=32, target="attention/*/kernel").rank
      16

    References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
      Kalajdzievski 2023 (rsLoRA). https://arxiv.org/abs/2312.03732
    """

    rank: int = 8
    alpha: float = 16.0
    target: Pattern = "kernel"
    exclude: Pattern = ()
    rank_pattern: Mapping[Matcher, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[Matcher, float] = dataclasses.field(default_factory=dict)
    layouts: Mapping[Matcher, Layout] = dataclasses.field(default_factory=dict)
    train: Pattern = ()
    rank_stabilized: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    init: Initializer = _GAUSSIAN
    init_pattern: Mapping[Matcher, Initializer] = dataclasses.field(
        default_factory=dict
    )
    fallback: str = "error"
    form: str = "auto"
    form_pattern: Mapping[Matcher, str] = dataclasses.field(default_factory=dict)
    variant: Variant | None = None
    rows: Mapping[Matcher, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        # Of the plain numbers: the patterns' dicts have none, and need not.
        return hash((self.rank, self.alpha, self.dropout, self.fallback, self.form))

    def __post_init__(self) -> None:
        for name in ("target", "exclude", "train"):
            check_pattern(name, getattr(self, name))
        for name in (*PATTERN_FIELDS, "rows"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise LoraTypeError(
                    f"{name}={value!r}. Write a dict, {{pattern: value}}."
                )
            for pattern in value:
                check_pattern(f"{name} key", pattern)
        fail(
            [
                *_rank_problems("rank", self.rank),
                *(
                    p
                    for k, v in self.rank_pattern.items()
                    for p in _rank_problems(f"rank_pattern[{k!r}]", v)
                ),
                *_alpha_problems("alpha", self.alpha),
                *(
                    p
                    for k, v in self.alpha_pattern.items()
                    for p in _alpha_problems(f"alpha_pattern[{k!r}]", v)
                ),
                *self._other_problems(),
            ]
        )

    def _other_problems(self) -> list[str]:
        found = []
        for pattern, layout in self.layouts.items():
            if not isinstance(layout, Layout):
                found.append(
                    f"layouts[{pattern!r}]={layout!r}. Write flora.Layout(...)."
                )
        if not _is_real(self.dropout) or not 0 <= self.dropout < 1:
            found.append(f"dropout={self.dropout!r}. It must lie in [0, 1).")
        if not isinstance(self.rank_stabilized, bool):
            found.append(
                f"rank_stabilized={self.rank_stabilized!r}. Write True or False."
            )
        if not is_fallback(self.fallback):
            found.append(f"fallback={self.fallback!r}. Write 'error' or 'materialize'.")
        found += form_problems("form", self.form)
        for pattern, form in self.form_pattern.items():
            found += form_problems(f"form_pattern[{pattern!r}]", form)
        found += _variant_problems(self.variant)
        for pattern, rows in self.rows.items():
            if not isinstance(rows, Sequence) or not all(
                isinstance(i, numbers.Integral) and not isinstance(i, bool)
                for i in rows
            ):
                found.append(f"rows[{pattern!r}]={rows!r}. Write a list of indices.")
        found += initializer_problems("init", self.init)
        for pattern, start in self.init_pattern.items():
            found += initializer_problems(f"init_pattern[{pattern!r}]", start)
        if not _is_floating_dtype(self.dtype):
            found.append(
                f"dtype={self.dtype!r}. Factors need a floating dtype, such as "
                "jnp.float32."
            )
        return found


def _variant_problems(variant: Any) -> list[str]:
    missing = [
        name for name in ("frozen", "start", "product") if not hasattr(variant, name)
    ]
    if variant is None or not (missing or isinstance(variant, type)):
        return []
    shown = variant.__name__ if isinstance(variant, type) else repr(variant)
    return [
        f"variant={shown}. Write a value with `frozen`, `start` and `product`, such as "
        "flora.variants.DoRA()."
    ]


def _is_floating_dtype(dtype: Any) -> bool:
    if dtype is None or is_array(dtype):
        return False
    try:
        return bool(jnp.issubdtype(dtype, jnp.inexact))
    except (TypeError, ValueError):
        return False


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _rank_problems(name: str, rank: Any) -> list[str]:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        return [f"{name}={rank!r}. The rank must be an int of at least 1."]
    if int(rank) > _MOST:
        return [f"{name}={rank!r}. The rank must be at most {_MOST:,}."]
    return []


def _alpha_problems(name: str, alpha: Any) -> list[str]:
    if not _is_real(alpha) or not math.isfinite(alpha) or alpha <= 0:
        return [
            f"{name}={alpha!r}. alpha must be a finite number above 0, such as "
            "2 * rank."
        ]
    return []


def require_config(config: Any) -> LoraConfig:
    """The config, or an error that says what to write."""
    if isinstance(config, LoraConfig):
        return config
    raise LoraTypeError(
        f"config is a {type(config).__name__}; expected flora.LoraConfig(...). The "
        "order is flora.init(key, config, fn, tree, *args)."
    )


def is_fallback(x: Any) -> bool:
    """Whether x names what to do where an operation has no factored rule."""
    return isinstance(x, str) and x in ("error", "materialize")


def initializer_problems(name: str, start: Any) -> list[str]:
    """What is wrong with an initializer."""
    if callable(start):
        return []
    return [
        f"{name}={start!r}. Write one of flora.initializers, such as "
        "flora.initializers.gaussian()."
    ]


def form_problems(name: str, form: Any) -> list[str]:
    """What is wrong with the name of a form."""
    if isinstance(form, str) and (form in FORMS or kernel_axes(form)):
        return []
    return [
        f"{name}={form!r}. Write one of {', '.join(map(repr, FORMS))}, or "
        "'kernel:tp' with the mesh axes (here tp) that outputs are sharded over."
    ]


def kernel_axes(form: str) -> tuple[str, ...] | None:
    """The mesh axes that 'kernel:tp,ep' names; `None` if it is no such form."""
    name, colon, axes = form.partition(":")
    found = tuple(axes.split(",")) if colon else ()
    return found if name == "kernel" and all(found) else None
