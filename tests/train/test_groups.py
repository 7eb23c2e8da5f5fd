import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
from flora import recipes
from flora.variants import DoRA, VeRA
from tests.support import contract
from tests.support.adapters import (
    ADAPTED,
    GRADS,
    PLACES,
    WAYS,
    bits,
    close,
    expected,
    f32,
    sgd_restart,
    steps,
    unchanged,
    values,
)


def test_rates_by_pattern_and_part():
    rates = {
        "layers/*": {"b": 3.0},
        "kernel": 0.5,  # the rest of layers/kernel, and the head
        "head/*": {"train": 7.0},
    }
    got, _ = steps(recipes.scale_rates(rates, ADAPTED), "adapter", GRADS[:1])
    factors = {
        ("layers/kernel", "a"): 0.5,
        ("layers/kernel", "b"): 3.0,
        ("head/kernel", "train"): 0.5,
        ("head/bias", "train"): 7.0,
    }
    start, grads = values(ADAPTED), values(GRADS[0])
    want = {p: start[p] + factors.get(p, 1.0) * grads[p] for p in PLACES}
    close(got, want)


def test_rates_keep_the_dtype_of_updates():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS[0])
    tx = recipes.scale_rates({"*": jnp.float32(0.5)}, ADAPTED)
    updates, _ = tx.update(half, tx.init(ADAPTED), ADAPTED)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("way", [*WAYS, "bare whole tree"])
def test_groups_with_their_own_optimizers(way):
    tx = recipes.partition(
        {"heads": optax.sgd(0.1), "b": optax.adamw(1e-3), "rest": optax.adamw(1e-2)},
        {"head/*": "heads", re_compiled: {"b": "b"}, "*": "rest"},
        ADAPTED,
    )
    got, state = steps(tx, way)
    rates = {p: 1e-2 if p[1] == "a" else 1e-3 for p in PLACES}
    rates["embedding", "b"] = 1e-2
    want = expected(rates, dict.fromkeys(PLACES, 1e-4))
    start, grads = values(ADAPTED), [values(g) for g in GRADS]
    for p in [("head/kernel", "train"), ("head/bias", "train")]:
        want[p] = start[p] - 0.1 * (grads[0][p] + grads[1][p])
    close(got, want)
    assert unchanged(got)
    heads = (
        state.inner_states
        if way != "in optimizer"
        else (state.inner_states["train"].inner_state.inner_states)
    )
    assert jax.tree.leaves(heads["heads"]) == []


def re_compiled(path, leaf):
    """A callable pattern; it sees the weight where there is one."""
    return path == "layers/kernel" and (leaf is None or leaf.ndim == 4)


def test_decay_mask():
    mask = recipes.decay_mask(ADAPTED)
    base, adapter = flora.split(ADAPTED)
    got = mask(ADAPTED)
    assert jax.tree.structure(got) == jax.tree.structure(ADAPTED)
    named = {p: get(got) for p, get in PLACES.items()}
    assert named == {p: p[0] != "head/bias" for p in PLACES}
    assert not any(jax.tree.leaves(flora.split(got)[0]))
    assert mask(adapter)["frozen"]["kernel"] is None
    own = recipes.decay_mask(
        ADAPTED, {"kernel": {"a": False}, "head/*": {"train": True}}
    )
    named = {p: get(own(adapter)) for p, get in PLACES.items()}
    assert named == {p: p != ("layers/kernel", "a") for p in PLACES}
    assert base["frozen"]["kernel"] is ADAPTED["frozen"]["kernel"]


def test_accumulated_gradients_give_the_step_of_the_whole_batch():
    """MultiSteps, the mean by hand and one large batch: the same AdamW steps."""

    def fn(p, x):
        return jnp.tanh(x @ p["kernel"]) @ p["head"]

    x, y = f32(8, 7), f32(8, 3, seed=1)
    params = {"kernel": f32(7, 5), "head": f32(5, 3)}
    adapted = contract.randomized(
        contract.adapt(fn, params, x, target="kernel", train="head")
    )
    base, adapter = flora.split(adapted)
    apply = flora.lora(fn)

    @jax.jit
    def gradient(adapter, x, y):
        return jax.grad(lambda a: jnp.mean((apply(flora.join(base, a), x) - y) ** 2))(
            adapter
        )

    def train(tx, way):
        @jax.jit
        def step(p, state, g):
            updates, state = tx.update(g, state, p)
            return optax.apply_updates(p, updates), state

        p, state = adapter, tx.init(adapter)
        for _ in range(2):
            parts = [gradient(p, x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4, 6)]
            if way == "by hand":
                parts = [jax.tree.map(lambda *g: sum(g) / 4, *parts)]
            elif way == "one batch":
                parts = [gradient(p, x, y)]
            for g in parts:
                p, state = step(p, state, g)
        return p

    inner = optax.chain(optax.adamw(1e-2), recipes.lora_plus(4.0))
    for wrap in (lambda tx: tx, recipes.lora_fa):
        results = {
            way: train(wrap(tx), way)
            for way, tx in {
                "MultiSteps": optax.MultiSteps(inner, 4),
                "by hand": inner,
                "one batch": inner,
            }.items()
        }
        assert not np.array_equal(results["by hand"]["kernel"].b, adapter["kernel"].b)
        for way in ("by hand", "one batch"):
            contract.close(results["MultiSteps"], results[way], 1e-5)


