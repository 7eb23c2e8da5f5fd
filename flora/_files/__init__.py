"""Files: adapters, their records, fingerprints of a base, safetensors.

Behind `flora.save`, `flora.load`, `flora.checkpoint` and `flora.hf`.  What a saved
adapter contains is in `adapter`, and what it says of each leaf in `records`; `items`
and `compare` are the same for checkpoints.  How files are replaced, and read meanwhile,
is in `atomic`.

It may import `_verbs`, `_trace`, `_algebra` and `_tree`.
"""
