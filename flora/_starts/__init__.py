"""Factors from values: of a weight, of gradients, of activations.

Behind `flora.starts` and `flora.budget`.  It may import `_verbs` and what is below, no
other folder beside it.
"""
