"""examples/language_models/from_gguf.py: what is read is what was written."""

import importlib
import json

import gguf
import lm_tiny
import numpy as np
import pytest
from language_models import from_gguf, hf_llama
from language_models.llama_config import LlamaConfig
from lm_data import Text

from flora import LoraError
from flora._files import safetensors
from tests.support import gguf_files

TYPES = gguf_files.TYPES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint's folder and its arrays, by name."""
    folder = tmp_path_factory.mktemp("tiny")
    lm_tiny.write_checkpoint(folder, steps=0, layers=2)
    return folder, arrays_of(folder)


def arrays_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        file = safetensors.read(path)
        found |= {k: file.array(k).astype(np.float32) for k in file.infos}
    return found


def test_what_was_written_is_read_back(tiny, tmp_path):
    folder, arrays = tiny
    stored = {"q_proj": TYPES.Q4_1, "k_proj": TYPES.F16, "embed": TYPES.Q8_0}
    path = gguf_files.write(tmp_path / "m.gguf", folder, arrays, types=stored)
    out = from_gguf.convert(path, tmp_path / "out")
    found = arrays_of(out)
    assert found.keys() == arrays.keys()
    for name, w in arrays.items():
        kind = next((t for k, t in stored.items() if k in name), None)
        if kind is None:
            np.testing.assert_array_equal(found[name], w)
            continue
        # Codes are of rows, which the order of the rows does not change.
        coded = gguf.quantize(w, kind)
        np.testing.assert_array_equal(found[name], gguf.dequantize(coded, kind))
        assert np.abs(found[name] - w).max() < 0.1 * np.abs(w).max()
    assert hf_llama.read_config(out) == hf_llama.read_config(folder)
    given = json.loads((out / "config.json").read_text())
    assert given["rms_norm_eps"] == 1e-5
    LlamaConfig.from_hf(given)


def test_a_tied_head_is_found(tiny, tmp_path):
    folder, arrays = tiny
    rest = {k: x for k, x in arrays.items() if k != "lm_head.weight"}
    path = gguf_files.write(tmp_path / "m.gguf", folder, rest)
    out = from_gguf.convert(path, tmp_path / "out")
    assert hf_llama.read_config(out).tie_word_embeddings
    assert arrays_of(out).keys() == rest.keys()


def test_the_tokenizer_is_that_of_the_checkpoint(tiny, tmp_path):
    folder, arrays = tiny
    path = gguf_files.write(tmp_path / "m.gguf", folder, arrays)
    out = from_gguf.convert(path, tmp_path / "out")
    one, other = Text.read(folder), Text.read(out)
    text = importlib.import_module("pydoc_data.topics").topics["numbers"]
    text = "".join(c for c in text if not c.isdigit())  # each of these is alone there
    chat = lm_tiny.chats()[0]["messages"]
    assert other.template == one.template
    assert other.stop == one.stop
    for x in (text, one.render(chat), "  Zürich\n\n日本 <|im_end|>"):
        ids = other.tokenizer.encode(x).ids
        assert ids == one.tokenizer.encode(x).ids
        assert other.tokenizer.decode(ids, skip_special_tokens=False) == x
    digits = other.tokenizer.encode("1234").tokens
    assert digits == ["1", "2", "3", "4"]


def test_a_token_that_comes_first_is_added(tiny, tmp_path):
    folder, arrays = tiny
    path = gguf_files.write(
        tmp_path / "m.gguf", folder, arrays, change=lambda w: w.add_add_bos_token(True)
    )
    text = Text.read(from_gguf.convert(path, tmp_path / "out"))
    assert text.tokenizer.encode("a").tokens == ["<|im_start|>", "a"]


def extra(writer):
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture='qwen2'; only 'llama' is read"),
        ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
         "llama.rope.scaling.type='yarn'"),
        ({"change": lambda w: w.add_expert_count(8)}, "llama.expert_count=8"),
        ({"change": extra}, "tensors not read: rope_freqs.weight"),
        ({"change": lambda w: w.add_rope_dimension_count(8)}, "_count=8 of 32"),
        ({"change": lambda w: w.add_vocab_size(9)}, "expected 9"),
        ({"change": lambda w: w.add_head_count(5)}, "num_attention_heads=5"),
        ({"change": lambda w: w.add_embedding_length(128)},
         "of another shape: token_embd.weight is .*, not .*128"),
        ({"change": lambda w: w.add_tokenizer_pre("qwen2")}, "only .*smollm.* is read"),
        ({"change": lambda w: w.add_token_merges(["a"])}, "tokenizer.ggml.merges"),
        ({"change": lambda w: w.add_token_types([1])}, "of 1 types"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_lost_is_refused(tiny, tmp_path, options, message, caplog):
    path = gguf_files.write(tmp_path / "m.gguf", *tiny, **options)
    with pytest.raises(LoraError, match=message) as caught:
        from_gguf.convert(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tensors_of_a_kind_that_cannot_be_read_are_named(tiny, tmp_path, monkeypatch):
    folder, arrays = tiny
    path = gguf_files.write(tmp_path / "m.gguf", folder, arrays)

    def refuses(*_):
        raise NotImplementedError("not yet")

    monkeypatch.setattr(gguf, "dequantize", refuses)
    with pytest.raises(LoraError, match=r"token_embd.weight is stored as F32"):
        from_gguf.convert(path, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_files_of_anything_are_refused(tiny, tmp_path):
    whole = gguf_files.write(tmp_path / "m.gguf", *tiny).read_bytes()
    path = tmp_path / "x.gguf"
    with pytest.raises(LoraError, match="is not there"):
        from_gguf.convert(path, tmp_path / "out")
    for data in (b"", b"GGUF", b"\0" * 99, whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(LoraError, match="cannot be read as GGUF"):
            from_gguf.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
