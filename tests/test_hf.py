"""Base weights from HF's files, and the decoder that they are for."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from language_models import hf_llama
from language_models.llama import Cache, Llama, empty_cache
from language_models.llama_config import LlamaConfig, frequencies

import flora
import flora.hf
from flora._files import safetensors
from flora.hf import Tensor
from tests.support import under_fire
from tests.support.checkpoints import mesh, same
from tests.support.decoders import SMALL, close, decoder, drawn, oracle, weights

IDS = np.random.default_rng(3).integers(0, 61, (2, 12))


def refused(folder, like, tensors, *parts, **options):
    with pytest.raises(flora.LoraError) as caught:
        flora.hf.load(folder, like, tensors, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


# --- The loader -----------------------------------------------------------------------

SHAPES = {
    "embed.weight": (10, 6), "layers.0.q.weight": (8, 6), "layers.1.q.weight": (8, 6),
    "layers.0.norm": (6,), "layers.1.norm": (6,), "heads.weight": (8, 6),
    "k.weight": (8, 6), "v.weight": (8, 6),
}  # fmt: skip
TENSORS = {
    "embed": Tensor("embed.weight"),
    "layers/q": Tensor(("layers.0.q.weight", "layers.1.q.weight"), axes=(1, 0)),
    "layers/norm": Tensor(("layers.0.norm", "layers.1.norm")),
    "heads": Tensor("heads.weight", axes=(1, 0), shape=(8, 6)),
    "first": Tensor(("k.weight", "v.weight"), (0, 2, 1), (8, 6), split=(2, 4, 6)),
}


def like(dtype=jnp.float32, sharding=None):
    sharding = sharding or {}

    def one(name, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.get(name))

    layers = {"q": one("q", 2, 6, 8), "norm": one("norm", 2, 6)}
    return {
        "embed": one("embed", 10, 6),
        "layers": layers,
        "heads": one("heads", 6, 2, 4),
        "first": one("first", 2, 2, 6, 4),
    }


def expected(x):
    """What `TENSORS` means, in NumPy."""
    layers = {
        "q": np.stack([x["layers.0.q.weight"].T, x["layers.1.q.weight"].T]),
        "norm": np.stack([x["layers.0.norm"], x["layers.1.norm"]]),
    }
    heads = x["heads.weight"].T.reshape(6, 2, 4)
    first = [x[k].reshape(2, 4, 6).swapaxes(1, 2) for k in ("k.weight", "v.weight")]
    return {
        "embed": x["embed.weight"],
        "layers": layers,
        "heads": heads,
        "first": np.stack(first),
    }


@pytest.fixture
def folder(tmp_path):
    """Two shards and an index, as HF writes them."""
    arrays = drawn(SHAPES, ml_dtypes.bfloat16)
    parts = {
        "model-1.safetensors": list(SHAPES)[:3],
        "model-2.safetensors": list(SHAPES)[3:],
    }
    for name, keys in parts.items():
        safetensors.write(
            tmp_path / name, {k: arrays[k] for k in keys}, {"format": "pt"}
        )
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_every_leaf_gets_its_tensors(folder):
    arrays = drawn(SHAPES, ml_dtypes.bfloat16)
    same(flora.hf.load(folder, like(jnp.bfloat16), TENSORS), expected(arrays))
    wide = jax.tree.map(lambda x: x.astype(np.float32), expected(arrays))
    same(flora.hf.load(folder / "model.safetensors.index.json", like(), TENSORS), wide)
    safetensors.write(folder / "one.safetensors", arrays, {})
    same(
        flora.hf.load(folder / "one.safetensors", like(jnp.bfloat16), TENSORS),
        expected(arrays),
    )


def test_a_tree_that_is_written_comes_back(tmp_path):
    tree = jax.tree.map(jnp.asarray, expected(drawn(SHAPES, ml_dtypes.bfloat16)))
    for shard_bytes, files in ((10**9, 1), (200, 4), (1, 8), (10**9, 1), (200, 4)):
        flora.hf.save(tmp_path / "x", tree, TENSORS, shard_bytes=shard_bytes)
        found = sorted(p.name for p in (tmp_path / "x").glob("*.safetensors"))
        assert len(found) == files
        same(flora.hf.load(tmp_path / "x", like(jnp.bfloat16), TENSORS), tree)
    index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in jax.tree.leaves(tree)
    )
    assert not (tmp_path / "x/model.safetensors").exists()


def test_each_device_gets_its_part_and_no_more_is_read(folder, monkeypatch):
    devices = mesh(4, 2)
    places = {
        "embed": Spec("model"),
        "q": Spec(None, "model", "data"),
        "norm": Spec(),
        "heads": Spec(None, "model", "data"),
        "first": Spec(None, "model", None, "data"),
    }
    sharding = {k: NamedSharding(devices, spec) for k, spec in places.items()}
    read = []
    part = flora.hf._part
    monkeypatch.setattr(
        flora.hf, "_part", lambda *args: read.append(part(*args)) or read[-1]
    )
    got = flora.hf.load(folder, like(jnp.bfloat16, sharding), TENSORS)
    arrays = drawn(SHAPES, ml_dtypes.bfloat16)
    same(got, expected(arrays))
    assert got["layers"]["q"].sharding == sharding["q"]
    assert got["layers"]["q"].addressable_shards[0].data.shape == (2, 3, 2)
    assert sum(x.nbytes for x in read) == sum(x.nbytes for x in jax.tree.leaves(got))
    assert max(x.size for x in read) < 2 * 6 * 8


def test_what_does_not_fit_is_named_at_once(folder):
    wrong = like()
    wrong["embed"] = jax.ShapeDtypeStruct((10, 7), jnp.float32)
    tensors = TENSORS | {"layers/norm": Tensor(("layers.0.norm", "layers.1.norn"))}
    refused(
        folder,
        wrong,
        tensors,
        "3 problems",
        "model-1.safetensors: 'embed.weight' has shape (10, 6); expected (10, 7) for "
        "'embed', float32[10,7]. Check the model's sizes against config.json.",
        "no file holds 'layers.1.norn'; expected one of shape (6,) for 'layers/norm', "
        "float32[2,6]. Closest: 'layers.1.norm'.",
        "model-2.safetensors: 'layers.1.norm', bfloat16[6], is for no leaf of the "
        "model. Write unused='layers.1.norm' to leave it.",
    )
    wrong = like()
    wrong["layers"]["q"] = jax.ShapeDtypeStruct((2, 8, 6), jnp.float32)
    refused(folder, wrong, TENSORS, "has shape (8, 6); expected (6, 8) for 'layers/q'")
    wrong["layers"]["q"] = jax.ShapeDtypeStruct((2, 6, 8), jnp.int8)
    refused(
        folder, wrong, TENSORS, "is bfloat16; expected a floating dtype for 'layers/q'"
    )


def test_tensors_that_make_no_sense_are_refused(folder):
    cases = [
        ({"embed": Tensor("embed.weight")}, "no entry for 'layers/q', float32[2,6,8]"),
        (TENSORS | {"more": Tensor("x")}, "'more' is no leaf of the tree"),
        (
            TENSORS | {"layers/norm": Tensor(("layers.0.norm",))},
            "1 tensors would be stacked",
        ),
        (TENSORS | {"embed": Tensor("embed.weight", axes=(0, 0))}, "axes= as an order"),
        (TENSORS | {"heads": Tensor("heads.weight", (1, 0), (8, 5))}, "cannot give it"),
        (
            TENSORS | {"heads": Tensor("heads.weight", (1, 0), (8, 6), (4, 2, 6))},
            "order",
        ),
        (TENSORS | {"heads": Tensor("heads.weight", split=(2, 4, 6))}, "beside shape="),
        (
            TENSORS | {"heads": Tensor("embed.weight", (1, 0), (8, 6))},
            "are named 'embed.w",
        ),
        ({"embed": "embed.weight"}, "expected a dict"),
    ]
    for tensors, message in cases:
        refused(folder, like(), tensors, message)
    refused(folder, {}, {}, "the tree is empty")
    rest = {k: t for k, t in TENSORS.items() if k != "heads"}
    some = {k: x for k, x in like().items() if k != "heads"}
    refused(folder, some, rest, "'heads.weight', bfloat16[8,6], is for no leaf")
    flora.hf.load(folder, some, rest, unused="heads.*")


def test_files_that_are_not_there_or_not_whole_are_refused(folder):
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    second = folder / "model-2.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    refused(folder, like(), TENSORS, "model-2.safetensors is no whole safetensors file")
    second.unlink()
    refused(folder, like(), TENSORS, "names model-2.safetensors, which is not there")
    second.write_bytes(data)
    index.write_text(text.replace("heads.weight", "heads.wait"))
    refused(folder, like(), TENSORS, "model-2.safetensors lacks 'heads.wait'")
    index.write_text(text.replace("model-2.safetensors", "../model-2.safetensors"))
    refused(folder, like(), TENSORS, "outside of its folder")
    index.write_text("{}")
    refused(folder, like(), TENSORS, "is no index: it lacks 'weight_map'")
    for text in ("[]", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        refused(folder, like(), TENSORS, "is no index: ")
    index.unlink()
    refused(
        folder, like(), TENSORS, "holds no model.safetensors and no", "it holds model-1"
    )
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    refused(
        folder, like(), TENSORS, "it holds pytorch_model.bin. Pickles are never read"
    )
    for wrong in (None, ""):
        with pytest.raises(flora.LoraError, match="Write the folder of a checkpoint"):
            flora.hf.load(wrong, like(), TENSORS)


def test_what_cannot_be_written_is_refused(tmp_path):
    tree = {"w": jnp.ones((4, 3))}
    names = {"w": Tensor("w")}
    config = flora.LoraConfig(rank=2, target="w")
    adapted = flora.init(
        jax.random.key(0), config, lambda p, x: x @ p["w"], tree, jnp.ones(4)
    )
    for wrong, message in (
        (adapted, "'w' is adapted: write flora.merge"),
        (jax.eval_shape(lambda: tree), "'w' is a ShapeDtypeStruct"),
        ({"w": jnp.ones((4, 3), jnp.int4)}, "'w' has dtype int4"),
        ({"w": 3.0}, "'w' is no array"),
    ):
        with pytest.raises(flora.LoraError, match=message):
            flora.hf.save(tmp_path, wrong, names)
    with pytest.raises(flora.LoraError, match="shard_bytes=0"):
        flora.hf.save(tmp_path, tree, names, shard_bytes=0)
    assert not [*tmp_path.iterdir()]


# --- One of two versions --------------------------------------------------------------

READERS = (
    under_fire.load_hf,
    under_fire.as_transformers_reads,
    under_fire.as_vllm_reads,
)
ONE, THREE, FIVE = 3, 4, 5  # versions, by the number of their files


def test_kills_at_any_step_leave_the_old_model_or_the_new_one(tmp_path):
    """From one file or several to fewer, more or as many; for other readers too."""
    pairs = [
        (None, ONE),
        (ONE, ONE + 3),
        (ONE, THREE),
        (THREE, ONE),
        (THREE, THREE + 3),
    ]
    pairs += [(THREE, FIVE), (FIVE, THREE)]
    killed = under_fire.killed_at_each_step(tmp_path, "hf", pairs)
    for (old, new), folders in killed.items():
        for load in READERS:
            under_fire.check_turn(load, folders, old, new)
        for folder in folders[:: len(folders) // 2]:
            under_fire.save_hf(folder, THREE + 6)
            assert [load(folder) for load in READERS] == [THREE + 6] * 3
            assert len([*folder.iterdir()]) == 4  # what was left is gone
            under_fire.save_hf(folder, ONE + 6)
            assert [load(folder) for load in READERS] == [ONE + 6] * 3
            assert [p.name for p in folder.iterdir()] == ["model.safetensors"]


def test_a_load_sees_one_version_of_what_is_saved_meanwhile(tmp_path, monkeypatch):
    under_fire.save_hf(tmp_path, THREE)
    read, saves = flora.hf.read, []

    def late(path):
        if len(saves) < 4:
            saves.append(THREE + len(saves) + 1)
            under_fire.save_hf(tmp_path, saves[-1])
        return read(path)

    monkeypatch.setattr(flora.hf, "read", late)
    assert under_fire.load_hf(tmp_path) == THREE + 4


def test_the_index_rules(folder):
    """What it does not name is not read: another file's tensor, or another file."""
    arrays = drawn(SHAPES, ml_dtypes.bfloat16)
    last = {k: arrays[k] for k in [*SHAPES][3:]}
    other = {k: 0 * arrays[k] for k in [*SHAPES][:2]} | {"more": arrays["heads.weight"]}
    safetensors.write(folder / "model-2.safetensors", last | other, {})
    safetensors.write(folder / "model.safetensors", other, {})
    same(flora.hf.load(folder, like(jnp.bfloat16), TENSORS), expected(arrays))


