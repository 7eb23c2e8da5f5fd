"""What PEFT makes of `out_proj` in `nn.MultiheadAttention`: ΔW is added twice.

y = x (W + 2 ΔW), in training and on merging, while A and B get the gradients of W + ΔW.
"""

import dataclasses
from typing import Any

from jax import lax

from flora._tree.weight import LoraWeight, Product

# The parameter and the module that PEFT adapts together.
IN, OUT = "in_proj_weight", "out_proj"


@dataclasses.dataclass(frozen=True)
class AddedTwice:
    """The variant."""

    frozen = ()

    def start(self, key: Any, weight: LoraWeight) -> LoraWeight:
        return weight

    def product(self, weight: LoraWeight) -> Product:
        """A and 2 B, of which A and B get half of the gradient."""
        a, b = (0.5 * x + lax.stop_gradient(0.5 * x) for x in (weight.a, weight.b))
        return Product(a, 2 * b)
