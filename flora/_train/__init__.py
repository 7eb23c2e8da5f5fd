"""What trains: masks, the optimizer, groups of parameters by leaf and part.

Behind `flora.optim` and `flora.recipes`.  It may import `_verbs` and what is below, no
other folder beside it.
"""
