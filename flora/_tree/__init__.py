"""What an adapted tree is made of: nodes, layouts, paths, keys, settings, errors.

The ground floor.  It imports nothing of flora but itself.
"""
