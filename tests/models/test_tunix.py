"""Tunix's own trainers, sampler and weight maps on modules that flora adapted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import flora
import flora.nnx
from tests.support import tunix_models as small

# Their warnings are theirs.
pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

models = pytest.mark.parametrize("name", small.NAMES)


def trainer(model, tx=None, folder=None, steps=None, every=1, kind=None, **fields):
    """Tunix's `PeftTrainer` of a model, and the losses that it reports."""
    import orbax.checkpoint as ocp
    from tunix.sft import peft_trainer

    if folder is not None:
        fields |= {
            "checkpoint_root_directory": str(folder),
            "checkpointing_options": ocp.CheckpointManagerOptions(
                save_interval_steps=every, enable_async_checkpointing=False
            ),
        }
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=2, max_steps=steps, pbar_description=None, **fields
    )
    tx = tx or optax.adamw(3e-2)
    result = (kind or peft_trainer.PeftTrainer)(model, tx, config)
    return result.with_gen_model_input_fn(small.model_input)


def history(of, name="loss", mode="train"):
    return np.asarray(of.metrics_logger.get_metric_history("", name, mode))


def by_flora(model, tx, batches):
    """The losses and the tree of flora's pure functions, without any module."""
    from tunix.sft import peft_trainer

    def loss_fn(tree, batch):
        def run(tree, *args):
            return nnx.merge(graphdef, tree)(*args)

        def call(*args):
            return flora.lora(run)(tree, *args)

        return peft_trainer._default_loss_fn(call, **small.model_input(batch))

    tree = flora.nnx.tree(model)
    graphdef = nnx.graphdef(flora.nnx.merge(model))
    tx = flora.optimizer(tx, tree)

    @jax.jit
    def step(tree, state, batch):
        loss, grads = flora.value_and_grad(loss_fn)(tree, batch)
        updates, state = tx.update(grads, state, tree)
        return flora.apply_updates(tree, updates), state, loss

    state, losses = tx.init(tree), []
    for batch in batches:
        tree, state, loss = step(tree, state, batch)
        losses.append(float(loss))
    return np.array(losses), tree


def base_of(name, **fields):
    """A decoder; no test changes it, and each checks that flora and Tunix do not."""
    return small.decoder(name, **fields)


def frozen(model):
    """All arrays of a module but its factors."""
    return small.names(nnx.state(model, nnx.Not(nnx.LoRAParam)))


@models
def test_every_matrix_has_factors_named_as_tunix_names_them(name):
    base = base_of(name)
    model = small.adapted(base)
    weights = {k for k, x in small.names(nnx.state(base)).items() if x.ndim > 1}
    assert len(weights) == {"Llama3": 16, "Qwen3": 16, "Gemma3": 13}[name]
    assert isinstance(model, type(base))
    found = small.names(nnx.state(model, nnx.LoRAParam))
    assert set(found) == {f"{w}_lora_{x}" for w in weights for x in "ab"}
    graphdef, state = nnx.split(base)
    covered = flora.coverage(
        lambda state, *args: nnx.merge(graphdef, state)(*args),
        state,
        *small.call_args(),
    )
    factored = {row.path for row in covered.rows if row.status == "factored"}
    assert {path.replace("/", ".") for path in factored} == weights


@models
def test_peft_trainer_gives_the_losses_of_the_pure_function(name):
    base, batches = base_of(name), small.batches(3) * 4
    model, before = small.adapted(base), small.names(nnx.state(base))
    want, tree = by_flora(model, optax.adamw(3e-2), batches)
    run = trainer(model)
    run.train(batches, batches[:3])
    np.testing.assert_allclose(history(run), want, rtol=1e-5)
    for got, x in zip(
        jax.tree.leaves(flora.split(flora.nnx.tree(model))[1]),
        jax.tree.leaves(flora.split(tree)[1]),
        strict=True,
    ):
        np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-4)
    assert small.same(frozen(model), before)
    assert small.same(nnx.state(base), before)
    evals = history(run, mode="eval")
    assert evals[-1] < evals[0]
    assert (history(run, "grad_norm") > 0).all()
    np.testing.assert_allclose(history(run, "perplexity"), np.exp(want), rtol=1e-4)
    moved = small.names(nnx.state(model, nnx.LoRAParam))
    assert all(np.any(x) for key, x in moved.items() if key.endswith("_b"))


