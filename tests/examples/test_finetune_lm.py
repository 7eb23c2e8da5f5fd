"""examples/finetune_lm.py: what it trains on, and that a run does what it says."""

import json
import pathlib
import re
import time
import types

import chex
import finetune_lm
import jax
import jax.numpy as jnp
import lm_tiny
import lm_train
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from language_models import hf_llama
from language_models.generation import generator
from language_models.llama import Llama
from lm_data import Example, Text, batch_of, pack, read_examples

import flora
from flora._files import safetensors
from flora.checkpoint import Checkpointer
from tests.support.checkpoints import same
from tests.support.decoders import close, oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """HF's files of an untrained decoder of one layer."""
    folder = tmp_path_factory.mktemp("tiny")
    return lm_tiny.write_checkpoint(folder, steps=0, layers=1)


@pytest.fixture(scope="module")
def text(checkpoint):
    return Text.read(checkpoint)


@pytest.fixture(scope="module")
def arrays(checkpoint):
    """HF's arrays by name."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        file = safetensors.read(path)
        found |= {k: file.array(k).astype(np.float32) for k in file.infos}
    return found


def float32(checkpoint):
    config = hf_llama.read_config(checkpoint)
    model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32)
    return model, hf_llama.load(checkpoint, model)


# --- Data -----------------------------------------------------------------------------


def example(*ids, trained=None):
    return Example(ids, tuple(trained) if trained else (True,) * len(ids))


def test_rows_are_packed_as_written_out_by_hand():
    examples = [
        example(7, 8, 9, trained=[False, False, True]),
        example(4, 5, 6, 2),
        example(
            3, 3, trained=[True, False]
        ),  # trains on nothing: its first has no left
        example(11, 12, 13, 14, 15, 16, 17, 18, 19, 20),
    ]
    rows = pack(examples, 8)
    expected = {
        "ids": [[11, 12, 13, 14, 15, 16, 17, 18], [4, 5, 6, 2, 7, 8, 9, 0],
                [18, 19, 20, 0, 0, 0, 0, 0]],
        "segments": [[1] * 8, [1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
        "positions": [[*range(8)], [0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0, 0, 0]],
        "targets": [[12, 13, 14, 15, 16, 17, 18, 0], [5, 6, 2, 0, 8, 9, 0, 0],
                    [19, 20, 0, 0, 0, 0, 0, 0]],
        "weights": [[1] * 7 + [0], [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
    }  # fmt: skip
    assert {k: x.tolist() for k, x in rows.items()} == expected
    assert rows["weights"].dtype == np.float32


def test_packing_loses_no_prediction():
    draw = np.random.default_rng(0)
    examples = []
    for _ in range(200):
        n = int(draw.integers(2, 40))
        ids, trained = draw.integers(1, 99, n), draw.random(n) < 0.7
        examples.append(example(*ids.tolist(), trained=trained.tolist()))
    rows = pack(examples, 16)
    wanted = sorted(
        pair
        for x in examples
        for pair in zip(x.ids, x.ids[1:], x.trained[1:], strict=False)
        if pair[2]
    )
    on = rows["weights"] > 0
    found = sorted(
        zip(rows["ids"][on], rows["targets"][on], rows["weights"][on], strict=True)
    )
    assert found == wanted
    assert (rows["segments"] > 0).mean() > 0.9
    assert (rows["segments"][on] > 0).all()


def test_a_packed_row_is_as_good_as_separate_ones(checkpoint, arrays):
    """No attention crosses segments: logits are the oracle's of each example alone."""
    draw = np.random.default_rng(1)
    examples = [example(*draw.integers(3, 440, n).tolist()) for n in (9, 6, 5, 11, 4)]
    rows = pack(examples, 21)
    model, params = float32(checkpoint)
    apply = jax.jit(model.apply)
    logits = apply(params, *(rows[k] for k in ("ids", "positions", "segments")))
    seen = 0
    for row in range(len(rows["ids"])):
        for segment in range(1, rows["segments"][row].max() + 1):
            mine = rows["segments"][row] == segment
            ids = rows["ids"][row][mine]
            close(logits[row][mine], oracle(arrays, model.config, ids))
            assert tuple(ids) in {x.ids for x in examples}
            seen += 1
    assert seen == len(examples) > len(rows["ids"])
    # The loss is the mean over trained tokens, whatever the block.
    each = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
    expected = float((each * rows["weights"]).sum())
    for block, most in ((0, 0), (7, 0), (0, 20), (7, 20)):
        loss = model.apply(params, rows, block, most, method="loss")
        assert abs(float(loss) - expected) < 1e-4 * expected


