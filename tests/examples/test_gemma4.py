"""Plans of other packages' decoders, and Gemma 4 of Tunix from HF's files and back."""

import importlib
import types

import _tpu
import finetune_gemma4
import jax
import jax.numpy as jnp
import numpy as np
import plan_gemma4
import pytest
from benchmarks._plan import Plan
from flax import nnx
from jax.sharding import PartitionSpec as P
from plan_gemma4 import GLOBAL, LOCAL, MODELS

import flora
import flora.hf
import flora.nnx
import flora.peft

# The warnings of other packages are theirs.
THIRD_PARTY = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]


def third_party(test):
    for mark in THIRD_PARTY:
        test = mark(test)
    return test


# What each kind of layer adds to a step, and what there is without any.
COSTS = {LOCAL: 3, GLOBAL: 7}


def linear(kinds):
    n = 100 + sum(COSTS[kind] for kind in kinds)
    return Plan("", 1.0, temp=n, cycles=4 * n)


KINDS = (*[LOCAL] * 5, GLOBAL) * 10
ALL = 100 + 50 * 3 + 10 * 7


def test_cycles_of_a_stack_are_summed_from_one_layer_and_two():
    asked = []

    def compiled(kinds):
        asked.append(kinds)
        return linear(kinds)

    assert plan_gemma4.summed(compiled, KINDS) == (4 * ALL, 3.0)
    assert asked == [(LOCAL,), (LOCAL, LOCAL), (LOCAL, GLOBAL)]
    assert plan_gemma4.summed(linear, (LOCAL,)) == (4 * 103, 1.0)


