"""What an adapted tree is made of: nodes, layouts, paths, keys, settings, errors.

`weight` has the node that replaces a leaf, `config` has `LoraConfig` and its defaults,
`initializers` how A and B are drawn, `layout` the roles of a weight's axes.

It imports nothing of flora from outside this folder.
"""
