"""What `flora.nnx` is made of.

`parts` puts factors beside the weights of a module and takes them out; `calls` makes
the class whose methods run on both; `carry` makes one module what another one is.
"""