def test_a_token_is_predicted_from_those_before_it():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 5, 7)), rng.integers(0, 7, (2, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = [-np.log(p[i, t, ids[i, t + 1]]) for i in range(2) for t in range(4)]
    got = plan_gemma4.next_token_loss(jnp.asarray(logits), jnp.asarray(ids))
    np.testing.assert_allclose(got, np.mean(nats), rtol=1e-5)


# Layouts of the layers of each kind, in and out axes.
LAYOUTS = {
    "attn/q_einsum/w": ((1,), (0, 2)),
    "attn/k_einsum/w": ((1,), (0, 2)),
    "attn/kv_einsum/w": ((2,), (0, 1, 3)),
    "attn/attn_vec_einsum/w": ((0, 1), (2,)),
    "mlp/gate_proj/kernel": ((0,), (1,)),
    "mlp/up_proj/kernel": ((0,), (1,)),
    "mlp/down_proj/kernel": ((0,), (1,)),
}


@third_party
def test_every_weight_of_gemma_4_31b_is_read_right():
    kinds = (LOCAL, GLOBAL)
    loss, state = MODELS["gemma4-31b"].build(kinds)
    args = plan_gemma4.arguments(2, 16)
    rows = {x.path: x for x in flora.coverage(loss, state, *args).rows}
    wide = {path for path, x in rows.items() if len(x.shape) > 1}
    assert {rows[path].status for path in wide} == {"factored"}
    assert len(wide) == 1 + 6 + 6
    for path in wide - {"embedder/input_embedding"}:
        layout = rows[path].layout
        assert (layout.in_, layout.out) == LAYOUTS[path.split("/", 2)[2]], path
    assert rows["layers/1/attn/k_einsum/w"].shape == (4, 5376, 512)


@third_party
def test_deepminds_own_is_read_the_same():
    linen = MODELS["gemma4-31b-linen"]
    loss, params = linen.build((LOCAL, GLOBAL))
    rows = flora.coverage(loss, params, *plan_gemma4.arguments(2, 16)).rows
    wide = {x.path.removeprefix("params/"): x for x in rows if len(x.shape) > 1}
    assert {x.status for x in wide.values()} == {"factored"}
    for path, x in wide.items():
        if "attn" in path:
            known = LAYOUTS[path.split("/", 1)[1]]
            assert (x.layout.in_, x.layout.out) == known, path
    gating = wide["layer_0/mlp/gating_einsum"].layout
    assert (gating.in_, gating.out) == ((2,), (0, 1))
    assert wide["layer_1/attn/k_einsum/w"].shape == (4, 5376, 512)


@third_party
@pytest.mark.parametrize("name", MODELS)
def test_norms_come_first_and_layers_are_as_many_as_the_package_has(name):
    model = MODELS[name]
    _, state = model.build(model.kinds[:1])
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in flat]
    assert [x for x in paths if x.startswith(model.first_norm)]
    if name == "gemma4-31b-linen":
        gm = importlib.import_module("gemma.gm")
        kinds = [x.name for x in gm.nn.Gemma4_31B().config.attention_types]
    else:
        package, _, sizes = model.build.args
        module = importlib.import_module(f"tunix.models.{package}.model")
        config = getattr(module.ModelConfig, sizes)()
        pattern = getattr(config, "attention_pattern", None)
        one = [x.name for x in pattern] if pattern else [model.kinds[0]]
        kinds = one * (config.num_layers // len(one))
    assert [*model.kinds] == kinds


@third_party
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_factors_lie_as_the_metadata_of_the_weights_says(base):
    mesh = _tpu.mesh("v5e:2x2", fsdp=2, tp=2)
    case = plan_gemma4.Case(MODELS["gemma4-31b"], mesh, base, 2, 32)
    _, adapted = case.adapted((LOCAL, GLOBAL))
    kv = adapted["layers"][0]["attn"]["kv_einsum"]["w"].get_value()
    o = adapted["layers"][1]["attn"]["attn_vec_einsum"]["w"].get_value()
    assert kv.a.sharding.spec == P("fsdp", None)
    assert kv.b.sharding.spec == P(None, None, "tp", None)
    assert o.a.sharding.spec == P("tp", None, None)
    assert o.b.sharding.spec == P(None, "fsdp")
    arrays = jax.tree.leaves(kv.base)
    assert arrays[0].dtype == {"bf16": jnp.bfloat16, "int8": jnp.int8}[base]
    assert arrays[0].sharding.spec == P(None, "tp", "fsdp", None)
    assert {x.sharding.mesh for x in jax.tree.leaves(adapted)} == {mesh}


@third_party
@pytest.mark.tpu_compiler
def test_models_see_the_chips_that_they_are_planned_for():
    mesh = _tpu.mesh("v5e:2x2", fsdp=2, tp=2)
    loss, state = MODELS["gemma4-31b"].build((LOCAL,))
    args = plan_gemma4.arguments(2, 32, mesh)
    here = str(jax.make_jaxpr(loss)(state, *args))
    with plan_gemma4.as_on(mesh):
        there = str(jax.make_jaxpr(loss)(state, *args))
    assert "sharding_constraint" in there
    assert "sharding_constraint" not in here
    assert jax.devices()[0].platform == "cpu"


@third_party
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_tunixs_module_adapts_on_chips_that_are_not_there(dropout):
    mesh, key = _tpu.mesh("v5e:2x2", fsdp=2, tp=2), jax.random.key(0)
    config = finetune_gemma4.tunix().ModelConfig(**two_layers())
    target = finetune_gemma4.TARGET
    settings = flora.LoraConfig(rank=2, target=target, dropout=dropout)
    ids, positions, mask = plan_gemma4.arguments(2, 8, mesh)
    with plan_gemma4.as_on(mesh):
        model = nnx.eval_shape(
            lambda: finetune_gemma4.tunix().Gemma4(config, rngs=nnx.Rngs(0))
        )
        model = flora.nnx.adapt(key, settings, model, ids, positions, None, mask)
    kv = model.layers[0].attn.kv_einsum
    assert (kv.w_lora_a.shape, kv.w_lora_b.shape) == ((32, 2), (2, 2, 4, 8))
    assert isinstance(kv.w_lora_a.get_value(), jax.ShapeDtypeStruct)


@third_party
@pytest.mark.tpu_compiler
@pytest.mark.by_hand
def test_a_plan_of_three_layers(monkeypatch, capsys):
    tiny = {"num_embed": 1024, "embed_dim": 256, "hidden_dim": 512, "head_dim": 128}
    config = importlib.import_module("tunix.models.gemma4.model").ModelConfig
    whole = config.gemma4_31b()
    small = {k: tiny.get(k, getattr(whole, k)) for k in whole.__slots__}
    monkeypatch.setattr(config, "gemma4_31b", lambda: config(**small))
    options = ["--topology", "v5e:2x2", "--mesh", "4x1", "--tokens", "128"]
    plan, frozen = plan_gemma4.main([*options, "--cycles", "--layers", "3"])
    assert plan.mesh == "3 layers"
    assert plan.fits("v5e")
    assert plan.cycles > frozen.cycles > 0
    assert plan.base + plan.adapter + plan.optimizer + plan.temp <= 1.1 * plan.peak
    assert sum(plan.collectives.values()) > 0
    assert "Planned in" in capsys.readouterr().out


SIZES = finetune_gemma4.TINY | {"num_layers": 2}


def two_layers():
    kinds = finetune_gemma4.tunix().AttentionType
    pattern = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
    return SIZES | {"attention_pattern": pattern}


@third_party
def test_weights_are_those_that_tunix_itself_loads(tmp_path):
    from tunix.models.gemma4 import model as gemma4
    from tunix.models.gemma4 import params_safetensors

    config = gemma4.ModelConfig(**two_layers())
    like, rng = finetune_gemma4.plain(config)[1], np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), like)
    names = finetune_gemma4.tensors(config)
    flora.hf.save(tmp_path, state, names)
    theirs = params_safetensors.create_model_from_safe_tensors(str(tmp_path), config)
    want = dict(nnx.to_flat_state(nnx.state(theirs)))
    got = dict(nnx.to_flat_state(flora.hf.load(tmp_path, like, names)))
    assert {*got} == {*want}
    for path, x in got.items():
        np.testing.assert_array_equal(x[...], want[path][...], err_msg=str(path))


