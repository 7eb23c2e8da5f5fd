"""Small models of other packages: name -> `Model`, with random weights.

Every package is imported where it is used, so that this file needs none of them.
Widths are chosen so that no activation has a weight's shape.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from flora._trace.compat import P
from flora._tree.paths import matches
from tests.support.registry import IDS, Model, linen, normal, of_nnx

TOKENS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
ENCODER = TOKENS | WIDTHS | {
    "intermediate_size": 22, "max_position_embeddings": 40, "type_vocab_size": 3,
    "num_labels": 3,
}  # fmt: skip
DECODER = TOKENS | WIDTHS | {"intermediate_size": 22, "max_position_embeddings": 40}
GPT = TOKENS | {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_inner": 22,
                "n_positions": 40}  # fmt: skip
SEQ2SEQ = TOKENS | {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 22,
    "decoder_ffn_dim": 22, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_position_embeddings": 40, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 22, "num_heads": 4}
VISION = WIDTHS | {"intermediate_size": 22, "image_size": 12, "patch_size": 4,
                   "num_labels": 3}  # fmt: skip
IMAGES = functools.partial(normal, 2, 3, 12, 12)


def flax_model(model, config, fields):
    import transformers

    config = getattr(transformers, f"{config}Config")(**fields)
    return getattr(transformers, f"Flax{model}")(config)


def hf(model, config, *args, **fields):
    """A Flax model of transformers, with random weights."""
    module = flax_model(model, config, fields)

    def fn(params, *args):
        return module(*args, params=params).logits

    return Model(fn, module.params, args)


def seq2seq(model, config, source=IDS, settings=None, **fields):
    """An encoder-decoder of transformers."""
    module = flax_model(model, config, fields)

    def fn(params, source, ids):
        return module(source, decoder_input_ids=ids, params=params).logits

    return Model(fn, module.params, (source, IDS[:, :4]), settings=settings or {})


def t5(name, *args, **fields):
    """A layer of T5 without relative positions.

    Those of transformers call `jnp.clip(..., a_max=...)`, which JAX no longer has.
    """
    import transformers

    package = f"transformers.models.{name.lower()}.modeling_flax_{name.lower()}"
    layer = getattr(importlib.import_module(package), f"Flax{name}LayerCollection")
    config = getattr(transformers, f"{name}Config")(**T5, **fields)
    return linen(layer(config, has_relative_attention_bias=False), *args)


def clip():
    import transformers

    text, vision = ENCODER | {"hidden_size": 12}, VISION
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=14
    )
    module = transformers.FlaxCLIPModel(config, input_shape=((1, 1), (1, 12, 12, 3)))

    def fn(params, ids, pixels):
        out = module(ids, pixels, params=params)
        return out.logits_per_image, out.text_embeds, out.image_embeds

    return Model(fn, module.params, (IDS, IMAGES()))


GEMMA = {"num_embed": 31, "embed_dim": 16, "hidden_dim": 22, "num_heads": 4,
         "head_dim": 6, "num_kv_heads": 2}  # fmt: skip
GEMMA4 = {"global_key_size": 8, "global_rope_proportion": 0.25,
          "local_rope_proportion": 1.0}  # fmt: skip
SCALED = {"views": (P.mul,)}  # the model itself computes w * w_scale


def any_of(*globs):
    """A pattern of globs of which some may select nothing: models differ."""
    return lambda path, leaf: matches(globs, path, leaf)


GEMMA_TARGET = any_of("w", "input_embedding", "gating_einsum", "linear", "*embedding",
                "per_layer_embeddings", "altup_*projection_*")  # fmt: skip


def gemma(package, settings=None, **fields):
    """A transformer of the package `gemma`, one local and one global layer."""
    config = importlib.import_module(f"gemma.gm.nn{package}._config")
    kinds = importlib.import_module(f"gemma.gm.nn{package}._modules").AttentionType
    model = importlib.import_module(f"gemma.gm.nn{package}._transformer")
    build = getattr(model, "Gemma3nTransformer", None) or model.Transformer
    fields = {"final_logit_softcap": 30.0, "sliding_window_size": 3,
              "use_post_attn_norm": True, "use_post_ffw_norm": True,
              "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL),
              **fields}  # fmt: skip
    module = build(config=config.TransformerConfig(**GEMMA, **fields),
                   dtype=jnp.float32)  # fmt: skip
    return linen(module, IDS, target=GEMMA_TARGET, settings=settings)


TUNIX = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 22, "num_heads": 4,
         "head_dim": 6, "num_kv_heads": 2}  # fmt: skip
QWEN = TUNIX | {"vocab_size": 31, "rope_theta": 10_000, "norm_eps": 1e-6}
TUNIX_TARGET = any_of(
    "w", "input_embedding", "kernel", "gate_proj", "up_proj", "down_proj",
    "router_logits", "gating_einsum", "linear", "per_layer_input_embedding",
)  # fmt: skip


def tunix(package, name, remat=None, settings=None, **fields):
    """A decoder of tunix: tokens, positions, no cache, a causal mask."""
    module = importlib.import_module(f"tunix.models.{package}.model")
    if remat:
        fields["remat_config"] = module.RematConfig[remat]
    config = module.ModelConfig(**fields)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
    return of_nnx(lambda rngs: getattr(module, name)(config, rngs=rngs),
                  IDS, positions, None, mask, target=TUNIX_TARGET,
                  settings=settings or {})  # fmt: skip


def tunix_gemma(**fields):
    kinds = importlib.import_module("tunix.models.gemma.model").AttentionType
    return tunix("gemma", "Gemma", **TUNIX, num_embed=31, final_logit_softcap=30.0,
                 use_post_attn_norm=True, use_post_ffw_norm=True,
                 attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
                 attn_logits_soft_cap=50.0, sliding_window_size=3)  # fmt: skip


def haiku(forward, *args, settings=None):
    """`forward(hk, *args)`, transformed; parameters and state are the tree."""
    import haiku as hk

    pure = hk.transform_with_state(functools.partial(forward, hk))
    params, state = jax.jit(pure.init)(jax.random.key(0), *args)

    def fn(tree, *args):
        return pure.apply(tree["params"], tree["state"], None, *args)

    tree = {"params": params, "state": state}
    target = any_of("w", "w_i", "w_h", "embeddings")
    return Model(fn, tree, args, target, settings or {})


def haiku_attention(hk, x):
    return hk.MultiHeadAttention(2, 6, w_init_scale=1.0, model_size=11)(x, x, x)


def haiku_recurrent(hk, x, cell):
    core = getattr(hk, cell)(6)
    return hk.dynamic_unroll(core, x, core.initial_state(3))[0]


def haiku_batch_norm(hk, x):
    y = hk.BatchNorm(True, True, 0.9)(hk.Linear(11)(x), is_training=True)
    return hk.Linear(7)(jax.nn.relu(y))


def haiku_transformer(hk, ids):
    def norm(x):
        return hk.LayerNorm(-1, True, True)(x)

    x = hk.Embed(31, 12)(ids)
    for _ in range(2):
        y = norm(x)
        x = x + hk.MultiHeadAttention(2, 8, w_init_scale=1.0, model_size=12)(y, y, y)
        x = x + hk.nets.MLP([22, 12], activation=jax.nn.gelu)(norm(x))
    return hk.Linear(31)(norm(x))


def haiku_resnet(hk, x):
    net = hk.nets.ResNet((1, 1, 1, 1), 7, bottleneck=False,
                         channels_per_group=(3, 4, 5, 6))  # fmt: skip
    return net(x, is_training=True)


# The gradient of a norm of W takes a dense dW.
NORM = {"views": (P.mul, P.div, P.sub, P.square, P.dot_general)}


def equinox(build, *args, call=None, **settings):
    """`build(eqx.nn, key)`, mapped over the batch."""
    import equinox as eqx

    params, static = eqx.partition(
        build(eqx.nn, jax.random.key(0)), eqx.is_inexact_array
    )

    def fn(params, *args):
        model = eqx.combine(params, static)
        return jax.vmap(functools.partial(call, model) if call else model)(*args)

    target = any_of("weight", "weight_ih", "weight_hh")
    return Model(fn, params, args, target, settings)


def equinox_attention(nn, key):
    return nn.MultiheadAttention(2, 8, output_size=11, key=key)


def lstm(cell, x):
    start = jnp.zeros(6), jnp.zeros(6)
    return jax.lax.scan(lambda c, x: (cell(x, c), c[0]), start, x)[1]


def gru(cell, x):
    return jax.lax.scan(lambda c, x: (cell(x, c), c), jnp.zeros(6), x)[1]


def equinox_spectral():
    import equinox as eqx

    def build(key):
        linear = eqx.nn.Linear(5, 11, key=key)
        return eqx.nn.SpectralNorm(linear, "weight", key=key)

    model, state = eqx.nn.make_with_state(build)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        model, fresh = eqx.combine(params, static), jax.tree.map(lambda s: s, state)
        return jax.vmap(lambda x: model(x, fresh)[0])(x)

    return Model(fn, params, (normal(3, 5),), ("weight",), NORM)


def keras(build, *inputs, training=False, **settings):
    """`build(keras.layers)`, called without state; weights by path are the tree."""
    import keras

    model = build(keras.layers)
    model(*inputs)
    params = {v.path: v.value for v in model.trainable_variables}
    rest = [v.value for v in model.non_trainable_variables]

    def fn(params, rest, *inputs):
        values = [params[v.path] for v in model.trainable_variables]
        return model.stateless_call(values, rest, *inputs, training=training)

    target = any_of("*kernel", "*embeddings")
    return Model(fn, params, (rest, *inputs), target, settings)


def keras_attention(layers):
    import keras

    x = keras.Input((3, 8))
    y = layers.MultiHeadAttention(2, 6, name="attention")(x, x)
    return keras.Model(x, layers.GroupQueryAttention(5, 4, 2, name="grouped")(y, y))


def keras_sequential(*names_and_arguments):
    def build(layers):
        import keras

        made = [getattr(layers, n)(*args, **kw) for n, args, kw in names_and_arguments]
        return keras.Sequential(made, name="net")

    return build


def keras_bidirectional(layers):
    import keras

    inner = layers.LSTM(6, return_sequences=True)
    timed = layers.TimeDistributed(layers.Dense(7))
    return keras.Sequential([layers.Bidirectional(inner), timed], name="net")


ENCODERS = {
    "bert": ("BertForSequenceClassification", "Bert", ENCODER),
    "bert masked lm": ("BertForMaskedLM", "Bert", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "Roberta", ENCODER),
    "albert": ("AlbertForSequenceClassification", "Albert",
               ENCODER | {"embedding_size": 12}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBert",
                   TOKENS | {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 22,
                             "max_position_embeddings": 40, "num_labels": 3}),
    "electra": ("ElectraForSequenceClassification", "Electra",
                ENCODER | {"embedding_size": 12}),
    "roformer": ("RoFormerForSequenceClassification", "RoFormer",
                 ENCODER | {"embedding_size": 16}),
    "big bird": ("BigBirdForSequenceClassification", "BigBird",
                 ENCODER | {"attention_type": "original_full"}),
    "gpt2": ("GPT2LMHeadModel", "GPT2", GPT),
    "gpt neo": ("GPTNeoForCausalLM", "GPTNeo",
                TOKENS | {"hidden_size": 16, "num_layers": 2, "num_heads": 4,
                          "intermediate_size": 22, "max_position_embeddings": 40,
                          "attention_types": [[["global", "local"], 1]],
                          "window_size": 3}),
    "gptj": ("GPTJForCausalLM", "GPTJ", GPT | {"rotary_dim": 2}),
    "opt": ("OPTForCausalLM", "OPT",
            DECODER | {"ffn_dim": 22, "word_embed_proj_dim": 12}),
    "bloom": ("BloomForCausalLM", "Bloom",
              TOKENS | {"hidden_size": 16, "n_layer": 1, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "Llama", DECODER | {"num_key_value_heads": 2}),
    "gemma": ("GemmaForCausalLM", "Gemma",
              DECODER | {"num_key_value_heads": 2, "head_dim": 4}),
    "mistral": ("MistralForCausalLM", "Mistral",
                DECODER | {"num_key_value_heads": 2}),
    "xglm": ("XGLMForCausalLM", "XGLM",
             TOKENS | {"d_model": 16, "ffn_dim": 22, "num_layers": 1,
                       "attention_heads": 4, "max_position_embeddings": 40}),
}  # fmt: skip

SEQ2SEQS = {
    "bart": ("BartForConditionalGeneration", "Bart", SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", "MBart", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", "Pegasus", SEQ2SEQ),
    "marian": ("MarianMTModel", "Marian", SEQ2SEQ | {"decoder_vocab_size": 31}),
    "blenderbot": ("BlenderbotForConditionalGeneration", "Blenderbot", SEQ2SEQ),
}  # fmt: skip

IMAGE_MODELS = {
    "vit": ("ViTForImageClassification", "ViT", VISION),
    "beit": ("BeitForImageClassification", "Beit",
             VISION | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2", VISION),
    "resnet": ("ResNetForImageClassification", "ResNet",
               {"embedding_size": 6, "hidden_sizes": [12, 16], "depths": [1, 1],
                "num_labels": 3}),
    "regnet": ("RegNetForImageClassification", "RegNet",
               {"embedding_size": 12, "hidden_sizes": [12, 16], "depths": [1, 1],
                "groups_width": 4, "num_labels": 3}),
}  # fmt: skip

MODELS = {
    **{f"hf {n}": functools.partial(hf, m, c, IDS, **f)
       for n, (m, c, f) in ENCODERS.items()},
    **{f"hf {n}": functools.partial(seq2seq, m, c, **f)
       for n, (m, c, f) in SEQ2SEQS.items()},
    **{f"hf {n}": functools.partial(lambda m, c, f: hf(m, c, IMAGES(), **f), m, c, f)
       for n, (m, c, f) in IMAGE_MODELS.items()},
    "hf t5 encoder": lambda: t5("T5", normal(2, 5, 16), causal=False,
                                feed_forward_proj="gated-gelu"),
    "hf t5 decoder": lambda: t5("T5", normal(2, 5, 16), jnp.ones((2, 5)), None,
                                normal(2, 6, 16, seed=1), causal=True),
    "hf longt5": lambda: t5("LongT5", normal(2, 9, 16), causal=False, local_radius=3),
    "hf clip": clip,
    "hf wav2vec2": lambda: hf(
        "Wav2Vec2ForCTC", "Wav2Vec2", normal(2, 60), **TOKENS, **WIDTHS,
        intermediate_size=22, feat_extract_norm="layer", conv_dim=(8, 10),
        do_stable_layer_norm=True, conv_kernel=(4, 3), conv_stride=(3, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    ),
    "hf whisper": lambda: seq2seq(
        "WhisperForConditionalGeneration", "Whisper", normal(2, 6, 14),
        {"exclude": "encoder/embed_positions/embedding"},  # added, all rows of it
        **SEQ2SEQ | {"num_mel_bins": 6, "max_source_positions": 7,
                     "max_target_positions": 9, "suppress_tokens": None,
                     "begin_suppress_tokens": None},
    ),
    "gemma 2": lambda: gemma("", attn_logits_soft_cap=50.0),
    "gemma 3": lambda: gemma("", use_qk_norm=True, transpose_gating_einsum=True),
    "gemma 3n": lambda: gemma(
        ".gemma3n", SCALED, use_qk_norm=True, use_value_norm=True, use_altup=True,
        transpose_gating_einsum=True, altup_coef_clip=120.0, use_laurel=True,
        laurel_rank=3, per_layer_input_dim=7, scale_plus_one=False,
        activation_sparsity_pattern=(0.95, 0.0),
    ),
    "gemma 4": lambda: gemma(".gemma4", SCALED, per_layer_input_dim=7, **GEMMA4),
    "gemma 4 experts": lambda: gemma(
        ".gemma4", enable_moe=True, num_experts=3, expert_dim=14, top_k_experts=2,
        moe_dense_hidden_dim=22, k_eq_v_global=True, num_global_kv_heads=1, **GEMMA4,
    ),
    "tunix llama3": lambda: tunix("llama3", "Llama3", **QWEN),
    "tunix llama3 remat": lambda: tunix("llama3", "Llama3", "DECODER", **QWEN,
                                        weight_tying=True),
    "tunix qwen2": lambda: tunix("qwen2", "Qwen2", **QWEN),
    "tunix qwen3": lambda: tunix("qwen3", "Qwen3", **QWEN, use_tied_embedding=True),
    "tunix qwen3 remat": lambda: tunix("qwen3", "Qwen3", "BLOCK", **QWEN),
    "tunix qwen3 experts": lambda: tunix("qwen3", "Qwen3", **QWEN, num_experts=3,
                                         num_experts_per_tok=2),
    "tunix gemma": tunix_gemma,
    "tunix gemma3": lambda: tunix("gemma3", "Gemma3", **TUNIX, num_embed=31,
                                  sliding_window_size=3, param_dtype=jnp.float32),
    "tunix gemma4": lambda: tunix("gemma4", "Gemma4", settings=SCALED, **TUNIX,
                                  num_embed=31, sliding_window_size=3,
                                  per_layer_input_dim=7, global_key_size=8),
    "tunix gemma4 experts": lambda: tunix(
        "gemma4", "Gemma4", **TUNIX, num_embed=31, sliding_window_size=3,
        global_key_size=8, enable_moe=True, num_experts=3, num_experts_per_tok=2,
        expert_dim=14, moe_dense_hidden_dim=22,
    ),
    "haiku linear": lambda: haiku(lambda hk, x: hk.Linear(11)(x), normal(3, 5)),
    "haiku mlp": lambda: haiku(lambda hk, x: hk.nets.MLP([11, 7])(x), normal(3, 5)),
    "haiku conv": lambda: haiku(lambda hk, x: hk.Conv2D(7, (3, 2), stride=2)(x),
                                normal(2, 9, 8, 3)),
    "haiku transposed conv": lambda: haiku(
        lambda hk, x: hk.Conv2DTranspose(7, 3, stride=2)(x), normal(2, 5, 6, 3)),
    "haiku depthwise conv": lambda: haiku(
        lambda hk, x: hk.DepthwiseConv2D(3, (3, 2))(x), normal(2, 9, 8, 3)),
    "haiku separable conv": lambda: haiku(
        lambda hk, x: hk.SeparableDepthwiseConv2D(3, 3)(x), normal(2, 9, 8, 3)),
    "haiku embed": lambda: haiku(lambda hk, ids: hk.Embed(31, 8)(ids), IDS),
    "haiku one-hot embed": lambda: haiku(
        lambda hk, ids: hk.Embed(31, 8, lookup_style="ONE_HOT")(ids), IDS),
    "haiku attention": lambda: haiku(haiku_attention, normal(2, 3, 8)),
    "haiku lstm": lambda: haiku(
        functools.partial(haiku_recurrent, cell="LSTM"), normal(4, 3, 5)),
    "haiku gru": lambda: haiku(
        functools.partial(haiku_recurrent, cell="GRU"), normal(4, 3, 5)),
    "haiku batch norm": lambda: haiku(haiku_batch_norm, normal(3, 5)),
    "haiku transformer": lambda: haiku(haiku_transformer, IDS),
    "haiku resnet": lambda: haiku(haiku_resnet, normal(2, 33, 33, 3)),
    "equinox linear": lambda: equinox(
        lambda nn, key: nn.Linear(5, 11, key=key), normal(3, 5)),
    "equinox mlp": lambda: equinox(
        lambda nn, key: nn.MLP(5, 7, 11, 2, key=key), normal(3, 5)),
    "equinox conv": lambda: equinox(
        lambda nn, key: nn.Conv2d(4, 6, 3, stride=2, groups=2, key=key),
        normal(2, 4, 9, 8)),
    "equinox transposed conv": lambda: equinox(
        lambda nn, key: nn.ConvTranspose2d(3, 7, 3, stride=2, key=key),
        normal(2, 3, 5, 6)),
    "equinox embedding": lambda: equinox(
        lambda nn, key: nn.Embedding(31, 8, key=key), IDS,
        call=lambda embed, ids: jax.vmap(embed)(ids)),
    "equinox attention": lambda: equinox(equinox_attention, normal(2, 3, 8),
                                         call=lambda model, x: model(x, x, x)),
    "equinox lstm": lambda: equinox(
        lambda nn, key: nn.LSTMCell(5, 6, key=key), normal(2, 4, 5), call=lstm),
    "equinox gru": lambda: equinox(
        lambda nn, key: nn.GRUCell(5, 6, key=key), normal(2, 4, 5), call=gru),
    "equinox norm": lambda: equinox(
        lambda nn, key: nn.Sequential([nn.LayerNorm(5), nn.Linear(5, 11, key=key)]),
        normal(3, 5)),
    "equinox weight norm": lambda: equinox(
        lambda nn, key: nn.WeightNorm(nn.Linear(5, 11, key=key)), normal(3, 5), **NORM),
    "equinox spectral norm": equinox_spectral,
    "keras attention": lambda: keras(keras_attention, normal(2, 3, 8)),
    "keras batch norm": lambda: keras(
        keras_sequential(("Dense", (11,), {"activation": "relu"}),
                         ("BatchNormalization", (), {}), ("Dropout", (0.1,), {}),
                         ("Dense", (7,), {})),
        normal(3, 5), training=True),
    "keras bidirectional": lambda: keras(keras_bidirectional, normal(2, 4, 5)),
    "keras conv": lambda: keras(
        keras_sequential(("Conv2D", (7, 3), {"strides": 2}),
                         ("DepthwiseConv2D", (2,), {}),
                         ("SeparableConv2D", (6, 2), {}),
                         ("Conv2DTranspose", (5, 3), {})),
        normal(3, 11, 8, 3)),
    "keras einsum": lambda: keras(
        keras_sequential(("EinsumDense", ("abc,cde->abde", (None, 2, 7)), {}),
                         ("EinsumDense", ("abde,def->abf", (None, 6)), {})),
        normal(3, 4, 5)),
    "keras recurrent": lambda: keras(
        keras_sequential(("Embedding", (31, 8), {"mask_zero": True}),
                         ("LSTM", (6,), {"return_sequences": True}),
                         ("GRU", (5,), {})),
        IDS),
}  # fmt: skip
