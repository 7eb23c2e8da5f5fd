"""What the README says of the TPU compiler's estimates, held to the third digit."""

from importlib import metadata

import pytest

LIBTPU = "0.0.52"  # the compiler that gave these numbers; pyproject.toml pins it

LARGE, SMALL = (8192, 4096, 14336), (4096, 2048, 5632)

# Cycles of the step in the form that flora chooses, to the frozen model's.
TO_FROZEN = {
    ("v5e", LARGE): 0.992,
    ("v5p", LARGE): 1.023,
    ("v6e", LARGE): 1.046,
    ("v5e", SMALL): 1.183,
    ("v5p", SMALL): 1.153,
    ("v6e", SMALL): 1.343,
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("chip", "shape"), TO_FROZEN)
def test_the_step_costs_what_the_readme_says(benchmark, chip, shape):
    assert metadata.version("libtpu") == LIBTPU, "measure anew: compare.py --on tpu"
    compare = benchmark("compare")
    sizes = compare._arms.Sizes(*shape)
    found = compare.measure_tpu(chip, sizes, ["frozen", "flora auto"])
    step, frozen = found["flora auto"], found["frozen"]
    assert abs(step["to_frozen"] - TO_FROZEN[chip, shape]) < 0.005, step
    # Beside the frozen model's: x A and dy B of three products, padded to 128 lanes, and
    # one [W ; B] at a time, padded alike.  If copies of W lasted, there would be three.
    thin, copy = 3 * 2 * sizes.tokens * 128 * 2, (sizes.d + 128) * sizes.ff * 2
    assert step["temp_bytes"] <= frozen["temp_bytes"] + thin + copy