def test_parts_of_variants():
    """Magnitudes have rates and groups of their own; VeRA's A and B stay frozen."""
    p, x = {"w": f32(6, 4), "v": f32(4, 3)}, f32(2, 6)

    def adapt(variant):
        return contract.adapt(lambda p, x: x @ p["w"] @ p["v"], p, x, variant=variant)

    dora, vera = adapt(DoRA()), adapt(VeRA())
    rates = {"w": {"magnitude": 5.0}, "*": {"b": 2.0, "magnitude": 0.0}}
    tx = recipes.scale_rates(rates, dora)
    got, _ = tx.update(dora, tx.init(dora), dora)
    contract.close(got["w"].extra["magnitude"], 5 * dora["w"].extra["magnitude"])
    assert not got["v"].extra["magnitude"].any()
    contract.close(got["v"].a, dora["v"].a)
    mask = recipes.decay_mask(dora)(dora)["w"]
    assert (mask.a, mask.b, mask.extra["magnitude"]) == (True, True, False)
    with pytest.raises(flora.LoraError, match=r"has no part 'b'; the parts.* d, v"):
        recipes.scale_rates({"w": {"b": 1.0}}, vera)
    tx = recipes.partition(
        {"d": optax.sgd(1.0), "v": optax.sgd(2.0)}, {"*": {"d": "d", "v": "v"}}, vera
    )
    updates, _ = tx.update(vera, tx.init(vera), vera)
    assert np.array_equal(bits(updates["w"].a), bits(jnp.full((6, 2), -0.0)))
    contract.close(updates["w"].extra["d"], -vera["w"].extra["d"])
    with pytest.raises(flora.LoraError, match=r"lora_fa: 'w' has the variant DoRA\(\)"):
        recipes.lora_fa(optax.sgd(0.1)).init({"w": dora["w"]})
    with pytest.raises(flora.LoraError, match=r"restart: 'w' has the variant DoRA\(\)"):
        sgd_restart({"w": dora["w"]})
    plus = recipes.lora_plus(3.0)
    got, _ = plus.update(vera, plus.init(vera), vera)  # B is frozen: no rate is raised
    contract.close(got, vera)


# What is refused.


def rates(spec, t=ADAPTED):
    return recipes.scale_rates(spec, t)


def groups(spec, names=("x",)):
    return recipes.partition({n: optax.sgd(0.1) for n in names}, spec, ADAPTED)


ERRORS = {
    r"rates='head/kernl' selects none of the 4 leaves.*Closest: 'head/kernel'.*Only "
    "leaves that train": lambda: rates({"head/kernl": 1.0}),
    "rates='scale' selects none": lambda: rates({"scale": 1.0}),  # it is frozen
    "'head/\\*' has no part 'b'; the parts of the 2 leaves.* train":
        lambda: rates({"head/*": {"b": 1.0}}),
    "all that 'embedding' selects is taken by earlier":
        lambda: rates({"*": 1.0, "embedding": 2.0}),
    "'embedding' is given -1.0; expected a finite number":
        lambda: rates({"embedding": -1.0}),
    "'embedding' is given True": lambda: rates({"embedding": True}),
    "2 problems": lambda: rates({"embeding": 1.0, "head/*": {"a": 1.0}}),
    "rates=3.0. Write a dict": lambda: rates(3.0),
    "rates key=3 holds a int": lambda: rates({3: 1.0}),
    "rates: none of the tree's": lambda: rates({"*": 1.0}, {"w": jnp.ones(3)}),
    "part 'train' of 'head/bias' is in no group.*'\\*': group":
        lambda: groups({"kernel": "x", "embedding": "x"}),
    "the group 'y' has no transformation; there are 'x'":
        lambda: groups({"head/*": "y", "*": "x"}),
    "the transformation 'y' has no arrays": lambda: groups({"*": "x"}, ("x", "y")),
    "'\\*' is given 3; expected the name": lambda: groups({"*": 3}),
    "the group 'frozen' is taken": lambda: groups({"*": "frozen"}, ("frozen",)),
    "decay: '\\*' is given 1.0; expected True or False":
        lambda: recipes.decay_mask(ADAPTED, {"*": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_refusals(message):
    with pytest.raises(flora.LoraError, match=message):
        ERRORS[message]()
