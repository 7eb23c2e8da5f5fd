"""Experiment 16: how A and B start, in a language model with pretrained weights."""

import _minilm as minilm
import _smollm2 as smollm2
from _page import Result, Text

import flora.initializers as init

FULL, SMOKE = smollm2.FULL, smollm2.SMOKE
# How they start, and where the search of the rate begins.
STARTS = {
    "standard": (init.gaussian(), 2),
    "reversed": (init.a_zero(), 1),
    "both random": (init.both_random(), 1),
}


def run(sizes: minilm.Sizes) -> Result:
    """The tables and the picture."""
    founds = [
        smollm2.fit(smollm2.arm(sizes, name, init=start, rate=rate), sizes)
        for name, (start, rate) in STARTS.items()
    ]
    before = [
        {"start": f.name} | dict(zip(smollm2.NUMBERS, f.before.tolist(), strict=True))
        for f in founds
    ]
    tables = {"before": before} | smollm2.rows_of(founds, "start")
    return Result(tables, smollm2.picture(founds))


TEXT = Text(
    title="16. How A and B start, a language model",
    claim="""
    Those of experiment 1, tried on an encoder in 12: with A = 0 and B random the model
    is poorer, both random is unsuitable, and the standard start stands larger rates.
    """,
    setup="""
    SmolLM2-135M-Instruct (30 layers, width 576) answers in a chat whether a film
    review's sentence is positive or negative. LoRA of rank 8, alpha 16 on every kernel
    of attention and MLP; 16 steps of Adam with 8 chats of at most 32 tokens, 40 for
    validation, 64 for the test; three seeds, each with chats and factors of its own.
    The loss is that of the answer's word, in nats, among all words there are.
    """,
    captions={
        "before": """
    Before training, first seed; standard and reversed are the model as it is. "right
    words": how often the right one of the two words is the likelier; "perplexity": of
    four passages of Python's reference, which nothing is trained on.
    """,
        "best": """
    At the rate that validation chose. "to standard": test loss less that of the
    standard start, seed by seed.
    """,
        "rates": """
    Every rate.
    """,
    },
    verdict="""
    Larger rates: as claimed, though the chosen ones are the same ([[best |
    start=standard | rate]] for standard and reversed). At 0.0003 reversed has learned
    ([[rates | start=reversed; rate=0.0003 | test_loss]] nats) what standard has not yet
    ([[rates | start=standard; rate=0.0003 | test_loss]], where telling nothing apart is
    0.693); at 0.003 reversed guesses ([[rates | start=reversed; rate=0.003 |
    right_words]] right) and its other text is lost, while standard still has a
    perplexity of [[rates | start=standard; rate=0.003 | perplexity]]. Poorer: not seen,
    as in experiment 12. Reversed ends [[best | start=reversed | to_standard]] nats from
    standard, and the interval has 0 in it; the toy's, at width 512 and after 150 steps,
    ended 1.26 times as high. Sixteen steps are few, and a start that moves further in
    each may gain by that: this cannot say what longer training would. Nor does reversed
    forget more for what it learns: at 0.001 its perplexity is [[rates | start=reversed;
    rate=0.001 | perplexity]] and standard's [[rates | start=standard; rate=0.001 |
    perplexity]], but at 0.0003, where it has learned about as much as standard at
    0.001, it is [[rates | start=reversed; rate=0.0003 | perplexity]]. Unsuitable: yes
    for both random. It begins with a perplexity of [[before | start=both random |
    perplexity]] in the place of [[before | start=standard | perplexity]] and chance
    among the two words ([[before | start=both random | right_words]] for [[before |
    start=standard | right_words]]); training brings the words back to where they were
    ([[best | start=both random | right_words]]), and the other text not at all ([[best
    | start=both random | perplexity]]). Its loss, [[best | start=both random |
    test_loss]] against [[best | start=standard | test_loss]], is the highest, as in the
    toy, but the interval of the difference has 0 in it. As in experiment 12, the old
    behavior shows more clearly than the loss what such a start costs.
    """,
)
