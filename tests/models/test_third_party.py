"""Unmodified models of other packages keep the contract."""

import pytest

from tests.support import contract
from tests.support.third_party import MODELS

# Their warnings are theirs.
pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

# Models whose layers others of the list have too; `.ci/run` leaves them out.
BY_HAND = {
    "hf bert", "hf roberta", "hf distilbert", "hf electra", "hf gpt neo", "hf opt",
    "hf gemma", "hf mistral", "hf xglm", "hf mbart", "hf pegasus", "hf marian",
    "hf blenderbot", "hf dinov2", "hf regnet", "hf t5 encoder", "gemma 2", "gemma 3",
    "gemma 4", "tunix llama3", "tunix qwen2", "tunix qwen3", "tunix qwen3 remat",
    "tunix gemma", "tunix gemma4", "haiku transformer",
}  # fmt: skip


def of(name):
    return pytest.param(name, marks=pytest.mark.by_hand if name in BY_HAND else ())


def test_what_runs_by_hand_is_in_the_list():
    assert set(MODELS) > BY_HAND


@pytest.mark.parametrize("name", [of(name) for name in MODELS])
def test_contract_of_third_party_models(name):
    contract.check_model(MODELS[name]())
