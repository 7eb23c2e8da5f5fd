"""`LoraConfig` by other libraries' names: the error says what to write."""

import re

import pytest

import flora

FIELDS = {
    "r": (8, "Write rank=8."),
    "lora_alpha": (16, "Write alpha=16."),
    "lora_dropout": (0.1, "Write dropout=0.1."),
    "use_rslora": (True, "Write rank_stabilized=True."),
    "target_modules": (
        ["q_proj", "mlp.up_proj"],
        "Write target=['q_proj/kernel', 'mlp/up_proj/kernel']",
    ),
    "exclude_modules": ({"lm_head"}, "Write exclude=['lm_head/kernel']"),
    "modules_to_save": (["lm_head"], "Write train=['lm_head/*']"),
    "use_dora": (True, "Write variant=flora.variants.DoRA()."),
    "bias": ("all", "Write train='bias'."),
    "init_lora_weights": ("gaussian", "Write init=flora.initializers.by_rank()."),
    "task_type": ("CAUSAL_LM", "Pass it to flora.peft.save."),
    "layers_to_transform": ([0, 1], "target=, such as 'layers_[0-3]/*/kernel'."),
    "ranks": (3, "Write rank=3, or take one of rank, alpha, target, "),
    "what": (3, "Take one of rank, alpha, target, "),
}
OTHERS = [
    ("target_modules", "all-linear", "Write target=flora.coverage(fn, tree, ...)."),
    ("target_modules", r".*\.(q|v)_proj", "globs of paths, such as 'q_proj/kernel'"),
    ("use_dora", False, "Leave it out."),
    ("bias", "none", "Leave it out."),
    ("init_lora_weights", True, "Leave it out: A is Gaussian"),
    ("init_lora_weights", "pissa", "Write flora.starts.pissa(adapted) after"),
]


@pytest.mark.parametrize(
    ("name", "value", "remedy"), [(k, *v) for k, v in FIELDS.items()] + OTHERS
)
def test_a_foreign_field_says_what_to_write(name, value, remedy):
    with pytest.raises(flora.LoraError, match=re.escape(remedy)) as error:
        flora.LoraConfig(**{name: value})
    assert isinstance(error.value, TypeError)
    assert f"LoraConfig has no field {name!r}." in str(error.value)


def test_what_is_offered_can_be_written():
    given = {name: FIELDS[name][0] for name in FIELDS}
    with pytest.raises(flora.LoraError) as error:
        flora.LoraConfig(**given)
    assert str(error.value).startswith(f"{len(FIELDS)} problems:")
    written = r"Write (\w+)=(.+?)(?:: globs of paths|, or take .+)?\.\n"
    offered = dict(re.findall(written, f"{error.value}\n"))
    values = {k: eval(v, {"flora": flora}) for k, v in offered.items()}
    config = flora.LoraConfig(**values)
    assert (config.alpha, config.rank_stabilized, config.train) == (16, True, "bias")
    assert config.variant == flora.variants.DoRA()
