"""Files: adapters, their records, fingerprints of a base, safetensors.

Behind `flora.save`, `flora.load`, `flora.checkpoint` and `flora.hf`.  It may import
`_verbs` and what is below, no other folder beside it.
"""
