"""Variants of LoRA: how factors start, and what product they make.

    W_eff = (W + scale a b) ⊙ columns    with a, b, columns = variant.product(weight)

A variant is a frozen dataclass with two functions and a tuple:

    start(key, weight)   the `LoraWeight` with what it needs in `extra`
    product(weight)      a `Product(a, b, columns, between)` of A, B and `extra`
    frozen               what does not train: 'a', 'b', names in `extra`

No rule of the interpreter knows of any variant, so that one of your own works wherever
LoRA does; `examples/custom_variant.py` is one, whole.
"""

from flora._algebra.variants import AdaLoRA, DoRA, VeRA, column_norms
from flora._tree.weight import Product, Variant

__all__ = ["AdaLoRA", "DoRA", "Product", "Variant", "VeRA", "column_norms"]
