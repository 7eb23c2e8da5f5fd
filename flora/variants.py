"""Variants of LoRA: how factors start, and what product they make.

    W_eff = (W + scale a b) ⊙ columns    with a, b, columns = variant.product(weight)

A variant is a frozen dataclass with two methods and a tuple:

    start(key, weight)   the `LoraWeight` with the arrays that it needs in `extra`
    product(weight)      a `Product(a, b, columns, between)` of A, B and `extra`
    frozen               names of what does not train: 'a', 'b' or keys of `extra`

No rule of the interpreter knows of any variant, so a variant of your own works wherever
LoRA does; `examples/custom_variant.py` is a complete one.
"""

from flora._algebra.norms import column_norms
from flora._algebra.variants import AdaLoRA, Columns, DoRA, MiCA, Rows, VeRA
from flora._tree.weight import Product, Variant

__all__ = [
    "AdaLoRA",
    "Columns",
    "DoRA",
    "MiCA",
    "Product",
    "Rows",
    "Variant",
    "VeRA",
    "column_norms",
]
