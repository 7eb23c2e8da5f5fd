"""W + scale·A·B: its products with activations, their forms, variants of it.

Knows arrays, no functions and no traces.  It may import `_tree`.
"""