@pytest.mark.parametrize(
    "name",
    ["Llama3", *(pytest.param(x, marks=pytest.mark.by_hand) for x in small.NAMES[1:])],
)
def test_a_mesh_changes_no_loss(name):
    from tunix.rl import reshard, utils

    # Widths that the axes divide, without which Tunix shards nothing.
    fields = {"embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8}
    words = {"num_embed" if name == "Gemma3" else "vocab_size": 32}
    base, batches = base_of(name, **fields, **words), small.batches(6)
    want, _ = by_flora(small.adapted(base), optax.adamw(3e-2), batches)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
    with mesh:
        base = reshard.reshard_model_to_mesh(base, mesh)
        model = reshard.reshard_model_to_mesh(small.adapted(base), mesh)
        run = trainer(model)
        run.train(batches)
    np.testing.assert_allclose(history(run), want, rtol=1e-4)
    assert utils.get_pytree_mesh_info(nnx.state(model)) == mesh
    a = model.layers[0].mlp.down_proj.kernel_lora_a
    b = model.layers[0].mlp.down_proj.kernel_lora_b
    assert (a.sharding.spec, b.sharding.spec) == (P("tp"), P(None, "fsdp"))


def test_gradients_are_accumulated():
    batches = small.batches(8)
    model = small.adapted(base_of("Llama3"))
    steps = optax.MultiSteps(optax.adamw(3e-2), 2).gradient_transformation()
    want, _ = by_flora(model, steps, batches)
    run = trainer(model, gradient_accumulation_steps=2)
    run.train(batches)
    np.testing.assert_allclose(history(run), want.reshape(4, 2).mean(1), rtol=1e-5)
    assert run.train_steps == 4


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("Llama3", "DECODER"),
        *(
            pytest.param(*x, marks=pytest.mark.by_hand)
            for x in [
                ("Llama3", "BLOCK"),
                ("Qwen3", "BLOCK"),
                ("Qwen3", "DECODER"),
                ("Gemma3", "BLOCK"),
                ("Gemma3", "DECODER"),
            ]
        ),
    ],
)
def test_a_model_that_remats_trains_as_one_that_does_not(name, remat):
    batches = small.batches(4)
    losses = []
    for option in (None, remat):
        model = small.adapted(base_of(name, remat=option))
        graphdef, state = nnx.split(model)
        jaxpr = jax.make_jaxpr(
            lambda state, *args, graphdef=graphdef: nnx.merge(graphdef, state)(*args)
        )(state, *small.call_args())
        assert ("remat" in str(jaxpr)) == (option is not None)
        run = trainer(model)
        run.train(batches)
        losses.append(history(run))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["Llama3", *(pytest.param(x, marks=pytest.mark.by_hand) for x in small.NAMES[1:])],
)
def test_a_resumed_run_continues_exactly(name, tmp_path):
    import orbax.checkpoint as ocp

    base, batches = base_of(name), small.batches(6)
    whole = small.adapted(base)
    trainer(whole, folder=tmp_path / "whole").train(batches)

    trainer(small.adapted(base), folder=tmp_path / "cut", steps=3).train(batches)
    kept = ocp.PyTreeCheckpointer().metadata(tmp_path / "cut/3/model_params")
    factors = jax.tree.leaves(nnx.state(whole, nnx.LoRAParam))
    assert len(jax.tree.leaves(kept.item_metadata.tree)) == len(factors)
    resumed = small.adapted(base, key=7)  # other factors: the checkpoint's replace them
    run = trainer(resumed, folder=tmp_path / "cut")
    assert run.train_steps == 3
    run.train(batches)
    assert small.same(nnx.state(resumed), nnx.state(whole))
    assert not small.same(nnx.state(whole), nnx.state(small.adapted(base)))


