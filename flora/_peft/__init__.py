"""Adapters of Hugging Face PEFT: its files, keys, names and formulas.

Behind `flora.peft`.

    both ways   file: the two files; config: adapter_config.json, with lora_alpha, r and
                their patterns (regex, targets); keys: the keys of tensors
    loading     load: which leaf each tensor belongs to; nodes: the leaves made of them;
                ignored, layouts, factors
    saving      save, parts; serving for vLLM and SGLang
    leaves      parameters of experts, ties of two modules, whole ones
    naming/     which module of PyTorch lies in which leaf
    kinds/      what is more than W + scale A B of a linear layer, and starts that
                changed the base

It may import all other folders but `_multi`.
"""
