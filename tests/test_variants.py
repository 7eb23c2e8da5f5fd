"""Variants against formulas in NumPy, in every transformation of the contract."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import flora
import flora.sharding
from flora.variants import DoRA, VeRA
from tests.support.contract import (
    _everything,
    adapt,
    array,
    close,
    close_at_start,
    dense_arrays_of_step,
    scalar,
)
from tests.support.variant_cases import (
    CASES,
    VARIANTS,
    case,
    conv,
    dense,
    experts,
    formula,
    trained,
)

AUTO = jax.sharding.AxisType.Auto

FEW = ("dense", "heads out", "stack of scan", "grouped convolution")


# DoRA alone scales columns; what the others do ends at A and B.
@pytest.mark.parametrize(
    ("variant", "name"),
    [("DoRA", name) for name in (*CASES, "embedding", "experts")]
    + [(variant, name) for variant in ("VeRA", "AdaLoRA") for name in FEW],
)
def test_every_variant_keeps_the_contract(x64, variant, name):
    fn, params, args = case(name)
    adapted = adapt(fn, params, *args, variant=VARIANTS[variant], dtype=jnp.float64)
    if variant == "DoRA":  # its norms are divided by themselves
        close(flora.lora(fn)(adapted, *args), fn(params, *args), 1e-14)
    else:
        close_at_start(fn, adapted, params, *args)
    adapted = trained(adapted)
    everything = jax.jit(lambda t, args: _everything(fn, t, args, name != "experts"))
    got = everything(adapted, args)
    got.pop("gradients"), got.pop("weights")
    plain = dense(adapted)
    want = fn(plain, *args)
    for out in (got.pop("merged"), *(got[k] for k in got if k != "whole")):
        close(out, want)
    g = jax.grad(lambda t: scalar(fn(t, *args)))(plain)["w"]
    whole = got["whole"]["w"]
    assert not np.any(np.asarray(whole.base)), "the base received a gradient"
    for part, wanted in formula(adapted["w"], g).items():
        found = {"a": whole.a, "b": whole.b, **whole.extra}[part]
        np.testing.assert_allclose(
            found,
            wanted,
            rtol=0,
            atol=1e-12 * max(1, np.abs(wanted).max()),
            err_msg=part,
        )
    found = dense_arrays_of_step(fn, adapted, *args)
    assert found == [], [eqn.primitive for eqn in found]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_narrow_dtypes(variant, dtype):
    params, x = {"w": array(6, 10, dtype=dtype)}, array(7, 6, seed=2, dtype=dtype)

    def fn(params, x):
        return jnp.tanh(x @ params["w"])

    adapted = adapt(fn, params, x, variant=VARIANTS[variant])
    start = flora.lora(fn)(adapted, x)
    if dtype == jnp.bfloat16:
        chex.assert_trees_all_equal(start, fn(params, x))
    adapted = trained(adapted)
    close(jax.jit(flora.lora(fn))(adapted, x), fn(dense(adapted), x).astype(dtype))
    close(flora.merge(adapted)["w"], dense(adapted)["w"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["dense", "convolution", "embedding"])
def test_dropout_acts_on_what_adapting_changes(x64, variant, name):
    """y = x W + (x' W_eff - x' W), with x' the dropped x; lookups are not dropped."""
    fn, params, args = case(name)
    changed = trained(
        adapt(
            fn, params, *args, variant=VARIANTS[variant], dropout=0.5, dtype=jnp.float64
        )
    )
    key = jax.random.key(5)
    apply = flora.lora(fn)
    got = apply(flora.with_dropout(changed, key), *args)
    if name == "embedding":
        return close(got, apply(changed, *args))
    # Factors whose product is 1 give x' itself: 1×1 along a window.
    shape = params["w"].shape
    n = shape[-2]
    eye = np.zeros((*shape[:-2], n, n))
    eye[tuple(k // 2 for k in shape[:-2])] = np.eye(n)
    same = {"w": jnp.zeros((*shape[:-1], n))}
    whole = adapt(
        fn, same, *args, dropout=0.5, rank=n, alpha=float(n), dtype=jnp.float64
    )
    assert whole["w"].layout == changed["w"].layout
    echo = {"w": dataclasses.replace(whole["w"], a=jnp.asarray(eye), b=jnp.eye(n))}
    # Strides leave positions out.
    unit = functools.partial(conv, strides=(1, 1)) if name == "convolution" else fn
    dropped = flora.lora(unit)(flora.with_dropout(echo, key), *args)
    assert 0.2 < float((dropped == 0).mean()) < 0.8
    effective = dense(changed)
    want = fn(params, *args) + fn(effective, dropped) - fn(params, dropped)
    close(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_frozen_stays_and_the_rest_trains(variant):
    fn, params, args = (
        lambda p, x: jnp.tanh(x @ p["w"]),
        {"w": array(5, 4, dtype=jnp.float32)},
        (array(3, 5, dtype=jnp.float32),),
    )
    adapted = adapt(fn, params, *args, variant=VARIANTS[variant])
    tx = flora.optimizer(optax.adamw(1e-2, weight_decay=0.1), adapted)
    state, before = tx.init(adapted), adapted

    @jax.jit
    def step(adapted, state):
        def loss(t):
            return (flora.lora(fn)(t, *args) ** 2).mean()

        value, grads = flora.value_and_grad(loss)(adapted)
        updates, state = tx.update(grads, state, adapted)
        return optax.apply_updates(adapted, updates), state, value

    losses = []
    for _ in range(5):
        adapted, state, value = step(adapted, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    old, new, frozen = before["w"], adapted["w"], VARIANTS[variant].frozen
    chex.assert_trees_all_equal(old.base, new.base)
    parts = {"a": (old.a, new.a), "b": (old.b, new.b)}
    parts |= {name: (old.extra[name], new.extra[name]) for name in old.extra}
    for name, (x, y) in parts.items():
        assert np.array_equal(x, y) == (name in frozen), name
    # The optimizer keeps two moments of what trains, and nothing else.
    sizes = sum(x.size for name, (x, _) in parts.items() if name not in frozen)
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == 2 * sizes


def test_vera_shares_its_random_factors():
    params = {
        "one": jnp.ones((5, 4)),
        "two": jnp.ones((5, 4)),
        "six": jnp.ones((3, 5, 4)),
    }

    def fn(p, x):
        return x @ p["one"] + x @ p["two"] + x @ p["six"][1]

    tree = adapt(fn, params, jnp.ones((2, 5)), variant=VeRA())
    chex.assert_trees_all_equal(tree["one"].a, tree["two"].a, tree["six"].a[1])
    chex.assert_trees_all_equal(tree["one"].b, tree["two"].b, tree["six"].b[2])
    other = adapt(fn, params, jnp.ones((2, 5)), variant=VeRA(seed=1))
    assert not np.array_equal(tree["one"].a, other["one"].a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_abstract_trees_and_meshes(variant):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=2 * (AUTO,))
    spec = jax.NamedSharding(mesh, P(None, "fsdp", "tp"))
    params = {"w": jax.device_put(jnp.ones((2, 8, 4)), spec)}
    x = jnp.ones((2, 8))

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, p["w"])[0]

    def make(params):
        return adapt(fn, params, x, variant=VARIANTS[variant])

    adapted = make(params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), flora.split(adapted)[1])
    abstract = make(jax.eval_shape(lambda: params))
    assert (
        jax.tree.map(lambda x: (x.shape, x.dtype), flora.split(abstract)[1]) == shapes
    )
    places = flora.sharding.shardings(adapted)
    placed = jax.device_put(adapted, places)
    close(jax.jit(flora.lora(fn))(placed, x), fn(params, x), 1e-5)
    name = {"DoRA": "magnitude", "VeRA": "v", "AdaLoRA": "e"}[variant]
    want = P(None, None) if variant == "AdaLoRA" else P(None, "tp")
    whole = jax.NamedSharding(mesh, want)
    assert places["w"].extra[name].is_equivalent_to(whole, 2)


def test_shards_take_their_columns(x64):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AUTO,))
    params, x = {"w": array(5, 8, seed=1)}, array(3, 5)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "tp"), P()), out_specs=P(None, "tp")
    )
    def product(w, x):
        return x @ w

    def fn(p, x):
        return product(p["w"], x)

    adapted = trained(adapt(fn, params, x, variant=DoRA(), dtype=jnp.float64))
    close(jax.jit(flora.lora(fn))(adapted, x), fn(dense(adapted), x))


