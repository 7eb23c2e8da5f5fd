import math
import re

import jax.numpy as jnp
import pytest

import flora

BAD_CONFIGS = {
    "rank=0. The rank must be an int": {"rank": 0},
    "rank=2.5. The rank must be an int": {"rank": 2.5},
    "rank=True. The rank must be an int": {"rank": True},
    "alpha=0. alpha must be a finite": {"alpha": 0},
    "alpha=-1.0. alpha must be": {"alpha": -1.0},
    "alpha=nan. alpha must be": {"alpha": math.nan},
    "alpha=inf. alpha must be": {"alpha": math.inf},
    "dropout=1.0. It must lie in": {"dropout": 1.0},
    "dropout=-0.1. It must lie in": {"dropout": -0.1},
    "dropout=nan. It must lie in": {"dropout": math.nan},
    "rank_pattern['x']=0. The rank": {"rank_pattern": {"x": 0}},
    "alpha_pattern['x']=-2. alpha": {"alpha_pattern": {"x": -2}},
    "rank_pattern=3. Write a dict": {"rank_pattern": 3},
    "target=3 holds a int. Write a glob": {"target": 3},
    "fallback='maybe'. Write 'error'": {"fallback": "maybe"},
    "dtype=<class 'jax.numpy.int32'>. Factors need": {"dtype": jnp.int32},
    "dtype='what'. Factors need": {"dtype": "what"},
    "init='pissa'. Write one of": {"init": "pissa"},
    "layouts['x']=3. Write flora.Layout": {"layouts": {"x": 3}},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs(message):
    with pytest.raises(flora.LoraError, match=re.escape(message)):
        flora.LoraConfig(**BAD_CONFIGS[message])


def test_all_problems_at_once():
    with pytest.raises(flora.LoraError) as error:
        flora.LoraConfig(rank=0, alpha=-1, dropout=2)
    assert str(error.value).startswith("3 problems:\n")
