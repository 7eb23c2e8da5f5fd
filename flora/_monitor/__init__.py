"""Measures of factors while they train, an alarm on losses, a figure of both.

Behind `flora.monitor`.  It may import `_verbs`, `_trace`, `_algebra` and `_tree`.
"""
