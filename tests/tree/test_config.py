"""What to adapt and how: every value is checked, and all problems are listed."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

import flora
from flora._tree.config import (
    COPIES,
    FORMS,
    form_problems,
    is_fallback,
    kernel_axes,
    require_config,
)

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
    "init_pattern['x']=1. Write one of flora.initializers": {"init_pattern": {"x": 1}},
    "init_pattern=<function": {"init_pattern": flora.initializers.uniform},
    "layouts['x']=3. Write flora.Layout": {"layouts": {"x": 3}},
    "rank_stabilized=1. Write True or False": {"rank_stabilized": 1},
    "alpha=True. alpha must be": {"alpha": True},
    "dropout=True. It must lie in": {"dropout": True},
    "dtype=None. Factors need": {"dtype": None},
    "form_pattern['x']='no'. Write one of": {"form_pattern": {"x": "no"}},
    "exclude=[3] holds a int. Write a glob": {"exclude": [3]},
    "layouts key=3 holds a int": {"layouts": {3: flora.Layout()}},
    "variant=DoRA. Write a value with `frozen`": {"variant": flora.variants.DoRA},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs(message):
    with pytest.raises(flora.LoraError, match=re.escape(message)):
        flora.LoraConfig(**BAD_CONFIGS[message])


def test_all_problems_at_once():
    with pytest.raises(flora.LoraError) as error:
        flora.LoraConfig(rank=0, alpha=-1, dropout=2)
    assert str(error.value).startswith("3 problems:\n")


def test_what_may_be_written():
    config = flora.LoraConfig(
        rank=np.int64(4), alpha=np.float32(0.5), dropout=0, dtype="bfloat16",
        target=["kernel", re.compile(".*embedding"), lambda path, leaf: True],
        rank_pattern={re.compile("x"): 1, "y": 2}, form_pattern={"x": "concat"},
        variant=flora.variants.DoRA(), fallback="materialize", train="bias",
    )  # fmt: skip
    assert dataclasses.replace(config, rank=2).rank == 2
    with pytest.raises(flora.LoraError, match="rank=-1"):
        dataclasses.replace(config, rank=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


def test_the_defaults_are_those_of_the_docstring():
    config = flora.LoraConfig()
    assert (config.rank, config.alpha, config.target, config.form) == (
        8, 16.0, "kernel", "auto",
    )  # fmt: skip
    assert config.dtype == jnp.float32
    # Fields that are dicts are not shared.
    assert config.rank_pattern is not flora.LoraConfig().rank_pattern
    # Equal configs draw by one compiled function.
    assert config.init is flora.LoraConfig().init
    assert config == flora.LoraConfig()


def test_what_is_no_config_says_the_order_of_arguments():
    config = flora.LoraConfig()
    assert require_config(config) is config
    for other in (None, {"rank": 2}, flora.LoraConfig, jnp.ones(2)):
        with pytest.raises(flora.LoraError, match=r"expected flora.LoraConfig\(...\)"):
            require_config(other)
    with pytest.raises(
        TypeError, match=r"config is a dict; .* flora.init\(key, config"
    ):
        require_config({})


def test_names_of_forms_and_fallbacks():
    for form in FORMS:
        assert form_problems("form", form) == []
    assert form_problems("form", "kernel:tp,ep") == []
    named = [kernel_axes(x) for x in ("kernel", "kernel:tp,ep", "auto", "kernels:tp")]
    assert named == [(), ("tp", "ep"), None, None]
    for bad in ("fast", "", None, 3, ["auto"], "kernel:", "kernel:tp,", "direct:tp"):
        (problem,) = form_problems("here", bad)
        assert problem.startswith(f"here={bad!r}. Write one of 'auto', 'direct', ")
    assert set(COPIES) < set(FORMS)
    assert [is_fallback(x) for x in ("error", "materialize", "", None, [])] == [
        True, True, False, False, False,
    ]  # fmt: skip
