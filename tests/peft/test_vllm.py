"""What flora writes for servers, served by vLLM on CPUs: greedy tokens are JAX's.

Needs the extra vllm-test; `tests/README.md` has the command.  vLLM runs in processes of
its own.  Its kernels for adapters of experts need a GPU: of these what it loads and
packs is compared, and the merged model is served.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import lm_tiny
import numpy as np
import pytest
import serve_many

import flora
import flora.hf
import flora.peft
import flora.starts
import flora.variants
from tests.support import peft_files as files
from tests.support import served, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

WORKER = pathlib.Path(vllm_server.__file__).with_name("vllm_worker.py")
# Of log-probabilities, in nats; adapters change them by more than 0.2 at the start.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.12}
FUSED = {
    "fused": {"target": "*_proj/kernel", "rank": 8},
    "fused qkv": {"target": "qkv_proj/kernel"},
    "fused gate and up": {"target": "gate_up_proj/kernel"},
}
TIED = {"tied": {"target": served.ALL}, "tied k": {"target": "k_proj/kernel"}}
LORA = {"enable_lora": True, "max_loras": 8, "max_cpu_loras": 40, "max_lora_rank": 16}


@dataclasses.dataclass
class Engine:
    """A checkpoint, adapters of it by name, and what JAX answers with each."""

    served: served.Served
    root: pathlib.Path
    options: dict = dataclasses.field(default_factory=dict)
    wanted: dict = dataclasses.field(default_factory=dict)
    refused: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.prompts = served.prompts(448)
        self.base = served.answers(self.served.fn, self.served.params, self.prompts)

    def folder(self, name):
        return self.root / name.replace(" ", "_")

    def add(self, name, tree, model=None, reference=None, **options):
        """Saves an adapter, and asks JAX; `reference` is what it is saved as."""
        model = model or self.served
        served.save(self.folder(name), model, tree, **options)
        tree = tree if reference is None else reference(self.folder(name))
        self.wanted[name] = served.answers(model.fn, tree, self.prompts)

    def job(self):
        rows = [(str(self.folder(n)), p) for p in self.prompts for n in self.wanted]
        options = {"model": str(self.served.folder), **self.options}
        return {
            "engine": options | (LORA if self.wanted else {}),
            "new": served.NEW,
            "base": self.prompts,
            "batch": rows,  # in one batch, the adapters by turns
            "refused": [str(x) for x in self.refused],
        }


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    found = {}
    lm_tiny.write_checkpoint(root / "llama", steps=0, layers=2)  # with a tokenizer
    model = served.llama(root / "llama")
    found["llama"] = engine = Engine(model, root / "of_llama")
    for n, (name, settings) in enumerate(served.KINDS.items()):
        engine.add(name, served.adapted(model, n + 1, **settings))
    _add_others(engine)
    phi3 = served.of_parts(root / "phi3", "phi3")
    found["phi3"] = engine = Engine(phi3, root / "of_phi3")
    for n, (name, settings) in enumerate(FUSED.items()):
        engine.add(name, served.adapted(phi3, n + 1, **settings))
    tied = served.llama(root / "tied", **QWEN2)
    found["tied"] = engine = Engine(tied, root / "of_tied")
    for n, (name, settings) in enumerate(TIED.items()):
        engine.add(name, served.adapted(tied, n + 1, **settings))
    half = served.llama(root / "llama", dtype=jnp.bfloat16)
    found["bfloat16"] = engine = Engine(half, root / "of_half", {"dtype": "bfloat16"})
    tree = served.adapted(half, 30, target=served.ALL, dtype=jnp.bfloat16)
    engine.add("in bfloat16", tree, dtype=jnp.bfloat16)
    for name, (of, settings) in MERGED.items():
        model = {"llama": model, "tied": tied}.get(of) or served.of_parts(root / of, of)
        tree = served.adapted(model, 40, **settings)
        folder = served.merged(root / f"merged_{name}", model, tree)
        as_merged = dataclasses.replace(model, folder=folder, params=tree)
        found[name] = Engine(as_merged, root / f"of_{name}")
        found[name].plain = served.answers(model.fn, model.params, found[name].prompts)
    return found


QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
    "tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip
MERGED = {
    "everything": ("llama", served.KINDS["everything"]),
    "a tied embedding": ("tied", {"target": ["embedding", "q_proj/kernel"]}),
    "experts": ("mixtral", {"target": ["experts/*", "gate/kernel", "o_proj/kernel"]}),
}


def _add_others(engine):
    """Adapters that are made in other ways, and files that vLLM must refuse."""
    model = engine.served
    tree = served.adapted(model, 20, target=served.ALL)

    def read(folder):
        return flora.peft.load(folder, model.params, names=model.names)

    engine.add("rounded", tree, reference=read, dtype=jnp.bfloat16)
    single = served.llama(model.folder, scan=False)
    tree = served.adapted(single, 21, target=served.ALL, rank_pattern={"1/mlp/*": 7})
    engine.add("layers one by one", tree, model=dataclasses.replace(single, names=None))
    config = flora.LoraConfig(rank=4, alpha=8.0, target=served.ALL)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    start = flora.init(jax.random.key(3), config, model.fn, model.params, ids)
    tree = served.moved(flora.starts.pissa(start), 22)
    engine.add("PiSSA", tree, base=model.params)
    for name, settings in {
        "dora": {"variant": flora.variants.DoRA()},
        "whole": {"train": "model/norm/weight"},
    }.items():
        tree = served.adapted(model, 23, target=served.ALL, **settings)
        with pytest.raises(flora.LoraError, match="vLLM"):
            served.save(engine.folder(name), model, tree)
        flora.peft.save(engine.folder(name), tree, names=model.names)
        engine.refused.append(engine.folder(name))


@pytest.fixture(scope="module")
def answers(engines, tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    jobs = {name: engine.job() for name, engine in engines.items()}
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(WORKER), "jobs.json", "out.json"]
    subprocess.run(command, cwd=root, check=True, timeout=600)
    return json.loads((root / "out.json").read_text())


def same(found, wanted, tolerance):
    """The tokens of all prompts, and the likeliest tokens' log-probabilities."""
    for one, tokens, logprobs in zip(found, *wanted, strict=True):
        worst = 0.0
        for step, given in enumerate(one["logprobs"]):
            gaps = [abs(x - logprobs[step][int(t)]) for t, x in given.items()]
            worst = max(worst, *gaps)
            if one["tokens"][step] != tokens[step]:
                ahead = np.sort(logprobs[step])[-2:]
                assert np.diff(ahead) < tolerance, (step, one["tokens"], tokens)
                assert tolerance > 1e-3  # in float32 all tokens are the same
                break
        assert worst < tolerance


