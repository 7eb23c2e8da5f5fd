"""The interpreter: from a function to a jaxpr, and a walk through it by rules.

`stage` traces the function and `interpret` walks the jaxpr: equations that read no
adapted weight go back to JAX, the others to the rule of their primitive in `rules/`,
and one without a rule is an error, which is worded in `interpret`.  `discover` follows
weights through the same walk and finds their layouts; `roles` finds attention and head.
`compat` alone knows how JAX versions differ.

It may import `_algebra` and `_tree`.
"""
