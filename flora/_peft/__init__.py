"""Adapters of Hugging Face PEFT: its files, keys, names and formulas.

Behind `flora.peft`.

    both ways   file: the two files; config: adapter_config.json, with lora_alpha, r and
                their patterns; keys: the keys of tensors; names, convention: modules
                and leaves
    loading     load, targets, layouts, factors; residual for PiSSA and OLoRA
    saving      parts, save; serving for vLLM and SGLang

It may import all other folders but `_multi`.
"""