def adapters():
    others = ["rounded", "layers one by one", "PiSSA"]
    found = {"llama": [*served.KINDS, *others], "phi3": FUSED, "tied": TIED}
    found["bfloat16"] = ["in bfloat16"]
    return [(engine, name) for engine, names in found.items() for name in names]


@pytest.mark.parametrize(("engine", "name"), adapters())
def test_adapters_in_one_batch(engines, answers, engine, name):
    mine = engines[engine]
    k, names = len(mine.wanted), list(mine.wanted)
    found = answers[engine]["batch"][names.index(name) :: k]
    same(found, mine.wanted[name], TOLERANCE[mine.options.get("dtype", "float32")])
    assert np.abs(mine.wanted[name][1] - mine.base[1])[:, 0].max() > 0.2


@pytest.mark.parametrize("engine", ["llama", "phi3", "tied", "bfloat16"])
def test_the_base_alone(engines, answers, engine):
    mine = engines[engine]
    tolerance = TOLERANCE[mine.options.get("dtype", "float32")]
    same(answers[engine]["base"], mine.base, tolerance)


@pytest.mark.parametrize("engine", MERGED)
def test_merged_checkpoints(engines, answers, engine):
    same(answers[engine]["base"], engines[engine].base, TOLERANCE["float32"])
    changed = np.abs(engines[engine].base[1] - engines[engine].plain[1])
    assert changed[:, 0].max() > 0.2


def test_what_vllm_refuses(answers):
    found = {pathlib.Path(k).name: x for k, x in answers["llama"]["refused"].items()}
    assert "DoRA" in found["dora"]
    assert found["whole"]


def test_a_tied_embedding_is_refused(engines, tmp_path):
    tied = engines["tied"].served
    tree = served.adapted(tied, 1, target="embed_tokens/embedding")
    with pytest.raises(flora.LoraError, match=r"flora\.merge"):
        served.save(tmp_path / "a", tied, tree, tied={EMBEDDING: "lm_head"})


EMBEDDING = "params/model/embed_tokens/embedding"


def test_the_server_loads_and_unloads(engines, tmp_path):
    mine = engines["llama"]
    one, two, other = "all linear", "up", "rslora"
    with vllm_server.Server(mine.served.folder, tmp_path / "log") as server:
        assert server.models() == ["base"]
        server.load("one", mine.folder(one))
        server.load("two", mine.folder(two))
        assert server.models() == ["base", "one", "two"]
        for names in (["one", "two"] * 2, ["two", "one"]):
            found = server.complete(names, mine.prompts[0], served.NEW)
            for name, tokens in zip(names, found, strict=True):
                wanted = mine.wanted[{"one": one, "two": two}[name]]
                assert tokens == wanted[0][0].tolist()
        server.unload("one")
        assert server.models() == ["base", "two"]
        assert server.complete(["base"], mine.prompts[0], served.NEW) == [
            mine.base[0][0].tolist()
        ]
        with pytest.raises(vllm_server.HTTPError):
            server.complete(["one"], mine.prompts[0], served.NEW)
        server.load("one", mine.folder(other))  # another adapter by the same name
        found = server.complete(["one"], mine.prompts[1], served.NEW)
        assert found == [mine.wanted[other][0][1].tolist()]
        with pytest.raises(vllm_server.HTTPError, match="DoRA"):
            server.load("dora", mine.folder("dora"))