REFUSED = {
    "sum": lambda p, x: x @ (p["w"] + p["v"]),
    "square": lambda p, x: x @ (p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2, 0))),
    "two weights": lambda p, x: x @ (p["w"] @ p["v"]),
    "sum over out axes": lambda p, x: x @ p["w"] + p["w"].sum(1),
}


TARGETS = {"two weights": "*"}


@pytest.mark.parametrize("what", REFUSED)
def test_what_scaled_columns_cannot_go_through_is_refused_by_name(x64, what):
    params, x, fn = (
        {"w": array(5, 5), "v": array(5, 5, seed=3)},
        array(3, 5),
        REFUSED[what],
    )
    adapted = trained(
        adapt(fn, params, x, target=TARGETS.get(what, "w"), variant=DoRA(),
              dtype=jnp.float64)
    )  # fmt: skip
    with pytest.raises(flora.LoraError, match=r"'w'.*scaled"):
        flora.lora(fn)(adapted, x)
    forced = flora.lora(fn, fallback="materialize")(adapted, x)
    close(forced, fn(dense(adapted), x))


def test_a_variant_of_the_wrong_kind_is_refused():
    with pytest.raises(flora.LoraError, match=r"variant=DoRA.*flora.variants.DoRA\(\)"):
        flora.LoraConfig(variant=DoRA)
    with pytest.raises(flora.LoraError, match="variant='dora'"):
        flora.LoraConfig(variant="dora")


