"""The loops of examples/howto/nnx.md: three lines of each make it LoRA."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest
from flax import nnx

import flora.nnx

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "howto/nnx.md").read_text()
DIFFS = dict(re.findall(r"```diff\n--- examples/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL))


def changed(source, diff):
    """The script with a diff's lines, and how many they are."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old = "\n".join(x[1:] for x in lines if x[:1] != "+")
        new = "\n".join(x[1:] for x in lines if x[:1] != "-")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source, len(re.findall(r"^\+", diff, re.MULTILINE))


def run(source, steps):
    module = types.ModuleType("loop")
    exec(compile(source, "loop", "exec", dont_inherit=True), module.__dict__)
    return module, module.main(steps)


@pytest.mark.parametrize(
    "name", ["nnx_digits", pytest.param("nnx_decoder", marks=pytest.mark.slow)]
)
def test_three_lines_make_a_loop_lora(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    text, count = changed(source, DIFFS[name])
    assert count == 3
    (module, full), (_, small) = run(source, 3), run(text, 3)
    fresh = module.Decoder() if "decoder" in name else module.CNN(rngs=nnx.Rngs(0))
    for found in (full, small):
        assert found["losses"][-1] < found["losses"][0]
    assert abs(full["losses"][0] - small["losses"][0]) < 1e-4  # B = 0
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    bases = [nnx.state(x, frozen) for x in (small["model"], fresh)]
    jax.tree.map(np.testing.assert_array_equal, *bases)
    assert flora.nnx.tree(small["model"])
    assert not nnx.state(full["model"], nnx.LoRAParam)