def test_files_that_an_index_names_are_not_written_over(tmp_path, monkeypatch):
    """Even `model.safetensors` can be one of several."""
    tree = {k: np.full((2, 2), 1.0, np.float32) for k in "ab"}
    tensors = {k: Tensor(k) for k in "ab"}
    names = {"a": "model.safetensors", "b": "extra.safetensors"}
    for key, name in names.items():
        safetensors.write(tmp_path / name, {key: tree[key]}, {})
    (tmp_path / "mine.safetensors").write_bytes(b"")
    index = json.dumps({"weight_map": names})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    before = [(tmp_path / name).read_bytes() for name in names.values()]
    monkeypatch.setattr(flora.hf, "replace", None)
    new = {k: 2 * x for k, x in tree.items()}
    with pytest.raises(TypeError):
        flora.hf.save(tmp_path, new, tensors)
    assert [(tmp_path / name).read_bytes() for name in names.values()] == before
    monkeypatch.undo()
    flora.hf.save(tmp_path, new, tensors)
    same(flora.hf.load(tmp_path, tree, tensors), new)
    assert not [name for name in names.values() if (tmp_path / name).exists()]
    assert (tmp_path / "mine.safetensors").exists()


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    under_fire.save_hf(tmp_path, THREE)
    before, write = sorted(tmp_path.iterdir()), flora.hf.write
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left")
        write(*args)

    monkeypatch.setattr(flora.hf, "write", full)
    with pytest.raises(OSError, match="no space"):
        under_fire.save_hf(tmp_path, FIVE)
    assert sorted(tmp_path.iterdir()) == before
    assert under_fire.load_hf(tmp_path) == THREE


