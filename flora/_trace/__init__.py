"""The interpreter: from a function to a jaxpr, and a walk through it by rules.

`stage` traces, `interpret` walks, `rules/` says what each primitive makes of a weight;
`discover` and `roles` read layouts and roles off the same jaxpr.  It may import
`_algebra` and `_tree`.  `compat` alone knows how JAX versions differ.
"""
