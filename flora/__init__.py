"""LoRA for any Flax model, as a pure function: W + (alpha/rank)·A·B.

    adapted = flora.init(key, config, model.apply, variables, x)
    apply = flora.lora(model.apply)
    loss, grads = flora.value_and_grad(loss_fn)(adapted, x)
    plain = flora.merge(adapted)

The modules here are what users import; the folders `_verbs`, `_trace`, `_algebra` and
so on are what these are built from, and the docstring of each says what is where.

References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
"""

from flora import initializers, variants
from flora._files import nodes as _nodes  # noqa: F401
from flora._files.adapter import load, save
from flora._tree.blocks import Block
from flora._tree.config import LoraConfig
from flora._tree.errors import LoraError
from flora._tree.layout import Layout
from flora._tree.version import __version__ as __version__
from flora._tree.weight import LoraWeight, Trained
from flora._verbs.coverage import coverage
from flora._verbs.dropout import with_dropout
from flora._verbs.init import init
from flora._verbs.lora import lora
from flora._verbs.merge import merge
from flora._verbs.split import join, split
from flora._verbs.summary import summary
from flora.optim import apply_updates, mask, optimizer, value_and_grad

__all__ = [
    "Block",
    "Layout",
    "LoraConfig",
    "LoraError",
    "LoraWeight",
    "Trained",
    "apply_updates",
    "coverage",
    "init",
    "initializers",
    "join",
    "load",
    "lora",
    "mask",
    "merge",
    "optimizer",
    "save",
    "split",
    "summary",
    "value_and_grad",
    "variants",
    "with_dropout",
]
