"""Folders of tests mirror the package's: what has no file of its own is listed."""

import pathlib

import flora

PACKAGE = pathlib.Path(flora.__file__).parent
TESTS = pathlib.Path(__file__).parents[1]

SAVED, LOADED = "peft/test_save.py", "peft/test_peft_flax.py"
REFUSED = "peft/test_peft_refusals.py"

# Modules without a test of their own name: what tests them, and why that.
EXCEPTIONS = {
    "initializers.py": ("tree/test_initializers.py", "it is that module's face"),
    "_algebra/variants.py": ("test_variants.py", "their face, against formulas"),
    "_files/compare.py": ("test_checkpoint_refusals.py", "runs that do not fit"),
    "_files/items.py": ("test_checkpoint.py", "what a checkpoint holds"),
    "_files/records.py": ("files/test_formats.py", "what a file says of a leaf"),
    "_monitor/measures.py": ("test_monitor.py", "what the monitor returns"),
    "_monitor/plot.py": ("test_monitor.py", "what the monitor draws"),
    "_multi/conform.py": ("multi/test_combine.py", "what adapters must agree on"),
    "_multi/extract.py": ("multi/test_combine.py", "the adapter of a difference"),
    "_multi/lowrank.py": ("multi/test_combine.py", "the best of a rank"),
    "_multi/places.py": ("multi/test_kinds.py", "places of a stack, filled anew"),
    "_multi/stacked.py": ("test_multi.py", "stacks of adapters, as callers hold them"),
    "_starts/components.py": ("test_budget.py", "budgets divided among leaves"),
    "_starts/residual.py": ("test_starts.py", "starts, as callers ask for them"),
    "_peft/config.py": (REFUSED, "settings that are refused"),
    "_peft/factors.py": ("peft/test_peft_layers.py", "factors, layer by layer"),
    "_peft/file.py": (REFUSED, "files that are damaged"),
    "_peft/kinds/groups.py": ("peft/test_peft_layers.py", "convolutions in groups"),
    "_peft/keys.py": ("peft/naming/test_names.py", "names in files"),
    "_peft/layouts.py": ("peft/test_peft_layers.py", "layouts, layer by layer"),
    "_peft/load.py": (LOADED, "whole files, loaded"),
    "_peft/naming/names_match.py": (
        "peft/naming/test_names.py",
        "names, found by values too",
    ),
    "_peft/nodes.py": ("peft/test_peft_layers.py", "the leaves of a loaded tree"),
    "_peft/parameters.py": ("peft/test_peft_layers.py", "parameters of experts"),
    "_peft/parts.py": ("peft/naming/test_names.py", "heads and fused leaves in parts"),
    "_peft/naming/renamed.py": (
        "peft/naming/test_convention.py",
        "names of another version",
    ),
    "_peft/serving.py": (SAVED, "what is written for servers"),
    "_peft/targets.py": (REFUSED, "what PEFT would not select"),
    "_peft/ties.py": ("peft/test_peft_layers.py", "weights that two modules share"),
    "_peft/kinds/twice.py": (
        "peft/kinds/test_attention.py",
        "what PEFT makes of attention",
    ),
    "_peft/whole.py": (SAVED, "leaves that train whole"),
}


def mirrored(module):
    """`trace/rules/test_dot.py` for `_trace/rules/dot.py`."""
    *folders, name = pathlib.PurePath(module).parts
    return "/".join([*(f.removeprefix("_") for f in folders), f"test_{name}"])


def test_each_module_has_a_test_file_or_a_reason_for_none():
    modules = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(modules) > 80
    without = {m for m in modules if not (TESTS / mirrored(m)).exists()}
    assert without == set(EXCEPTIONS)
    for module, (tests, reason) in EXCEPTIONS.items():
        assert (TESTS / tests).exists(), module
        assert reason
