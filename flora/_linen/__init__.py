"""What `flora.linen` is made of.

`parts` moves arrays between variables and adapted trees; `plans` finds out how a
module's weights are used, and remembers it; `calls` runs a method on base and factors;
`attributes` shows what the module within has.
"""
