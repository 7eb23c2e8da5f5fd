import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import MODELS

import flora


@pytest.mark.parametrize("name", MODELS)
def test_contract_of_models(name):
    model = MODELS[name]()
    adapted = contract.check(model.fn, model.params, *model.args, target=model.target,
                             **({"tolerance": 2e-5} | model.settings))  # fmt: skip
    report = flora.coverage(model.fn, model.params, *model.args)
    for row in flora.summary(adapted).rows:
        if row.role == "lora":
            assert report[row.path].status == "factored"
            assert report[row.path].layout == row.layout


@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_inputs_and_sharded(name):
    model = MODELS[name]()
    adapted = contract.randomized(
        contract.adapt(model.fn, model.params, *model.args, target=model.target)
    )
    apply = jax.jit(flora.lora(model.fn))
    expected = apply(adapted, *model.args)
    two = [jnp.stack([x, x]) for x in model.args]
    over = jax.jit(jax.vmap(flora.lora(model.fn), (None, 0)))(adapted, *two)
    tolerance = model.settings.get("tolerance", 2e-5)
    contract.close(jax.tree.map(lambda y: y[1], over), expected, tolerance)
    mesh = Mesh(np.array(jax.devices("cpu")), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    args = [jnp.concatenate([x] * 8) for x in model.args]
    want = jax.jit(model.fn)(flora.merge(adapted), *args)
    got = apply(jax.device_put(adapted, replicated), *jax.device_put(args, by_row))
    contract.close(got, want, tolerance)
