"""What trains: masks, the optimizer, groups of parameters by leaf and part.

Behind `flora.optim` and `flora.recipes`.  It may import `_verbs`, `_trace`, `_algebra`
and `_tree`.
"""
