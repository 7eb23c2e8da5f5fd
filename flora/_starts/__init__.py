"""Factors computed from values: of a weight, of gradients, of activations.

Behind `flora.starts` and `flora.budget`.  It may import `_verbs`, `_trace`, `_algebra`
and `_tree`.
"""
