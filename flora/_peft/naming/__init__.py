"""Which parameter of a PyTorch model is in which leaf of a Flax tree.

names        slots, and the maps that users write
convention   HF's, where nothing is written
renamed      names of another version of transformers
names_match  maps found by values
memory       what a leaf remembers of the file that it came from
"""
