"""Tiny models of many architectures, as transformers builds them, without weights."""

# A few words of vocabulary, a few features: one second a model.
_SIZES = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
_WORDS = _SIZES | {"max_position_embeddings": 16, "pad_token_id": 0}
_IMAGES = {k: v for k, v in _SIZES.items() if k != "vocab_size"} | {
    "image_size": 8, "patch_size": 4, "num_channels": 3}  # fmt: skip
_T5 = {
    "vocab_size": 17, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2,
    "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 17, "num_mel_bins": 5, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "d_model": 8, "max_source_positions": 8,
    "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
# (class of the model, class of its config, what differs from the config's defaults)
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _WORDS | {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _WORDS | {"num_key_value_heads": 1}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _WORDS | {
        "num_key_value_heads": 1, "head_dim": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _WORDS),
    "opt": ("OPTForCausalLM", "OPTConfig", _WORDS | {
        "ffn_dim": 12, "word_embed_proj_dim": 8}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _WORDS),
    "bloom": ("BloomForCausalLM", "BloomConfig", {
        "vocab_size": 17, "hidden_size": 8, "n_layer": 2, "n_head": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 17, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _WORDS | {
        "num_key_value_heads": 1, "num_local_experts": 3}),
    "qwen2 moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _WORDS | {
        "num_key_value_heads": 1, "num_experts": 3, "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 6}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", _T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": ("BertForSequenceClassification", "BertConfig", _WORDS),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", _WORDS),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {
        "vocab_size": 17, "dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2,
        "max_position_embeddings": 16}),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGES),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGES),
    "dinov2": ("Dinov2Model", "Dinov2Config", _IMAGES),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {
        "embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1],
        "layer_type": "basic"}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
}  # fmt: skip


def _plain(torch):
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.conv = nn.Conv1d(6, 6, 3)
            self.wide = nn.Conv2d(6, 4, (3, 1))
            self.norm = nn.BatchNorm1d(6)
            self.blocks = nn.Sequential(
                nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False)
            )
            self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))

    return Net()


def build(kind, seed=0):
    """A model of that architecture in float64, its weights drawn."""
    import torch
    import transformers

    torch.manual_seed(seed)
    if kind == "plain":
        model = _plain(torch)
    else:
        name, config, settings = KINDS[kind]
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    model = model.double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model