# --- The decoder ----------------------------------------------------------------------


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS = {
    "llama": {},
    "llama 3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "qwen 2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen 3": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
    "mistral, a window": {"model_type": "mistral", "sliding_window": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_formula(kind, tmp_path):
    config = LlamaConfig.from_hf(SMALL | KINDS[kind])
    arrays = weights(KINDS[kind], tmp_path)
    window = config.sliding_window or 99
    ahead = np.arange(12)[:, None] - np.arange(12)
    mask = (ahead >= 0) & (ahead < window)
    expected = np.stack([oracle(arrays, config, row, mask=mask) for row in IDS])
    params = hf_llama.load(tmp_path, decoder(KINDS[kind]))
    apply = jax.jit(decoder(KINDS[kind]).apply)
    close(apply(params, jnp.asarray(IDS)), expected)


def test_scan_remat_and_unrolled_agree(tmp_path):
    arrays = weights({}, tmp_path)
    expected = np.stack([oracle(arrays, decoder().config, row) for row in IDS])
    for options in (
        {"scan": False},
        {"remat": "full"},
        {"scan": False, "remat": "dots"},
    ):
        model = decoder(**options)
        close(model.apply(hf_llama.load(tmp_path, model), jnp.asarray(IDS)), expected)


def test_llama_3_frequencies():
    """Long waves are slowed by the factor, short ones kept, in between mixed."""
    config = LlamaConfig.from_hf(SMALL | {"head_dim": 128} | KINDS["llama 3.1"])
    plain = 5e5 ** (-np.arange(64) / 64)
    slowed = []
    for f in plain:
        wave = 2 * math.pi / f
        if wave < 8192 / 4:
            slowed.append(f)
        elif wave > 8192 / 1:
            slowed.append(f / 8)
        else:
            share = (8192 / wave - 1) / (4 - 1)
            slowed.append((1 - share) * f / 8 + share * f)
    np.testing.assert_allclose(frequencies(config), slowed, rtol=2e-5)
    linear = SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    halved = 1e4 ** (-np.arange(4) / 4) / 2
    np.testing.assert_allclose(
        frequencies(LlamaConfig.from_hf(linear)), halved, rtol=1e-5
    )


def test_a_cache_gives_the_same_logits(tmp_path):
    """Prompts of 5 and 7 tokens, padded to 7, then both go on token by token."""
    arrays = weights({}, tmp_path)
    model, lengths = decoder(), np.array([5, 7])
    params = hf_llama.load(tmp_path, model)
    cache = empty_cache(model.config, 2, 10, jnp.float32)
    assert isinstance(cache, Cache)
    decode = jax.jit(lambda p, *args: model.apply(p, *args, method="decode"))
    places = np.broadcast_to(np.arange(7), (2, 7))
    own = (places < lengths[:, None]).astype(np.int32)
    logits, cache = decode(params, jnp.asarray(IDS[:, :7]), places, own, cache)
    found = [[logits[b, :n]] for b, n in enumerate(lengths)]
    for n in range(3):
        at = (lengths + n)[:, None]
        ids = np.take_along_axis(IDS, at, 1)
        logits, cache = decode(params, ids, at, np.ones_like(at), cache)
        for b in range(2):
            found[b].append(logits[b])
    for b, n in enumerate(lengths):
        expected = oracle(arrays, model.config, IDS[b, : n + 3])
        close(np.concatenate(found[b]), expected)


def test_other_configs_are_refused_by_name():
    for change, message in (
        ({"model_type": "gemma"}, "model_type='gemma'; this decoder is one of llama"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'; this decoder has"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": 0}, "vocab_size=0; expected an int of 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; expected"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0; expected"),
        ({"num_key_value_heads": 3}, "is no multiple of 3 key-value heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; expected"),
        ({"hidden_size": 10**400}, "hidden_size=1000"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"head_dim": 3}, "head_dim=3; rotary positions need an even one"),
        ({"head_dim": 0}, "head_dim=0; expected"),
        ({"sliding_window": -1}, "sliding_window=-1; expected"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; expected a number"),
        ({"rope_theta": 0}, "rope_theta=0; expected a number above 0"),
        ({"rope_theta": [1]}, "rope_theta=.1.; expected a number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0; expected"),
        ({"rope_scaling": "linear"}, "low|factor=None|rope type"),
        ({"rope_scaling": {"type": ["x"]}}, "rope type .'x'.; this decoder has"),
        ({"attention_bias": "no"}, "attention_bias='no'; expected true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaConfig.from_hf(SMALL | change)
    with pytest.raises(ValueError, match="vocab_size missing"):
        LlamaConfig.from_hf({k: v for k, v in SMALL.items() if k != "vocab_size"})
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert LlamaConfig.from_hf(SMALL | new).rope_theta == 5e5
    qwen = LlamaConfig.from_hf(SMALL | {"model_type": "qwen2", "sliding_window": 4})
    assert (qwen.sliding_window, qwen.qkv_bias, qwen.o_bias) == (None, True, False)


def test_a_decoder_lies_on_a_mesh(tmp_path):
    arrays = weights({}, tmp_path)
    model, devices = decoder(), Mesh(np.array(jax.devices("cpu")), ("fsdp",))
    params = hf_llama.load(tmp_path, model, devices)
    down = params["params"]["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert down.sharding.spec == Spec(None, "fsdp", None)
    assert down.addressable_shards[3].data.shape == (3, 6, 32)
    expected = arrays["model.layers.2.mlp.down_proj.weight"].T[18:24]
    np.testing.assert_array_equal(down.addressable_shards[3].data[2], expected)
    same(params, hf_llama.load(tmp_path, model))


@pytest.mark.third_party
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logits_are_those_of_transformers(kind, tmp_path):
    import transformers

    given = {k: v for k, v in SMALL.items() if k != "model_type"}
    given |= {"max_position_embeddings": 64}
    given |= {"sliding_window": 64} if kind == "mistral" else {}
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(**given)
    theirs = getattr(transformers, f"Flax{name}ForCausalLM")(config, seed=1)
    expected = np.asarray(theirs(jnp.asarray(IDS)).logits)
    parsed = LlamaConfig.from_hf(config.to_dict())
    assert parsed.rope_theta == 10000.0  # the only one that FlaxLlama has
    names = hf_llama.tensors(parsed, scan=False)
    flora.hf.save(tmp_path, {"params": theirs.params}, names, shard_bytes=20_000)
    model = Llama(parsed, dtype=jnp.float32, param_dtype=jnp.float32)
    got = model.apply(hf_llama.load(tmp_path, model), jnp.asarray(IDS))
    close(got, expected)
