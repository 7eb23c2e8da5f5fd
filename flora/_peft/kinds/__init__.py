"""Kinds of PEFT's adapters that are more than plain LoRA of a layer, a module each.

of the config   activated (aLoRA), bias (lora_bias), diagonal (BD-LoRA), kasa,
replicated (layer_replication), tokens (trainable tokens)
of the layer    attention and twice (nn.MultiheadAttention), groups (convolutions)
of the start    start and residual: PiSSA, OLoRA and others that changed the base
"""
