"""The verbs on trees: init, lora, split, join, merge, with_dropout, coverage, summary.

`flora` itself exports them.  It may import `_trace`, `_algebra` and `_tree`.
"""