def test_requests_of_the_example():
    script = pathlib.Path(serve_many.__file__)
    options = ["--requests=12", "--rounds=1", "--d=64", "--layers=2", "--vllm"]
    command = [sys.executable, str(script), *options]
    found = subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert b"vLLM against mixed: 192 of 192 tokens are the same" in found.stdout


# --- Experts, as far as vLLM goes without a GPU ---------------------------------------


def loaded(folder, expected):
    """vLLM's own reading of a folder."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=64)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    return LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, lora_model_id=1, device="cpu"
    )


def manager(**attributes):
    """vLLM's manager of adapters without a model."""
    from vllm.lora.model_manager import LoRAModelManager

    made = LoRAModelManager.__new__(LoRAModelManager)
    usual = {"is_pooling_model": False, "_is_non_gated_moe": False, "modules": {}}
    usual |= {"_enable_moe_shared_loras": False, "packed_modules": {}}
    made.__dict__.update(usual | attributes)
    return made


def close(got, want):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=1e-5 * max(scale, 1e-3), rtol=0)


WORDS = ("w1", "w2", "w3")


@pytest.mark.parametrize("target", [*WORDS, "*"])
def test_experts_one_by_one(tmp_path, target):
    mixtral = served.of_parts(tmp_path / "ck", "mixtral")
    tree = served.adapted(mixtral, 1, target=f"experts/{target}")
    served.save(tmp_path / "a", mixtral, tree)
    wanted = served.merged_deltas(mixtral, tree)
    each = [f"{j}.{w}" for j in range(4) for w in WORDS]
    lora = loaded(tmp_path / "a", {f"experts.{x}" for x in each})
    fronts = [f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)]
    packed = {front: [f"{front}.{x}" for x in each] for front in fronts}
    manager(packed_modules=packed)._create_merged_loras_inplace(lora)
    for front in fronts:
        for k, word in enumerate(WORDS):
            a, b = lora.loras[front].lora_a[k], lora.loras[front].lora_b[k]
            for j in range(4):
                close((b[j] @ a[j]).numpy(), wanted[f"{front}.{j}.{word}"])
            assert b.any() == (target in ("*", word))


@pytest.mark.parametrize("targets", [("gate_up_proj",), ("down_proj",), None])
def test_experts_in_stacks(tmp_path, targets):
    """As transformers has them; for vLLM's models that do, and by conversion."""
    both = "gate_up_proj", "down_proj"
    tree, _, _, made = files.stacked_experts(*targets or both)
    flora.peft.save(tmp_path / "a", made, serving=True)
    merged, plain = flora.merge(made)["experts"], tree["experts"]
    up, down = (np.asarray(merged[n] - plain[n]).swapaxes(1, 2) for n in both)
    stacks = types.SimpleNamespace(shape=(1, 3))
    module = types.SimpleNamespace(
        global_num_experts=3, local_num_experts=3, ep_rank=0, use_ep=False,
        w13_lora_a_stacked=[stacks], w13_lora_b_stacked=[stacks],
    )  # fmt: skip
    lora = loaded(tmp_path / "a", {"experts"})
    own = manager(_is_3d_moe_model=True)
    own._create_merged_loras_inplace(lora)
    own._stack_moe_lora_weights(lora, module, "experts")
    for k, want in enumerate((up, down)):
        a, b = lora.loras["experts"].lora_a[k], lora.loras["experts"].lora_b[k]
        close((b @ a).numpy(), want)
    lora = loaded(tmp_path / "a", {"experts"})
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(architectures=["MixtralForCausalLM"])
    )
    own = manager(model=model)
    own._create_merged_loras_inplace(lora)
    own._convert_3d_to_2d_moe_lora(lora, module, "experts")
    gate, up = np.split(up, 2, 1)
    for k, want in enumerate((gate, down, up)):
        a, b = lora.loras["experts"].lora_a[k], lora.loras["experts"].lora_b[k]
        close((b @ a).numpy(), want)


@pytest.mark.parametrize("one", ["in_proj_qkv", "in_proj_z"])
def test_a_delta_net_of_two_modules(tmp_path, one):
    """q, k and v in one module and z in another, which vLLM computes as four."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA as Layer

    words = "in_proj_qkv", "in_proj_z"
    tree, made = files.together("delta net in two", one)
    flora.peft.save(tmp_path / "a", made, serving=True)
    lora = loaded(tmp_path / "a", {*words})
    packed = {"layers.0.in_proj_qkvz": [f"layers.0.{word}" for word in words]}
    manager(packed_modules=packed)._create_merged_loras_inplace(lora)
    (both,) = lora.loras.values()
    layer = types.SimpleNamespace(n_slices=4, output_sizes=[2, 2, 4, 6])
    a, b = Layer.expand_packed_lora(layer, both.lora_a, both.lora_b)
    got = np.concatenate([(y @ x).numpy() for x, y in zip(a, b, strict=True)])
    merged, plain = (x["layers"]["0"] for x in (flora.merge(made), tree))
    want = [np.asarray(merged[w]["kernel"] - plain[w]["kernel"]).T for w in words]
    close(got, np.concatenate(want))
