import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import flora
from tests.support import contract
from tests.support.registry import normal


def by_pallas(w, x):
    def kernel(w_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(w, x)


def by_callback(w, x):
    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), shape, w, x)


@pytest.mark.parametrize(
    ("call", "name"), [(by_pallas, "pallas_call"), (by_callback, "pure_callback")]
)
def test_weights_in_kernels_and_callbacks_are_refused_by_name(call, name):
    def fn(p, x):
        return call(p["w"], x)

    params, x = {"w": normal(7, 5)}, normal(3, 7)
    with pytest.raises(flora.LoraError, match=rf"'{name}' at test_interpret.py:\d+"):
        contract.adapt(fn, params, x)
    tree = contract.randomized(contract.adapt(fn, params, x, fallback="materialize"))
    contract.close(flora.lora(fn)(tree, x), fn(flora.merge(tree), x))
