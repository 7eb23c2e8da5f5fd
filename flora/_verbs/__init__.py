"""The verbs on trees: init, lora, split, join, merge, with_dropout, coverage, summary.

One module each, with `draw` for the drawing of factors and `tables` for printing.
`flora` itself exports the verbs.  It may import `_trace`, `_algebra` and `_tree`.
"""
