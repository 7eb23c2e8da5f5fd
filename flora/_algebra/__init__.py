"""W + scale·A·B: its products with activations, their forms, variants of it.

`axes` names the axes of W, A, B and x.  `low_rank` computes scale (x A) B, and decides
which of the two products comes first.  `forms` computes the whole sum x W + scale
(x A) B in the other ways that `choice` picks, on TPUs above all; in the direct way the
sum is taken in `_trace.rules.product`.  `dense` forms W + scale A B, for `flora.merge`.

Nothing here knows of a function or a trace.  It may import `_tree`.
"""
