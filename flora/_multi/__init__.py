"""Many adapters of one base: stacks, mixed batches, simultaneous runs, combinations.

Behind `flora.multi`.  It may import all other folders but `_peft`.
"""
