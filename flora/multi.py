"""Many adapters of one base: stack, serve, train and combine them.

    stacked = flora.multi.stack([one, two, three])
    y = flora.multi.lora(model.apply)(base, stacked, [0, 2, None, 1], x)
    stacked = flora.multi.put(stacked, 1, four)          # compiles nothing

    runs = flora.multi.start(adapters, optax.adamw, learning_rates)
    runs, losses = flora.multi.train_step(loss, optax.adamw)(base, runs, x)
    adapters = flora.multi.finish(runs)

    merged = flora.multi.merge(base, one)                # and unmerge, bit for bit
    both = flora.multi.combine([one, two], [0.7, 0.3]).adapter

References: Hu et al. 2021. https://arxiv.org/abs/2106.09685
"""

from flora._multi.combine import Combined, combine
from flora._multi.extract import extract
from flora._multi.merging import Merged, merge, unmerge
from flora._multi.mixed import lora
from flora._multi.places import add, put, remove
from flora._multi.runs import Runs, finish, start, train_step
from flora._multi.stacked import pad, prepare, select, stack, unstack

__all__ = [
    "Combined",
    "Merged",
    "Runs",
    "add",
    "combine",
    "extract",
    "finish",
    "lora",
    "merge",
    "pad",
    "prepare",
    "put",
    "remove",
    "select",
    "stack",
    "start",
    "train_step",
    "unmerge",
    "unstack",
]