@third_party
@pytest.mark.slow
def test_a_run_trains_goes_on_over_another_mesh_and_leaves_by_hfs_names(tmp_path):
    from tunix.models.gemma4.model import ModelConfig

    losses = finetune_gemma4.run(tmp_path, two_layers(), steps=6)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    config = ModelConfig(**two_layers())
    logits, like = finetune_gemma4.plain(config)
    names = finetune_gemma4.tensors(config, "model.")
    merged = flora.hf.load(tmp_path / "merged", like, names)
    wrote = np.load(tmp_path / "logits.npz")
    got = jax.jit(logits)(merged, wrote["ids"])
    np.testing.assert_allclose(got, wrote["adapted"], atol=1e-5 * abs(got).max())
    assert abs(wrote["adapted"] - wrote["base"]).max() > 0.1
    base = flora.hf.load(tmp_path / "base", like, names)
    modules = finetune_gemma4.modules("model.")
    args = (jnp.asarray(wrote["ids"]),)
    back = flora.peft.load(
        tmp_path / "adapter", base, names=modules, fn=logits, args=args
    )
    got = jax.jit(flora.lora(logits))(back, wrote["ids"])
    np.testing.assert_allclose(got, wrote["adapted"], atol=1e-5 * abs(got).max())


def test_the_31b_has_the_names_of_the_hub():
    config = types.SimpleNamespace(**finetune_gemma4.TINY | {"num_layers": 60})
    names = finetune_gemma4.tensors(config)
    keys = {key for tensor in names.values() for key in tensor.names}
    assert len(keys) == 2 + 60 * (4 + 3 + 6 + 1) - 10
    assert "model.language_model.layers.4.self_attn.v_proj.weight" in keys
    assert "model.language_model.layers.5.self_attn.v_proj.weight" not in keys
