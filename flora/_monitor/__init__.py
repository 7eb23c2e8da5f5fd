"""Measures of factors while they train, alarms on losses, the figure of both.

Behind `flora.monitor`.  It may import `_verbs` and what is below, no other folder
beside it.
"""
