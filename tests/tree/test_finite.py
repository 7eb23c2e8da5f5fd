"""NaN and infinity: refused wherever something is kept, by name, unless insisted on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
import flora.checkpoint
import flora.hf
import flora.multi
import flora.peft
import flora.quantize
import flora.recipes
import flora.starts
from flora._tree.finite import require_finite
from tests.support.contract import array

X = jnp.ones((2, 8))
CONFIG = flora.LoraConfig(rank=2, target="kernel", train="head")
TENSORS = {
    name: flora.hf.Tensor(name) for name in ("layer/kernel", "head", "mask", "step")
}
NAMES = {"layer/kernel": "layer.weight", "head": "head.weight"}


def fn(p, x):
    return jnp.where(p["mask"] == 0, x @ p["layer"]["kernel"], 0) @ p["head"]


def params(dtype=jnp.float32):
    """With a mask that is infinite on purpose."""
    kernel = array(8, 6, dtype=jnp.float32).astype(dtype)
    head = array(6, 5, dtype=jnp.float32).astype(dtype)
    mask = jnp.zeros(6, dtype).at[0].set(-jnp.inf)
    return {"layer": {"kernel": kernel}, "head": head, "mask": mask,
            "step": jnp.int32(3)}  # fmt: skip


def adapt(dtype=jnp.float32, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    adapted = flora.init(jax.random.key(0), config, fn, params(dtype), X.astype(dtype))
    node = adapted["layer"]["kernel"]
    return changed(adapted, b=array(*node.b.shape, dtype=node.b.dtype))


def changed(adapted, **parts):
    node = dataclasses.replace(adapted["layer"]["kernel"], **parts)
    return {**adapted, "layer": {"kernel": node}}


def broken(value=jnp.nan):
    adapted = adapt()
    return changed(adapted, b=adapted["layer"]["kernel"].b.at[1, 2].set(value))


def broken_base():
    node = adapt()["layer"]["kernel"]
    return changed(adapt(), base=node.base.at[1, 2].set(jnp.inf))


def checkpoint(path, adapted, state=None, **insist):
    with flora.checkpoint.Checkpointer(path / "steps") as checkpointer:
        checkpointer.save(1, adapted, state, **insist)


def restart(path, adapted, **insist):
    tx = flora.optimizer(optax.sgd(1.0), adapted)
    state = tx.init(adapted)
    return flora.recipes.restart(jax.random.key(1), tx, state, adapted, **insist)


def peft(path, adapted, **insist):
    flora.peft.save(path / "peft", adapted, names=NAMES, **insist)
    if insist:
        with pytest.raises(flora.LoraError, match="NaN or infinity in 1 of 12"):
            flora.peft.load(path / "peft", params(), names=NAMES)
        flora.peft.load(path / "peft", params(), names=NAMES, **insist)


# verb: (what it does, the name that it gives the leaf)
KEEPERS = {
    "merge": (lambda path, x, **k: flora.merge(x, **k), "layer/kernel"),
    "restart": (restart, "layer/kernel"),
    "Checkpointer.save": (checkpoint, "b of layer/kernel"),
    "flora.save": (
        lambda path, x, **k: flora.save(path / "x.safetensors", x, **k),
        "b/layer/kernel",
    ),
    "peft.save": (peft, "b of layer/kernel"),
}


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_what_keeps_an_adapter_refuses_what_is_not_finite(tmp_path, name, value):
    keep, leaf = KEEPERS[name]
    with pytest.raises(
        flora.LoraError, match=rf"'{leaf}' holds NaN or infinity in \d+ of \d+ places"
    ):
        keep(tmp_path, broken(value))
    assert list(tmp_path.iterdir()) == []  # nothing was touched
    keep(tmp_path, broken(value), allow_nonfinite=True)
    keep(tmp_path / "finite", adapt())  # the infinite mask is not its business
    with pytest.raises(flora.LoraError, match=r"allow_nonfinite='yes'. Write True or"):
        keep(tmp_path, adapt(), allow_nonfinite="yes")


@pytest.mark.parametrize("name", [*KEEPERS.keys() - {"restart"}])
def test_leaves_that_train_whole_are_looked_at_too(tmp_path, name):
    keep, _ = KEEPERS[name]
    adapted = adapt()
    head = flora.Trained(adapted["head"].value.at[0, 0].set(jnp.inf))
    with pytest.raises(flora.LoraError, match="head' holds NaN or infinity in 1 of 30"):
        keep(tmp_path, {**adapted, "head": head})


READERS = {
    "pissa": flora.starts.pissa,
    "olora": flora.starts.olora,
    "loftq": lambda x: flora.quantize.loftq(x, "int8", block=2),
    "lora_ga": lambda x: flora.starts.lora_ga(
        x, {"layer": {"kernel": jnp.ones((8, 6))}}
    ),
    "eva": lambda x: flora.starts.eva(jax.random.key(1), x, fn, [(X,)]),
}


@pytest.mark.parametrize("name", READERS)
def test_what_computes_from_a_weight_refuses_it_too(name):
    with pytest.raises(flora.LoraError, match=rf"{name}: 'layer/kernel' holds NaN"):
        READERS[name](broken_base())


def test_gradients_of_a_start():
    grads = {"layer": {"kernel": jnp.full((8, 6), jnp.nan)}}
    with pytest.raises(flora.LoraError, match="'the gradient of layer/kernel' holds"):
        flora.starts.lora_ga(adapt(), grads)


def test_quantized_weights():
    tree = {"kernel": array(8, 6, dtype=jnp.float32).at[0, 0].set(jnp.inf)}
    with pytest.raises(flora.LoraError, match="quantize: 'kernel' holds NaN or inf"):
        flora.quantize.quantize(tree, "int8", block=2)
    quantized = flora.quantize.quantize(tree, "int8", block=2, allow_nonfinite=True)
    assert quantized["kernel"].shape == (8, 6)
    with pytest.raises(flora.LoraError, match="in 2 of 48 places"):
        require_finite("verb", quantized)  # all that share a scale


def test_adapters_that_are_combined_or_extracted():
    good, bad = (flora.split(x)[1] for x in (adapt(), broken()))
    with pytest.raises(
        flora.LoraError, match=r"combine: .* of adapter 1 is not finite"
    ):
        flora.multi.combine([good, bad], [0.5, 0.5])
    trained = flora.merge(broken(), allow_nonfinite=True)
    with pytest.raises(flora.LoraError, match="extract: 'layer/kernel' holds NaN"):
        flora.multi.extract(adapt(), trained)


def test_weights_in_files_of_hugging_face(tmp_path):
    tree = params()
    for leaf, tree_ in (("mask", tree), ("head", tree | {"mask": jnp.zeros(6)} | {
            "head": tree["head"].at[1].set(jnp.nan)})):  # fmt: skip
        with pytest.raises(flora.LoraError, match=f"save: '{leaf}' holds NaN or inf"):
            flora.hf.save(tmp_path / "hf", tree_, TENSORS)
    assert not (tmp_path / "hf").exists()
    flora.hf.save(tmp_path / "hf", tree, TENSORS, allow_nonfinite=True)
    found = flora.hf.load(tmp_path / "hf", jax.eval_shape(params), TENSORS)
    np.testing.assert_array_equal(found["mask"], tree["mask"])


def test_a_file_of_other_dtype_that_cannot_hold_the_values(tmp_path):
    node = adapt()["layer"]["kernel"]
    large = changed(adapt(), b=node.b.at[0, 0].set(1e5))
    flora.peft.save(tmp_path, large, names=NAMES)
    with pytest.raises(flora.LoraError, match=r"lora_B.weight' holds NaN .* 1 of 12"):
        flora.peft.save(tmp_path, large, names=NAMES, dtype=jnp.float16)


def test_a_merged_sum_that_the_dtype_cannot_hold():
    adapted = adapt(jnp.float16, target="kernel")
    node = adapted["layer"]["kernel"]
    large = changed(adapted, a=node.a.at[0, 0].set(1e3), b=node.b.at[0, 1].set(1e3))
    with pytest.raises(flora.LoraError, match=r"'layer/kernel' holds .* in 1 of 48"):
        flora.merge(large)


def test_what_a_base_held_before_is_not_blamed_on_the_merge():
    merged = flora.merge(broken_base())
    assert jnp.isinf(merged["layer"]["kernel"]).sum() == 1
    both = changed(broken_base(), b=broken()["layer"]["kernel"].b)
    with pytest.raises(flora.LoraError, match="in 7 of 48 places"):
        flora.merge(both)  # a column of 8, of which one was there


def test_no_values_to_look_at():
    traced = jax.jit(flora.merge)(broken())
    assert jnp.isnan(traced["layer"]["kernel"]).sum() == 8
    shapes = jax.eval_shape(flora.merge, broken())
    assert shapes["layer"]["kernel"].shape == (8, 6)
    flora.merge(jax.eval_shape(broken))
    nodes = [adapt(), broken()]
    mapped = jax.vmap(lambda b: flora.merge(changed(adapt(), b=b)))(
        jnp.stack([x["layer"]["kernel"].b for x in nodes])
    )
    assert jnp.isnan(mapped["layer"]["kernel"]).sum() == 8

    def closure(x):  # values of a constant are known while something else is traced
        require_finite("verb", {"constant": jnp.ones(3), "x": x})
        with pytest.raises(flora.LoraError, match="'constant' holds"):
            require_finite("verb", {"constant": bad, "x": x})
        return x

    bad = jnp.array([jnp.nan])
    jax.jit(closure)(jnp.nan)
    require_finite("verb", {"key": jax.random.key(0), "n": jnp.int8(1), "s": "s"})


def test_moments_and_other_numbers_of_a_state(tmp_path):
    adapted = adapt()
    adapter = flora.split(adapted)[1]
    tx = optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau())
    state = tx.init(adapter)
    assert any(jnp.isinf(x).any() for x in jax.tree.leaves(state))  # the best loss
    checkpoint(tmp_path / "good", adapted, state)
    a = adapter["layer"]["kernel"].a.at[0, 0].set(jnp.nan)
    _, state = tx.update(changed(adapter, a=a), state, adapter, value=1.0)
    with pytest.raises(
        flora.LoraError, match=r"'state of \S*mu/layer/kernel/a' holds .* 1 of 16"
    ):
        checkpoint(tmp_path / "bad", adapted, state)
    checkpoint(tmp_path / "bad", adapted, state, allow_nonfinite=True)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float8_e5m2, jnp.float16, jnp.complex64]
)
@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
def test_dtypes(dtype, make):
    x = make(jnp.array([1, jnp.inf, jnp.nan, 0], dtype))
    with pytest.raises(flora.LoraError, match=r"verb: 'x' holds .* in 2 of 4 places"):
        require_finite("verb", {"x": x})
    require_finite("verb", {"x": x[:1]})


def test_arrays_stay_where_they_lie():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, Spec("data")))
    bad = x * jnp.nan
    with jax.transfer_guard("disallow"):
        require_finite("verb", {"x": x})
        with pytest.raises(flora.LoraError, match="24 of 24"):
            require_finite("verb", {"x": bad})