@dataclasses.dataclass(frozen=True)
class Squashed:
    """x A goes through tanh before it meets B."""

    frozen = ()

    def start(self, key, weight):
        return weight

    def product(self, weight):
        return flora.variants.Product(weight.a, weight.b, between=jnp.tanh)


@pytest.mark.parametrize(
    "name", ["dense", "heads out", "stack of scan", "convolution",
             "grouped convolution", "embedding", "experts"]
)  # fmt: skip
def test_a_function_between_a_and_b(x64, name):
    fn, params, args = case(name)
    adapted = trained(adapt(fn, params, *args, variant=Squashed(), dtype=jnp.float64))
    if name != "stack of scan":
        w = adapted["w"]
        n, stack = w.rank, w.layout.stack
        out = [w.base.shape[i] for i in w.layout.out]
        got = flora.lora(fn)(adapted, *args) - fn(params, *args)
        if name == "convolution":
            z = conv({"w": w.a}, *args)
        elif name == "grouped convolution":
            halves = jnp.split(args[0], 2, -1)
            z = jnp.stack([conv({"w": w.a}, half) for half in halves], -2)
        elif name == "experts":
            z = experts({"w": w.a}, *args)
        elif name == "embedding":
            z = w.a[args[0]]
        else:
            z = jnp.tensordot(args[0], w.a, len(w.layout.in_))
        z = w.scale * jnp.tanh(z)
        if name == "experts":
            want = experts({"w": w.b}, z, args[1])
        elif name == "grouped convolution":
            b = w.b.reshape(n, 2, -1)
            want = jnp.einsum("bhwgr,rgo->bhwgo", z, b).reshape(got.shape)
        else:
            assert not stack
            want = (z @ w.b.reshape(n, -1)).reshape(*z.shape[:-1], *out)
        close(got, want, 1e-11)
    with pytest.raises(flora.LoraError, match=r"'w'.*between"):
        flora.merge(adapted)


def test_a_checkpoint_keeps_what_a_variant_has(tmp_path):
    from flora.checkpoint import Checkpointer

    fn, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((5, 4))}, jnp.ones((3, 5))
    adapted = trained(adapt(fn, params, x, variant=DoRA()))
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, adapted)
        fresh = adapt(fn, params, x, variant=DoRA(), key=7)
        restored = checkpointer.restore(fresh).adapted
        chex.assert_trees_all_equal(restored, adapted)
        with pytest.raises(flora.LoraError, match=r"variant=DoRA\(\)"):
            checkpointer.restore(adapt(fn, params, x))


def test_the_table_counts_what_trains():
    fn, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((5, 4))}, jnp.ones((3, 5))
    vera = flora.summary(adapt(fn, params, x, variant=VeRA())).rows[0]
    dora = flora.summary(adapt(fn, params, x, variant=DoRA())).rows[0]
    assert (vera.trained, dora.trained) == (2 + 4, 5 * 2 + 2 * 4 + 4)
