"""What the examples claim, and what the pages say of the library."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import _arms
import custom_variant
import finetune_digits
import finetune_nnx
import gpu
import jax
import jax.numpy as jnp
import long_run
import pytest
import step_cost
import tracing

import flora
from flora._trace.rules import RULES
from flora._tree.config import FORMS
from tests.support.contract import close, randomized

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_finetune_digits_in_small(tmp_path):
    picture = tmp_path / "out.png"
    results = finetune_digits.main(["--smoke", "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert results.base_bytes_changed == results.off_bytes_changed == 0
    assert results.merge_error <= 1e-5
    rows = {row.name: row for row in results.rows}
    assert rows["LoRA"].trained_parameters < rows["full fine-tuning"].trained_parameters
    assert rows["LoRA"].optimizer_bytes < rows["full fine-tuning"].optimizer_bytes


def test_finetune_digits_fails_unless_its_facts_hold():
    finetune_digits.prove(0, 0, 1e-6)
    for broken in ((1, 0, 0.0), (0, 1, 0.0), (0, 0, 1e-3), (0, 0, math.nan)):
        with pytest.raises(RuntimeError, match="The proof fails"):
            finetune_digits.prove(*broken)


@pytest.mark.slow
def test_finetune_digits(tmp_path):
    results = finetune_digits.main(["--out", str(tmp_path / "out.png")])
    rows = {row.name: row for row in results.rows}
    assert rows["frozen model"].turned < 0.4 < 0.9 < rows["LoRA"].turned
    assert rows["LoRA"].turned > rows["linear probe"].turned
    assert rows["LoRA, off"].upright == rows["frozen model"].upright > 0.95


def test_finetune_nnx():
    results = finetune_nnx.main(steps=60)
    assert results["after"] > results["before"] + 0.3
    assert results["merge_error"] <= 1e-5
    assert results["changed"] == ["dropout/rngs/count", "norm/mean", "norm/var"]


def test_a_long_run_in_small():
    for arm in long_run.measure(steps=40, d=16).values():
        assert (arm["traces"], arm["programs"], arm["changed_bytes"]) == (1, 1, 0)
        assert arm["last"] < 0.8 * arm["first"]


def test_step_cost():
    costs = step_cost.measure()
    assert costs["lora"]["to_frozen"] <= 1.03
    assert costs["lora"]["to_full"] <= 0.72
    assert costs["merge"]["to_full"] > 1.0
    assert costs["whole_tree"]["temp_to_split"] <= 1.1


def test_planning_70_billion_parameters():
    # In a process of its own: the peak of resident memory is a process's.
    code = "import json, plan_70b; print(json.dumps(plan_70b.measure()))"
    folder = ROOT / "examples" / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["parameters"] > 68e9
    assert plan["targets"] > 80 * 7
    assert plan["init_seconds"] < 60  # 3 s on an idle machine
    assert plan["peak_bytes"] < 2 * 2**30


@pytest.mark.slow
def test_tracing_time():
    results = tracing.measure(layers=24, pairs=5)
    assert results["trace"]["ratio"] <= 2.5
    assert results["trace_step"]["ratio"] <= 2.5


def test_the_same_operations_as_in_the_formula_by_hand():
    model, ids = tracing.Decoder(2), jnp.ones((2, 16), jnp.int32)
    tree = model.init(jax.random.key(0), ids)
    config = flora.LoraConfig(rank=4, alpha=8)
    adapted = randomized(flora.init(jax.random.key(0), config, model.apply, tree, ids))
    formula, *split = tracing.by_hand(model, adapted)
    apply = flora.lora(model.apply)
    close(apply(adapted, ids), formula(*split, ids), 1e-5)

    def operations(fn, *args):
        text = jax.jit(fn).lower(*args, ids).as_text()
        return collections.Counter(re.findall(r"stablehlo\.(\w+)", text))

    assert operations(apply, adapted) == operations(formula, *split)


@pytest.mark.slow
def test_every_arm_of_the_comparison_trains_and_is_timed():
    names = [name for name in _arms.makers() if name not in _arms.OTHERS]
    sizes = _arms.Sizes(tokens=16, d=16, ff=32, rank=2, dtype=jnp.float32, block=8)
    results = gpu.measure(sizes, device="cpu", rounds=2, only=names)
    # The compiler has no estimate for a kernel: benchmarks/kernel.py counts its bytes.
    assert {f"flora {form}" for form in FORMS} - {"flora kernel"} < set(names)
    assert all(results[name]["to_frozen"] > 0 for name in names)


@pytest.mark.third_party
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [x for x in _arms.OTHERS if x != "quax"])
def test_arms_of_other_libraries_train(name):
    _arms.check(name, _arms.OTHERS[name])


def test_an_arm_on_weights_that_are_not_rounded_stops_the_comparison():
    def unrounded(sizes):
        return dataclasses.replace(_arms.flora_arm(sizes), qtype="nf4")

    with pytest.raises(RuntimeError, match="is off by"):
        _arms.check("unrounded", unrounded)


def test_an_arm_that_does_not_train_stops_the_comparison():
    def dead(sizes):
        arm = _arms.flora_arm(sizes, "direct")
        stopped = jax.lax.stop_gradient
        return _arms.Arm(arm.pack, lambda t, f, x: arm.loss(stopped(t), f, x))

    with pytest.raises(RuntimeError, match="the norm of its gradient"):
        _arms.check("dead", dead)


def test_a_page_lists_every_primitive_with_a_rule():
    text = (ROOT / "examples/howto/primitives.md").read_text()
    assert {p.name for p in RULES} - set(re.findall(r"`(\w+)`", text)) == set()


def test_a_page_lists_every_form():
    text = (ROOT / "examples/howto/forms.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert {*rows, "auto"} == set(FORMS)


def test_the_readme_s_ten_lines_run(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    first, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(first, scope)
    assert scope["losses"][-1] < scope["losses"][0]
    assert flora.__version__ in text


def test_the_readme_is_short_and_says_how_to_install_run_and_test():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert [command.splitlines() for command in commands] == [
        ["pip install flora-jax"],
        ['pip install -e ".[examples]" && python examples/finetune_digits.py'],
        ['pip install -e ".[test]" && python -m pytest'],
    ]


def test_the_readme_s_costs_are_those_of_the_benchmarks():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## What it costs") : text.index("The estimates are")]
    costs = set(re.findall(r"\d+\.\d+", table))
    page = (ROOT / "examples/benchmarks/README.md").read_text()
    assert len(costs) >= 13
    assert costs <= set(re.findall(r"\d+\.\d+", page))


def test_a_variant_of_ones_own():
    results = custom_variant.main(steps=60)
    assert results["trained"] == 2 * 4 * 4
    assert results["losses"][-1] < 0.95 * results["losses"][0]
    assert results["merge_error"] <= 1e-5
