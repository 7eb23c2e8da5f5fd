"""Gemma's own LoRA recipe in Kauldron, with `flora.linen.LoRA` in its place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.linen

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore"),  # of tools that Kauldron imports
]
TARGET = ["*/w", "gating_einsum", "linear"]


def gemma():
    """A small Gemma 3 with random weights; its tokenizer has 13 tokens."""
    from gemma import gm
    from gemma.gm.nn import _config, _modules

    kinds = _modules.AttentionType
    config = _config.TransformerConfig(
        num_embed=13, embed_dim=16, hidden_dim=22, num_heads=4, head_dim=6,
        num_kv_heads=2, final_logit_softcap=None, use_post_attn_norm=True,
        use_post_ffw_norm=True, use_qk_norm=True, sliding_window_size=3,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
    )  # fmt: skip
    return gm.nn.Transformer(config=config, tokens="batch.input", dtype=jnp.float32)


def adapted(**config):
    config = flora.LoraConfig(rank=4, target=TARGET, **config)
    return flora.linen.LoRA(model=gemma(), config=config)


def batches():
    """One batch, again and again."""
    tokens = np.random.default_rng(0).integers(3, 13, (8, 9)).astype(np.int32)
    mask = np.ones((8, 8, 1), np.float32)
    return {"input": tokens[:, :-1], "target": tokens[:, 1:, None], "loss_mask": mask}


def trainer(workdir, steps, model, init=None):
    from kauldron import kd

    select = kd.optim.select("lora")
    tx = kd.optim.partial_updates(optax.adamw(1e-2, weight_decay=0.1), mask=select)
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits="preds.logits", labels="batch.target", mask="batch.loss_mask"
    )
    data = kd.data.InMemoryPipeline(loader=batches, batch_size=8, shuffle=False, seed=0)
    return kd.train.Trainer(
        seed=42,
        workdir=workdir,
        train_ds=data,
        model=model,
        num_train_steps=steps,
        train_losses={"xentropy": loss},
        optimizer=tx,
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=1),
        **({"init_transform": init} if init else {}),
    )


def differ(one, other):
    return jax.tree.map(lambda x, y: bool((x != y).any()), one, other)


def test_gemma_trains_and_resumes_in_kauldron(tmp_path):
    from gemma import gm, peft

    runs = trainer(tmp_path / "a", 2, adapted())
    before = runs.init_state()
    state, _ = runs.train()
    base, factors = (peft.split_params(x.params) for x in (before, state))
    assert not any(jax.tree.leaves(differ(base.original, factors.original)))
    assert all(jax.tree.leaves(differ(base.lora, factors.lora)))
    again = peft.merge_params(*peft.split_params(state.params))
    assert not any(jax.tree.leaves(differ(again, state.params)))
    assert jax.tree.structure(again) == jax.tree.structure(state.params)

    resumed, _ = trainer(tmp_path / "a", 4, adapted()).train()
    through, _ = trainer(tmp_path / "b", 4, adapted()).train()
    assert int(resumed.step) == int(through.step)
    assert not any(jax.tree.leaves(differ(resumed.params, through.params)))
    assert any(jax.tree.leaves(differ(resumed.params, state.params)))

    model, variables = adapted(), {"params": through.params}
    tree = flora.linen.tree(model, variables)
    flora.save(tmp_path / "adapter.safetensors", tree)
    tokens = batches()["input"]
    merged = flora.merge(tree)
    wanted = gemma().apply(merged, tokens).logits
    logits = model.apply(variables, tokens).logits
    assert jnp.abs(logits - wanted).max() < 1e-4 * jnp.abs(wanted).max()

    sampler = gm.text.Sampler(
        model=gemma(),
        params=merged["params"],
        tokenizer=gm.testing.DummyTokenizer(),
        cache_length=32,
        pad_length=8,
    )
    assert isinstance(sampler.sample("Hello world", max_new_tokens=4), str)


def test_gemmas_loader_skips_the_factors(tmp_path):
    from gemma import gm
    from kauldron import kd

    pretrained = gemma().init(jax.random.key(7), batches()["input"])["params"]

    @dataclasses.dataclass(frozen=True)
    class Given(kd.ckpts.InitTransform):
        def transform(self, state):
            assert jax.tree.structure(state.params) == jax.tree.structure(pretrained)
            return state.replace(params=pretrained)

    init = gm.ckpts.SkipLoRA(wrapped=Given())
    state = trainer(tmp_path, 1, adapted(), init).init_state()
    assert "lora" in state.params
    variables, tokens = {"params": state.params}, batches()["input"]
    wanted = gemma().apply({"params": pretrained}, tokens).logits
    assert (adapted().apply(variables, tokens).logits == wanted).all()