def said(text, one):
    """What is trained on, as text."""
    ids = [i for i, t in zip(one.ids, one.trained, strict=True) if t]
    return text.tokenizer.decode(ids, skip_special_tokens=False)


def test_only_what_the_assistant_says_is_trained_on(text):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Rome?"},
        {"role": "assistant", "content": "In Italy."},
        {"role": "user", "content": "And Cairo?"},
        {"role": "assistant", "content": "In Egypt, Africa."},
    ]
    one = text.example({"messages": chat})
    end = "<|im_end|>\n"
    assert said(text, one) == f"In Italy.{end}In Egypt, Africa.{end}"
    whole = text.tokenizer.decode(list(one.ids), skip_special_tokens=False)
    assert whole == text.render(chat)
    prompt = text.chat_prompt(chat[:2])
    assert one.ids[: len(prompt)] == tuple(prompt)
    marked = lm_tiny.TEMPLATE.replace(
        "{{ m.content }}", "{%- generation -%}{{ m.content }}{%- endgeneration -%}"
    )
    other = Text(text.tokenizer, marked, text.special, text.stop)
    assert other.render(chat[1:3]).endswith("assistantIn Italy.<|im_end|>\n")
    completion = {"prompt": "Rome is in", "completion": " Italy."}
    one = text.example(completion)
    assert said(text, one) == " Italy.<|im_end|>"
    assert said(text, text.example({"text": "Rome is."})) == "Rome is.<|im_end|>"
    assert text.stop == (text.tokenizer.token_to_id("<|im_end|>"),)


def test_lines_that_make_no_sense_are_named(text, tmp_path):
    good = json.dumps({"text": "Rome is the capital of Italy."})
    for line, message in (
        ("{", "line 3: Expecting"),
        ("[1]", "line 3: a list; expected an object"),
        ('{"txt": "x"}', "line 3: keys 'txt'; expected 'messages', 'prompt' and"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "line 3: 'messages' is no",
        ),
        ('{"messages": "x"}', "line 3: 'messages' is no list"),
    ):
        (tmp_path / "x").write_text(f"{good}\n\n{line}\n")
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / "x", text)
    (tmp_path / "x").write_text("\n")
    with pytest.raises(ValueError, match="none of 0 examples has a token"):
        read_examples(tmp_path / "x", text)


def test_a_line_ends_at_a_newline_alone(text, tmp_path):
    said = ["one\u2028two", "three\u2029\x85\x0b\x0cfour", "five\rsix"]
    lines = [json.dumps({"text": x}, ensure_ascii=False) for x in said]
    (tmp_path / "x").write_bytes("\r\n".join(lines).encode())
    found = read_examples(tmp_path / "x", text)
    assert found == [text.example({"text": x}) for x in said]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 100_000, "line 1: "),
        (b'{"text": ' + b"9" * 9_999 + b"}", "line 1: Exceeds"),
        (b'{"text": "\xff"}', "line 1: 'utf-8' codec"),
        (b'{"text": "\\ud800"}', "line 1: .*surrogates"),
    ],
)
def test_lines_of_anything_are_named(text, tmp_path, line, message):
    (tmp_path / "x").write_bytes(line)
    with pytest.raises(flora.LoraError, match=message) as caught:
        read_examples(tmp_path / "x", text)
    assert len(str(caught.value)) < 4_000


BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ 9**(9**(9**9)) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "{{ '%999999999999d' % 1 }}",
    "{{ range(10**9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 9_999 + "1" + ")" * 9_999 + " }}",
]


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_a_template_takes_neither_all_the_time_nor_all_memory(text, template):
    bomb = Text(text.tokenizer, template, text.special, text.stop)
    began = time.monotonic()
    with pytest.raises(flora.LoraError, match=r"the chat template (fails|takes more)"):
        bomb.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - began < 20  # and the start of a process
    plain = Text(text.tokenizer, "{{ messages[0].content }}é", text.special, text.stop)
    assert plain.render([{"role": "user", "content": "\u2028"}]) == "\u2028é"


def test_templates_that_hide_what_was_said_are_refused(text, tmp_path):
    def with_template(template):
        return Text(text.tokenizer, template, text.special, text.stop)

    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": r, "content": c} for r, c in zip(roles, "abcd", strict=True)]
    last = with_template("{{ messages[-1].content }}")
    for other, message in (
        (last, "writes turn 1 otherwise once others follow"),
        (with_template(None), "has no chat template"),
        (
            with_template("{{ raise_exception('no systems') }}"),
            "refuses the chat: no systems",
        ),
        (
            with_template("{{ ''.__class__.__mro__ }}"),
            "the chat template fails: access to",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            other.example({"messages": chat})
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        Text.read(tmp_path)


def test_batches_are_a_function_of_the_step_alone():
    rows = {"ids": np.arange(10)[:, None], "weights": np.ones((10, 1), np.float32)}
    seen = [batch_of(rows, step, (2, 2), seed=5)["ids"] for step in range(10)]
    assert seen[0].shape == (2, 2, 1)
    stream = np.concatenate([x.reshape(-1) for x in seen])
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == [*range(10)]
    assert (stream[:10] != stream[10:20]).any()
    again = batch_of(rows, 7, (2, 2), seed=5)["ids"]
    np.testing.assert_array_equal(again, seen[7])
    other = np.concatenate(
        [batch_of(rows, n, (2, 2), 6)["ids"].reshape(-1) for n in range(10)]
    )
    assert (other != stream).any()


# --- Training and generation ----------------------------------------------------------


def test_generation_is_greedy_and_stops(checkpoint, arrays, text):
    model, params = float32(checkpoint)
    prompts = [
        text.tokenizer.encode(x).ids for x in ("Rome is", "The capital of Peru is")
    ]

    def greedy(ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(int(oracle(arrays, model.config, np.array(ids))[-1].argmax()))
        return ids[-count:]

    expected = [greedy(x, 5) for x in prompts]
    stop = expected[1][3]

    def cut(ids):
        return ids[: ids.index(stop)] if stop in ids else ids

    generate = generator(model, flora.lora, new=5, stop=(stop,), rounded=8)
    assert generate(params, prompts) == [cut(x) for x in expected]
    assert len(cut(expected[1])) in (1, 2, 3)


def test_accumulated_gradients_are_those_of_one_batch(checkpoint, text):
    """Micro-batches with unequal numbers of trained tokens count token by token."""
    model, params = float32(checkpoint)
    examples = [text.example(x) for x in lm_tiny.chats()[:6]]
    examples += [text.example({"text": x}) for x in lm_tiny.plain_text()[:6]]
    rows = {k: x[:4] for k, x in pack(examples, 32).items()}
    assert len({*rows["weights"].sum(axis=1)}) > 1
    config = flora.LoraConfig(rank=2, target="self_attn/*/kernel")
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("fsdp",))
    params = jax.device_put(params, NamedSharding(mesh, Spec()))
    adapted = flora.init(jax.random.key(0), config, model.apply, params, ids)
    base, adapter = flora.split(adapted)
    tx = optax.sgd(1.0)
    _, places = lm_train.started(tx, adapter)
    step = lm_train.step_function(model, tx, places, dropout=False, block=16)
    found = []
    for shape in ((1, 4), (2, 2)):
        batch = {k: x.reshape(*shape, 32) for k, x in rows.items()}
        batch = lm_train.put(batch, mesh)
        mine = jax.tree.map(jnp.copy, adapter)  # it is donated
        found.append(step(base, mine, tx.init(mine), batch, jax.random.key(0)))
    (one, _, loss, norm), (two, _, other_loss, other_norm) = found
    np.testing.assert_allclose([loss, norm], [other_loss, other_norm], rtol=2e-5)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)
    moved = [
        abs(np.asarray(x) - y).max()
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(adapter), strict=True)
    ]
    assert max(moved) > 1e-4

    def mean(tree):
        out = model.apply(flora.merge(tree), rows, method="loss")
        return float(out) / float(rows["weights"].sum())

    assert abs(mean(flora.join(base, adapter)) - float(loss)) < 1e-5 * float(loss)


