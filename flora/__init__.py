"""LoRA for any Flax model, as a pure function: W + (alpha/rank)·A·B.

    adapted = flora.init(key, config, model.apply, variables, x)
    apply = flora.lora(model.apply)
    loss, grads = flora.value_and_grad(loss_fn)(adapted, x)
    plain = flora.merge(adapted)

References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
"""

from flora import initializers, variants
from flora._adapt import join, merge, split, with_dropout
from flora._config import LoraConfig
from flora._coverage import coverage
from flora._errors import LoraError
from flora._init import init
from flora._summary import summary
from flora._transform import lora
from flora._version import __version__
from flora._weight import Layout, LoraWeight, Trained
from flora.optim import mask, optimizer, value_and_grad

__all__ = [
    "Layout",
    "LoraConfig",
    "LoraError",
    "LoraWeight",
    "Trained",
    "__version__",
    "coverage",
    "init",
    "initializers",
    "join",
    "lora",
    "mask",
    "merge",
    "optimizer",
    "split",
    "summary",
    "value_and_grad",
    "variants",
    "with_dropout",
]
