"""Files for servers, read by SGLang's own code; needs its package without the rest.

`tests/README.md` says how to install that.  Its kernels, which need GPUs, do not run:
what they would multiply by is compared, as SGLang stacks it for them.
"""

import json

import jax
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support import served, sglang_files

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj": ("gate_proj", "x_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"),
    "qkvr": ("wq_du", "wk_dv", "wv_dv", "wr_du"),
}
HF = {"num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"], "model_type": "x"}


@pytest.fixture(scope="module")
def sglang():
    return sglang_files.classes()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return served.llama(tmp_path_factory.mktemp("llama") / "ck")


def check(found, wanted):
    """Every stack that SGLang has, slice by slice; returns how many are not zero."""
    left, changed = dict(wanted), 0
    if "model.embed_tokens" in left:  # A is by words
        left["model.embed_tokens"] = left["model.embed_tokens"].T
    for name, (scaling, a, b, count) in found.items():
        head, _, last = name.rpartition(".")
        last = {"w2": "down_proj"}.get(last, last)
        assert not any(last in some for some in STACKED.values()), f"{name} is alone"
        parts = [name] if name in left else [f"{head}.{n}" for n in STACKED[last]]
        rank = a.shape[0] // count
        ends = np.cumsum([len(left[part]) for part in parts])
        assert ends[-1] == len(b), name
        for k, part in enumerate(parts):
            rows = slice(ends[k] - len(left[part]), ends[k])
            slot = k if count > 1 and len(parts) > 1 else 0
            got = scaling * b[rows] @ a[slot * rank : (slot + 1) * rank]
            want = left.pop(part)
            scale = max(np.abs(want).max(), 1e-3)
            np.testing.assert_allclose(got, want, atol=1e-5 * scale, rtol=0)
            changed += bool(np.abs(want).max() > 1e-3)
    for name, want in left.items():
        assert not want.any(), f"SGLang did not read {name}"
    return changed


@pytest.mark.parametrize("kind", served.KINDS)
def test_every_kind(tmp_path, sglang, llama, kind):
    tree = served.adapted(llama, 1, **served.KINDS[kind])
    served.save(tmp_path / "a", llama, tree)
    hf = json.loads((llama.folder / "config.json").read_text())
    found = sglang_files.deltas(sglang, tmp_path / "a", hf)
    assert check(found, served.merged_deltas(llama, tree)) > 0


def test_fused_leaves(tmp_path, sglang):
    phi3 = served.of_parts(tmp_path / "ck", "phi3")
    for n, target in enumerate(("self_attn/*", "mlp/gate_up_proj/*", "*_proj/kernel")):
        tree = served.adapted(phi3, 1, target=target)
        served.save(tmp_path / f"{n}", phi3, tree)
        found = sglang_files.deltas(sglang, tmp_path / f"{n}", HF)
        assert check(found, served.merged_deltas(phi3, tree)) >= 2


@pytest.mark.parametrize(
    ("kind", "one"), [(k, one) for k, sizes in files.TOGETHER.items() for one in sizes]
)
def test_one_of_those_that_are_read_together(tmp_path, sglang, kind, one):
    tree, made = files.together(kind, one)
    flora.peft.save(tmp_path / "a", made, serving=True)
    merged = jax.tree.map(lambda x, y: np.asarray(x - y).T, flora.merge(made), tree)
    merged = merged["layers"]["0"]
    wanted = {f"layers.0.{n}": merged[n]["kernel"] for n in files.TOGETHER[kind]}
    if kind == "experts":  # SGLang calls them as other models do
        words = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        wanted = {f"{k[:-2]}{words[k[-2:]]}": x for k, x in wanted.items()}
    found = sglang_files.deltas(sglang, tmp_path / "a", HF)
    assert check(found, wanted) == 1