def test_tokens_without_a_weight_have_no_logits(checkpoint, text):
    model, params = float32(checkpoint)
    rows = pack([text.example(x) for x in lm_tiny.chats()[:12]], 64)
    most = lm_train.most_trained(rows)
    assert (rows["weights"] > 0).sum(axis=1).max() <= most == 24

    def sizes(*args):
        made = jax.make_jaxpr(lambda p: model.apply(p, rows, *args, method="loss"))
        return {
            int(x) for x in re.findall(rf"f32\[\d+,(\d+),{vocab}\]", str(made(params)))
        }

    vocab = model.config.vocab_size
    assert sizes(0, most) == {most}
    assert sizes(16, most) == {16}
    assert sizes() == {64}
    whole = model.apply(params, rows, method="loss")
    np.testing.assert_allclose(
        [model.apply(params, rows, n, most, method="loss") for n in (0, 16)],
        [whole, whole],
        rtol=1e-5,
    )


def test_exact_answers_are_those_of_greedy_decoding(checkpoint, text):
    model, params = float32(checkpoint)
    chats = [x["messages"][:1] for x in lm_tiny.chats()[:6]]
    prompts = [text.chat_prompt(x) for x in chats]
    answers = generator(model, flora.lora, new=5, stop=())(params, prompts)
    stop = answers[2][3]  # what comes after it is not decoded
    assert stop not in answers[2][:3]

    def told(n, answer):
        ids = (*prompts[n], *answer)
        return Example(ids, tuple(i >= len(prompts[n]) for i in range(len(ids))))

    def changed(answer, at):
        return [*answer[:at], (answer[at] + 1) % 99 + 3, *answer[at + 1 :]]

    given = [*answers[:2], changed(answers[2], 4), changed(answers[3], 0)]
    given += [changed(answers[4], 2), answers[5]]
    rows = pack([told(n, x) for n, x in enumerate(given)], 64)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("fsdp",))
    params = jax.device_put(params, NamedSharding(mesh, Spec()))
    config = flora.LoraConfig(rank=2, target="q_proj/kernel")  # B = 0: nothing changes
    ids = jnp.array([prompts[0]])
    adapted = flora.init(jax.random.key(0), config, model.apply, params, ids)
    base, adapter = flora.split(adapted)
    logits = jax.jit(model.apply)(params, ids)[0, -1]
    right, wrong = answers[0][0], int(jnp.argsort(logits)[-2])
    decoded = generator(model, flora.lora, new=5, stop=(stop,))(params, prompts)
    cut = [x[: x.index(stop)] if stop in x else x for x in given]
    share = sum(map(list.__eq__, decoded, cut)) / 6
    assert share in (4 / 6, 5 / 6)
    for block in (0, 8):
        evaluate = lm_train.evaluation(
            model, block, mesh, stop=(stop,), choices=(right, wrong)
        )
        found = evaluate(base, adapter, rows, 2)
        assert found.exact == pytest.approx(share)
        assert found.choice == 1.0
    assert lm_train.evaluation(model, 0, mesh)(base, adapter, rows, 2).choice is None