def test_a_whole_checkpoint_continues_exactly_with_dropout(tmp_path):
    from tunix.sft import checkpoint_manager

    batches = small.batches(6)
    model = small.adapted(base_of("Llama3"), dropout=0.3)
    first = trainer(model)
    first.is_managed_externally = True  # so that it takes all that it is given
    first.train(batches[:3])
    folder = str(tmp_path / "whole")
    manager = checkpoint_manager.CheckpointManager(folder)
    assert manager.save(3, first.model, first.optimizer, force=True)
    manager.close()
    before = history(first)
    first.train(batches[3:])

    other = small.adapted(base_of("Llama3", seed=5), key=7, dropout=0.3)
    again = trainer(other)
    again.is_managed_externally = True
    manager = checkpoint_manager.CheckpointManager(folder)
    assert manager.maybe_restore(other, again.optimizer)[0] == 3
    again.train(batches[3:])
    assert small.same(nnx.state(other, nnx.Param), nnx.state(model, nnx.Param))
    assert len(before) < len(history(first))


def sampler(model):
    from tunix.generate import sampler

    config = model.config
    cache = sampler.CacheConfig(
        24, config.num_layers, config.num_kv_heads, config.head_dim
    )
    return sampler.Sampler(model, small.Tokenizer(), cache)


def sample(of, **settings):
    settings = {"max_generation_steps": 12, "return_logprobs": True} | settings
    out = of(["5 9 4", "7 3 11 30 8"], **settings)
    return [np.asarray(x) for x in out.tokens], [np.asarray(x) for x in out.logprobs]


