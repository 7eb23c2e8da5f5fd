"""Experiment 9: DoRA against LoRA with as many parameters.

DoRA: m ⊙ (W + s A B) / |W + s A B|, norms per output and not differentiated; m starts
as the norms of W.  On the transformer of experiment 6.
"""

import dataclasses

import _digits as digits
import _study as study
import numpy as np
from _page import COLORS, Result, Text, label, panels

import flora
import flora.variants

TARGET = (digits.ATTENTION, digits.MLP)
# Ranks that give LoRA the numbers of DoRA's magnitudes: width 32 or any other.
ONE_MORE = ("attention/query/kernel", "attention/value/kernel", "mlp_up/kernel")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The transformer's sizes and the ranks."""

    model: digits.Sizes = dataclasses.field(default_factory=digits.Sizes)
    ranks: tuple[int, ...] = (1, 4)


FULL = Sizes()
SMOKE = Sizes(
    digits.Sizes(8, 1, 2, steps=2, batch=4, seeds=2, rates=(1e-3, 1e-2)), (1,)
)


def arms(sizes: Sizes) -> list[digits.Arm]:
    """For each rank LoRA, DoRA, and LoRA with as many numbers as DoRA."""
    model = digits.Transformer(sizes.model.width, sizes.model.depth)
    found = []
    for r in sizes.ranks:
        plain = flora.LoraConfig(rank=r, alpha=2 * r, target=TARGET)
        dora = dataclasses.replace(plain, variant=flora.variants.DoRA())
        alphas = {name: 2.0 * (r + 1) for name in ONE_MORE}
        more = dataclasses.replace(
            plain, rank_pattern=dict.fromkeys(ONE_MORE, r + 1), alpha_pattern=alphas
        )
        found += [
            digits.lora_arm(f"LoRA, rank {r}", model, plain),
            digits.lora_arm(f"LoRA, rank {r} or {r + 1}", model, more),
            digits.lora_arm(f"DoRA, rank {r}", model, dora),
        ]
    return found


def run(sizes: Sizes) -> Result:
    """The table and the picture."""
    variables = digits.pretrained(sizes.model)
    rates = sizes.model.rates
    rows, equal = [], np.ones(sizes.model.seeds)
    figure, (ax, test) = panels(2, width=4)
    for i, (arm, color) in enumerate(zip(arms(sizes), COLORS, strict=False)):
        found = digits.fine_tune(arm, variables, sizes.model)
        trained, tested = found["training_loss"], found["test_loss"]
        k = study.best(tested)
        equal = tested[k] if i % 3 == 0 else equal  # plain LoRA of that rank
        rows.append(
            {"arm": arm.name, "trained": digits.parameters(arm, variables)}
            | study.rate_cells(rates, k)
            | study.cells("test_loss", tested[k], log=True)
            | study.cells("to_LoRA", tested[k] / equal, log=True)
            | study.cells("new_accuracy", found["new_accuracy"][k])
            | study.cells("old_accuracy", found["old_accuracy"][k])
        )
        for axis, values in ((ax, trained), (test, tested)):
            mean = np.exp(np.log(values).mean(axis=1))
            mean[~np.isfinite(mean)] = np.nan
            axis.plot(rates, mean, color=color, marker=".", label=arm.name)
    label(ax, "turned digits", "peak learning rate", "training loss")
    label(test, "turned digits", "peak learning rate", "test loss")
    ax.legend(fontsize=7)
    return Result({"equal": rows}, figure)


TEXT = Text(
    title="9. DoRA",
    claim="""
    DoRA (arXiv 2402.09353) is better than LoRA at nearly equal parameters, more so at
    low rank.
    """,
    setup="""
    The transformer and task of experiment 6, with `flora.variants.DoRA()`:
    m ⊙ (W + s A B) / |W + s A B| per output, the norm not differentiated, m trained at
    the same rate. The magnitudes cost half a rank or so; LoRA gets exactly as many
    numbers by one more rank in three of each block's six kernels.
    """,
    captions={
        "equal": """
    Turned digits, held out, at the rate of least test loss (the same 8 for every arm);
    "to LoRA" divides by plain LoRA of that rank, seed by seed.
    """,
    },
    verdict="""
    Not at equal parameters, here. DoRA is better than LoRA of its rank ([[equal |
    arm=DoRA, rank 1 | to_LoRA]] of the test loss at rank 1, [[equal | arm=DoRA, rank 4
    | to_LoRA]] at rank 4), and so is LoRA that spends the magnitudes' numbers on rank
    ([[equal | arm=LoRA, rank 1 or 2 | to_LoRA]] and [[equal | arm=LoRA, rank 4 or 5 |
    to_LoRA]]): between the two nothing is resolved. What does differ is the rate:
    DoRA's loss rises later when the peak rate is too large (right ends of the curves),
    so it is the more forgiving one. The magnitudes weigh more at this width (a kernel
    of 32 by 32 has 64 numbers a rank and 32 magnitudes) than in a large model, where
    they are nearly free and the paper's comparison is at nearly equal parameters as
    well.
    """,
)
