"""flora beside other libraries in a trainer: what the benchmark's page says is so."""

import pathlib
import re

import pytest
import trainers

# Their warnings are theirs.
pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]
PAGE = pathlib.Path(trainers.__file__).parent / "README.md"
BY_HAND = ("Llama 3 of Tunix", "Gemma 3 of gemma")


def of_the_page(title):
    """The rows of a model's table: step -> lines, weights, ratios."""
    found, model = {}, None
    for line in PAGE.read_text().splitlines():
        cells = [re.sub(r"[`*]|\(.*\)", "", x).strip() for x in line.split("|")[1:-1]]
        if len(cells) == 6:
            model = cells[0] or model
            if model == title:
                found[cells[1]] = cells[2:5]
    return found


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(x, marks=pytest.mark.by_hand if x in BY_HAND else ())
        for x in trainers.models()
    ],
)
def test_the_page_has_what_the_script_finds(title):
    page, name = of_the_page(title), None
    rows = [row for row in trainers.models()[title]() if row[0] != "full fine-tuning"]
    for step, cells in rows:
        if isinstance(cells, str):  # raises
            assert page.get(step, ["—"])[0] == "—", step
        elif step == "flora, the same weights":
            assert cells[1] == page[name][1]
            ours = float(page[name][2].split(", ")[1])
            assert float(cells[2]) == pytest.approx(ours, abs=0.01)
        else:
            name = step
            lines, weights, ratios = page[step]
            assert cells[:2] == [lines, weights]
            theirs = float(ratios.split(", ")[0])
            assert float(cells[2]) == pytest.approx(theirs, abs=0.01)
    flora = dict(rows)["flora"]
    assert flora[3] == ""  # no weight without factors


def test_names_of_all_libraries_lead_to_their_weights():
    names = {
        "layers/0/mlp/up/kernel_lora_a": "layers/0/mlp/up/kernel",
        "lora/layers/up/kernel/a": "layers/up/kernel",
        "layers/up/lora/a": "layers/up",
        "layers/up/lora/lora_a": "layers/up",
        "layer_0/attn/q_einsum/_LoRAEinsum_0/lora/b": "layer_0/attn/q_einsum",
        "layer_1/mlp/_LoRAEinsum_linear/lora/b": "layer_1/mlp/linear",
    }
    assert {trainers.weight_of(x) for x in names} == set(names.values())
    for name, weight in names.items():
        assert trainers.weight_of(name) == weight