def test_choices_that_begin_alike_are_refused(text):
    assert len({*text.first_tokens(["Rome", "Paris"])}) == 2
    with pytest.raises(flora.LoraError, match=r"begin with the tokens \['R"):
        text.first_tokens(["Rome", "Rome."])


@pytest.fixture
def compiled_once(tmp_path):
    """What two runs both compile is compiled once."""
    new = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    old = {name: getattr(jax.config, name) for name in new}
    for name, value in new.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


SIZES = {"steps": 4, "batch": 8, "accumulate": 2, "length": 64, "block": 32, "rank": 4,
         "learning-rate": 2e-2, "warmup": 1, "save-every": 2, "eval-every": 2,
         "dropout": 0.1, "new-tokens": 4}  # fmt: skip


def run(checkpoint, out, *more, **sizes):
    train, held_out = lm_tiny.write_data(out.parent / "data")
    argv = ["--checkpoint", str(checkpoint), "--train", str(train), "--out", str(out)]
    argv += ["--eval", str(held_out), "--devices", "2"]
    for name, value in (SIZES | sizes).items():
        argv += [f"--{name}", str(value)]
    return finetune_lm.main([*argv, *more])


@pytest.mark.slow
def test_a_run_in_small_and_one_that_was_interrupted(
    checkpoint, tmp_path, compiled_once
):
    whole = run(checkpoint, tmp_path / "whole", "--merge", "--prompt", "Where is Rome?")
    assert whole.train_loss[1] < whole.train_loss[0]
    assert [*whole.held_out] == [0, 2, 4]
    assert [*whole.losses] == [1, 2, 3, 4]
    assert [*whole.answers] == ["Where is Rome?"]

    half = run(checkpoint, tmp_path / "half", "--stop-after", "2")
    assert half.losses == {n: whole.losses[n] for n in (1, 2)}
    with pytest.raises(SystemExit, match="has come to step 2"):
        run(checkpoint, tmp_path / "half")
    with pytest.raises(SystemExit, match="was run with --batch 8, not 16"):
        run(checkpoint, tmp_path / "half", "--resume", batch=16)
    rest = run(checkpoint, tmp_path / "half", "--resume")
    assert rest.losses == {n: whole.losses[n] for n in (3, 4)}
    same(flora.split(rest.adapted)[1], flora.split(whole.adapted)[1])

    # What lies on disk: the adapter on weights read anew, and the merged model.
    model = Llama(hf_llama.read_config(checkpoint))
    params = hf_llama.load(checkpoint, model)
    again = flora.load(tmp_path / "whole" / "adapter.safetensors", params)
    same(again, whole.adapted)
    merged = Llama(hf_llama.read_config(tmp_path / "whole" / "merged"))
    same(
        hf_llama.load(tmp_path / "whole" / "merged", merged), flora.merge(whole.adapted)
    )
    assert Text.read(tmp_path / "whole" / "merged").template == lm_tiny.TEMPLATE
    with Checkpointer(tmp_path / "half" / "checkpoints") as checkpointer:
        assert checkpointer.steps() == (2, 4)


@pytest.mark.slow
def test_a_run_whose_loss_is_no_number_stops(checkpoint, tmp_path, monkeypatch, capsys):
    """The adapter before a loss of NaN gives it: the one before that is kept."""
    real, before = finetune_lm.step_function, {}

    def made(*args, **kwargs):
        step, count = real(*args, **kwargs), iter(range(1, 99))

        def failing(*args):
            n = next(count)
            before[n - 1] = jax.tree.map(np.asarray, args[1])
            adapter, state, loss, norm = step(*args)
            return adapter, state, loss * np.nan if n == 4 else loss, norm

        return failing

    monkeypatch.setattr(finetune_lm, "step_function", made)
    with pytest.raises(SystemExit, match=r"step 4: the loss is nan.* of step 2 is in"):
        run(checkpoint, tmp_path)
    said = [x for x in capsys.readouterr().out.split("\n") if x.startswith("step ")]
    assert [x.split()[1] for x in said] == ["0", "2"]  # a line at each evaluation
    base = hf_llama.load(checkpoint, Llama(hf_llama.read_config(checkpoint)))
    again = flora.load(tmp_path / "adapter.safetensors", base)
    chex.assert_trees_all_equal(flora.split(again)[1], before[2])