@models
def test_the_sampler_gives_the_merged_models_tokens(name):
    model = small.trained(base_of(name))
    merged = flora.nnx.merge(model)
    for settings in ({}, {"temperature": 0.9, "top_p": 0.95, "seed": 3}):
        got, want = (sample(sampler(m), **settings) for m in (model, merged))
        for x, y in zip(*(tokens for tokens, _ in (got, want)), strict=True):
            np.testing.assert_array_equal(x, y)
        for x, y in zip(*(logps for _, logps in (got, want)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


def test_the_sampler_takes_factors_alone():
    base = base_of("Llama3")
    model, fresh = small.trained(base), small.adapted(base)
    of = sampler(fresh)
    before, want = sample(of)[0], sample(sampler(flora.nnx.merge(model)))[0]
    plain = sample(sampler(base))[0]
    assert all(map(np.array_equal, before, plain))
    of.transformer_state = nnx.variables(model, nnx.LoRAParam)
    after = sample(of)[0]
    assert all(map(np.array_equal, after, want))
    assert not all(map(np.array_equal, after, before))
    of.transformer_state = nnx.variables(fresh)  # the whole of it
    assert all(map(np.array_equal, sample(of)[0], before))


def preferences(count, rows=2, length=4):
    from tunix.sft.dpo import dpo_trainer

    draw = np.random.default_rng(0)

    def ids(low, high):
        return draw.integers(low, high, (rows, length)).astype("int32")

    ones = np.ones((rows, length), "int32")
    return [
        dpo_trainer.TrainingInput(
            prompt_ids=ids(3, 31),
            prompt_mask=ones,
            chosen_ids=ids(3, 15),
            chosen_mask=ones,
            rejected_ids=ids(16, 31),
            rejected_mask=ones,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
def test_dpo_prefers_what_was_chosen_with_the_base_as_reference(algorithm):
    from tunix.sft.dpo import dpo_trainer

    base = base_of("Llama3")
    model, before = small.adapted(base), small.names(nnx.state(base))
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=100, algorithm=algorithm, pbar_description=None, beta=0.5
    )
    ref = base if algorithm == "dpo" else None
    run = dpo_trainer.DPOTrainer(model, ref, optax.adamw(1e-2), config)
    data = preferences(1) * 6
    run.train(data)
    if algorithm == "dpo":  # at first policy and reference are one
        assert history(run)[0] == pytest.approx(np.log(2), abs=1e-6)
        assert history(run, "rewards/margin")[0] == pytest.approx(0, abs=1e-5)
    assert history(run, "rewards/margin")[-1] > history(run, "rewards/margin")[0]
    assert history(run)[-1] < history(run)[0]
    assert small.same(nnx.state(base), before)
    assert small.same(frozen(model), before)
    example = run._prepare_inputs(data[0])
    options = {"algorithm": algorithm, "beta": 0.5}
    got, want = (
        dpo_trainer.dpo_loss_fn(m, example, **options)[0]
        for m in (model, flora.nnx.merge(model))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def cluster(model, base, mesh, tx=None, steps=3):
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    Role = rl_cluster.Role
    return rl_cluster.RLCluster(
        actor=model,
        reference=base,
        tokenizer=small.Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={
                role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)
            },
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=tx or optax.adamw(3e-2),
                eval_every_n_steps=100,
                max_steps=steps,
                pbar_description=None,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=6, max_prompt_length=4, kv_cache_size=16,
                temperature=1.0, top_p=1.0, top_k=None,
            ),
        ),
    )  # fmt: skip


def rewards(prompts, completions, **_):
    """The share of small numbers."""
    words = [[int(w) for w in text.split()] for text in completions]
    return [float(np.mean([w < 16 for w in ws])) if ws else 0.0 for ws in words]


def test_grpo_with_the_base_as_reference():
    from tunix.rl import reshard, utils
    from tunix.rl.grpo import grpo_learner

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    base = reshard.reshard_model_to_mesh(base_of("Llama3"), mesh)
    model, before = small.adapted(base), small.names(nnx.state(base))
    start = small.names(nnx.state(model, nnx.LoRAParam))
    of = cluster(model, base, mesh)
    reference = of.inference_worker.get_model("reference")
    assert utils.is_sharing_backbone(reference, of.actor_trainer.model)
    assert utils.is_sharing_weights(of.actor_trainer.model, of.rollout.model())
    learner = grpo_learner.GRPOLearner(
        rl_cluster=of,
        reward_fns=rewards,
        algo_config=grpo_learner.GRPOConfig(num_generations=4, beta=0.1),
    )
    data = [{"prompts": np.array(["5 9", "7 3", "11 4"])} for _ in range(3)]
    learner.train(data)
    actor = of.actor_trainer.model
    assert of.actor_trainer.train_steps == 3
    assert isinstance(actor, type(base))
    assert small.same(frozen(actor), before)
    assert small.same(nnx.state(reference), before)
    assert small.same(nnx.state(base), before)
    assert not small.same(nnx.state(actor, nnx.LoRAParam), start)
    kl = of.actor_trainer.metrics_logger.get_metric_history("actor", "kl", "train")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-6
    rolled, merged = of.rollout.model(), flora.nnx.merge(actor)
    np.testing.assert_allclose(
        rolled(*small.call_args())[0], merged(*small.call_args())[0], atol=1e-5
    )


LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
EINSUMS = "|.*q_einsum|.*kv_einsum|.*attn_vec_einsum"


@models
def test_names_and_shapes_are_those_that_qwix_gives(name):
    import qwix

    provider = qwix.LoraProvider(module_path=LINEAR + EINSUMS, rank=3, alpha=6)
    base = base_of(name)
    theirs = qwix.apply_lora_to_model(base_of(name), provider, **base.get_model_input())
    got, want = (
        {k: (x.shape, x.dtype) for k, x in small.names(s).items()}
        for s in (nnx.state(m, nnx.LoRAParam) for m in (small.adapted(base), theirs))
    )
    assert want.items() <= got.items()
    beyond = {k.rsplit("_lora_", 1)[0] for k in got.keys() - want.keys()}
    assert beyond == {"embedder.input_embedding"} | (
        set() if name == "Gemma3" else {"lm_head.w"}
    )


def served(state, mappings):
    """Zeros for the arrays of a server, by the names that a map gives them."""
    flat = {}
    for source, x in small.names(state).items():
        target = mappings[re.sub(r"\.\d+\.", ".*.", source)][0]
        layer = re.search(r"\.(\d+)\.", source)[1]
        path = target.replace("*", layer).split(".")
        flat[tuple(path)] = nnx.Param(jnp.zeros(x.shape))
    return nnx.State.from_flat_path(flat)


@pytest.mark.parametrize("name", ["Llama3", "Qwen3"])
def test_factors_go_where_the_map_to_vllm_says(name):
    from tunix.generate import mappings, utils

    target = ("*_proj/w", "*_proj/kernel")
    model = small.trained(base_of(name), target=target)
    maps = mappings.MappingConfig.build(model=model, backend="vllm_jax")
    sources = maps.lora_to_hf_mappings
    factors = nnx.state(model, nnx.LoRAParam)
    assert {re.sub(r"\.\d+\.", ".*.", k) for k in small.names(factors)} == set(sources)
    weights = {re.sub(r"\.\d+\.", ".*.", k) for k in frozen(model)}
    assert weights <= set(maps.to_hf_mappings)
    there = utils.transfer_state_with_mappings(
        factors,
        served(factors, sources),
        key_mappings=sources,
        transpose_keys=maps.to_hf_transpose_keys,
    )
    arrays = small.names(there)
    for source, x in small.names(factors).items():
        tail = source.split("attn.")[-1].split("mlp.")[-1].split(".")[0]
        layer, which = re.search(r"\.(\d)\..*_lora_(.)$", source).groups()
        (key,) = (
            k
            for k in arrays
            if f".{layer}." in k and f".{tail}." in k and k.endswith(f"_lora_{which}")
        )
        np.testing.assert_array_equal(arrays[key], x)


@pytest.mark.parametrize("name", ["Llama3", "Qwen3"])
def test_the_map_to_sglang_has_every_factor(name):
    model = small.trained(base_of(name), target=("*_proj/w", "*_proj/kernel"))
    maps = type(model).lora_to_hf_mappings("sglang_jax")
    turned = type(model).lora_to_hf_transpose_keys("sglang_jax")
    factors = small.names(nnx.state(model, nnx.LoRAParam))
    assert {re.sub(r"\.\d+\.", ".*.", k) for k in factors} == set(maps) == set(turned)
    for key, x in factors.items():  # SGLang has one more axis in front
        assert x.ndim + 1 == len(turned[re.sub(r"\.\d+\.", ".*.", key)])


@models
def test_tunix_merges_the_factors_as_flora_does(name, tmp_path):
    import safetensors.numpy
    from tunix.models import safetensors_saver

    def flat(name, x):
        ins = {"o_proj": 2, "attn_vec_einsum": 2}.get(name.split(".")[-1], 1)
        return np.ascontiguousarray(x.reshape(np.prod(x.shape[:ins]), -1))

    base = base_of(name)
    target = ("*_proj/w", "*_proj/kernel", "attn_vec_einsum/w")
    target = [t for t in target if name != "Gemma3" or t != "*_proj/w"]
    target = [t for t in target if name == "Gemma3" or t != "attn_vec_einsum/w"]
    model = small.trained(base, target=target)
    factors = nnx.state(model, nnx.LoRAParam)
    owners = {k.rsplit(".", 1)[0] for k in small.names(factors)}

    def of(model):
        named = {
            k.rsplit(".", 1)[0]: x for k, x in small.names(nnx.state(model)).items()
        }
        return {k: flat(k, named[k]) for k in owners}

    (tmp_path / "base").mkdir()
    safetensors.numpy.save_file(of(base), tmp_path / "base/model.safetensors")
    safetensors_saver.save_lora_merged_model_as_safetensors(
        str(tmp_path / "base"), str(tmp_path / "out"), model, 3, 6, lambda path: path
    )
    got = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    for key, want in of(flora.nnx.merge(model)).items():
        np.testing.assert_allclose(got[key], want, atol=1e-5)
        assert abs(want - of(base)[key]).max() > 1e-2
