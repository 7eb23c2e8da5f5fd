"""examples/finetune_minilm.py and minilm.py: a random encoder, no download."""

import csv
import dataclasses
import json
import math

import finetune_minilm as example
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import pytest
from scipy import stats

import flora
import flora.hf
from flora import LoraError
from tests.support.contract import close


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return example.write_random(tmp_path_factory.mktemp("random"))


@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path):
    rows = example.main(["--smoke", "--out", str(tmp_path)])
    assert [row.arm for row in rows] == ["head", "LoRA", "full"]
    trained = {row.arm: row.trained for row in rows}
    assert trained["head"] == 2 * 16 + 2
    # Rank 2: query, key, value, out are 16 by 16, up and down 16 by 32.
    assert trained["LoRA"] == 34 + 2 * (4 * 32 + 2 * 48)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 2
    # What it wrote: the merged model is another one, with a head that was trained.
    sizes = minilm.read_sizes(tmp_path / "merged")
    model, variables = minilm.load(tmp_path / "random")
    model, variables = minilm.with_head(model, variables, 2)
    merged = flora.hf.load(
        tmp_path / "merged", variables, minilm.names(sizes, head=True)
    )
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), variables, merged)
    assert moved["params"]["head"]["kernel"] > 0
    assert moved["params"]["layer_0"]["up"]["kernel"] > 0
    assert moved["params"]["layer_0"]["up"]["bias"] == 0
    assert moved["params"]["words"]["embedding"] == 0


def test_padding_changes_nothing(folder):
    model, variables = minilm.load(folder)
    ids, mask = jnp.array([[2, 5, 9, 3]]), jnp.ones((1, 4), bool)
    longer = jnp.pad(ids, ((0, 0), (0, 3)), constant_values=7)
    kept = jnp.pad(mask, ((0, 0), (0, 3)))
    close(
        model.apply(variables, longer, kept)[:, :4], model.apply(variables, ids, mask)
    )


def test_training_learns_what_one_word_says(folder):
    args = example.options(["--smoke", "--out", str(folder / "x")])
    args.data = example.write_sentences(folder / "sentences.jsonl")
    texts, labels, called = example.read_data(args)
    assert called == ["negative", "positive"]
    tokens = minilm.tokenizer(folder)
    short = minilm.encoded(tokens, texts, labels, length=16, least=5)
    splits = [example.split(short, args, seed) for seed in range(2)]
    model, variables = minilm.with_head(*minilm.load(folder), 2)
    arm = example.full_arm(model, variables, epochs=40)
    run = example.runner(arm, splits, batch=16)
    assert run(3, 0).loss < 0.1 < math.log(2) < 1
    assert run(3, 0) is run(3, 0)  # the second time it does not train


def test_seeds_share_the_test_sentences_alone():
    rows = np.arange(100)
    sentences = minilm.Sentences(rows, rows, rows)
    args = example.options(
        ["--train", "40", "--validation", "20", "--test", "30", "--batch", "8"]
    )
    one, two = (example.split(sentences, args, seed) for seed in range(2))
    np.testing.assert_array_equal(one.test.labels, two.test.labels)
    assert not np.array_equal(one.train.labels, two.train.labels)
    for own in (one, two):
        parts = own.train.labels, own.validation.labels, own.test.labels
        assert [len(x) for x in parts] == [40, 20, 30]
        assert len(set(np.concatenate(parts))) == 90
    args.train = 60
    with pytest.raises(LoraError, match=r"100 sentences.*ask for 110"):
        example.split(sentences, args, 0)


def test_the_grid_grows_until_the_best_rate_has_neighbors():
    asked = []

    def loss(i):
        asked.append(i)
        return abs(i - 5)

    assert example.bracketed(loss, 2) == 5
    assert {4, 5, 6} <= set(asked)
    assert example.bracketed(lambda i: abs(i + 1), 2) == -1
    assert example.bracketed(lambda i: math.inf if i > 2 else -i, 2) == 2
    with pytest.raises(LoraError, match="still falls"):
        example.bracketed(lambda i: -i, 0)
    assert [example.rate_of(i) for i in (-1, 0, 1, 2)] == [3e-5, 1e-4, 3e-4, 1e-3]


def test_intervals_are_students():
    x = [0.8, 0.9, 0.85]
    mean, half = example.interval(x)
    low, high = stats.t.interval(0.95, 2, np.mean(x), np.std(x, ddof=1) / 3**0.5)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_proof_that_fails_stops_the_run():
    example.prove({"a fact": True})
    with pytest.raises(RuntimeError, match=r"The proof fails\. another"):
        example.prove({"a fact": True, "another": False})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "roberta", "model_type is 'roberta'; this encoder needs 'bert'"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("position_embedding_type", "relative_key", "needs 'absolute'"),
        ("hidden_size", "16", "hidden_size is '16'; expected a number"),
        ("num_hidden_layers", None, "num_hidden_layers is None"),
    ],
)
def test_another_kind_of_checkpoint_is_refused(folder, tmp_path, key, value, said):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match=said):
        minilm.load(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(LoraError, match=r"config\.json is not there"):
        minilm.load(tmp_path)
    with pytest.raises(LoraError, match=r"tokenizer\.json is not there"):
        minilm.tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "fine"}', "line 2: KeyError"),
        ("fine", "line 2: JSONDecodeError"),
        ('{"text": 3, "label": 1}', "line 2: text is 3, no string"),
        ('{"text": "fine", "label": "a"}', "labels"),
    ],
)
def test_data_of_ones_own_that_is_wrong(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "good", "label": "a"}\n' + line + "\n")
    args = dataclasses.make_dataclass("Args", ["data"])(path)
    with pytest.raises(LoraError, match=said):
        example.read_data(args)


def test_rates_of_lora_change_the_adapter_alone(folder):
    model, variables = minilm.with_head(*minilm.load(folder), 3)
    config = flora.LoraConfig(rank=2, target="layer_*/kernel", train=["head/*"])
    arm = example.lora_arm(model, variables, config, epochs=1)
    frozen, trained = arm.start(0)
    ids = jnp.array([[2, 5, 9, 3]])
    close(
        arm.logits(frozen, trained, ids, ids > 0), model.apply(variables, ids, ids > 0)
    )
    base, ours = example.frozen_leaves(variables, flora.join(frozen, trained))
    assert all(x is y or bool((x == y).all()) for x, y in zip(base, ours, strict=True))
    assert len(base) == len(jax.tree.leaves(variables)) - 2
