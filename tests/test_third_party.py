"""Unmodified models of other packages keep the contract."""

import contract
import pytest
from third_party import MODELS

# Their warnings are theirs.
pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", MODELS)
def test_contract_of_third_party_models(name):
    contract.check_model(MODELS[name]())
