"""Adapters of Hugging Face PEFT: its files, keys, names and formulas.

Behind `flora.peft`.  It may import everything below but `_multi`.
"""