def test_without_a_good_checkpoint_the_start_is_named():
    job = types.SimpleNamespace(out=pathlib.Path("run"))
    saved = types.SimpleNamespace(steps=lambda: (2,))
    for step, loss, what in (
        (3, np.nan, "step 3: the loss is nan"),
        (2, 1.0, "step 2: the gradient is not finite"),
    ):
        text = finetune_lm.diverged(job, saved, step, loss)
        assert text.startswith(f"{what}. The adapter as it began is in run/start")


ARMS = {
    "full": ["--full"],
    "one layer": ["--unroll", "--target", "--train-whole", "layers/0/*"],
    "quantized": ["--quantize", "int8", "--form", "concat"],
}


@pytest.mark.parametrize(
    "arm", ["full", "one layer", pytest.param("quantized", marks=pytest.mark.slow)]
)
def test_arms(checkpoint, tmp_path, arm):
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": x}) + "\n" for x in lm_tiny.plain_text())
    )
    sizes = {
        "steps": 2,
        "learning-rate": 1e-3,
        "dropout": 0.0,
        "eval-every": 0,
        "save-every": 0,
    }
    more = ["--other", str(other), "--choices", "It", "Rome", "--merge"]
    found = run(checkpoint, tmp_path / "out", *ARMS[arm], *more, **sizes)
    assert [*found.held_out] == [2]
    assert found.held_out[2].choice is not None
    assert found.other[1] < found.other[0]  # the data are about the same
    assert not (tmp_path / "out" / "checkpoints").exists()
    leaves = jax.tree.leaves(flora.split(found.adapted)[0])
    model = Llama(hf_llama.read_config(checkpoint))
    params = hf_llama.load(checkpoint, model)
    whole = sum(x.size for x in jax.tree.leaves(params))
    layer = sum(x.size for x in jax.tree.leaves(params["params"]["model"]["layers"]))
    assert {"full": whole, "one layer": layer}.get(
        arm, found.parameters
    ) == found.parameters
    assert (arm == "quantized") == any(x.dtype == jnp.int8 for x in leaves)
    merged = hf_llama.load(tmp_path / "out" / "merged", model)
    apply, ids = jax.jit(flora.lora(model.apply)), jnp.arange(8)[None]
    unrolled = jax.jit(flora.lora(Llama(model.config, scan=arm != "one layer").apply))
    a, b = apply(merged, ids), unrolled(found.adapted, ids)
    np.testing.assert_allclose(a, b, atol=3e-2 * float(jnp.abs(b).max()))
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["other"] == [*found.other]
    assert (tmp_path / "out" / "peft").exists() == (arm == "quantized")


@pytest.mark.slow
def test_the_whole_run_learns(tmp_path):
    results = finetune_lm.main(["--out", str(tmp_path / "run"), "--devices", "1"])
    assert results.train_loss[1] < 0.5 * results.train_loss[0]
    first, *_, last = results.held_out.values()
    assert last < first
    assert all("It is" in after for _, after in results.answers.values())


def test_a_loss_that_rises_fails_the_run(checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="The loss has not fallen"):
        finetune_lm.prove(None, None, None, 1.0, 1.0)
    given = ["--checkpoint", str(checkpoint), "--train", "x"]
    for argv, message in (
        (["--checkpoint", str(checkpoint)], 2),
        (["--checkpoint", str(checkpoint), "--train", "x", "--batch", "3"], 2),
        (["--checkpoint", str(checkpoint), "--train", "x", "--block", "7"], 2),
        ([*given, "--full", "--quantize", "int8"], 2),
    ):
        with pytest.raises(SystemExit) as caught:
            finetune_lm.options(argv)
        assert caught.value.code == message
